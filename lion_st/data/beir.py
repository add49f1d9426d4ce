"""Test collections in BEIR layout: `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from lion_st.data.text import open_text
from lion_st.files import atomic_file

Corpus: TypeAlias = dict[str, dict[str, str]]  # document id -> {"title", "text"}
Queries: TypeAlias = dict[str, str]  # query id -> text
Qrels: TypeAlias = dict[str, dict[str, int]]  # query id -> document id -> relevance
QRELS_HEADER = "query-id\tcorpus-id\tscore"


def load_beir(path: str | Path, split: str = "test") -> tuple[Corpus, Queries, Qrels]:
    """Read a test collection.

    Args:
        path: Folder in BEIR layout (Thakur et al., 2021, BEIR: A Heterogeneous Benchmark for Zero-shot Evaluation).
        split: Name of the judgements file, `qrels/<split>.tsv`.

    Returns:
        Documents by id with `title` ("" where a document has none) and `text`; all queries by id; the judgements of the
        split by query id.

    Raises:
        FileNotFoundError: If the folder or one of its three files is missing.
        ValueError: If a line is malformed, an id repeats, or a judgement names an unknown query or document.

    Example:
        >>> corpus, queries, qrels = load_beir("scifact")
        >>> len(corpus), len(qrels)
        (5183, 300)
    """
    root = Path(path)
    corpus: Corpus = {}
    for place, row in read_jsonl(root / "corpus.jsonl", ("_id", "text")):
        _add(corpus, row["_id"], {"title": row.get("title") or "", "text": row["text"]}, place)
    queries: Queries = {}
    for place, row in read_jsonl(root / "queries.jsonl", ("_id", "text")):
        _add(queries, row["_id"], row["text"], place)
    qrels: Qrels = {}
    for place, query, document, grade in read_qrels(root / "qrels" / f"{split}.tsv"):
        for kind, key, known in (("query", query, queries), ("document", document, corpus)):
            if key not in known:
                raise ValueError(f"{place} judges the unknown {kind} {key!r}: add it or remove the judgement.")
        _add(qrels.setdefault(query, {}), document, grade, place)
    return corpus, queries, qrels


def save_beir(
    path: str | Path,
    corpus: Mapping[str, Mapping[str, str]],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    split: str = "test",
) -> Path:
    """Write a test collection in BEIR layout; the files appear only once all of them are written.

    Raises:
        FileExistsError: If one of the three files exists already.
    """
    root = Path(path)
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
        if file.exists():
            raise FileExistsError(f"{file} exists: give another folder, or remove it first.")
    with ExitStack() as complete:
        for file, lines in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with complete.enter_context(atomic_file(file)).open("w", encoding="utf-8") as out:
                out.writelines(f"{line}\n" for line in lines)
    return root


def read_jsonl(path: str | Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each JSON object of a file with its place, `file:line`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is not a JSON object or lacks one of the fields.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} is not JSON ({error.msg}): {line.strip()[:80]!r}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} is {line.strip()[:80]!r}: every line must be a JSON object.")
            missing = [field for field in fields if row.get(field) is None]
            if missing:
                raise ValueError(f"{place} has no {missing[0]!r}, only {sorted(row)}: every line needs {list(fields)}.")
            yield place, row


def read_qrels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield the place, query id, document id and relevance of each judgement."""
    if not path.is_file():
        splits = sorted(file.stem for file in path.parent.glob("*.tsv"))
        raise FileNotFoundError(f"{path} does not exist; splits with judgements: {splits}.")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\r\n").split("\t")
            if number == 1 and fields[0] == "query-id":
                continue
            try:
                query, document, grade = fields
                yield f"{path}:{number}", query, document, int(grade)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number} is {line.strip()!r}: a judgement is query-id, corpus-id, score, tab-separated."
                ) from error


def _add(rows: dict[str, Any], key: Any, value: Any, place: str) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{place} has the id {key!r}: ids must be strings.")
    if key in rows:
        raise ValueError(f"{place} repeats the id {key!r}: ids must be unique.")
    rows[key] = value
