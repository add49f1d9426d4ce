"""From texts to vectors: encoding of queries and corpora, shards, fingerprints of models.

The names below are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion_st.encoding.encode import EncodedCorpus, encode_corpus, encode_texts
    from lion_st.encoding.fingerprints import model_fingerprint, model_name
    from lion_st.encoding.loading import load_encoder
    from lion_st.encoding.on_ray import encode_corpus_on_ray
    from lion_st.encoding.vectors import Vectors, active_terms, to_csr, to_dense

_HOME = {
    "EncodedCorpus": "encode",
    "Vectors": "vectors",
    "active_terms": "vectors",
    "encode_corpus": "encode",
    "encode_corpus_on_ray": "on_ray",
    "encode_texts": "encode",
    "load_encoder": "loading",
    "model_fingerprint": "fingerprints",
    "model_name": "fingerprints",
    "to_csr": "vectors",
    "to_dense": "vectors",
}

__all__ = [
    "EncodedCorpus",
    "Vectors",
    "active_terms",
    "encode_corpus",
    "encode_corpus_on_ray",
    "encode_texts",
    "load_encoder",
    "model_fingerprint",
    "model_name",
    "to_csr",
    "to_dense",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
