"""Test collections in BEIR layout: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from lion_st.data.fields import check_id
from lion_st.data.files import FILE_KINDS, find_file
from lion_st.data.quickstart import TEST_SETS, quickstart_data
from lion_st.data.records import read_texts
from lion_st.data.sources import TEXT_STEMS, download_folder, parse_source
from lion_st.data.trec import read_qrels
from lion_st.extras import require
from lion_st.files import atomic_file, require_free

Corpus: TypeAlias = dict[str, dict[str, str]]  # document id -> {"title", "text"}
Queries: TypeAlias = dict[str, str]  # query id -> text
Qrels: TypeAlias = dict[str, dict[str, int]]  # query id -> document id -> relevance
QRELS_HEADER = "query-id\tcorpus-id\tscore"
QRELS_KINDS = (".tsv", *(kind for kind in FILE_KINDS if kind != ".tsv"), ".trec", ".qrels")


def load_beir(path: str | Path, split: str = "test") -> tuple[Corpus, Queries, Qrels]:
    """Read a test collection.

    Args:
        path: Folder in BEIR layout (Thakur et al., 2021, BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation), or
            a data set of the Hub with such files, see `beir_files`.
        split: Name of the judgements file, `qrels/<split>.tsv`.

    Returns:
        Documents by id with `title` ("" where a document has none) and `text`; all queries by id; the judgements of the
        split by query id.

    Raises:
        FileNotFoundError: If the folder or one of its three files is missing.
        ValueError: If a line is malformed, an id repeats, a judged query is blank, or a judgement names an unknown
            query or contradicts another.

    Warns:
        UserWarning: If documents are judged that the corpus lacks: they count as never found.

    Example:
        >>> corpus, queries, qrels = load_beir("scifact")
        >>> len(corpus), len(qrels)
        (5183, 300)
    """
    documents_file, queries_file, qrels_file = beir_files(path, split)
    texts = read_texts(documents_file)
    corpus: Corpus = {key: {"title": fields.title, "text": fields.text} for key, fields in texts.items()}
    queries: Queries = {key: fields.text for key, fields in read_texts(queries_file, "query").items()}
    qrels = read_qrels(qrels_file, queries, corpus)
    require_queries(queries, qrels, queries_file)
    return corpus, queries, qrels


def require_queries(queries: Mapping[str, str], judged: Iterable[str], source: str | Path) -> None:
    """Refuse judged queries that are not there or have no text, which nothing encodes."""
    blank = next((query for query in judged if not queries.get(query, "").strip()), None)
    if blank is not None:
        raise ValueError(f"{source} has no text for the judged query {blank!r}: fill it in or remove its judgements.")


def beir_files(path: str | Path, split: str) -> tuple[Path, Path, Path]:
    """The files of documents, queries and a split's judgements, whatever their kind and compression.

    Args:
        path: A folder with `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`, or a data set of the Hub that has
            these files ("mteb/scifact"), perhaps in a folder that the subset names; then they are downloaded.
        split: Split of the judgements.
    """
    source = parse_source(path)
    if source.path is None:
        root = download_folder(source, ["corpus.*", "queries.*", "qrels/*", "qrels.*"])
    else:
        root = source.path / (source.subset or "")
    files = [find_file(root, TEXT_STEMS[kind]) for kind in ("document", "query")]
    for name, file in zip(("corpus", "queries"), files, strict=True):
        if file is None:
            raise FileNotFoundError(f"{root / f'{name}.jsonl'} does not exist, nor compressed or as another table.")
    qrels = find_file(root / "qrels", (split,), QRELS_KINDS)
    if qrels is None and split == "test":  # of a collection with one split
        qrels = find_file(root, ("qrels",), QRELS_KINDS)
    if qrels is None:
        splits = sorted({file.name.split(".")[0] for file in (root / "qrels").glob("*")})
        raise FileNotFoundError(f"{root / 'qrels' / split}.tsv does not exist; splits with judgements: {splits}.")
    documents, queries = (file for file in files if file is not None)
    return documents, queries, qrels


def save_beir(
    path: str | Path,
    corpus: Mapping[str, Mapping[str, str]],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    split: str = "test",
    overwrite: bool = False,
) -> Path:
    """Write a test collection in BEIR layout; the files appear only once all of them are written.

    Raises:
        FileExistsError: If one of the three files is there and `overwrite` is False.
        ValueError: If an id is blank or holds a tab or line break.
    """
    root = Path(path)
    for what, keys in (("corpus", corpus), ("queries", queries), *(("qrels", grades) for grades in qrels.values())):
        for key in keys:
            check_id(key, what, "_id")
    files = {
        root / "corpus.jsonl": (
            json.dumps({"_id": key, "title": row.get("title", ""), "text": row["text"]}, ensure_ascii=False)
            for key, row in corpus.items()
        ),
        root / "queries.jsonl": (
            json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in queries.items()
        ),
        root / "qrels" / f"{split}.tsv": (
            [QRELS_HEADER]
            + [f"{query}\t{document}\t{grade}" for query, row in qrels.items() for document, grade in row.items()]
        ),
    }
    for file in files:
        require_free(file, overwrite)
    with ExitStack() as complete:
        for file, lines in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with complete.enter_context(atomic_file(file)).open("w", encoding="utf-8") as out:
                out.writelines(f"{line}\n" for line in lines)
    return root


def quickstart_test_sets(folder: str | Path) -> dict[str, Path]:
    """Write the test sets of the bundled data set as BEIR folders, unless they are there.

    Args:
        folder: Where to write them, each in a folder of its name.

    Returns:
        Folder of each test set, by name: squad_dev and scifact.
    """
    parquet = require("pyarrow.parquet")
    data = quickstart_data()
    written = {name: Path(folder) / name for name in TEST_SETS}
    for name, target in written.items():
        if (target / "qrels" / "test.tsv").exists():
            continue
        corpus, queries, judgements = (
            parquet.read_table(data / name / f"{part}.parquet").to_pylist() for part in ("corpus", "queries", "qrels")
        )
        qrels: Qrels = {}
        for row in judgements:
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
        save_beir(
            target,
            {row["_id"]: {"title": row["title"], "text": row["text"]} for row in corpus},
            {row["_id"]: row["text"] for row in queries},
            qrels,
        )
    return written
