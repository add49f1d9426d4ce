"""Teachers' scores of training tuples, in one Parquet file that training reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lion_st.data.layouts import DOCUMENT_LISTS, Candidates
from lion_st.data.lookup import TextLookup
from lion_st.data.tables import TupleSource, open_tuples, text_tables
from lion_st.data.teachers import UNNAMED
from lion_st.errors import require_type
from lion_st.extras import require
from lion_st.supervision.blocks import write_in_blocks
from lion_st.supervision.teachers import Bm25, Teacher

VERSION = 1  # part of the settings: raise it when the same settings shall give other scores
NAME = re.compile(r"[\w.-]+")


class Taught(NamedTuple):
    """What `teach` wrote."""

    path: Path
    tuples: int
    documents: int  # of all tuples together, each scored by each teacher


class _Row(NamedTuple):
    """A tuple with its texts; the scores are those that its source has already."""

    number: int
    query: str
    query_text: str
    positives: list[str]
    negatives: list[str]
    texts: list[str]
    scores: dict[str, list[float]]


def teach(
    source: str | Path,
    output: str | Path,
    teachers: Mapping[str, Teacher],
    *,
    split: str = "train",
    subset: str | None = None,
    queries: str | Path | None = None,
    documents: str | Path | None = None,
    rows_at_once: int = 256,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Taught:
    """Score the documents of training tuples with one teacher or several.

    The tuples are scored in blocks, within which batches are of like length; a run that was killed goes on with the
    block that it was at and ends with the same bytes, and under torchrun each process takes its blocks, see
    `lion_st.supervision.blocks`. The output's metadata say of each teacher what it is, by fingerprint, and how it was
    used; a run is not gone on with in another way.

    Scores of teachers with names that the source already has are kept, so that one run adds to another's.

    Args:
        source: Training tuples of any layout that `load_tuples` reads.
        output: Parquet file with the same tuples (`query_id` or `query`, `positive_document_ids` or `pos`,
            `negative_document_ids` or `neg`) and `scores`, for each teacher a list, of the positives and then of the
            negatives.
        teachers: By name. A `Bm25` that has not indexed anything takes the documents of the source.
        split: Split of the source.
        subset: Subset of the source.
        queries: Where the texts of query ids are, if not in the source.
        documents: The same for document ids.
        rows_at_once: Tuples of a block: what a kill may cost, and what batches of like length are made of.
        overwrite: Replace a file in `output`.
        show_progress: Show a progress bar.

    Returns:
        The file and its counts.

    Raises:
        TypeError: If a teacher is not one, but a path for example.
        ValueError: If there is no teacher, one has a name that cannot be one or is taken, a tuple is malformed, an id
            is unknown, or a score is not finite; the message names teacher, row and document.
        FileExistsError: If `output` was made by other teachers or of other tuples.
        StorageError: If an unfinished run had other teachers or other tuples.

    Example:
        ::

            teachers = {"minilm": load_teacher("cross-encoder/ms-marco-MiniLM-L6-v2"), "bm25": Bm25()}
            teach("mined.parquet", "scored.parquet", teachers, queries="data", documents="data")
            load_tuples("scored.parquet", teacher_scores=True, teachers=["minilm", "bm25"], queries="data", ...)
    """
    from tqdm.auto import tqdm

    _check_teachers(teachers)
    if rows_at_once < 1:
        raise ValueError(f"rows_at_once is at least 1, got {rows_at_once}.")
    opened = open_tuples(source, subset, split, queries, documents)
    tuples = _Tuples(opened, source, queries, documents)
    taken = next((name for name in teachers if name in tuples.teachers), None)
    if taken is not None:
        raise ValueError(f"{source} already has scores of a teacher {taken!r}: give yours another name.")
    for teacher in teachers.values():
        if isinstance(teacher, Bm25) and not teacher.collection:
            teacher.index(tuples.documents())
    settings = {
        "kind": "lion_st teacher scores",
        "version": VERSION,
        "rows_at_once": rows_at_once,
        **{f"teacher {name}": teacher.settings() for name, teacher in teachers.items()},
    }
    with tqdm(desc="Score", unit=" tuples", disable=not show_progress) as progress:

        def compute(rows: list[_Row]) -> Any:
            table = tuples.table(rows, _score(rows, teachers))
            progress.update(len(rows))
            return table

        path = write_in_blocks(
            output, settings, lambda: tuples.blocks(rows_at_once), compute, prepare=tuples.read, overwrite=overwrite
        )
    return _counts(path, tuples.columns[1:])


class _Tuples:
    """Tuples with the tables of their texts."""

    def __init__(
        self, opened: TupleSource, source: str | Path, queries: str | Path | None, documents: str | Path | None
    ) -> None:
        self.opened = opened
        tables = text_tables(opened, source, queries, documents)
        self.query_texts, self.document_texts = (None if one is None else TextLookup(one) for one in tables)
        first = next(opened.read())
        self.teachers = [name for name in first.scores or () if name != UNNAMED]
        lists = DOCUMENT_LISTS if opened.document_ids else ("pos", "neg")
        self.columns = ("query_id" if opened.query_ids else "query", *lists)

    def blocks(self, rows: int) -> Iterator[list[tuple[int, Candidates]]]:
        candidates = enumerate(self.opened.read())
        while block := list(islice(candidates, rows)):
            yield block

    def read(self, block: list[tuple[int, Candidates]]) -> list[_Row]:
        """The rows of a block with their texts."""
        lists = [[*one.positives, *one.negatives] for _, one in block]
        texts = iter(self._texts(self.document_texts, list(chain(*lists))))
        asked = self._texts(self.query_texts, [one.query for _, one in block])
        return [
            _Row(
                number,
                one.query,
                query,
                one.positives,
                one.negatives,
                list(islice(texts, len(documents))),
                {name: one.scores[name] for name in self.teachers},
            )
            for (number, one), query, documents in zip(block, asked, lists, strict=True)
        ]

    def documents(self) -> Iterator[str]:
        """The texts of the collection that are not blank, or of the tuples where these hold them, each once."""
        if self.document_texts is None:
            yield from dict.fromkeys(text for one in self.opened.read() for text in (*one.positives, *one.negatives))
            return
        table = self.document_texts.table
        for start in range(0, len(table), 10_000):
            texts = table.read_unchecked(range(start, min(start + 10_000, len(table))))
            yield from (text for text in texts if text and not text.isspace())

    def table(self, rows: list[_Row], scores: dict[str, list[np.ndarray]]) -> Any:
        pyarrow = require("pyarrow")
        lists = pyarrow.list_(pyarrow.string())
        values = [[getattr(row, name) for row in rows] for name in ("query", "positives", "negatives")]
        columns = {
            name: pyarrow.array(value, kind)
            for name, value, kind in zip(self.columns, values, (pyarrow.string(), lists, lists), strict=True)
        }
        earlier = {name: [row.scores[name] for row in rows] for name in self.teachers}
        named = [pyarrow.array(of_rows, pyarrow.list_(pyarrow.float32())) for of_rows in (earlier | scores).values()]
        return pyarrow.table(columns | {"scores": pyarrow.StructArray.from_arrays(named, [*earlier, *scores])})

    @staticmethod
    def _texts(lookup: TextLookup | None, names: list[str]) -> list[str]:
        return names if lookup is None else lookup.table.read(lookup.rows(names))


def _score(rows: list[_Row], teachers: Mapping[str, Teacher]) -> dict[str, list[np.ndarray]]:
    """The scores of each teacher, in a list for each row."""
    queries = [row.query_text for row in rows for _ in row.texts]
    documents = [text for row in rows for text in row.texts]
    ends = np.cumsum([len(row.texts) for row in rows])
    scores = {}
    for name, teacher in teachers.items():
        found = np.asarray(teacher.score(queries, documents), dtype=np.float32)
        if found.shape != (len(documents),):
            raise ValueError(f"The teacher {name!r} gives scores of shape {found.shape} for {len(documents)} pairs.")
        wrong = np.flatnonzero(~np.isfinite(found))
        if len(wrong):
            row = rows[int(np.searchsorted(ends, wrong[0], side="right"))]
            raise ValueError(
                f"The teacher {name!r} gives {found[wrong[0]]} for row {row.number}, query {row.query!r}, and the "
                f"document {documents[wrong[0]][:80]!r}: load it in float32 or bfloat16, or remove the row."
            )
        scores[name] = np.split(found, ends[:-1])
    return scores


def _check_teachers(teachers: Mapping[str, Teacher]) -> None:
    remedy = "pass load_teacher(model) or Bm25()"
    require_type(teachers, Mapping, "Teachers by name", remedy)
    if not teachers:
        raise ValueError("There is nothing to score with: give at least one teacher.")
    for name, teacher in teachers.items():
        require_type(teacher, Teacher, "A teacher", remedy)
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name for a teacher: take letters, digits, '_', '-' and '.'.")


def _counts(path: Path, columns: tuple[str, ...]) -> Taught:
    if not path.exists():  # the process that ends last of several will write it
        return Taught(path, 0, 0)
    table = require("pyarrow.parquet").read_table(path, columns=list(columns))
    lists = [chunk for name in columns for chunk in table[name].chunks]
    return Taught(path, len(table), sum(len(chunk.flatten()) for chunk in lists))
