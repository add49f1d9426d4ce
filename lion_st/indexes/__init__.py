"""Indexes behind one small protocol (add, save, load, search, stats); the engine is chosen by name."""

from lion_st.encoding.storage import StorageError
from lion_st.engines import ENGINES
from lion_st.indexes.base import Hits, Index, LocalIndex, Paradigm
from lion_st.indexes.factory import create_index, engine_for, index_folder, load_index, present_engine
from lion_st.indexes.frequencies import DocumentFrequencies
from lion_st.indexes.pruning import Pruning

__all__ = [
    "ENGINES",
    "DocumentFrequencies",
    "Hits",
    "Index",
    "LocalIndex",
    "Paradigm",
    "Pruning",
    "StorageError",
    "create_index",
    "engine_for",
    "index_folder",
    "load_index",
    "present_engine",
]
