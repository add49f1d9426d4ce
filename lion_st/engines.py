"""The index engines by name and the settings of each: what the command line knows without importing one of them."""

from __future__ import annotations

from collections.abc import Iterable

# engine -> (kind of vectors -> class in lion_st.indexes)
ENGINES: dict[str, dict[str, str]] = {
    "exact": {
        "sparse": "exact_sparse.ExactSparseIndex",
        "dense": "exact_dense.ExactDenseIndex",
        "multi_vector": "exact_multi_vector.ExactMultiVectorIndex",
        "hybrid": "hybrid.HybridIndex",
    },
    "torch": {
        "sparse": "torch_sparse.TorchSparseIndex",
        "dense": "torch_dense.TorchDenseIndex",
        "hybrid": "hybrid.TorchHybridIndex",
    },
    "seismic": {"sparse": "seismic.SeismicIndex"},
    "faiss": {"dense": "faiss.FaissIndex"},
    "milvus": dict.fromkeys(("sparse", "dense", "hybrid"), "milvus.MilvusIndex"),
}
_BY_CLASS = {
    "exact_sparse.ExactSparseIndex": ("quantization",),
    "exact_dense.ExactDenseIndex": ("dtype",),
    "exact_multi_vector.ExactMultiVectorIndex": ("dtype",),
    "hybrid.HybridIndex": ("weights", "candidates"),
    "hybrid.TorchHybridIndex": ("weights", "candidates", "device", "memory_gb"),
    "torch_sparse.TorchSparseIndex": ("device", "memory_gb"),
    "torch_dense.TorchDenseIndex": ("device", "memory_gb"),
    "seismic.SeismicIndex": (
        "n_postings", "max_fraction", "summary_energy", "centroid_fraction", "query_cut", "heap_factor",
        "neighbours",
    ),
    "faiss.FaissIndex": (
        "kind", "neighbours", "ef_construction", "ef_search", "clusters", "probes", "code_bytes"
    ),
    "milvus.MilvusIndex": (
        "uri", "collection", "token", "rows_per_request", "dense_index_type", "candidates", "weights"
    ),
}  # fmt: skip


def engine_settings(engine: str, paradigm: str | None = None) -> list[str]:
    """The names of an engine's settings, which are the arguments of its class.

    Args:
        engine: A key of `ENGINES`.
        paradigm: "sparse", "dense", "multi_vector" or "hybrid" vectors; by default the settings for all it searches.
    """
    if engine not in ENGINES:
        raise ValueError(f"Unknown engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    if paradigm is not None and paradigm not in ENGINES[engine]:
        able = [name for name, classes in ENGINES.items() if paradigm in classes]
        raise ValueError(f"The engine {engine!r} does not search {paradigm!r} vectors: choose one of {able}.")
    classes = ENGINES[engine].values() if paradigm is None else [ENGINES[engine][paradigm]]
    return list(dict.fromkeys(name for one in classes for name in _BY_CLASS[one]))


def require_settings(engines: Iterable[str], given: Iterable[str], paradigm: str | None = None) -> None:
    """Refuse the name of a setting that none of some engines has.

    Args:
        engines: Keys of `ENGINES`, of which one will be used.
        given: Names of settings.
        paradigm: See `engine_settings`.
    """
    engines = list(engines)
    known = [name for engine in engines for name in engine_settings(engine, paradigm)]
    for name in given:
        if name not in known:
            of = f" for {paradigm} vectors" if paradigm else ""
            raise ValueError(f"{' and '.join(engines)} has no setting {name!r}{of}: choose from {', '.join(known)}.")
