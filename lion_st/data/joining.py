"""Training tuples joined with the rows of their texts: checked once, kept on disk, shared by all processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lion_st.data.cache import cached_table, identity_of
from lion_st.data.layouts import Candidates
from lion_st.data.lookup import TextLookup, TextTable, text_keys_of
from lion_st.data.tables import TupleSource
from lion_st.data.teachers import column_of, teachers_of

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TABLE_FORMAT = 6  # part of the cache's key: raise it when the same source shall give another table
TUPLES_AT_ONCE = 1000
LEFT_OUT = {
    "pairs": "pairs whose document the corpus lacks",
    "negatives": "negatives that are positives of their own query or repeat another negative",
    "queries": "queries without a positive document",
}


def join_tuples(source: TupleSource, queries: TextTable | None, documents: TextTable | None) -> Dataset:
    """The candidates of each query as integers, in a memory-mapped table.

    | column | |
    |---|---|
    | query_name | the query's id, or its text where the source has texts |
    | query_row | row of its text in `queries`, null without |
    | query_key, keys | see `text_keys_of`, of the query and of each document |
    | documents | rows in `documents`, or texts without; positives first |
    | positives | how many of them are positives, at least 1 |
    | teacher_scores | of each document, where the source has scores; teacher_scores:NAME of a teacher with a name |

    Documents whose text repeats that of an earlier one of their row are left out, and so are negatives whose text is
    that of a positive of the same query in another row.

    Args:
        source: Where the tuples come from.
        queries: Texts of the queries, where these are ids.
        documents: Texts of the documents, where these are ids.

    Raises:
        ValueError: If a row is malformed, an id is unknown or repeated, or a text that is named is empty.

    Warns:
        UserWarning: If something was left out.
    """
    identity = {
        "format": TABLE_FORMAT,
        "source": source.identity,
        "ids": [source.query_ids, source.document_ids],
        "texts": [None if texts is None else identity_of(texts.table) for texts in (queries, documents)],
    }
    table, left_out = cached_table("tuples", identity, partial(_write, source, queries, documents))
    for what, count in left_out.items():
        if count:
            warnings.warn(f"{source.name}: left out {count:,} {LEFT_OUT[what]}.", stacklevel=3)
    return table


def _write(source: TupleSource, queries: TextTable | None, documents: TextTable | None, path: Path) -> dict[str, int]:
    """Write the table; how many of what were left out."""
    import pyarrow as pa

    rows = path.with_suffix(".rows")
    query_rows, document_rows = (None if texts is None else _Rows(texts) for texts in (queries, documents))
    left_out = dict.fromkeys(LEFT_OUT, 0)
    _write_batches(rows, _find_rows(source, query_rows, document_rows, left_out))
    query_keys, document_keys = (None if found is None else found.keys() for found in (query_rows, document_rows))

    def keyed() -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        with pa.memory_map(str(rows)) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield batch, *_keys(batch, query_keys, document_keys)

    relevant = several_positives(
        (own, keys, batch["documents"].value_lengths().to_numpy(), batch["positives"].to_numpy())
        for batch, own, keys in keyed()
    )
    _write_batches(path, (_drop_repeats(*parts, relevant, left_out) for parts in keyed()))
    rows.unlink()
    return left_out


class _Rows(TextLookup):
    """A lookup that remembers which texts were asked for."""

    def __init__(self, table: TextTable) -> None:
        super().__init__(table)
        self.used = np.zeros(len(self), bool)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        found = super().rows(ids)
        self.used[found] = True
        return found

    def keys(self) -> np.ndarray:
        """Keys of the texts that were asked for, [texts]."""
        return self.table.keys(self.used)


def _find_rows(
    source: TupleSource, queries: _Rows | None, documents: _Rows | None, left_out: dict[str, int]
) -> Iterator[pa.RecordBatch]:
    candidates = source.read()
    first = next(candidates, None)
    if first is None:
        raise ValueError(f"{source.name} has no rows.")
    teachers = list(first.scores or ())
    candidates, total = chain([first], candidates), 0
    while chunk := list(islice(candidates, TUPLES_AT_ONCE)):
        total += len(chunk)
        if source.judged and documents is not None:
            known = documents.find([one.positives[0] for one in chunk]) >= 0
            left_out["pairs"] += int((~known).sum())
            chunk = [one for one, there in zip(chunk, known, strict=True) if there]
        yield _batch(chunk, queries, documents, teachers)
    if left_out["pairs"] == total and documents is not None:
        raise ValueError(
            f"None of the {total:,} documents that {source.name} judges as relevant is in {documents.name}."
        )


def _batch(
    chunk: list[Candidates], queries: _Rows | None, documents: _Rows | None, teachers: list[str]
) -> pa.RecordBatch:
    import pyarrow as pa

    names = [one.query for one in chunk]
    listed = [document for one in chunk for document in (*one.positives, *one.negatives)]
    query_rows = [None] * len(chunk) if queries is None or not chunk else queries.rows(names)
    if documents is None:
        values = pa.array(listed, pa.string())
    else:
        values = pa.array(documents.rows(listed) if listed else [], pa.int64())
    offsets = np.cumsum([0, *(len(one.positives) + len(one.negatives) for one in chunk)])
    columns = {
        "query_name": pa.array(names, pa.string()),
        "query_row": pa.array(query_rows, pa.int64()),
        "documents": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values),
        "positives": pa.array([len(one.positives) for one in chunk], pa.int32()),
    }
    for teacher in teachers:
        scores = np.array([score for one in chunk for score in one.scores[teacher]], np.float32)
        columns[column_of(teacher)] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(scores))
    return pa.RecordBatch.from_pydict(columns)


def several_positives(
    batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
) -> dict[int, frozenset[int]]:
    """The positives of the queries that have more than one, in one row or in several, all by their keys.

    Args:
        batches: Keys of the queries [rows], keys of the documents of all rows one after the other, how many each row
            has [rows], and how many of these are positives [rows].
    """
    found = [np.empty((0, 2), np.int64)]
    for queries, keys, lengths, positives in batches:
        ranks = np.arange(len(keys)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        relevant = ranks < np.repeat(positives, lengths)
        found.append(np.stack([np.repeat(queries, lengths)[relevant], keys[relevant]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    queries, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    return {
        int(queries[place]): frozenset(pairs[starts[place] : starts[place] + counts[place], 1].tolist())
        for place in np.flatnonzero(counts > 1)
    }


def _keys(
    batch: pa.RecordBatch, query_keys: np.ndarray | None, document_keys: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of a batch's queries [rows] and documents, those of all rows one after the other."""
    queries, documents = batch["query_name"], batch["documents"].flatten()
    return (
        text_keys_of(queries.to_pylist()) if query_keys is None else query_keys[batch["query_row"].to_numpy()],
        text_keys_of(documents.to_pylist()) if document_keys is None else document_keys[documents.to_numpy()],
    )


def _drop_repeats(
    batch: pa.RecordBatch,
    own_keys: np.ndarray,
    keys: np.ndarray,
    relevant: dict[int, frozenset[int]],
    left_out: dict[str, int],
) -> pa.RecordBatch:
    """A batch with keys, without documents that repeat an earlier one or are relevant to the query in another row."""
    import pyarrow as pa

    values = batch["documents"].flatten()
    bounds = [0, *np.cumsum(batch["documents"].value_lengths().to_numpy()).tolist()]
    listed, queries, rows, kept, offsets, positives = keys.tolist(), own_keys.tolist(), [], [], [0], []
    for row, given in enumerate(batch["positives"].to_pylist()):
        start, stop = bounds[row : row + 2]
        first: dict[int, int] = {}
        for place in range(start, stop):
            first.setdefault(listed[place], place)
        others = relevant.get(queries[row], ())
        places = [place for key, place in first.items() if place < start + given or key not in others]
        stay = sum(place < start + given for place in places)
        left_out["negatives"] += (stop - start - given) - (len(places) - stay)
        if not stay:
            left_out["queries"] += 1
            continue
        rows.append(row)
        kept += places
        offsets.append(len(kept))
        positives.append(stay)
    ends, places = pa.array(offsets, pa.int32()), pa.array(kept, pa.int64())
    remaining = pa.array(rows, pa.int64())
    columns = {
        "query_name": batch["query_name"].take(remaining),
        "query_row": batch["query_row"].take(remaining),
        "query_key": pa.array(own_keys[rows], pa.int64()),
        "documents": pa.ListArray.from_arrays(ends, values.take(places)),
        "keys": pa.ListArray.from_arrays(ends, pa.array(keys[kept], pa.int64())),
        "positives": pa.array(positives, pa.int32()),
    }
    for name in map(column_of, teachers_of(batch.schema.names)):
        columns[name] = pa.ListArray.from_arrays(ends, batch[name].flatten().take(places))
    return pa.RecordBatch.from_pydict(columns)


def _write_batches(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    import pyarrow as pa

    first = next(batches)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        for batch in chain([first], batches):
            writer.write_batch(batch)
