"""Choice among configurations of a GPU kernel by measuring them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Configuration = TypeVar("Configuration")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Tuner(Generic[Configuration]):
    """Measures every configuration once for each key and remembers the fastest; all give the same results.

    A configuration that does not compile or run on this GPU is passed over. The interpreter and a CUDA graph that is
    being captured take the first, unmeasured.

    Args:
        configurations: In order of preference.
    """

    def __init__(self, configurations: Sequence[Configuration]):
        self.configurations = list(configurations)
        self._fastest: dict[Hashable, Configuration] = {}

    def fastest(
        self,
        key: Hashable,
        launch: Callable[[Configuration], None],
        fits: Callable[[Configuration], bool] = lambda _: True,
    ) -> Configuration:
        """The fastest configuration for a key.

        Args:
            key: What the choice depends on.
            launch: Runs the kernel, whose effect may be repeated.
            fits: Whether a configuration can serve at all.

        Raises:
            RuntimeError: If none runs.
        """
        if key not in self._fastest:
            candidates = [candidate for candidate in self.configurations if fits(candidate)]
            if interpreted() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
                return candidates[0]
            self._fastest[key] = self._measure(key, launch, candidates)
        return self._fastest[key]

    def _measure(
        self, key: Hashable, launch: Callable[[Configuration], None], candidates: list[Configuration]
    ) -> Configuration:
        from triton.testing import do_bench

        times: list[tuple[float, Configuration]] = []
        failures: list[str] = []
        for candidate in candidates:
            try:
                times.append((do_bench(lambda candidate=candidate: launch(candidate), warmup=10, rep=40), candidate))
            except Exception as error:  # compilers and drivers raise what they like
                failures.append(f"{candidate}: {type(error).__name__}: {str(error)[:200]}")
        if not times:
            raise RuntimeError(f"No configuration of the kernel runs for {key}: " + "; ".join(failures))
        milliseconds, best = min(times, key=lambda pair: pair[0])
        logger.debug("Kernel for %s: %s, %.3f ms; passed over: %s", key, best, milliseconds, failures or "none")
        return best
