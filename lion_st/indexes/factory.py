"""Making an empty index and opening a saved one: the engine is chosen by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lion_st.encoding.snapshots import download_explained, local_folder
from lion_st.encoding.storage import HEADER, StorageError, read_folder
from lion_st.engines import ENGINES, engine_settings, require_settings
from lion_st.extras import has_seismic
from lion_st.files import is_hub_name
from lion_st.indexes.base import KIND, VERSION, Index, Paradigm


def create_index(engine: str, paradigm: Paradigm, **parameters: Any) -> Index:
    """Make an empty index.

    Args:
        engine: A key of `ENGINES`; for "seismic" see `present_engine`.
        paradigm: "sparse", "dense", "hybrid" (exact, torch, milvus) or "multi_vector" (exact).
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
    if (present := present_engine(engine)) != engine:
        engine, parameters = present, {}
    return engine_class(engine, paradigm)(paradigm, **parameters)


def present_engine(engine: str) -> str:
    """An engine, or what takes its place on platforms that it has no packages for: "exact" in that of "seismic".

    No approximate search takes Seismic's place: over the wide vectors of language models, exact search was as fast up
    to a million documents.

    Warns:
        UserWarning: If another engine takes its place.
    """
    if engine != "seismic" or has_seismic() or find_spec("seismic") is not None:
        return engine
    warnings.warn(
        "Seismic has no package for this platform (wheels are for x86-64 Linux with glibc 2.34, Python 3.10 to 3.12): "
        "the engine 'exact' takes its place, without settings, and finds all that is to be found.",
        stacklevel=3,
    )
    return "exact"


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


def load_index(
    path: str | Path, *, memory_map: bool = False, verify: bool = True, revision: str | None = None
) -> Index:
    """Load an index of any engine; see `Index.load`.

    Args:
        path: Folder of the index, or the name of a data set on the Hub, `owner/name`, see `index_folder`.
        memory_map: Leave large arrays on disk and read them as they are touched.
        verify: Compare the checksums of all files; their sizes, and the checksums of small ones, always are. With it
            engines also check that large files lead nowhere outside of themselves: leave it on for what others made.
        revision: Commit, tag or branch of the data set; main by default.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a data set.
        StorageError: If what is there is damaged, or is not an index that may be read.

    Example:
        ::

            load_index("org/scifact-index", revision="v1").search(vectors, k=10)
    """
    with download_explained(path):
        folder = index_folder(path, revision)
        return _saved_class(folder).load(folder, memory_map=memory_map, verify=verify)


def index_folder(place: str | Path, revision: str | None = None) -> Path:
    """The local folder of an index, downloaded from the Hub if there is no such folder and it is not cached.

    Args:
        place: A folder, or the name of a data set that `lion_st.hub.publish_index` published.
        revision: Commit, tag or branch of the data set; main by default.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a data set.
        ValueError: If a revision is given for a folder.
        StorageError: If the data set holds no index, or one of an engine whose files are not read from elsewhere.
    """
    folder = local_folder(place, (HEADER, "data-*"), revision)
    if is_hub_name(place):
        require_portable(place, folder)
    return folder


def require_portable(place: str | Path, folder: Path) -> None:
    """Refuse an index whose files are of no use, or not safe to read, on another machine."""
    cls = _saved_class(folder)
    if cls.not_portable is not None:
        raise StorageError(
            f"{str(place)!r} is an index of the engine {cls.engine!r}, {cls.not_portable}. Publish the encoded corpus, "
            "of which `lion-st index` builds an index of any engine."
        )


def _saved_class(folder: Path) -> Any:
    """The class of a saved index."""
    engine, paradigm = read_folder(
        folder, KIND, VERSION, lambda metadata, _: (metadata["engine"], metadata["paradigm"]), verify=False
    )
    return engine_class(engine, paradigm)


def engine_class(engine: str, paradigm: Paradigm) -> Any:
    """The class of an engine that searches a kind of vectors."""
    engine_settings(engine, paradigm)
    module, name = ENGINES[engine][paradigm].split(".")
    return getattr(import_module(f"lion_st.indexes.{module}"), name)
