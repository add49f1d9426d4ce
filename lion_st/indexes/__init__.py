"""Indexes behind one small protocol (add, save, load, search, stats); the engine is chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lion_st.encoding.storage import StorageError, read_folder
from lion_st.engines import ENGINES, engine_settings, require_settings
from lion_st.indexes.base import KIND, VERSION, Hits, Index, LocalIndex, Paradigm
from lion_st.indexes.pruning import Pruning

__all__ = [
    "ENGINES",
    "Hits",
    "Index",
    "LocalIndex",
    "Paradigm",
    "Pruning",
    "StorageError",
    "create_index",
    "engine_for",
    "load_index",
]


def create_index(engine: str, paradigm: Paradigm, **parameters: Any) -> Index:
    """Make an empty index.

    Args:
        engine: A key of `ENGINES`.
        paradigm: "sparse", "dense" or, with milvus, "hybrid".
        parameters: The engine's own settings, see its class.

    Raises:
        ValueError: For an unknown engine or setting, or an engine that does not search this paradigm.

    Example:
        >>> index = create_index("exact", "sparse")
        >>> index.add(["d1", "d2"], [[0.0, 1.5, 0.0], [0.5, 0.5, 0.0]])
        >>> index.search([[1.0, 1.0, 0.0]], k=1)
        [[('d1', 1.5)]]
    """
    require_settings([engine], parameters, paradigm)
    return _engine_class(engine, paradigm)(paradigm, **parameters)


def engine_for(engines: str | Sequence[str], paradigm: str) -> str:
    """The first of some engines that searches a kind of vectors.

    Raises:
        ValueError: If none does, or one is unknown.

    Example:
        >>> engine_for(["seismic", "faiss"], "dense")
        'faiss'
    """
    names = [engines] if isinstance(engines, str) else list(engines)
    for name in names:
        engine_settings(name)
    able = [name for name in names if paradigm in ENGINES[name]]
    if not able:
        engine_settings(names[0], paradigm)
    return able[0]


def load_index(path: str | Path, *, memory_map: bool = False, verify: bool = True) -> Index:
    """Load an index of any engine; see `Index.load`."""
    engine, paradigm = read_folder(
        path, KIND, VERSION, lambda metadata, _: (metadata["engine"], metadata["paradigm"]), verify=False
    )
    cls = _engine_class(engine, paradigm)
    return cls.load(path, memory_map=memory_map, verify=verify)


def _engine_class(engine: str, paradigm: str) -> Any:
    engine_settings(engine, paradigm)
    module, name = ENGINES[engine][paradigm].split(".")
    return getattr(import_module(f"lion_st.indexes.{module}"), name)
