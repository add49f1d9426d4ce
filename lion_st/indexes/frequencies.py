"""In how many documents of a collection each term is active, and query weights made of that."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import to_csr


class DocumentFrequencies:
    """Counts, over the sparse vectors of a collection, in how many documents each term is active.

    Args:
        documents: N, how many there are.
        counts: int64 [V], in how many of them each term is active.
    """

    def __init__(self, documents: int = 0, counts: np.ndarray | None = None) -> None:
        self.documents = documents
        self.counts = np.zeros(0, np.int64) if counts is None else counts

    def add(self, vectors: sparse.csr_array) -> None:
        """Count the vectors [N, V] of further documents."""
        matrix = to_csr(vectors)
        counts = np.bincount(matrix.indices, minlength=matrix.shape[1])
        self.counts = counts if self.documents == 0 else self.counts + counts
        self.documents += matrix.shape[0]

    def weigh(self, queries: sparse.csr_array) -> sparse.csr_array:
        """Multiply the weights of queries [Q, V] by 1 + ln((N + 1) / (n + 1)), n the documents of N that have the term.

        That is the smoothed inverse document frequency of scikit-learn's TfidfTransformer: at least 1, so that no term
        is lost. Without documents the weights stay.

        Raises:
            ValueError: If the documents have another number of terms.
        """
        queries = to_csr(queries)
        if not self.documents:
            return queries
        if queries.shape[1] != len(self.counts):
            raise ValueError(
                f"The documents have {len(self.counts):,} terms and the queries {queries.shape[1]:,}: encode both with "
                "one model."
            )
        idf = 1 + np.log((self.documents + 1) / (self.counts + 1))
        data = queries.data * idf.astype(queries.dtype)[queries.indices]
        return sparse.csr_array((data, queries.indices, queries.indptr), shape=queries.shape)
