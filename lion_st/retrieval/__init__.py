"""From queries to ranked results: retrievers, search, fusion, BM25 and explanations.

The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion_st.retrieval.bm25 import Bm25Retriever
    from lion_st.retrieval.explain import explain_score, top_terms
    from lion_st.retrieval.fusion import convex_fusion, fit_convex_weights, reciprocal_rank_fusion
    from lion_st.retrieval.retriever import HybridRetriever, ModelRetriever, Retriever
    from lion_st.retrieval.search import index_corpus, recall_against, search_run, search_texts

_HOME = {
    "Bm25Retriever": "bm25",
    "HybridRetriever": "retriever",
    "ModelRetriever": "retriever",
    "Retriever": "retriever",
    "convex_fusion": "fusion",
    "explain_score": "explain",
    "fit_convex_weights": "fusion",
    "index_corpus": "search",
    "recall_against": "search",
    "reciprocal_rank_fusion": "fusion",
    "search_run": "search",
    "search_texts": "search",
    "top_terms": "explain",
}

__all__ = [
    "Bm25Retriever",
    "HybridRetriever",
    "ModelRetriever",
    "Retriever",
    "convex_fusion",
    "explain_score",
    "fit_convex_weights",
    "index_corpus",
    "recall_against",
    "reciprocal_rank_fusion",
    "search_run",
    "search_texts",
    "top_terms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
