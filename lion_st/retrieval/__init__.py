"""From texts to ranked results: encoding, indexes, search, fusion and pruning."""

from __future__ import annotations

from lion_st.retrieval.bm25 import Bm25Retriever
from lion_st.retrieval.cluster import encode_corpus_on_ray
from lion_st.retrieval.describe import model_fingerprint, model_name
from lion_st.retrieval.encode import EncodedCorpus, encode_corpus, encode_texts
from lion_st.retrieval.explain import explain_score, top_terms
from lion_st.retrieval.fusion import convex_fusion, fit_convex_weights, reciprocal_rank_fusion
from lion_st.retrieval.indexes import ENGINES, Hits, Index, StorageError, create_index, load_index
from lion_st.retrieval.pipeline import index_corpus, recall_against, search_texts
from lion_st.retrieval.prune import Pruning
from lion_st.retrieval.retriever import HybridRetriever, ModelRetriever, Retriever
from lion_st.retrieval.vectors import Vectors, active_terms, to_csr, to_dense

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
    "load_index",
    "model_fingerprint",
    "model_name",
    "recall_against",
    "reciprocal_rank_fusion",
    "search_texts",
    "to_csr",
    "to_dense",
    "top_terms",
]
