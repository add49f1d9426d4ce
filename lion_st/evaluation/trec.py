"""TREC files: runs, relevance judgements and topics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lion_st.data.text import open_text
from lion_st.evaluation.metrics import Qrels, Run
from lion_st.files import atomic_write

Number = TypeVar("Number", int, float)


def write_run(path: str | Path, run: Run, tag: str = "lion_st") -> Path:
    """Write `query Q0 document rank score tag` lines, best first.

    Args:
        path: File to write, replaced atomically.
        run: Scores by query and document.
        tag: Name of the run, without spaces.

    Raises:
        ValueError: If an id or the tag holds white space, which the format cannot express.
    """
    _check_names([tag, *run, *{document for hits in run.values() for document in hits}])
    lines = []
    for query, hits in run.items():
        ranked = sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)
        for rank, (document, score) in enumerate(ranked, 1):
            lines.append(f"{query} Q0 {document} {rank} {score:.9g} {tag}\n")
    return _write_lines(path, lines)


def write_qrels(path: str | Path, qrels: Qrels) -> Path:
    """Write `query 0 document grade` lines.

    Args:
        path: File to write, replaced atomically.
        qrels: Relevance grades by query and document.

    Raises:
        ValueError: If an id holds white space, which the format cannot express.
    """
    _check_names([*qrels, *{document for grades in qrels.values() for document in grades}])
    return _write_lines(
        path,
        [f"{query} 0 {document} {grade}\n" for query, grades in qrels.items() for document, grade in grades.items()],
    )


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run file. Ranks are ignored, as trec_eval does.

    Raises:
        ValueError: If a line has not six fields, a score is no number, or a document occurs twice for a query.
    """
    run: dict[str, dict[str, float]] = {}
    for number, (query, _, document, _, score, _) in _fields(path, 6, "query Q0 document rank score tag"):
        hits = run.setdefault(query, {})
        if document in hits:
            raise ValueError(f"{path}:{number}: document {document!r} occurs twice for query {query!r}.")
        hits[document] = _number(float, score, path, number)
    return run


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Read relevance judgements: TREC lines `query 0 document grade`, or BEIR's tab-separated file with a header.

    Raises:
        ValueError: If a line does not have these fields or a grade is no whole number.
    """
    qrels: dict[str, dict[str, int]] = {}
    with open_text(path) as lines:
        is_beir = next(lines, "").split() == ["query-id", "corpus-id", "score"]
    if is_beir:
        for number, (query, document, grade) in _fields(path, 3, "query-id corpus-id score"):
            if number > 1:
                qrels.setdefault(query, {})[document] = _number(int, grade, path, number)
    else:
        for number, (query, _, document, grade) in _fields(path, 4, "query 0 document grade"):
            qrels.setdefault(query, {})[document] = _number(int, grade, path, number)
    return qrels


def read_topics(path: str | Path) -> dict[str, str]:
    """Read queries: `id<tab>text` lines, or TREC topics, of which the title is taken.

    Raises:
        ValueError: If a line has no tab, a topic no number or title, or an id occurs twice.
    """
    with open_text(path) as lines:
        text = lines.read()
    if "<top>" in text.lower():
        pairs = list(_trec_topics(text, path))
    else:
        pairs = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                identifier, tab, query = line.partition("\t")
                if not tab or not query.strip():
                    raise ValueError(f"{path}:{number}: expected 'id<tab>text', got {line[:80]!r}.")
                pairs.append((identifier.strip(), query.strip()))
    topics = dict(pairs)
    if len(topics) < len(pairs):
        raise ValueError(f"{path} has {len(pairs) - len(topics)} query ids that occur more than once.")
    return topics


def hits_to_run(queries: Iterable[str], hits: Iterable[list[tuple[str, float]]]) -> dict[str, dict[str, float]]:
    """Pair query ids with the lists that a search returned."""
    return {query: dict(found) for query, found in zip(queries, hits, strict=True)}


def drop_self_matches(run: Mapping[str, Mapping[str, float]], k: int | None = None) -> dict[str, dict[str, float]]:
    """Remove documents with the id of the query, then keep the k best."""
    result = {}
    for query, hits in run.items():
        kept = sorted(((score, document) for document, score in hits.items() if document != query), reverse=True)
        result[query] = {document: score for score, document in kept[:k]}
    return result


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not name or re.search(r"\s", name):
            raise ValueError(f"{name!r} cannot stand in a TREC file: ids and tags are not empty and hold no spaces.")


def _write_lines(path: str | Path, lines: Iterable[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(lines))
    return path


def _fields(path: str | Path, count: int, layout: str) -> Iterator[tuple[int, list[str]]]:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != count:
                raise ValueError(f"{path}:{number}: expected '{layout}', got {line.strip()[:80]!r}.")
            yield number, fields


def _number(kind: Callable[[str], Number], text: str, path: str | Path, number: int) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{path}:{number}: {text!r} is not a number.") from None


def _trec_topics(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    for topic in re.split(r"<top>", text, flags=re.IGNORECASE)[1:]:
        number = re.search(r"<num>\s*(?:Number:)?\s*([^\s<]+)", topic, flags=re.IGNORECASE)
        title = re.search(r"<title>\s*(?:Topic:)?\s*([^<]+)", topic, flags=re.IGNORECASE)
        if number is None or title is None or not title[1].strip():
            raise ValueError(f"{path}: a topic has no <num> or <title>: {topic.strip()[:80]!r}.")
        yield number[1], " ".join(title[1].split())
