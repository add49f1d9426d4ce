"""Teachers' scores: those of their own libraries, the same bytes after a kill and from two processes, and refusals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import lion
from tiny_models import tiny_tokenizer

import lion_st
from lion_st.data import load_tuples
from lion_st.indexes import StorageError
from lion_st.supervision import Bm25, Encoder, Reranker, load_teacher, teach
from lion_st.supervision.blocks import read_settings
from lion_st.supervision.teachers import PROMPT, pair_template

MICRO = Path(__file__).parents[2] / "hub_uploads" / "models" / "lion-micro-base"
TOPICS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="module")
def models(tiny_backbone, tmp_path_factory) -> dict[str, Path]:
    """A random cross-encoder, one of two labels, a SentenceTransformer and a SparseEncoder, as folders."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    folder, words = tmp_path_factory.mktemp("teachers"), tiny_tokenizer()
    shape = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(intermediate_size=64, max_position_embeddings=128, initializer_range=0.5)
    words.padding_side = "right"  # BERT counts positions from the first token, padding or not
    torch.manual_seed(0)
    for name, kind, labels in (
        ("cross", BertForSequenceClassification, 1),
        ("labels", BertForSequenceClassification, 3),
        ("bert", BertModel, 1),
    ):
        kind(BertConfig(num_labels=labels, pad_token_id=words.pad_token_id, **shape)).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    encoder = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)], device="cpu")
    encoder.save(str(folder / "dense"))
    sparse = lion_st.build(tiny_backbone(), "sparse", query_length=16, document_length=32, device="cpu")
    lion_st.export(sparse, folder / "sparse", verify=False, create_model_card=False)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def data(tmp_path) -> Path:
    """14 tuples of ids with one or two positives and three or four negatives, one of them a long document."""
    folder = tmp_path / "data"
    folder.mkdir()
    documents = {f"d{n}-{m}": f"{topic} do this and that on day {m} " + "again " * (m * m) for n, topic in
                 enumerate(TOPICS) for m in range(6)}  # fmt: skip
    queries = {f"q{n}": f"what do {topic} do" for n, topic in enumerate(TOPICS * 2)}
    rows = [
        {
            "query_id": f"q{n}",
            "positive_document_ids": [f"d{n % 7}-0", f"d{n % 7}-1"][: 1 + n % 2],
            "negative_document_ids": [f"d{(n + m) % 7}-{m + 1}" for m in range(1, 4 + n % 2)],
        }
        for n in range(14)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "mined.parquet")
    for name, texts in (("corpus", documents), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text.strip()}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pairs_of(folder: Path, scored: Path) -> tuple[list[tuple[str, str]], dict[str, list[float]]]:
    """All pairs of a scored file as texts, and each teacher's scores of them."""
    documents, queries = (
        {row["_id"]: row["text"] for row in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())}
        for name in ("corpus", "queries")
    )
    pairs, scores = [], {}
    for row in pq.read_table(scored).to_pylist():
        ids = [*row["positive_document_ids"], *row["negative_document_ids"]]
        pairs += [(queries[row["query_id"]], documents[one]) for one in ids]
        for name, values in row["scores"].items():
            assert len(values) == len(ids)
            scores.setdefault(name, []).extend(values)
    return pairs, scores


def texts_at(folder: Path) -> dict[str, Path]:
    return {"queries": folder / "queries.jsonl", "documents": folder / "corpus.jsonl"}


def by_transformers(pairs: list[tuple[str, str]], prompt: str) -> list[float]:
    """The logit of " yes" less that of " no", one prompt at a time, without sentence-transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(MICRO), AutoModelForCausalLM.from_pretrained(MICRO).float()
    yes, no = (tokenizer.encode(answer, add_special_tokens=False)[0] for answer in (" yes", " no"))
    scores = []
    with torch.inference_mode():
        for query, document in pairs:
            text = prompt.replace("{query}", query).replace("{document}", document)
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
            scores.append((logits[yes] - logits[no]).item())
    return scores


def test_scores_are_those_of_each_teacher_s_own_library(models, data, tmp_path):
    """Five teachers in one run of the command; training then reads those that it is asked for."""
    from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
    from torch import nn

    output, words = tmp_path / "scored.parquet", ["--quiet", "--device", "cpu", "--rows-at-once", "5"]
    options = {"cross.batch_size": 4, "llm.dtype": "float32", "llm.batch_size": 4, "lexical.k1": 1.2}
    named = {"cross": models["cross"], "llm": MICRO, "dense": models["dense"], "sparse": models["sparse"]}
    words += [
        part for name, model in (named | {"lexical": "bm25"}).items() for part in ("--teacher", f"{name}={model}")
    ]
    words += [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    words += [part for name, place in texts_at(data).items() for part in (f"--{name}", str(place))]
    shown = lion("teach", data / "mined.parquet", output, *words)
    assert "70 documents of 14 tuples, scored by cross, llm, dense, sparse, lexical." in shown
    pairs, scores = pairs_of(data, output)

    reranker = CrossEncoder(str(models["cross"]), device="cpu")
    np.testing.assert_allclose(scores["cross"], reranker.predict(pairs, activation_fn=nn.Identity()), atol=1e-5)
    assert np.std(scores["cross"]) > 0.05
    np.testing.assert_allclose(scores["llm"], by_transformers(pairs, PROMPT), atol=2e-4)
    for name, stock in (("dense", SentenceTransformer), ("sparse", SparseEncoder)):
        path = str(models[name])
        model = (
            stock(path, device="cpu") if name == "dense" else lion_st.load(path, as_sparse_encoder=True, device="cpu")
        )
        queries, documents = zip(*pairs, strict=True)
        vectors = model.encode_query(list(queries)), model.encode_document(list(documents))
        np.testing.assert_allclose(scores[name], model.similarity_pairwise(*vectors), rtol=1e-4, atol=1e-5)
    bm25 = bm25s.BM25(k1=1.2, b=0.4, method="lucene")
    corpus = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    bm25.index(bm25s.tokenize(corpus, show_progress=False), show_progress=False)
    for (query, document), score in zip(pairs, scores["lexical"], strict=True):
        (tokens,) = bm25s.tokenize([query], return_ids=False, show_progress=False)
        assert score == pytest.approx(bm25.get_scores(tokens)[corpus.index(document)], rel=1e-5)

    recorded = read_settings(output)
    kinds = ("CrossEncoder", "causal language model", "SentenceTransformer", "SparseEncoder", "BM25")
    assert [recorded[f"teacher {name}"]["kind"] for name in (*named, "lexical")] == list(kinds)
    assert recorded["teacher llm"]["prompt"] == PROMPT and recorded["teacher llm"]["dtype"] == "float32"
    assert all(len(recorded[f"teacher {name}"]["model_xxh3"]) == 64 for name in named)

    tuples = load_tuples(
        output, negatives=3, sampling="first", teacher_scores=True, teachers=["dense"], **texts_at(data)
    )
    first = pq.read_table(output).to_pylist()[0]["scores"]["dense"]
    assert tuples[0]["label"] == pytest.approx(first[:4])


def test_long_documents_are_cut_and_the_prompt_s_end_is_not(models):
    prompt = 'A "query": {query}\n{% no jinja %} \\n Text: {document} — so?\nAnswer:'
    long = load_teacher(MICRO, prompt=prompt, max_tokens=48, device="cpu")
    features = long.model.preprocess([("what do lions eat", "lions eat zebras " * 50), ("a", "b")])
    tokenizer = long.model.tokenizer
    cut, whole = tokenizer.batch_decode(features["input_ids"])
    assert features["input_ids"].shape == (2, 48) and cut.endswith("so?\nanswer:") and cut.count("zebras") >= 3
    expected = tokenizer(prompt.replace("{query}", "a").replace("{document}", "b"))["input_ids"]
    assert features["input_ids"][1][features["attention_mask"][1].bool()].tolist() == expected
    assert "{% no jinja %} \\n text: b — so?" in whole
    for wrong in ("no places", "{document} {query}", "{query} {query} {document}", "{query}"):
        with pytest.raises(ValueError, match=r"write \{query\} and, behind it, \{document\}"):
            pair_template(wrong, False)


class Counted(Reranker):
    """A reranker that ends its process before a call, as the operating system might."""

    kill_at = 0
    calls = 0

    def score(self, queries, documents):
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(queries, documents)


KILLED = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_teach as t
from sentence_transformers import CrossEncoder
teacher = t.Counted(CrossEncoder({model!r}, device="cpu"), 4)
teacher.kill_at = 3
t.teach({tuples!r}, {output!r}, {{"cross": teacher}}, rows_at_once=3, **t.texts_at(Path({folder!r})))
"""


def test_after_a_kill_the_same_bytes_come_out_and_no_row_is_scored_twice(models, data, tmp_path):
    output, tuples = tmp_path / "killed.parquet", data / "mined.parquet"
    program = KILLED.format(
        tests=str(Path(__file__).parent), model=str(models["cross"]), tuples=str(tuples), output=str(output),
        folder=str(data),
    )  # fmt: skip
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not output.exists() and len(list((tmp_path / "killed.parquet.parts").glob("part-*.parquet"))) == 2

    def run(path: Path, batch_size: int = 4, **settings) -> Counted:
        from sentence_transformers import CrossEncoder

        teacher = Counted(CrossEncoder(str(models["cross"]), device="cpu"), batch_size)
        teach(tuples, path, {"cross": teacher}, **({"rows_at_once": 3} | texts_at(data) | settings))
        return teacher

    with pytest.raises(
        StorageError, match=r"other settings: teacher cross was .*'batch_size': 4.* is .*'batch_size': 2"
    ):
        run(output, batch_size=2)
    with pytest.raises(StorageError, match="rows_at_once was 3, is 5"):
        run(output, rows_at_once=5)
    assert run(output).calls == 3  # of five blocks
    assert run(tmp_path / "whole.parquet").calls == 5
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert run(output).calls == 0  # scored already
    with pytest.raises(FileExistsError, match="overwrite=True"):
        run(output, batch_size=2)

    # The tuples or their texts change: what was scored is of others.
    lines = (data / "corpus.jsonl").read_text()
    (data / "corpus.jsonl").write_text(lines.replace("rivers do this", "rivers did that"))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        run(output)
    assert run(output, overwrite=True).calls == 5


def test_two_processes_write_what_one_writes(models, data, tmp_path):
    command = ["teach", str(data / "mined.parquet")]
    options = ["--teacher", f"cross={models['cross']}", "--teacher", "lexical=bm25", "--set", "lexical.coverage=true"]
    options += ["--rows-at-once", "4", "--device", "cpu", "--quiet"]
    options += [part for name, place in texts_at(data).items() for part in (f"--{name}", str(place))]
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    lion(*command, one, *options)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "shared-cache"), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "lion_st", *command, str(two), *options]
    ranks = [
        subprocess.Popen(words, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]  # as torchrun starts them
    printed = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert any("scored by cross, lexical" in text for text in printed)
    assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob("two.parquet.parts")) and not list(tmp_path.glob(".two*"))


def test_a_multi_vector_model_teaches_by_maxsim(tiny_backbone, tmp_path):
    from sentence_transformers import MultiVectorEncoder

    model = lion_st.build(tiny_backbone(), "multi_vector", query_length=16, document_length=32, device="cpu")
    folder = lion_st.export(model, tmp_path / "model", verify=False, create_model_card=False)
    teacher = load_teacher(folder, device="cpu", dtype="float32")
    assert teacher.settings()["kind"] == "MultiVectorEncoder"
    queries, documents = ["what do lions do", "zebras", "what do lions do"], ["lions rest", "zebras run far", "rivers"]
    stock = MultiVectorEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    expected = [
        float((stock.encode_query([query])[0] @ stock.encode_document([document])[0].T).amax(1).sum())
        for query, document in zip(queries, documents, strict=True)
    ]
    np.testing.assert_allclose(teacher.score(queries, documents), expected, rtol=1e-4)


def test_coverage_is_a_share(data):
    corpus = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    plain, share = Bm25(), Bm25(coverage=True)
    for teacher in (plain, share):
        teacher.index(corpus)
    queries = ["what do lions do", "zebras again", "nothing known"] * 2
    documents = [corpus[0], corpus[6], corpus[0], corpus[5], corpus[11], corpus[3]]
    scores, shares = plain.score(queries, documents), share.score(queries, documents)
    assert shares.max() < 1 and (shares[[2, 5]] == 0).all() and (scores[:2] > 0).all()
    assert scores[0] / shares[0] == pytest.approx(scores[3] / shares[3], rel=1e-5)  # the same query
    once, again = share.score(["lions"], corpus[:1]), share.score(["lions lions lions"], corpus[:1])
    assert again == pytest.approx(once) and once > 0
    with pytest.raises(ValueError, match="collection lacks the document 'unknown'"):
        plain.score(["lions"], ["unknown"])
    with pytest.raises(ValueError, match="no documents yet"):
        Bm25().score(["lions"], ["unknown"])


def test_a_blank_document_that_no_tuple_names_is_no_obstacle_to_bm25(data, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text((data / "corpus.jsonl").read_text() + '{"_id": "blank", "title": "", "text": " "}\n')
    plain, blank = (
        teach(data / "mined.parquet", tmp_path / name, {"bm25": Bm25()}, queries=data, documents=documents).path
        for name, documents in (("plain.parquet", data), ("blank.parquet", corpus))
    )
    assert pq.read_table(plain).equals(pq.read_table(blank))


def test_scores_of_texts_are_added_to_those_of_an_earlier_run(models, tmp_path):
    """Tuples that hold their texts; the second run keeps the first's teacher, and training takes both."""
    rows = [
        {"query": f"what do {topic} do", "pos": [f"{topic} do this"], "neg": [f"{topic} rest {n}" for n in range(3)]}
        for topic in TOPICS
    ]
    source = tmp_path / "own.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = teach(source, tmp_path / "first.parquet", {"a": load_teacher(models["dense"], device="cpu")}).path
    second = teach(first, tmp_path / "second.parquet", {"b": Bm25()}).path
    found = pq.read_table(second).to_pylist()
    assert [row["scores"]["a"] for row in found] == [row["scores"]["a"] for row in pq.read_table(first).to_pylist()]
    assert [row["query"] for row in found] == [row["query"] for row in rows]
    with pytest.raises(ValueError, match="already has scores of a teacher 'b'"):
        teach(second, tmp_path / "third.parquet", {"b": Bm25()})
    labels = load_tuples(second, sampling="first", teacher_scores=True, teachers={"a": 1, "b": 2}, combine="separate")
    assert np.shape(labels[0]["label"]) == (2, 4)


class Wrong:
    def __init__(self, scores):
        self.scores = scores

    def settings(self):
        return {}

    def score(self, queries, documents):
        return self.scores(documents)


def test_what_cannot_be_a_score_is_refused_by_teacher_row_and_document(data, tmp_path):
    def nan_at_zebras(documents):
        return np.array([np.nan if text.startswith("zebras do this and that on day 2") else 1.0 for text in documents])

    def run(teachers, **options):
        return teach(data / "mined.parquet", tmp_path / "a.parquet", teachers, **(texts_at(data) | options))

    with pytest.raises(ValueError, match=r"'bad' gives nan for row 0, query 'q0', and the document 'zebras do this"):
        run({"bad": Wrong(nan_at_zebras)})
    with pytest.raises(ValueError, match=r"'bad' gives scores of shape \(2,\) for 70 pairs"):
        run({"other": Wrong(lambda texts: np.ones(len(texts))), "bad": Wrong(lambda texts: np.ones(2))})
    with pytest.raises(ValueError, match="at least one teacher"):
        run({})
    with pytest.raises(ValueError, match="'a b' is not a name for a teacher"):
        run({"a b": Bm25()})
    with pytest.raises(TypeError, match="load_teacher"):
        run({"a": "runs/model"})
    with pytest.raises(ValueError, match="rows_at_once is at least 1, got 0"):
        run({"a": Bm25()}, rows_at_once=0)


def test_models_and_settings_that_do_not_fit_are_refused(models):
    with pytest.raises(ValueError, match="3 labels, where a reranker has one score"):
        load_teacher(models["labels"], device="cpu")
    with pytest.raises(ValueError, match="BertModel, which scores no pairs"):
        load_teacher(models["bert"])
    with pytest.raises(ValueError, match="has no prompt and no yes"):
        load_teacher(models["cross"], prompt="{query} {document}", yes="1")
    with pytest.raises(ValueError, match="a SentenceTransformer, which has no max_tokens"):
        load_teacher(models["dense"], max_tokens=8)
    with pytest.raises(ValueError, match=r"answer ' certainly not' is \d+ tokens"):
        load_teacher(MICRO, no=" certainly not")
    with pytest.raises(ValueError, match="the same token"):
        load_teacher(MICRO, no=" yes")
    with pytest.raises(ValueError, match="batch_size is at least 1, got 0"):
        load_teacher(models["dense"], batch_size=0, device="cpu")
    assert isinstance(load_teacher(models["dense"], device="cpu"), Encoder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name a teacher with --teacher NAME=MODEL"),
        (["--teacher", "bm25"], "--teacher takes NAME=MODEL"),
        (["--teacher", "a=bm25", "--teacher", "a=bm25"], "names 'a' twice"),
        (["--teacher", "a=bm25", "--set", "b.k1=1"], "with a NAME of --teacher, a"),
        (["--teacher", "a=bm25", "--set", "a.prompt=x"], "bm25 has no 'prompt'; it has k1, b, coverage"),
        (["--teacher", "a=bm25", "--set", "a.k1=much"], "that is not a number"),
        (["--teacher", "a=bm25", "--set", "a.coverage=1"], "that is not true or false"),
        (["--teacher", "a=runs/none/such"], "There is no checkpoint folder"),
        (["--teacher", "a=bm25", "--rows-at-once", "0"], "--rows-at-once"),
    ],
)
def test_wrong_command_lines_are_refused(data, tmp_path, words, message):
    assert message in lion("teach", data / "mined.parquet", tmp_path / "a.parquet", *words, exit_code=None)
