"""lion_st: sparse (Lion-SP) and dense (Lion-DS) retrievers from decoder-only language models.

The names below are imported on first use, so that `import lion_st` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion_st.exporting import export
    from lion_st.kernels import splade_pool
    from lion_st.losses import CachedContrastiveDistillationLoss, ContrastiveDistillationLoss, FlopsRegularizer
    from lion_st.models import build, load, paradigm_of
    from lion_st.modules import LionTransformer, LlamaPooling, SpladeHead

__version__ = "0.1.0"

_HOME = {
    "export": "lion_st.exporting",
    "splade_pool": "lion_st.kernels",
    "CachedContrastiveDistillationLoss": "lion_st.losses",
    "ContrastiveDistillationLoss": "lion_st.losses",
    "FlopsRegularizer": "lion_st.losses",
    "build": "lion_st.models",
    "load": "lion_st.models",
    "paradigm_of": "lion_st.models",
    "LionTransformer": "lion_st.modules",
    "LlamaPooling": "lion_st.modules",
    "SpladeHead": "lion_st.modules",
}

# What README and messages use as `lion_st.hub.push`, without an import of its own.
_FOLDERS = (
    "data",
    "encoding",
    "evaluation",
    "hub",
    "indexes",
    "kernels",
    "losses",
    "modules",
    "retrieval",
    "training",
)

__all__ = [
    "CachedContrastiveDistillationLoss",
    "ContrastiveDistillationLoss",
    "FlopsRegularizer",
    "LionTransformer",
    "LlamaPooling",
    "SpladeHead",
    "__version__",
    "build",
    "export",
    "load",
    "paradigm_of",
    "splade_pool",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_FOLDERS])
