"""Packages that come with an extra of lion_st, imported where they are used and named where they are missing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

EXTRAS = {
    "train": ("datasets", "matplotlib", "trl"),
    "retrieval": ("bm25s", "faiss", "pyarrow", "seismic"),
    "eval": ("Stemmer", "evaluate", "mteb", "pytrec_eval"),
    "quantized": ("bitsandbytes",),
    "liger": ("liger_kernel",),
    "deepspeed": ("deepspeed",),
    "serve": ("fastapi", "orjson", "prometheus_client", "uvicorn"),
    "milvus": ("milvus_lite", "pymilvus"),
    "ray": ("ray",),
    "demo": ("gradio",),
    "gguf": ("gguf",),
}
EXTRA_OF = {package: extra for extra, packages in EXTRAS.items() for package in packages}


def require(module: str) -> Any:
    """Import a module of a package that an extra brings.

    Returns:
        The module.

    Example:
        ::

            faiss = require("faiss")
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This needs {package} ({error}): {_remedy(package)}.", name=package) from error


def missing_extra(error: BaseException) -> str | None:
    """What to do about an import that failed for want of an extra; None if that is not what is wrong.

    Example:
        >>> missing_extra(ModuleNotFoundError("No module named 'trl'", name="trl"))
        "No module named 'trl': pip install 'lion-st[train]'."
    """
    package = (getattr(error, "name", None) or "").partition(".")[0]
    is_plain = isinstance(error, ModuleNotFoundError) and package in EXTRA_OF
    return f"{error}: {_remedy(package)}." if is_plain else None


def _remedy(package: str) -> str:
    if package == "seismic" and not has_seismic():
        return 'it has wheels for Python 3.10 to 3.12 on x86-64 Linux alone. Use the engine "exact"'
    return f"pip install 'lion-st[{EXTRA_OF[package]}]'"


def has_seismic() -> bool:
    """Whether Seismic has wheels for this platform: x86-64 Linux with glibc 2.34 or newer, Python 3.10 to 3.12."""
    import platform

    if sys.platform != "linux" or platform.machine() != "x86_64" or sys.version_info >= (3, 13):
        return False
    library, version = platform.libc_ver()
    return library == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= (2, 34)
