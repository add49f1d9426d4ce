"""Exact search of sparse vectors by an inverted index."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.indexes.base import LocalIndex, Paradigm, as_ids
from lion_st.indexes.merging import merged

BLOCK = 64  # queries that a thread searches at a time
WINDOW = WINDOW_LIMIT = 65_536  # documents whose number fits 16 bits
POSTINGS = 2**31 - 1  # of a window, whose lists begin at numbers of 32 bits
LEVELS = {"uint8": 255, "uint16": 65_535}


class _Window(NamedTuple):
    """Postings of up to `WINDOW` documents; see `inverted.search_window`."""

    indptr: np.ndarray  # int32 [V + 1]
    documents: np.ndarray  # uint16 [P]
    values: np.ndarray  # float32, uint16 or uint8 [P]
    upper: np.ndarray  # float32 [V]
    rows: int


def _fill(window: _Window) -> int:
    """How full a window is, as a number of documents."""
    return max(window.rows, -(-window.documents.size * WINDOW // POSTINGS))


def _joined(one: _Window, other: _Window) -> _Window:
    from lion_st.indexes import inverted

    both = (one.indptr, one.documents, one.values, one.rows, other.indptr, other.documents, other.values)
    indptr, documents, values = inverted.join(*both)
    return _Window(indptr, documents, values, np.maximum(one.upper, other.upper), one.rows + other.rows)


class ExactSparseIndex(LocalIndex):
    """Exact inner-product search over term weights, the search of the Lion paper (arXiv 2502.15526, section 3).

    The kernels are described in `lion_st.indexes.inverted`.

    Args:
        paradigm: "sparse".
        quantization: None keeps float32 weights (6 bytes a posting); "uint16" and "uint8" store them linearly by term
            (4 and 3 bytes a posting). The search then is exact over the rounded weights, which differ from the given
            ones by at most a 1/131,070 (uint16) or 1/510 (uint8) part of the term's largest weight. Add to it in bulk:
            the first search after an addition begins a part, of 8 bytes for each term of the vocabulary and more.
    """

    engine = "exact"
    paradigms = ("sparse",)
    parameters = ("quantization",)

    def __init__(self, paradigm: Paradigm, quantization: Literal["uint8", "uint16"] | None = None) -> None:
        super().__init__(paradigm)
        if quantization is not None and quantization not in LEVELS:
            raise ValueError(f"quantization is None, 'uint16' or 'uint8', got {quantization!r}.")
        self.quantization = quantization
        self._windows: list[_Window] = []
        self._pending: list[sparse.csr_array] = []
        self._pending_rows = 0
        self._local = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._pool_key = (0, 0)

    def _add(self, vectors: sparse.csr_array) -> None:
        if self._pending_rows + vectors.shape[0] < WINDOW:
            self._pending.append(vectors.copy())  # what the caller may change before the first search
            self._pending_rows += vectors.shape[0]
        else:
            self._invert_all([*self._pending, vectors], whole_windows_only=True)

    def _ready(self) -> list[_Window]:
        """All windows, once what was added last is inverted as well."""
        with self._lock:
            if self._pending_rows:
                self._invert_all(self._pending)
            return list(self._windows)

    def _invert_all(self, parts: list[sparse.csr_array], whole_windows_only: bool = False) -> None:
        """Turn what waits into windows; what interrupts this leaves the index as it was."""
        rows = sparse.vstack(parts, format="csr") if len(parts) > 1 else parts[0]
        stop = rows.shape[0] // WINDOW * WINDOW if whole_windows_only else rows.shape[0]
        parts = [rows[start : min(start + WINDOW, stop)] for start in range(0, stop, WINDOW)]
        windows = [window for part in parts for window in self._inverted(part)]
        rest = [rows[stop:].copy()] if stop < rows.shape[0] else []
        windows = self._merged(self._windows + windows)
        self._windows, self._pending, self._pending_rows = windows, rest, rows.shape[0] - stop

    def _merged(self, windows: list[_Window]) -> list[_Window]:
        """See `merged`; weights that were quantised by the largest of their window stay there."""
        return windows if self.quantization else merged(windows, _joined, _fill, WINDOW)

    def _inverted(self, rows: sparse.csr_array) -> list[_Window]:
        """Windows of at most `WINDOW` documents: several where they have more postings than 32 bits count."""
        if rows.nnz <= POSTINGS or rows.shape[0] == 1:
            return [self._invert(rows)]
        half = rows.shape[0] // 2
        return self._inverted(rows[:half]) + self._inverted(rows[half:])

    def _invert(self, rows: sparse.csr_array) -> _Window:
        from lion_st.indexes import inverted

        indptr = np.zeros(rows.shape[1] + 1, dtype=np.int32)
        upper = np.zeros(rows.shape[1], dtype=np.float32)
        documents = np.empty(rows.nnz, dtype=np.uint16)
        values = np.empty(rows.nnz, dtype=np.float32)
        inverted.count_postings(rows.indices, indptr)
        inverted.invert(rows.indptr, rows.indices, rows.data, indptr, documents, values, upper)
        if self.quantization is not None:
            weights, values = values, np.empty(rows.nnz, dtype=self.quantization)
            inverted.quantize(indptr, weights, upper, LEVELS[self.quantization], values)
        return _Window(indptr, documents, values, upper, rows.shape[0])

    def _search(
        self, queries: sparse.csr_array, k: int, threads: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        windows = self._ready()
        count = queries.shape[0]
        step = min(BLOCK, -(-count // threads))
        blocks = [slice(start, min(start + step, count)) for start in range(0, count, step)]

        def search_block(block: slice) -> tuple[np.ndarray, np.ndarray]:
            return self._search_block(windows, queries, block, k, allowed)

        if len(blocks) == 1:
            return search_block(blocks[0])
        found = list(map(search_block, blocks) if threads == 1 else self._threads(threads).map(search_block, blocks))
        rows, scores = zip(*found, strict=True)
        return np.concatenate(rows), np.concatenate(scores)

    def _threads(self, count: int) -> ThreadPoolExecutor:
        """Threads that stay, with their scratch arrays, until another number is asked for or the process forks."""
        with self._lock:
            if self._pool is None or self._pool_key != (count, os.getpid()):
                self._pool, self._pool_key = ThreadPoolExecutor(count), (count, os.getpid())
            return self._pool

    def _search_block(
        self, windows: list[_Window], queries: sparse.csr_array, block: slice, k: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        from lion_st.indexes import inverted

        count = block.stop - block.start
        best = np.zeros((count, k), dtype=np.uint64)
        sizes = np.zeros(count, dtype=np.int64)
        accumulators, touched = self._scratch(max(window.rows for window in windows))
        levels = LEVELS[self.quantization] if self.quantization else 0
        first_row = 0
        every = np.empty(0, dtype=np.bool_)
        for window in windows:
            mask = every if allowed is None else allowed[first_row : first_row + window.rows]
            if allowed is None or mask.any():
                inverted.search_window(
                    window.indptr, window.documents, window.values, window.upper, levels, first_row,
                    queries.indptr[block.start : block.stop + 1], queries.indices, queries.data, mask, best, sizes,
                    accumulators[: window.rows], touched,
                )  # fmt: skip
            first_row += window.rows
        best.sort(axis=1)
        best = best[:, ::-1]
        rows = 0xFFFFFFFF - (best & 0xFFFFFFFF).astype(np.int64)
        scores = (best >> 32).astype(np.uint32).view(np.float32)
        return np.where(best > 0, rows, -1), scores

    def _scratch(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Accumulators and a list of documents, kept by each thread."""
        if getattr(self._local, "size", 0) < size:
            self._local.size = size
            self._local.arrays = (np.zeros(size, dtype=np.float64), np.empty(size, dtype=np.int32))
        return self._local.arrays

    def vectors(self, ids: Sequence[str]) -> sparse.csr_array:
        """The stored rows of documents, [len(ids), V]; quantised weights as the search sees them.

        Raises:
            KeyError: If an id is not in the index.
        """
        from lion_st.indexes import inverted

        found = self._rows_of(as_ids(ids))
        windows = self._ready()
        assert self.dimensions is not None
        ends = np.cumsum([window.rows for window in windows])
        levels = LEVELS[self.quantization] if self.quantization else 0
        rows = []
        for row in found:
            number = int(np.searchsorted(ends, row, side="right"))
            window = windows[number]
            terms, weights = inverted.document_terms(
                window.indptr, window.documents, window.values, window.upper, levels, row - (ends[number] - window.rows)
            )
            rows.append(sparse.csr_array((weights, terms, [0, len(terms)]), shape=(1, self.dimensions)))
        return sparse.vstack(rows, format="csr")

    def _count_documents(self, alive: np.ndarray | None) -> np.ndarray:
        counts = np.zeros(self.dimensions or 0, dtype=np.int64)
        first_row = 0
        for window in self._ready():
            lengths = np.diff(window.indptr)
            if alive is not None:
                terms = np.repeat(np.arange(lengths.size), lengths)
                own = alive[first_row : first_row + window.rows]
                lengths = np.bincount(terms[own[window.documents]], minlength=lengths.size)
            counts += lengths
            first_row += window.rows
        return counts

    def _keep(self, kept: np.ndarray) -> None:
        from lion_st.indexes import inverted

        first_row = 0
        left = []
        for window in self._ready():
            own = kept[first_row : first_row + window.rows]
            first_row += window.rows
            if own.all():
                left.append(window)
            elif own.any():
                indptr, documents, values = inverted.keep(window.indptr, window.documents, window.values, own)
                left.append(_Window(indptr, documents, values, window.upper, int(own.sum())))
        self._windows = self._merged(left)

    def _bytes(self) -> int:
        return sum(part.nbytes for window in self._ready() for part in window[:4])

    def _save_arrays(self) -> dict[str, np.ndarray]:
        return {"rows": np.array([window.rows for window in self._ready()], dtype=np.int64)}

    def _save_files(self, data: Path) -> None:
        for name in _Window._fields[:4]:
            write_joined(data, name, [getattr(window, name) for window in self._windows])

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        assert self.dimensions is not None
        # np.asarray drops the memmap subclass, for which numba has no type, and keeps the mapping.
        indptr, documents, values, upper = (
            np.asarray(read_array(data, name, memory_map)) for name in _Window._fields[:4]
        )
        counts = read_array(data, "rows")
        require_sound(
            data,
            counts.dtype.kind == "i" and counts.ndim == 1 and int(counts.sum()) == len(self.ids),
            counts.size and counts.min() > 0 and counts.max() <= WINDOW_LIMIT,
            indptr.dtype == np.int32 and indptr.shape == (counts.size * (self.dimensions + 1),),
            upper.dtype == np.float32 and upper.shape == (counts.size * self.dimensions,),
            documents.dtype == np.uint16 and documents.ndim == 1 and documents.shape == values.shape,
            values.dtype == (self.quantization or "float32"),
        )
        require_sound(data, bool(np.isfinite(upper).all() and (upper >= 0).all()))
        start = 0
        for number, rows in enumerate(counts.tolist()):
            starts = indptr[number * (self.dimensions + 1) : (number + 1) * (self.dimensions + 1)]
            stop = start + int(starts[-1])
            require_sound(data, starts[0] == 0, stop <= documents.size, bool((np.diff(starts) >= 0).all()))
            bounds = upper[number * self.dimensions : (number + 1) * self.dimensions]
            window = _Window(starts, documents[start:stop], values[start:stop], bounds, rows)
            if verify and stop > start:
                require_sound(data, window.documents.max() < rows, window.values.min() > 0)
                require_sound(data, bool(np.isfinite(window.values.max())))
            self._windows.append(window)
            start = stop
        require_sound(data, start == documents.size)
