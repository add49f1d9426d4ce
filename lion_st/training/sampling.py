"""Batches over all devices in which no document is known to be relevant to another query."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.sampler import DefaultBatchSampler

from lion_st.data.joining import several_positives
from lion_st.data.lookup import text_keys_of
from lion_st.data.tuples import TupleReader, reader_of

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1024
CANDIDATE_COLUMNS = ("query_name", "query_key", "keys", "positives", "teacher_scores")


@dataclass(frozen=True)
class _Row:
    """A row by keys: `texts` of what the loss would see, its positive among them, and `relevant` of all documents that
    are judged relevant to its query, where these are several."""

    index: int
    texts: frozenset[Any]
    relevant: frozenset[Any] = frozenset()


@dataclass
class _Batch:
    indices: list[int] = field(default_factory=list)
    texts: set[Any] = field(default_factory=set)
    relevant: set[Any] = field(default_factory=set)

    def add(self, row: _Row) -> bool:
        """Take a row, unless a document of one side is relevant to a query of the other, or a text occurs on both."""
        if not (
            row.texts.isdisjoint(self.texts)
            and row.texts.isdisjoint(self.relevant)
            and row.relevant.isdisjoint(self.texts)
        ):
            return False
        self.indices.append(row.index)
        self.texts |= row.texts
        self.relevant |= row.relevant
        return True


class NoFalseNegativesBatchSampler(DefaultBatchSampler):
    """Batches in which no text occurs twice, and no query meets a document as a negative that is judged relevant to it.

    sentence-transformers' NO_DUPLICATES for in-batch negatives of all devices. What differs: `batch_size` is that of
    all devices together; labels are not taken for texts; all judgements of a query count, those of its other rows and
    positives that were not drawn included; documents known by id are compared by id and not read. Rows that do not fit
    a batch wait for the next. An epoch has exactly `len(sampler)` batches: where its rows do not fill them, rows are
    drawn again, in another order.

    Order and batches depend on the seed and the epoch alone, so that a resumed run, and each device, sees the same.

    Args:
        dataset: As `load_tuples` makes it, or with columns of texts, `query` or the first of them being the query,
            `positive` or the second being relevant to it.
        batch_size: Queries of a batch, over all devices.
        drop_last: Leave out the rows after the last full batch.
        valid_label_columns: Columns that are not texts.
        generator: Not used: a generator that others share has a state that a resumed run lacks.
        seed: Seed of the order.

    Raises:
        ValueError: If the rows do not fill one batch.

    Warns:
        UserWarning: If a query or positive is that of more rows than an epoch has batches.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.dataset = dataset
        self.rows = _row_reader(dataset, self.valid_label_columns or ())
        if next(self._one_pass(torch.Generator().manual_seed(seed or 0), batch_size), None) is None:
            raise self._too_few()
        if (left_out := _too_frequent(dataset, self.valid_label_columns or (), len(self))) > 0:
            warnings.warn(
                f"At least {left_out:,} of {len(dataset):,} rows are not drawn in an epoch, in each epoch others, and "
                f"further ones twice in their place: a query or positive is that of more rows than the {len(self):,} "
                "batches, and a batch takes a text once. A smaller --batch_size draws more of them.",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size if self.drop_last else -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed or 0) + self.epoch)
        left = len(self)
        while left:
            before = left
            for batch in self._one_pass(generator, self.batch_size):
                left -= 1
                if not left and not self.drop_last:
                    batch = batch[: len(self.dataset) - self.batch_size * (len(self) - 1)]
                yield batch
                if not left:
                    return
            if left == before:
                raise self._too_few()

    def _one_pass(self, generator: torch.Generator, size: int) -> Iterator[list[int]]:
        """Full batches of rows in a new order, each row at most once."""
        order = torch.randperm(len(self.dataset), generator=generator)
        rows = (row for part in order.split(ROWS_AT_ONCE) for row in self.rows(part.tolist()))
        waiting: list[_Row] = []
        while True:
            batch, passed = _Batch(), []
            for place, row in enumerate(waiting):
                if len(batch.indices) == size:
                    passed += waiting[place:]
                    break
                if not batch.add(row):
                    passed.append(row)
            waiting = passed
            while len(batch.indices) < size:
                following = next(rows, None)
                if following is None:
                    return
                if not batch.add(following):
                    waiting.append(following)
            yield batch.indices

    def _too_few(self) -> ValueError:
        return ValueError(
            f"The {len(self.dataset):,} rows of the training data fill no batch of {self.batch_size} in which no text "
            "occurs twice and no document is relevant to another query. Give more data or a smaller --batch_size."
        )


def _too_frequent(dataset: Dataset, labels: Sequence[str], batches: int) -> int:
    """Rows that so many batches cannot hold, as one query, or one positive, is that of more rows."""
    import pyarrow.compute as pc

    queries, positives = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    table = dataset.with_format("arrow")
    if reader_of(dataset) is not None:
        for part in table.select_columns(["query_key", "keys", "positives"]).iter(100 * ROWS_AT_ONCE):
            is_only = part["positives"].to_numpy() == 1  # of several one is drawn
            queries.append(part["query_key"].to_numpy())
            positives.append(pc.list_element(part["keys"], 0).to_numpy()[is_only])
    else:
        pair = _query_and_positive([name for name in dataset.column_names if name not in (*labels, "dataset_name")])
        for part in table.select_columns(list(dict.fromkeys(pair))).iter(100 * ROWS_AT_ONCE):
            for name, keys in zip(pair, (queries, positives), strict=True):
                keys.append(text_keys_of(map(str, part[name].to_pylist())))
    counts = (np.unique(np.concatenate(keys), return_counts=True)[1] for keys in (queries, positives))
    return max(int(np.maximum(of_text - batches, 0).sum()) for of_text in counts)


def _row_reader(dataset: Dataset, labels: Sequence[str]) -> Any:
    """A function that reads rows of a data set, by number, as `_Row`."""
    reader = reader_of(dataset)
    if reader is not None:
        columns = [name for name in CANDIDATE_COLUMNS if name in dataset.column_names]
        table = dataset.with_format("arrow").select_columns(columns)
        parts = table.select_columns(["query_key", "keys", "positives"]).iter(100 * ROWS_AT_ONCE)
        return partial(_read_candidates, table, reader, several_positives(map(_arrays, parts)))
    return partial(_read_texts, dataset, frozenset([*labels, "dataset_name"]))


def _arrays(candidates: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of a table of candidates: keys of queries and of all documents, how many each row has, how many are positives."""
    lists = candidates["keys"].combine_chunks()
    columns = (candidates["query_key"], lists.flatten(), lists.value_lengths(), candidates["positives"])
    queries, keys, lengths, positives = (column.to_numpy() for column in columns)
    return queries, keys, lengths, positives


def _read_candidates(
    table: Dataset, reader: TupleReader, relevant: dict[int, frozenset[int]], indices: list[int]
) -> list[_Row]:
    candidates = table[indices]
    queries, texts = candidates["query_key"].to_pylist(), reader.keys(candidates).tolist()
    return [
        _Row(index, frozenset(own), relevant.get(query, frozenset()))
        for index, query, own in zip(indices, queries, texts, strict=True)
    ]


def _read_texts(dataset: Dataset, labels: frozenset[str], indices: list[int]) -> list[_Row]:
    columns = [values for name, values in dataset[indices].items() if name not in labels]
    return [
        _Row(index, frozenset(str(text).strip() for text in texts))
        for index, texts in zip(indices, zip(*columns, strict=True), strict=True)
    ]


def _query_and_positive(names: Sequence[str]) -> tuple[str, str]:
    query = "query" if "query" in names else names[0]
    return query, "positive" if "positive" in names else next((name for name in names if name != query), query)
