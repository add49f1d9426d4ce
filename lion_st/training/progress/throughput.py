"""How fast a training goes and how much memory it takes, read when something is logged and not before."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 2**30


class Throughput:
    """Counts texts and tokens on their device, and seconds without those of evaluations and checkpoints."""

    def __init__(self) -> None:
        self._texts = 0
        self._sums: Tensor | None = None  # int64 [2]: tokens, and squared lengths of texts
        self._tokens = 0.0  # since `tokens_per_second` was last asked for
        self._start = time.monotonic()

    def add(self, lengths: Tensor) -> None:
        """Count a batch: tokens of each text, int64 [N]."""
        sums = torch.stack([lengths.sum(), lengths.square().sum()])
        self._texts += len(lengths)
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self) -> tuple[int, float, float]:
        """Texts, tokens and squared lengths since this was last called; waits for the device."""
        if self._sums is None:
            return 0, 0.0, 0.0
        texts, (tokens, squares) = self._texts, map(float, self._sums.tolist())
        self._texts, self._sums = 0, None
        self._tokens += tokens
        return texts, tokens, squares

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - begin

    def tokens_per_second(self) -> float:
        """Tokens that `take` has counted, a second, since this was last called."""
        now = time.monotonic()
        pace = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0.0, now
        return pace


def peak_memory() -> float | None:
    """Most memory that was in use at a time, in GiB: of the GPU where there is one, else of the process, if known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would name the largest of this process and the one that started it
        lines = status.read_text().splitlines()
        return next((float(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def lengths_of_read_texts(inputs: Mapping[str, Any], with_queries: bool = True) -> Tensor:
    """Tokens of each text of a training batch that the network reads, [N].

    Args:
        inputs: Of the step, by column: masks [B, L] and tasks.
        with_queries: Whether it reads queries too, which a table may encode in its place.
    """
    columns = [name.removesuffix("_attention_mask") for name in inputs if name.endswith("_attention_mask")]
    read = [column for column in columns if with_queries or inputs.get(f"{column}_task") != "query"]
    return torch.cat([inputs[f"{column}_attention_mask"].sum(1) for column in read])
