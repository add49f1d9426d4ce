"""From texts to vectors: encoding of queries and corpora, shards, fingerprints of models.

The names below are imported on first use.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.encoding.encode import encode_corpus, encode_texts
    from lion_st.encoding.fingerprints import model_fingerprint, model_name
    from lion_st.encoding.loading import load_encoder
    from lion_st.encoding.on_ray import encode_corpus_on_ray
    from lion_st.encoding.shards import EncodedCorpus
    from lion_st.encoding.vectors import Vectors, active_dims, to_csr, to_dense

__all__ = [
    "EncodedCorpus",
    "Vectors",
    "active_dims",
    "encode_corpus",
    "encode_corpus_on_ray",
    "encode_texts",
    "load_encoder",
    "model_fingerprint",
    "model_name",
    "to_csr",
    "to_dense",
]

__getattr__, __dir__ = attach(__name__)
