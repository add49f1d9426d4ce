"""Choice among configurations of a GPU kernel by measuring them once for each machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Configuration = TypeVar("Configuration")


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Tuner(Generic[Configuration]):
    """Measures every configuration once for each key and remembers the fastest; all give the same results.

    Choices are kept in the user's cache folder, so that another process need neither compile nor measure again. A
    configuration that does not compile or run on this GPU is passed over. The interpreter and a CUDA graph that is
    being captured take the first, unmeasured.

    Args:
        configurations: In order of preference.
    """

    def __init__(self, configurations: Sequence[Configuration]):
        self.configurations = list(configurations)
        self.times: dict[Hashable, dict[Configuration, float]] = {}  # milliseconds, of what this process measured
        self._fastest: dict[Hashable, Configuration] = {}
        self._lock = threading.Lock()

    def fastest(
        self,
        key: Hashable,
        make_probe: Callable[[], Callable[[Configuration, bool], Any]],
        fits: Callable[[Configuration], bool] = lambda _: True,
    ) -> Configuration:
        """The fastest configuration for a key.

        Args:
            key: What the choice depends on, of strings, numbers and truth values.
            make_probe: Makes what is measured, a function of a configuration that runs the kernel or, if its second
                argument is true, compiles it alone. Called where nothing is known of the key.
            fits: Whether a configuration can serve at all.

        Raises:
            RuntimeError: If none runs.
        """
        if key in self._fastest:
            return self._fastest[key]
        candidates = [candidate for candidate in self.configurations if fits(candidate)]
        if interpreted() or len(candidates) == 1:
            return candidates[0]
        with self._lock:
            if key not in self._fastest:
                known = _remembered(key, candidates)
                if known is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                self._fastest[key] = self._measure(key, make_probe(), candidates) if known is None else known
        return self._fastest[key]

    def _measure(
        self, key: Hashable, probe: Callable[[Configuration, bool], Any], candidates: list[Configuration]
    ) -> Configuration:
        from triton.testing import do_bench

        logger.info("Measuring %d configurations of a kernel for %s, once for this machine.", len(candidates), key)
        times: dict[Configuration, float] = {}
        failures: list[str] = []
        with ThreadPoolExecutor(len(candidates)) as threads:  # most of the time the compiler runs without Python's lock
            compiled = [threads.submit(probe, candidate, True) for candidate in candidates]
        for candidate, done in zip(candidates, compiled, strict=True):
            try:
                done.result()
                times[candidate] = do_bench(lambda candidate=candidate: probe(candidate, False), warmup=10, rep=40)
            except Exception as error:  # compilers and drivers raise what they like
                failures.append(f"{candidate}: {type(error).__name__}: {str(error)[:200]}")
        if not times:
            raise RuntimeError(f"No configuration of the kernel runs for {key}: " + "; ".join(failures))
        self.times[key] = times
        best = min(times, key=times.__getitem__)
        logger.debug("Kernel for %s: %s, %.3f ms; passed over: %s", key, best, times[best], failures or "none")
        _remember(key, best, times[best])
        return best


def cache_file(key: Hashable) -> Path:
    """Where the choice for a key is kept: by this GPU's driver stack and the kernels' source, $XDG_CACHE_HOME first."""
    import triton

    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    versions = [torch.__version__, torch.version.cuda or torch.version.hip, triton.__version__, _source_hash()]
    name = hashlib.sha256(json.dumps([key, versions]).encode()).hexdigest()[:32]
    return Path(folder) / "lion_st" / "kernels" / f"{name}.json"


def _remembered(key: Hashable, candidates: list[Configuration]) -> Configuration | None:
    try:
        choice = json.loads(cache_file(key).read_text(encoding="utf-8"))["configuration"]
    except FileNotFoundError:
        return None
    except Exception as error:  # a cache that cannot be read is measured anew
        logger.debug("Ignoring the kept choice for %s: %s: %s", key, type(error).__name__, error)
        return None
    return next((candidate for candidate in candidates if repr(candidate) == choice), None)


def _remember(key: Hashable, choice: Configuration, milliseconds: float) -> None:
    try:
        file = cache_file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        contents = {"key": key, "configuration": repr(choice), "milliseconds": milliseconds}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", encoding="utf-8", delete=False) as draft:
            json.dump(contents, draft)
        try:
            os.replace(draft.name, file)
        except OSError:
            os.unlink(draft.name)
            raise
    except Exception as error:  # without a cache the next process measures again
        logger.debug("Cannot keep the choice for %s: %s: %s", key, type(error).__name__, error)


@cache
def _source_hash() -> str:
    files = sorted(Path(__file__).parent.glob("t*.py"))  # of the Triton backend
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
