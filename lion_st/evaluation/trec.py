"""Writing TREC files, and what runs are made of; `lion_st.data.trec` reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lion_st.data.fields import check_id
from lion_st.evaluation.metrics import Qrels, Run, require_ids, require_judgements, require_run, whole_grades
from lion_st.files import atomic_file, require_free


def write_run(path: str | Path, run: Run, tag: str = "lion_st", overwrite: bool = False) -> Path:
    """Write `query Q0 document rank score tag` lines, best first.

    Columns are separated by spaces, or by tabs where an id holds a space.

    Args:
        path: File to write.
        run: Scores by query and document.
        tag: Name of the run; its spaces become underscores.
        overwrite: Replace an earlier file, at once.

    Raises:
        FileExistsError: If the file is there and `overwrite` is False.
        ValueError: If an id is blank or holds a tab or line break, or a score is not finite.
    """
    require_run(run)
    require_free(path, overwrite)
    separator = check_ids([*run, *{document for hits in run.values() for document in hits}])
    tag = re.sub(r"\s", "_", tag) or "lion_st"
    return _write_lines(path, (separator.join([*columns, tag]) for columns in _ranked(run)))


def write_qrels(path: str | Path, qrels: Qrels, overwrite: bool = False) -> Path:
    """Write `query 0 document grade` lines, separated by spaces, or by tabs where an id holds a space.

    Args:
        path: File to write.
        qrels: Relevance grades by query and document.
        overwrite: Replace an earlier file, at once.

    Raises:
        FileExistsError: If the file is there and `overwrite` is False.
        ValueError: If an id is blank or holds a tab or line break, or a grade is not a whole number.
    """
    require_judgements(qrels)
    require_free(path, overwrite)
    separator = check_ids([*qrels, *{document for grades in qrels.values() for document in grades}])
    whole = {query: whole_grades(query, grades) for query, grades in qrels.items()}
    rows = [(query, "0", document, str(grade)) for query, grades in whole.items() for document, grade in grades.items()]
    return _write_lines(path, map(separator.join, rows))


def check_ids(ids: Iterable[str]) -> str:
    """What separates the columns of a TREC file with these ids: a space, or a tab if one of them holds white space.

    Raises:
        TypeError: If an id is not a string.
        ValueError: If an id is blank or holds a tab or line break, which no TREC file can express.
    """
    ids = list(ids)
    require_ids(ids)
    separator = " "
    for one in ids:
        if re.search(r"\s|^$", one):
            check_id(one, "A run or test set", "id")
            separator = "\t"
    return separator


def drop_self_matches(run: Mapping[str, Mapping[str, float]], k: int | None = None) -> dict[str, dict[str, float]]:
    """Remove documents with the id of the query, then keep the k best."""
    result = {}
    for query, hits in run.items():
        kept = sorted(((score, document) for document, score in hits.items() if document != query), reverse=True)
        result[query] = {document: score for score, document in kept[:k]}
    return result


def _ranked(run: Run) -> Iterator[tuple[str, str, str, str, str]]:
    for query, hits in run.items():
        ranked = sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)
        for rank, (document, score) in enumerate(ranked, 1):
            if not math.isfinite(score):
                raise ValueError(f"Document {document!r} has the score {score} for query {query!r}: scores are finite.")
            yield query, "Q0", document, str(rank), f"{score:.9g}"


def _write_lines(path: str | Path, lines: Iterable[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path
