"""From queries to ranked results: retrievers, search, fusion, BM25 and explanations.

The names below are imported on first use.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.indexes.fusion import convex_fusion, fit_convex_weights, reciprocal_rank_fusion
    from lion_st.retrieval.bm25 import Bm25Retriever
    from lion_st.retrieval.explain import explain_score, top_terms
    from lion_st.retrieval.hybrid import HybridRetriever
    from lion_st.retrieval.retriever import ModelRetriever, Retriever
    from lion_st.retrieval.search import index_corpus, search_run, search_texts

__all__ = [
    "Bm25Retriever",
    "HybridRetriever",
    "ModelRetriever",
    "Retriever",
    "convex_fusion",
    "explain_score",
    "fit_convex_weights",
    "index_corpus",
    "reciprocal_rank_fusion",
    "search_run",
    "search_texts",
    "top_terms",
]

__getattr__, __dir__ = attach(__name__)
