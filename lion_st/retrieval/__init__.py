"""From texts to ranked results: encoding, indexes, search, fusion and pruning.

The names below are imported on first use, each engine only where it is chosen.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion_st.retrieval.bm25 import Bm25Retriever
    from lion_st.retrieval.cluster import encode_corpus_on_ray
    from lion_st.retrieval.describe import model_fingerprint, model_name
    from lion_st.retrieval.encode import EncodedCorpus, encode_corpus, encode_texts
    from lion_st.retrieval.explain import explain_score, top_terms
    from lion_st.retrieval.fusion import convex_fusion, fit_convex_weights, reciprocal_rank_fusion
    from lion_st.retrieval.indexes import ENGINES, Hits, Index, StorageError, create_index, load_index
    from lion_st.retrieval.loading import load_encoder
    from lion_st.retrieval.pipeline import index_corpus, recall_against, search_run, search_texts
    from lion_st.retrieval.prune import Pruning
    from lion_st.retrieval.retriever import HybridRetriever, ModelRetriever, Retriever
    from lion_st.retrieval.vectors import Vectors, active_terms, to_csr, to_dense

_HOME = {
    "ENGINES": "indexes",
    "Bm25Retriever": "bm25",
    "EncodedCorpus": "encode",
    "Hits": "indexes",
    "HybridRetriever": "retriever",
    "Index": "indexes",
    "ModelRetriever": "retriever",
    "Pruning": "prune",
    "Retriever": "retriever",
    "StorageError": "indexes",
    "Vectors": "vectors",
    "active_terms": "vectors",
    "convex_fusion": "fusion",
    "create_index": "indexes",
    "encode_corpus": "encode",
    "encode_corpus_on_ray": "cluster",
    "encode_texts": "encode",
    "explain_score": "explain",
    "fit_convex_weights": "fusion",
    "index_corpus": "pipeline",
    "load_encoder": "loading",
    "load_index": "indexes",
    "model_fingerprint": "describe",
    "model_name": "describe",
    "recall_against": "pipeline",
    "reciprocal_rank_fusion": "fusion",
    "search_run": "pipeline",
    "search_texts": "pipeline",
    "to_csr": "vectors",
    "to_dense": "vectors",
    "top_terms": "explain",
}

__all__ = [
    "ENGINES",
    "Bm25Retriever",
    "EncodedCorpus",
    "Hits",
    "HybridRetriever",
    "Index",
    "ModelRetriever",
    "Pruning",
    "Retriever",
    "StorageError",
    "Vectors",
    "active_terms",
    "convex_fusion",
    "create_index",
    "encode_corpus",
    "encode_corpus_on_ray",
    "encode_texts",
    "explain_score",
    "fit_convex_weights",
    "index_corpus",
    "load_encoder",
    "load_index",
    "model_fingerprint",
    "model_name",
    "recall_against",
    "reciprocal_rank_fusion",
    "search_run",
    "search_texts",
    "to_csr",
    "to_dense",
    "top_terms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
