"""Exact search of dense vectors, and of all that is compared block by block, by products of all with all."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.encoding.vectors import stored
from lion_st.indexes.base import LocalIndex, Paradigm
from lion_st.indexes.merging import merged

QUERIES_AT_ONCE = 256
DOCUMENTS_AT_ONCE = 65_536


class BlockIndex(LocalIndex):
    """Exact search by the products of all queries with all documents, whose vectors lie in blocks.

    Args:
        paradigm: What the engine searches.
        dtype: "float32" or "float16": how vectors are stored. Products are taken in float32.
    """

    engine = "exact"
    parameters = ("dtype",)

    def __init__(self, paradigm: Paradigm, dtype: Literal["float32", "float16"] = "float32") -> None:
        super().__init__(paradigm)
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is 'float32' or 'float16', got {dtype!r}.")
        self.dtype = dtype
        self._blocks: list[Any] = []

    def _search(self, queries: Any, k: int, threads: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        parts = [(part, queries[part]) for part in self._query_parts(queries)]
        first_row = 0
        with blas_threads(threads):
            for block in list(self._blocks):
                for window in self._windows(block):
                    documents = self._read(block[window])
                    start = first_row + window.start
                    for part, own in parts:
                        products = self._products(own, documents)
                        if allowed is not None:
                            products[:, ~allowed[start : start + len(documents)]] = -np.inf
                        rows[part], scores[part] = merge_best(rows[part], scores[part], products, start)
                first_row += len(block)
        rows[scores == -np.inf] = -1
        scores[rows < 0] = 0.0
        return rows, scores

    @abstractmethod
    def _query_parts(self, queries: Any) -> Iterator[slice]:
        """Queries that are searched at a time."""

    @abstractmethod
    def _windows(self, block: Any) -> Iterator[slice]:
        """Documents of a block that are compared at a time."""

    def _read(self, documents: Any) -> Any:
        """Documents as `_products` takes them."""
        return documents

    @abstractmethod
    def _products(self, queries: Any, documents: Any) -> np.ndarray:
        """Scores, float32 [Q, N]."""

    def _keep(self, kept: np.ndarray) -> None:
        parts = np.split(kept, np.cumsum([len(block) for block in self._blocks])[:-1])
        self._blocks = [block[own] for block, own in zip(self._blocks, parts, strict=True) if own.any()]

    def _bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)


class ExactDenseIndex(BlockIndex):
    """Exact inner-product search over dense vectors by blocked matrix products.

    Args:
        paradigm: "dense".
        dtype: "float32" or "float16": how vectors are stored. Products are taken in float32.
    """

    paradigms = ("dense",)

    def _add(self, vectors: np.ndarray) -> None:
        blocks = [*self._blocks, stored(vectors, self.dtype)]
        self._blocks = merged(blocks, lambda *both: np.concatenate(both), len)

    def _query_parts(self, queries: np.ndarray) -> Iterator[slice]:
        return (slice(start, start + QUERIES_AT_ONCE) for start in range(0, len(queries), QUERIES_AT_ONCE))

    def _windows(self, block: np.ndarray) -> Iterator[slice]:
        return (slice(start, start + DOCUMENTS_AT_ONCE) for start in range(0, len(block), DOCUMENTS_AT_ONCE))

    def _read(self, documents: np.ndarray) -> np.ndarray:
        return documents.astype(np.float32, copy=False)

    def _products(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        return queries @ documents.T

    def _save_files(self, data: Path) -> None:
        write_joined(data, "vectors", self._blocks)

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        vectors = read_array(data, "vectors", memory_map)
        require_sound(data, vectors.dtype == self.dtype, vectors.shape == (len(self.ids), self.dimensions))
        self._blocks = [vectors]


class _BlasThreads:
    """The number of threads of BLAS, a setting of the whole process, while searches are under way.

    Searches at the same time share the number of the first one; the last one puts back what was there before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches = 0
        self._controller: Any = None  # looking for the libraries takes a millisecond
        self._limit: Any = None

    @contextmanager
    def __call__(self, threads: int) -> Iterator[None]:
        with self._lock:
            if self._controller is None:
                from threadpoolctl import ThreadpoolController

                self._controller = ThreadpoolController()
            if not self._searches:
                self._limit = self._controller.limit(limits=threads, user_api="blas")
            self._searches += 1
        try:
            yield
        finally:
            with self._lock:
                self._searches -= 1
                if not self._searches:
                    self._limit.restore_original_limits()


blas_threads = _BlasThreads()


def merge_best(
    rows: np.ndarray, scores: np.ndarray, block_scores: np.ndarray, first_row: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the scores [Q, N] of a block of documents into the k best so far, equal scores by rising row."""
    k = rows.shape[1]
    if block_scores.shape[1] > k:
        # Everything not below the k-th score: argpartition alone would keep any of several equal scores.
        floors = -np.partition(-block_scores, k - 1, axis=1)[:, k - 1]
        block_rows = np.empty((len(block_scores), k), dtype=np.int64)
        for query, floor in enumerate(floors):
            best = np.flatnonzero(block_scores[query] >= floor)
            block_rows[query] = best[np.argsort(-block_scores[query, best], kind="stable")[:k]]
    else:
        block_rows = np.broadcast_to(np.arange(block_scores.shape[1]), block_scores.shape)
    merged_scores = np.concatenate([scores, np.take_along_axis(block_scores, block_rows, axis=1)], axis=1)
    merged_rows = np.concatenate([rows, block_rows + first_row], axis=1)
    order = np.argsort(-merged_scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(merged_rows, order, axis=1), np.take_along_axis(merged_scores, order, axis=1)
