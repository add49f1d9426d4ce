"""numba functions, their machine code kept on disk where there is a folder for it."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import numba

from lion_st.hooks import keep_going_uncached

logger = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True)` that does without the cache where numba finds no folder, or no room, to write to.

    Such are read-only installations whose user has no home, and full disks. NUMBA_CACHE_DIR names a folder for them.

    Args:
        options: Of `numba.njit`.
    """

    def compile_(function: Callable[..., Any]) -> Any:
        def note(error: Exception) -> None:
            logger.debug("Compiling %s in every process: %s", function.__qualname__, error)

        try:
            cached = numba.njit(cache=True, **options)(function)
        except RuntimeError as error:  # "no locator available"
            note(error)
            return numba.njit(**options)(function)
        keep_going_uncached(cached, note)
        return cached

    return compile_


class Parallel:
    """A numba function with `prange`, on all threads or, by `serial`, on the caller's alone, with the same result."""

    def __init__(self, function: Callable[..., Any]):
        assert isinstance(function, types.FunctionType)
        self.parallel = compiled(parallel=True)(function)
        # numba's cache tells functions apart by name, not by options.
        alone = types.FunctionType(function.__code__, function.__globals__, f"{function.__name__}_serial")
        alone.__qualname__, alone.__module__ = alone.__name__, function.__module__
        self.serial = compiled()(alone)
