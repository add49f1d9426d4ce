"""Exact search over sparse vectors on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.indexes import torch_search
from lion_st.indexes.base import as_ids
from lion_st.indexes.merging import merged
from lion_st.indexes.torch_search import ADDING, ROUNDING, Approximation, TorchIndex, padded
from lion_st.kernels.pair_scores import sparse_pair_scores
from lion_st.kernels.postings import Postings, add_postings

FREQUENT = 32  # a term in one of so many documents is frequent
MOST_FREQUENT = 1024  # terms that are
COLUMNS = 8  # of a matrix, whose rows then begin where tensor cores read fastest
_ARRAYS = ("starts", "terms", "values")


class _Rows(NamedTuple):
    """Documents as they were given: CSR, whose row starts are of 64 bits, as there may be billions of weights."""

    starts: np.ndarray  # int64 [N + 1]
    terms: np.ndarray  # int32 [P]
    values: np.ndarray  # float32 [P]

    @property
    def size(self) -> int:
        return len(self.starts) - 1

    def part(self, start: int, stop: int) -> _Rows:
        low, high = self.starts[start], self.starts[stop]
        return _Rows(self.starts[start : stop + 1] - low, self.terms[low:high], self.values[low:high])

    def only(self, kept: np.ndarray) -> _Rows:
        counts = np.diff(self.starts)
        entries = np.repeat(kept, counts)
        starts = np.concatenate([[0], np.cumsum(counts[kept])])
        return _Rows(starts, self.terms[entries], self.values[entries])


class _Chunk(NamedTuple):
    first: int
    size: int  # documents
    longest: int  # terms of a document
    starts: Tensor  # int64 [N + 1], where each document's terms begin
    terms: Tensor  # int32 [P]
    values: Tensor  # float32 [P]
    frequent: Tensor  # int64 [F], frequent terms
    weights: Tensor  # bfloat16 [N padded, F], those of frequent terms
    posting_starts: Tensor  # int64 [V + 1]; see `Postings`, of all other terms
    posting_documents: Tensor
    posting_values: Tensor


class _Queries(NamedTuple):
    starts: np.ndarray  # [Q + 1], where each query's terms begin
    dimensions: int
    terms: Tensor  # int64 [pairs]
    weights: Tensor  # float32 [pairs]


class _Batch(NamedTuple):
    table: Tensor  # float32 [Q, V]
    rows: Tensor  # int64 [pairs] of a query and a term
    terms: Tensor  # int64 [pairs]
    weights: Tensor  # float32 [pairs]
    longest: int  # terms of a query


class TorchSparseIndex(TorchIndex):
    """Exact sparse search on a GPU: documents and scores of the engine "exact".

    Two thirds of what an LLM's query touches are terms that every tenth document has. The weights of frequent terms (in
    1 of 32 documents, at most 1,024 of them) are a matrix in bfloat16, whose product with the queries takes next to no
    time on tensor cores; the posting lists of all others are added up by atomics in the second-level cache. Documents
    that may be among the best are then scored from their own rows. A million documents of 300 terms take about 7 GB.

    Args:
        paradigm: "sparse".
        device: See `TorchIndex`.
        memory_gb: See `TorchIndex`.
    """

    paradigms = ("sparse",)
    lowest = 0.0

    def _add(self, vectors: sparse.csr_array) -> None:
        if vectors.shape[0]:
            starts, terms = vectors.indptr.astype(np.int64), vectors.indices.astype(np.int32)
            parts = [*self._parts, _Rows(starts, terms, vectors.data.copy())]
            self._parts = merged(parts, lambda *both: _joined(both), lambda part: part.size)

    def _between(self, start: int, stop: int) -> _Rows:
        """The documents of some rows."""
        found, first = [], 0
        for part in self._parts:
            low, high = max(start - first, 0), min(stop - first, part.size)
            if low < high:
                found.append(part.part(low, high))
            first += part.size
        return found[0] if len(found) == 1 else _joined(found)

    def _make_chunk(self, first: int, stop: int, device: torch.device) -> _Chunk:
        assert self.dimensions is not None
        # torch.tensor copies, since what is memory-mapped cannot be written to.
        starts, terms, values = (torch.tensor(part, device=device) for part in self._between(first, stop))
        counts = starts.diff()
        row = torch.repeat_interleave(torch.arange(stop - first, device=device), counts)
        frequencies = torch.bincount(terms, minlength=self.dimensions)
        most = frequencies.topk(min(MOST_FREQUENT, self.dimensions))
        frequent = most.indices[(most.values * FREQUENT >= stop - first) & (most.values > 0)]
        frequent = frequent[: len(frequent) // COLUMNS * COLUMNS].sort().values
        column = torch.full((self.dimensions,), -1, device=device)
        column[frequent] = torch.arange(len(frequent), device=device)
        column_of = column[terms]
        inside = column_of >= 0
        weights = torch.zeros(padded(stop - first), len(frequent), dtype=torch.bfloat16, device=device)
        weights[row[inside], column_of[inside]] = values[inside].bfloat16()
        rare = ~inside
        order = torch.sort(terms[rare], stable=True).indices
        frequencies[frequent] = 0
        return _Chunk(
            first,
            stop - first,
            int(counts.max()),
            starts,
            terms,
            values,
            frequent,
            weights,
            torch.cat([frequencies.new_zeros(1), frequencies.cumsum(0)]),
            row[rare][order].int(),
            values[rare][order],
        )

    def _queries(self, queries: sparse.csr_array, device: torch.device) -> _Queries:
        terms = torch.tensor(queries.indices, dtype=torch.int64, device=device)
        return _Queries(queries.indptr, queries.shape[1], terms, torch.tensor(queries.data, device=device))

    def _batch(self, queries: _Queries, part: slice) -> _Batch:
        counts = np.diff(queries.starts[part.start : part.stop + 1])
        own = slice(int(queries.starts[part.start]), int(queries.starts[part.stop]))
        terms, weights = queries.terms[own], queries.weights[own]
        rows = torch.tensor(np.repeat(np.arange(len(counts)), counts), device=terms.device)
        table = torch.zeros(len(counts), queries.dimensions, dtype=torch.float32, device=terms.device)
        table[rows, terms] = weights
        return _Batch(table, rows, terms, weights, int(counts.max()))

    def _approximate(self, chunk: _Chunk, batch: _Batch) -> Approximation:
        queries = batch.table.shape[0]
        if len(chunk.frequent):
            scores = torch_search.product(batch.table[:, chunk.frequent].bfloat16(), chunk.weights)
        else:
            scores = batch.table.new_zeros(queries, len(chunk.weights))
        postings = Postings(chunk.posting_starts, chunk.posting_documents, chunk.posting_values)
        add_postings(scores, postings, batch.rows, batch.terms, batch.weights)
        additions = len(chunk.frequent) + batch.longest  # of a score, at most
        relative = 2 * ROUNDING + ROUNDING**2 + additions * ADDING
        return Approximation(scores, relative, batch.table.new_zeros(queries, 1))

    def _exact(self, chunk: _Chunk, batch: _Batch, query: Tensor, document: Tensor) -> Tensor:
        rows = (chunk.starts, chunk.terms, chunk.values)
        return sparse_pair_scores(batch.table, *rows, chunk.longest, query, document)

    def vectors(self, ids: Sequence[str]) -> sparse.csr_array:
        """The stored rows of documents, [len(ids), V].

        Raises:
            KeyError: If an id is not in the index.
        """
        assert self.dimensions is not None
        found = _joined([self._between(row, row + 1) for row in self._rows_of(as_ids(ids))])
        return sparse.csr_array((found.values, found.terms, found.starts), shape=(found.size, self.dimensions))

    def _count_documents(self, alive: np.ndarray | None) -> np.ndarray:
        counts = np.zeros(self.dimensions or 0, dtype=np.int64)
        first = 0
        for part in self._parts:
            left = part if alive is None else part.only(alive[first : first + part.size])
            counts += np.bincount(left.terms, minlength=counts.size)
            first += part.size
        return counts

    def _keep(self, kept: np.ndarray) -> None:
        first, parts = 0, []
        for part in self._parts:
            parts.append(part.only(kept[first : first + part.size]))
            first += part.size
        self._parts = [part for part in parts if part.size]
        self._chunks = []

    def _save_files(self, data: Path) -> None:
        if self._parts:
            counts = np.concatenate([np.diff(part.starts) for part in self._parts])
            np.save(data / "starts.npy", np.concatenate([[0], np.cumsum(counts)]))
            for name in ("terms", "values"):
                write_joined(data, name, [getattr(part, name) for part in self._parts])

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        starts, terms, values = (np.asarray(read_array(data, name, memory_map)) for name in _ARRAYS)
        assert self.dimensions is not None
        require_sound(
            data,
            starts.dtype == np.int64 and starts.shape == (len(self.ids) + 1,),
            terms.dtype == np.int32 and terms.ndim == 1 and values.dtype == np.float32 and values.shape == terms.shape,
        )
        require_sound(data, starts[0] == 0, starts[-1] == len(terms), bool((np.diff(starts) >= 0).all()))
        if verify and len(terms):
            require_sound(data, terms.min() >= 0, terms.max() < self.dimensions, values.min() > 0)
            require_sound(data, bool(np.isfinite(values.max())))
        self._parts = [_Rows(starts, terms, values)]


def _joined(parts: Sequence[_Rows]) -> _Rows:
    counts = np.concatenate([np.diff(part.starts) for part in parts])
    starts = np.concatenate([[0], np.cumsum(counts)])
    return _Rows(starts, np.concatenate([one.terms for one in parts]), np.concatenate([one.values for one in parts]))
