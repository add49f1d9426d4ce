"""Exact late interaction in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.encoding.vectors import TokenVectors, max_sim, stack
from lion_st.indexes.base import LocalIndex, Paradigm
from lion_st.indexes.exact import FOLDED, blas_threads, folded, merge_best, stored

QUERY_TOKENS = 512  # are compared at a time
DOCUMENT_TOKENS = 32_768  # with so many of the documents, 64 MiB of products


class ExactMultiVectorIndex(LocalIndex):
    """Exact MaxSim search: every query token is compared with every token of every document.

    A document takes as many vectors as it has tokens, about 100 times what a dense index does: 8.8 million passages of
    70 tokens and 128 dimensions are 158 GB in float16.

    Args:
        paradigm: "multi_vector".
        dtype: "float32" or "float16": how vectors are stored. Products are taken in float32.
    """

    engine = "exact"
    paradigms = ("multi_vector",)
    parameters = ("dtype",)

    def __init__(self, paradigm: Paradigm = "multi_vector", dtype: Literal["float32", "float16"] = "float32") -> None:
        super().__init__(paradigm)
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is 'float32' or 'float16', got {dtype!r}.")
        self.dtype = dtype
        self._blocks: list[TokenVectors] = []

    def _add(self, vectors: TokenVectors) -> None:
        blocks = [*self._blocks, TokenVectors(stored(vectors.values, self.dtype), vectors.offsets.copy())]
        self._blocks = folded(blocks, lambda *both: stack(both), len, FOLDED)

    def _search(
        self, queries: TokenVectors, k: int, threads: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        groups = list(_windows(queries, QUERY_TOKENS))
        parts = [queries[group] for group in groups]
        first_row = 0
        with blas_threads(threads):
            for block in list(self._blocks):
                for window in _windows(block, DOCUMENT_TOKENS):
                    documents = block[window]
                    start = first_row + window.start
                    for group, part in zip(groups, parts, strict=True):
                        found = max_sim(part, documents)
                        if allowed is not None:
                            found[:, ~allowed[start : start + len(documents)]] = -np.inf
                        rows[group], scores[group] = merge_best(rows[group], scores[group], found, start)
                first_row += len(block)
        rows[scores == -np.inf] = -1
        scores[rows < 0] = 0.0
        return rows, scores

    def _keep(self, kept: np.ndarray) -> None:
        parts = np.split(kept, np.cumsum([len(block) for block in self._blocks])[:-1])
        self._blocks = [block[own] for block, own in zip(self._blocks, parts, strict=True) if own.any()]

    def _bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def _save_arrays(self) -> dict[str, np.ndarray]:
        counts = [np.diff(block.offsets) for block in self._blocks]
        return {"offsets": np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)} if counts else {}

    def _save_files(self, data: Path) -> None:
        write_joined(data, "vectors", [block.values for block in self._blocks])

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        values, offsets = read_array(data, "vectors", memory_map), np.asarray(read_array(data, "offsets", False))
        require_sound(data, values.dtype == self.dtype, values.ndim == 2, values.shape[1:] == (self.dimensions,))
        require_sound(data, offsets.dtype == np.int64, offsets.shape == (len(self.ids) + 1,), bool(offsets[0] == 0))
        require_sound(data, bool(offsets[-1] == len(values)), bool((np.diff(offsets) > 0).all()))
        self._blocks = [TokenVectors(values, offsets)]


def _windows(vectors: TokenVectors, tokens: int) -> Iterator[slice]:
    """Slices of texts with at most so many tokens together, or of one text that has more."""
    start = 0
    while start < len(vectors):
        end = int(np.searchsorted(vectors.offsets, vectors.offsets[start] + tokens, side="right")) - 1
        yield slice(start, max(end, start + 1))
        start = max(end, start + 1)
