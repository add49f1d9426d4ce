"""Exact late interaction in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.encoding.vectors import TokenVectors, max_sim, stack, stored
from lion_st.indexes.exact_dense import BlockIndex
from lion_st.indexes.merging import merged

QUERY_TOKENS = 512  # are compared at a time
DOCUMENT_TOKENS = 32_768  # with so many of the documents, 64 MiB of products


class ExactMultiVectorIndex(BlockIndex):
    """Exact MaxSim search: every query token is compared with every token of every document.

    A document takes as many vectors as it has tokens, about 100 times what a dense index does: 8.8 million passages of
    70 tokens and 128 dimensions are 158 GB in float16.

    Args:
        paradigm: "multi_vector".
        dtype: "float32" or "float16": how vectors are stored. Products are taken in float32.
    """

    paradigms = ("multi_vector",)

    def _add(self, vectors: TokenVectors) -> None:
        blocks = [*self._blocks, TokenVectors(stored(vectors.values, self.dtype), vectors.offsets.copy())]
        self._blocks = merged(blocks, lambda *both: stack(both), len)

    def _query_parts(self, queries: TokenVectors) -> Iterator[slice]:
        return _windows(queries, QUERY_TOKENS)

    def _windows(self, block: TokenVectors) -> Iterator[slice]:
        return _windows(block, DOCUMENT_TOKENS)

    def _products(self, queries: TokenVectors, documents: TokenVectors) -> np.ndarray:
        return max_sim(queries, documents)

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
