"""Which implementation of the sparse head runs, chosen once for each kind of device and said once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from functools import cache
from types import ModuleType

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)

VARIABLE = "LION_ST_KERNEL"
OLDEST_TRITON = "3.4"
BACKENDS = ("reference", "blockwise", "triton")


@torch.compiler.assume_constant_result
def choose_backend(device: torch.device) -> str:
    """Name of the backend for tensors of a device: `LION_ST_KERNEL` if set, else the fastest that can run.

    Raises:
        ValueError: If `LION_ST_KERNEL` names no backend.
        RuntimeError: If it names one that cannot run on the device, and why.
    """
    forced = os.environ.get(VARIABLE, "").strip().lower()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _choose(device.type, forced, interpreted)


def backend_module(name: str) -> ModuleType:
    """The module with `forward` and `backward` of a backend."""
    if name == "triton":
        from lion_st.kernels import triton_backend

        return triton_backend
    from lion_st.kernels import blockwise

    return blockwise


@cache
def _choose(device: str, forced: str, interpreted: bool) -> str:
    if forced and forced not in BACKENDS:
        raise ValueError(f"{VARIABLE} is {forced!r}: set it to one of {', '.join(BACKENDS)}, or unset it.")
    obstacle = _why_not_triton(device, interpreted)
    if forced == "triton" and obstacle:
        raise RuntimeError(f"{VARIABLE} is 'triton', which cannot run here: {obstacle}. Unset it, or use 'blockwise'.")
    if forced:
        logger.info("Sparse head on %s: %s, as %s asks.", device, forced, VARIABLE)
        return forced
    if device == "cuda" and obstacle:
        logger.warning("Sparse head on cuda: blockwise, which is slower than triton: %s.", obstacle)
        return "blockwise"
    if device == "cuda":
        logger.info("Sparse head on cuda: triton, the fastest there.")
        return "triton"
    logger.info("Sparse head on %s: blockwise, the fastest there.", device)
    return "blockwise"


def _why_not_triton(device: str, interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    version = importlib.metadata.version("triton")
    if Version(version) < Version(OLDEST_TRITON):
        return f"triton {version} is too old (pip install 'triton>={OLDEST_TRITON}')"
    if interpreted:
        return None
    if device != "cuda":
        return f"the tensors are on {device!r}, and triton needs a GPU (or TRITON_INTERPRET=1)"
    if torch.version.hip:  # whose GPUs torch calls "cuda" too
        return "the kernels are made for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None
