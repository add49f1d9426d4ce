"""Hard negatives: those of a brute-force search, never a positive, and the same bytes after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import lion

import lion_st
from lion_st.data import load_tuples, save_beir
from lion_st.encoding import encode_corpus, encode_texts
from lion_st.indexes import StorageError, create_index, load_index
from lion_st.retrieval import Bm25Retriever, ModelRetriever, index_corpus
from lion_st.supervision import IndexSearcher, mine_negatives
from lion_st.supervision.blocks import read_settings
from lion_st.supervision.mining import hard_negatives

TOPICS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems", "planets")
VERBS = ("rest", "move", "grow", "end", "begin", "shine")
DOCUMENTS = {
    f"d{n}-{m}": f"{topic} {verb} in place {n}" for n, topic in enumerate(TOPICS) for m, verb in enumerate(VERBS)
}
QUERIES = {f"q{n}": f"where do {topic} {VERBS[n % len(VERBS)]}" for n, topic in enumerate(TOPICS)}
# Two positives each, and a judgement of 0, which makes no positive.
QRELS = {
    f"q{n}": {f"d{n}-{n % len(VERBS)}": 1, f"d{n}-{(n + 1) % len(VERBS)}": 2, f"d{n}-{(n + 2) % len(VERBS)}": 0}
    for n in range(len(TOPICS))
}


class MatrixSearcher:
    """Exact scores of a matrix [queries, documents], as an independent search."""

    def __init__(self, name: str, scores: np.ndarray, queries: list[str], documents: list[str]) -> None:
        self.name, self.scores, self.queries, self.documents = name, scores, queries, documents

    def fingerprint(self) -> str:
        return self.name

    def search(self, queries, k=10):
        rows = [self.scores[self.queries.index(query)] for query in queries]
        return [[(self.documents[i], float(row[i])) for i in np.argsort(-row, kind="stable")[:k]] for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_beir(
        tmp_path_factory.mktemp("beir") / "set",
        {key: {"title": "", "text": text} for key, text in DOCUMENTS.items()},
        QUERIES,
        QRELS,
        "train",
    )


@pytest.fixture(scope="module")
def models(tiny_backbone, folder, tmp_path_factory):
    """A sparse and a dense checkpoint, each with an index of the documents."""
    made = {}
    for paradigm in ("sparse", "dense"):
        root = tmp_path_factory.mktemp(paradigm)
        checkpoint = lion_st.export(
            lion_st.build(tiny_backbone(), paradigm, device="cpu"), root / "model", verify=False
        )
        encoded = encode_corpus(lion_st.load(checkpoint, device="cpu"), folder / "corpus.jsonl", root / "encoded")
        index_corpus(encoded, root / "index", sample=0)
        made[paradigm] = (checkpoint, root / "index")
    return made


def read(path: Path) -> dict[str, tuple[list[str], list[str]]]:
    rows = pq.read_table(path).to_pylist()
    return {row["query_id"]: (row["positive_document_ids"], row["negative_document_ids"]) for row in rows}


def brute_force(scores, query, negatives, ranks, absolute=None, relative=None):
    """The definition over full score matrices [documents] of each searcher, deep enough to hold every positive."""
    ids, relevant = list(DOCUMENTS), {d for d, grade in QRELS[query].items() if grade > 0}
    columns, banned = [], set()
    for row in scores:
        order = [ids[i] for i in np.argsort(-row, kind="stable")]
        value = dict(zip(ids, row, strict=True))
        least = min(value[document] for document in relevant)
        margin = max(absolute or 0, (relative or 0) * abs(least))
        if absolute is not None or relative is not None:
            banned |= {document for document in ids if value[document] > least - margin}
        columns.append([document for document in order if document not in relevant][ranks[0] : ranks[1]])
    taken = []
    for rank in range(ranks[1] - ranks[0]):
        for column in columns:
            if rank < len(column) and column[rank] not in banned and column[rank] not in taken:
                taken.append(column[rank])
    return taken[:negatives]


@pytest.mark.parametrize(
    "margins",
    [{}, {"absolute_margin": 0.4}, {"relative_margin": 0.1}, {"absolute_margin": 0.2, "relative_margin": 0.3}],
)
@pytest.mark.parametrize("ranks", [(0, 46), (3, 46)])
def test_negatives_are_those_of_a_brute_force_search(tmp_path, margins, ranks):
    generator = np.random.default_rng(0)
    matrices = [generator.normal(1, 1, (len(QUERIES), len(DOCUMENTS))) for _ in range(2)]
    searchers = [
        MatrixSearcher(str(n), matrix, list(QUERIES.values()), list(DOCUMENTS)) for n, matrix in enumerate(matrices)
    ]
    mined = mine_negatives(
        searchers, QUERIES, QRELS, tmp_path / "a.parquet", negatives=5, ranks=ranks, queries_at_once=3, **margins
    )
    found = read(mined.path)
    expected = {
        query: brute_force(
            [matrix[row] for matrix in matrices],
            query,
            5,
            ranks,
            margins.get("absolute_margin"),
            margins.get("relative_margin"),
        )
        for row, query in enumerate(QUERIES)
    }
    assert {query: negatives for query, (_, negatives) in found.items()} == {k: v for k, v in expected.items() if v}
    assert mined.tuples == len(found) and mined.without == len(QUERIES) - len(found)
    assert mined.negatives == sum(len(negatives) for _, negatives in found.values())


def test_sparse_dense_and_bm25_mine_together_and_training_reads_it(models, folder, tmp_path):
    """The command finds what exact search by hand finds, no positive among it, and `load_tuples` takes the file."""
    specs = [f"{checkpoint}@{index}" for checkpoint, index in models.values()]
    options = ["--negatives", "6", "--ranks", "1", "9", "--queries-at-once", "3", "--quiet"]
    command = ["mine", folder, folder, tmp_path / "out.parquet", *options]
    for spec in (*specs, "bm25"):
        command += ["--search", spec]
    assert "8 tuples with 6.0 negatives on average; 0 judged queries have none" in lion(*command)

    scores = []
    for checkpoint, _ in models.values():
        model = lion_st.load(checkpoint, device="cpu")
        queries, documents = (
            encode_texts(model, list(texts.values()), task)
            for texts, task in ((QUERIES, "query"), (DOCUMENTS, "document"))
        )
        scores.append(
            np.asarray((queries @ documents.T).todense() if hasattr(queries, "nnz") else queries @ documents.T)
        )
    bm25 = Bm25Retriever()
    bm25.index(DOCUMENTS)
    found = read(tmp_path / "out.parquet")
    for row, query in enumerate(QUERIES):
        relevant = {document for document, grade in QRELS[query].items() if grade > 0}
        (lexical,) = bm25.search([QUERIES[query]], len(DOCUMENTS))
        columns = [[list(DOCUMENTS)[i] for i in np.argsort(-matrix[row], kind="stable")] for matrix in scores] + [
            [document for document, _ in lexical]
        ]
        columns = [[document for document in column if document not in relevant][1:9] for column in columns]
        turns = [column[rank] for rank in range(8) for column in columns if rank < len(column)]
        assert found[query] == (
            sorted(relevant, key=lambda one: -QRELS[query][one]),
            list(dict.fromkeys(turns))[:6],
        )
    tuples = load_tuples(
        tmp_path / "out.parquet", negatives=6, queries=folder / "queries.jsonl", documents=folder / "corpus.jsonl"
    )
    assert tuples[0]["query"] == QUERIES["q0"] and len(tuples) == 8
    assert {tuples[0][f"negative_{n}"] for n in range(1, 7)} == {DOCUMENTS[one] for one in found["q0"][1]}


def test_a_judged_positive_is_never_a_negative(tmp_path):
    """Not the best ranked one of all either, of which the searchers find nothing else."""
    scores = np.full((len(QUERIES), len(DOCUMENTS)), -1.0)
    for row, query in enumerate(QUERIES):
        for document, grade in QRELS[query].items():
            scores[row, list(DOCUMENTS).index(document)] = 5 + grade
    searcher = MatrixSearcher("m", scores, list(QUERIES.values()), list(DOCUMENTS))
    mined = mine_negatives([searcher], QUERIES, QRELS, tmp_path / "a.parquet", negatives=40, ranks=(0, 40))
    for query, (positives, negatives) in read(mined.path).items():
        assert len(positives) == 2 and not set(positives) & set(negatives)
        assert next(document for document, grade in QRELS[query].items() if grade == 0) == negatives[0]


def test_a_judged_query_without_a_text_is_refused_before_the_search(tmp_path):
    with pytest.raises(ValueError, match="no text for the judged query 'blank'"):
        mine_negatives([Bm25Retriever()], {"q": "lions", "blank": " "}, {"blank": {"a": 1}}, tmp_path / "mined.parquet")


@pytest.mark.parametrize("kind", ["bm25", "model"])
def test_negatives_of_other_documents_or_options_are_not_read_back(models, tmp_path, kind):
    searcher = Bm25Retriever() if kind == "bm25" else ModelRetriever(lion_st.load(models["sparse"][0], device="cpu"))
    asked = ([searcher], {"q": "lions hunt"}, {"q": {"a": 1}}, tmp_path / "mined.parquet")
    documents = {"a": "lions hunt", "b": "lions hunt at night", "c": "lions hunt zebras by day"}
    searcher.index(documents)
    mined = mine_negatives(*asked, negatives=1, show_progress=False)
    assert mine_negatives(*asked, negatives=1, show_progress=False) == mined
    options = ({"negatives": 2}, {"ranks": (0, 9)}, {"absolute_margin": 0.1}, {"relative_margin": 0.1})
    for changed in (*options, {"queries_at_once": 2}):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            mine_negatives(*asked, **{"negatives": 1, **changed})
    searcher.index({**documents, "b": "no animal at all"})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        mine_negatives(*asked, negatives=1, show_progress=False)


def test_a_margin_is_that_of_a_rankings_own_positive_and_of_the_size_of_its_score():
    rankings = [[("a", 2.0), ("b", 1.9), ("c", 1.0)], [("d", 9.0), ("c", 8.0)]]
    assert hard_negatives(rankings, ["a"], 4) == ["b", "d", "c"]
    assert hard_negatives(rankings, ["a"], 4, absolute_margin=1.0) == ["c"]
    negative = [[("a", -2.0), ("b", -2.5), ("c", -3.0)]]  # logits
    assert hard_negatives(negative, ["a"], 4, relative_margin=0.5) == ["c"]


def test_a_search_changes_no_fingerprint(models):
    model, index = lion_st.load(models["dense"][0], device="cpu"), create_index("torch", "dense", device="cpu")
    index.add(["a"], encode_texts(model, ["a lion"], "document"))
    searcher = IndexSearcher(model, index)
    before = searcher.fingerprint()
    searcher.search(["a cat"])
    assert index.stats()["bytes"] and searcher.fingerprint() == before


def test_judged_documents_that_are_not_there_are_left_out(models, folder, tmp_path):
    """Of bm25, an index and a model alone; as ArguAna's judgements name some, and training would refuse their ids."""
    judged = {**QRELS, "q0": {"gone": 1, "d0-0": 1}, "q1": {"gone too": 1}}
    checkpoint, index = models["dense"]
    bm25, model = Bm25Retriever(), ModelRetriever(lion_st.load(checkpoint, device="cpu"))
    bm25.index(DOCUMENTS)
    model.index(DOCUMENTS)
    for name, searcher in {"b": bm25, "m": model, "i": IndexSearcher(model.model, load_index(index))}.items():
        with pytest.warns(UserWarning, match="2 documents that are judged relevant are not among the 48"):
            mined = mine_negatives([searcher], QUERIES, judged, tmp_path / f"{name}.parquet", negatives=2)
        assert read(mined.path)["q0"][0] == ["d0-0"] and "q1" not in read(mined.path)
        assert len(load_tuples(mined.path, negatives=2, queries=folder, documents=folder)) == mined.tuples == 7


KILLED = """
import os, signal, sys
from lion_st.supervision import mine_negatives
sys.path.insert(0, {tests!r})
import test_hard_negatives as t
import numpy as np

class Killer(t.MatrixSearcher):
    asked = 0
    def search(self, queries, k=10):
        Killer.asked += 1
        if Killer.asked == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().search(queries, k)

scores = np.random.default_rng(0).normal(size=(8, 48))
mine_negatives([Killer("m", scores, list(t.QUERIES.values()), list(t.DOCUMENTS))], t.QUERIES, t.QRELS, {output!r},
               queries_at_once=2)
"""


def test_after_a_kill_the_same_bytes_come_out_and_nothing_is_searched_twice(tmp_path):
    output = tmp_path / "killed.parquet"
    program = KILLED.format(tests=str(Path(__file__).parent), output=str(output))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == -signal.SIGKILL
    assert not output.exists() and len(list((tmp_path / "killed.parquet.parts").glob("part-*.parquet"))) == 2

    scores = np.random.default_rng(0).normal(size=(8, 48))
    searcher = MatrixSearcher("m", scores, list(QUERIES.values()), list(DOCUMENTS))
    with pytest.raises(StorageError, match=r"other settings: negatives was 16, is 3\. Go on with those"):
        mine_negatives([searcher], QUERIES, QRELS, output, queries_at_once=2, negatives=3)
    changed = QRELS | {"q0": {"d7-0": 1}}
    with pytest.raises(StorageError, match=r"part-000000\.parquet was made of other rows"):
        mine_negatives([searcher], QUERIES, changed, output, queries_at_once=2)
    searched = []
    searcher.search = lambda queries, k: searched.extend(queries) or MatrixSearcher.search(searcher, queries, k)
    mine_negatives([searcher], QUERIES, QRELS, output, queries_at_once=2)
    assert searched == list(QUERIES.values())[4:]
    whole = mine_negatives([searcher], QUERIES, QRELS, tmp_path / "whole.parquet", queries_at_once=2).path
    assert output.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] and {p.name for p in tmp_path.iterdir()} == {
        output.name,
        whole.name,
    }
    assert read_settings(output)["negatives"] == 16

    # A run that was killed between the finished file and the removal of its parts.
    left = [
        tmp_path / f"{output.name}.parts",
        tmp_path / f".{output.name}.0123abcd.tmp",
        tmp_path / f".{output.name}.lock",
    ]
    left[0].mkdir()
    for file in (left[0] / "part-000000.parquet", *left[1:]):
        file.write_bytes(b"")
    before = output.stat().st_mtime_ns
    mine_negatives([searcher], QUERIES, QRELS, output, queries_at_once=2)  # made of the same already
    assert output.stat().st_mtime_ns == before and not any(path.exists() for path in left)
    for other in ({"negatives": 3}, {"qrels": changed}):
        options = {"qrels": QRELS, "queries_at_once": 2} | other
        with pytest.raises(FileExistsError, match="overwrite=True"):
            mine_negatives([searcher], QUERIES, options.pop("qrels"), output, **options)
    mine_negatives([searcher], QUERIES, QRELS, output, negatives=3, overwrite=True)
    assert all(len(negatives) == 3 for _, negatives in read(output).values())


def test_two_processes_share_the_blocks(tmp_path, monkeypatch):
    """One after the other here, as they share files alone: the last one writes the same bytes as one process."""
    scores = np.random.default_rng(0).normal(size=(8, 48))
    searcher = MatrixSearcher("m", scores, list(QUERIES.values()), list(DOCUMENTS))
    alone = mine_negatives([searcher], QUERIES, QRELS, tmp_path / "alone.parquet", queries_at_once=3).path
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        together = mine_negatives([searcher], QUERIES, QRELS, tmp_path / "together.parquet", queries_at_once=3)
        assert together.path.exists() == (rank == "0")
    assert together.path.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negatives": 0}, "negatives is at least 1, got 0"),
        ({"queries_at_once": 0}, "queries_at_once is at least 1"),
        ({"ranks": (5, 5)}, r"0 <= start < stop, got 5 and 5"),
        ({"relative_margin": 1.0}, "relative_margin is at least 0 and below 1, got 1.0"),
        ({"absolute_margin": float("nan")}, "absolute_margin is a finite number of at least 0, got nan"),
        ({"searchers": []}, "at least one searcher"),
        ({"qrels": {"q0": {"d0-0": 0}}}, "None of the 8 queries"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    searcher = MatrixSearcher("m", np.zeros((8, 48)), list(QUERIES.values()), list(DOCUMENTS))
    given = {"searchers": [searcher], "qrels": QRELS} | options
    with pytest.raises(ValueError, match=message):
        mine_negatives(given.pop("searchers"), QUERIES, given.pop("qrels"), tmp_path / "a.parquet", **given)
    with pytest.raises(ValueError, match=r"a name that ends in \.parquet"):
        mine_negatives([searcher], QUERIES, QRELS, tmp_path / "a.jsonl")
    with pytest.raises(TypeError, match="IndexSearcher"):
        mine_negatives(["runs/index"], QUERIES, QRELS, tmp_path / "a.parquet")


def test_what_the_command_lacks_is_said_before_anything_is_read(tmp_path, folder):
    def fails(*words: object) -> str:
        return lion("mine", folder, folder, *words, exit_code=None)

    output = tmp_path / "a.parquet"
    assert "--search bm25, --search MODEL@INDEX" in fails(output)
    assert "lion-st index" in fails(output, "--search", f"{folder}@{tmp_path / 'none'}")
    assert "--relative-margin is a finite number" in fails(output, "--search", "bm25", "--relative-margin", "nan")
    assert "splits with judgements: ['train']" in fails(output, "--search", "bm25", "--split", "dev")


def test_an_index_of_another_model_is_warned_of(models):
    checkpoint, index = models["sparse"][0], load_index(models["dense"][1])
    with pytest.warns(UserWarning, match="built with"):
        IndexSearcher(lion_st.load(checkpoint, device="cpu"), index)


def test_a_model_alone_encodes_the_documents_and_judgements_may_lie_elsewhere(models, folder, tmp_path):
    checkpoint, index = models["sparse"]
    judgements = tmp_path / "judged.txt"
    judgements.write_text("q0 0 d0-0 1\nq1 0 d1-1 1\nq99 0 d1-1 1\n")
    found = {}
    for name, spec in (("alone", str(checkpoint)), ("index", f"{checkpoint}@{index}")):
        output = tmp_path / f"{name}.parquet"
        command = ("mine", folder / "corpus.jsonl", folder / "queries.jsonl", output, "--search", spec, "--quiet")
        with pytest.warns(UserWarning, match="1 judged queries have no text, such as 'q99'"):
            lion(*command, "--qrels", judgements, "--device", "cpu")
        found[name] = read(output)
    assert found["alone"] == found["index"] and list(found["alone"]) == ["q0", "q1"]
