"""Exact search over dense vectors on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lion_st.encoding.storage import read_array, require_sound
from lion_st.indexes import torch_search
from lion_st.indexes.base import Paradigm
from lion_st.indexes.torch_search import ADDING, Approximation, TorchIndex, padded

SLACK = 1.001  # of norms, which are sums in float32


class _Chunk(NamedTuple):
    first: int
    size: int  # documents
    vectors: Tensor  # float32 [N, D]
    rounded: Tensor  # bfloat16 [N padded, D]
    longest: Tensor  # float32, the largest norm
    error: Tensor  # float32, the largest norm of what rounding took


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

    def __init__(self, paradigm: Paradigm = "dense", device: str | None = None, memory_gb: float | None = None) -> None:
        super().__init__(paradigm, device, memory_gb)
        self._parts: list[np.ndarray] = []

    def _add(self, vectors: np.ndarray) -> None:
        if len(vectors):
            self._parts.append(vectors.copy())

    def _make_chunk(self, first: int, stop: int, device: torch.device) -> _Chunk:
        assert self.dimensions is not None
        vectors = torch.empty(stop - first, self.dimensions, device=device)
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

    def _batch(self, queries: np.ndarray, part: slice, device: torch.device) -> Tensor:
        return torch.tensor(queries[part], device=device)

    def _approximate(self, chunk: _Chunk, batch: Tensor) -> Approximation:
        rounded = batch.bfloat16()
        norms = batch.norm(dim=1, keepdim=True)  # [Q, 1]
        taken = (batch - rounded.float()).norm(dim=1, keepdim=True)
        longest = chunk.longest + chunk.error
        error = norms * chunk.error + taken * longest + (batch.shape[1] + 1) * ADDING * norms * longest
        return Approximation(torch_search.product(rounded, chunk.rounded), 0.0, SLACK * error)

    def _exact(self, chunk: _Chunk, batch: Tensor, query: Tensor, document: Tensor) -> Tensor:
        scores = torch.empty(len(query), device=query.device)
        step = max(1, torch_search.ENTRIES // batch.shape[1])
        for start in range(0, len(query), step):
            part = slice(start, start + step)
            scores[part] = (batch[query[part]].double() * chunk.vectors[document[part]].double()).sum(1).float()
        return scores

    def _keep(self, kept: np.ndarray) -> None:
        first, parts = 0, []
        for part in self._parts:
            parts.append(part[kept[first : first + len(part)]])
            first += len(part)
        self._parts = [part for part in parts if len(part)]
        self._chunks = []

    def _save_arrays(self) -> dict[str, np.ndarray]:
        return {"vectors": np.concatenate(self._parts)} if self._parts else {}

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        vectors = read_array(data, "vectors", memory_map)
        require_sound(data, vectors.dtype == np.float32, vectors.shape == (len(self.ids), self.dimensions))
        self._parts = [np.asarray(vectors)]
