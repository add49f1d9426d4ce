"""Exact search over dense vectors on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lion_st.encoding.storage import read_array, require_sound, write_joined
from lion_st.indexes import torch_search
from lion_st.indexes.merging import merged
from lion_st.indexes.torch_search import ADDING, Approximation, TorchIndex, padded
from lion_st.kernels.pair_scores import dense_pair_scores

SLACK = 1.001  # of norms, which are sums in float32
LARGEST = 1e15  # number of a vector, so that no norm, nor product of two, leaves the range of float32


class _Chunk(NamedTuple):
    first: int
    size: int  # documents
    vectors: Tensor  # float32 [N, D]
    rounded: Tensor  # bfloat16 [N padded, D]
    longest: Tensor  # float32, the largest norm
    error: Tensor  # float32, the largest norm of what rounding took


class _Batch(NamedTuple):
    vectors: Tensor  # float32 [Q, D]
    rounded: Tensor  # bfloat16 [Q, D]
    norms: Tensor  # float32 [Q, 1]
    taken: Tensor  # float32 [Q, 1], norms of what rounding took


class TorchDenseIndex(TorchIndex):
    """Exact dense search on a GPU: products in bfloat16, whose errors are bounded by what rounding took of the vectors.

    Scores are those of float64, rounded once to float32; those of the engine "exact" are sums in float32. A million
    documents of 2,048 dimensions take 12.3 GB.

    Args:
        paradigm: "dense".
        device: See `TorchIndex`.
        memory_gb: See `TorchIndex`.
    """

    paradigms = ("dense",)

    def _check(self, vectors: Any) -> np.ndarray:
        matrix: np.ndarray = super()._check(vectors)
        largest = max(matrix.max(), -matrix.min()) if matrix.size else 0.0
        if largest > LARGEST:
            raise ValueError(
                f"The engine 'torch' searches vectors of numbers up to {LARGEST:g}, got {largest:g}: normalise "
                "them, or use the engine 'exact'."
            )
        return matrix

    def _add(self, vectors: np.ndarray) -> None:
        if len(vectors):
            self._parts = merged([*self._parts, vectors.copy()], lambda *both: np.concatenate(both), len)

    def _make_chunk(self, first: int, stop: int, device: torch.device) -> _Chunk:
        assert self.dimensions is not None
        vectors = torch.empty(stop - first, self.dimensions, dtype=torch.float32, device=device)
        row = 0  # of the part's first document
        for part in self._parts:
            low, high = max(first, row), min(stop, row + len(part))
            if low < high:  # torch.tensor copies, since what is memory-mapped cannot be written to
                vectors[low - first : high - first] = torch.tensor(part[low - row : high - row])
            row += len(part)
        rounded = torch.zeros(padded(stop - first), self.dimensions, dtype=torch.bfloat16, device=device)
        rounded[: stop - first] = vectors.bfloat16()
        taken = vectors - rounded[: stop - first].float()
        return _Chunk(first, stop - first, vectors, rounded, vectors.norm(dim=1).max(), taken.norm(dim=1).max())

    def _queries(self, queries: np.ndarray, device: torch.device) -> Tensor:
        return torch.tensor(queries, device=device)

    def _batch(self, queries: Tensor, part: slice) -> _Batch:
        own = queries[part]
        rounded = own.bfloat16()
        taken = (own - rounded.float()).norm(dim=1, keepdim=True)
        return _Batch(own, rounded, own.norm(dim=1, keepdim=True), taken)

    def _approximate(self, chunk: _Chunk, batch: _Batch) -> Approximation:
        longest = chunk.longest + chunk.error
        summing = (batch.vectors.shape[1] + 1) * ADDING * batch.norms * longest
        error = batch.norms * chunk.error + batch.taken * longest + summing
        return Approximation(torch_search.product(batch.rounded, chunk.rounded), 0.0, SLACK * error)

    def _exact(self, chunk: _Chunk, batch: _Batch, query: Tensor, document: Tensor) -> Tensor:
        return dense_pair_scores(batch.vectors, chunk.vectors, query, document)

    def _keep(self, kept: np.ndarray) -> None:
        first, parts = 0, []
        for part in self._parts:
            parts.append(part[kept[first : first + len(part)]])
            first += len(part)
        self._parts = [part for part in parts if len(part)]
        self._chunks = []

    def _save_files(self, data: Path) -> None:
        write_joined(data, "vectors", self._parts)

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        vectors = read_array(data, "vectors", memory_map)
        require_sound(data, vectors.dtype == np.float32, vectors.shape == (len(self.ids), self.dimensions))
        self._parts = [np.asarray(vectors)]
