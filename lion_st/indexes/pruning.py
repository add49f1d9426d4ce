"""Static pruning: fewer terms per document or query, for a smaller and faster index at some loss of quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import keep_top_terms, rows_of, select_entries, to_csr


@dataclass(frozen=True)
class Pruning:
    """What to keep of sparse vectors; several limits apply together.

    Args:
        top_terms: Keep at most this many terms of a text, the heaviest ones.
        max_ratio: Keep weights of at least this share of the text's largest weight.
        threshold: Keep weights of at least this value.
        term_quantile: Drop this share of each term's smallest weights (thresholds by term).
    """

    top_terms: int | None = None
    max_ratio: float | None = None
    threshold: float | None = None
    term_quantile: float | None = None

    def __post_init__(self) -> None:
        if self.top_terms is not None and self.top_terms < 1:
            raise ValueError(f"top_terms is at least 1, got {self.top_terms}.")
        for name in ("max_ratio", "term_quantile"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is a share of at least 0 and below 1, got {value}.")
        if self.threshold is not None and not 0 <= self.threshold < np.inf:
            raise ValueError(f"threshold is a finite weight of at least 0, got {self.threshold}.")

    def __str__(self) -> str:
        limits = [f"{name}={value:g}" for name, value in vars(self).items() if value is not None]
        return ", ".join(limits) or "none"

    def apply(self, vectors: sparse.csr_array, thresholds: np.ndarray | None = None) -> sparse.csr_array:
        """Prune vectors [N, V].

        Args:
            vectors: Rows of term weights.
            thresholds: [V], the weights below which `term_quantile` drops, see `term_thresholds`; by default taken over
                these rows, which must then be all there are.
        """
        vectors = to_csr(vectors)
        if self.term_quantile is not None:
            if thresholds is None:
                thresholds = term_thresholds(vectors, self.term_quantile)
            vectors = drop_below(vectors, thresholds)
        if self.threshold is not None:
            vectors = drop_below(vectors, self.threshold)
        if self.max_ratio is not None:
            vectors = keep_max_ratio(vectors, self.max_ratio)
        if self.top_terms is not None:
            vectors = keep_top_terms(vectors, self.top_terms)
        return vectors


def keep_max_ratio(vectors: sparse.csr_array, ratio: float) -> sparse.csr_array:
    """Keep weights of at least `ratio` times the largest weight of their row."""
    largest = vectors.max(axis=1).toarray().ravel() if vectors.nnz else np.zeros(vectors.shape[0])
    return select_entries(vectors, vectors.data >= ratio * largest[rows_of(vectors)])


def drop_below(vectors: sparse.csr_array, threshold: float | np.ndarray) -> sparse.csr_array:
    """Keep weights of at least `threshold`, one number or one per term [V]."""
    floor = threshold[vectors.indices] if isinstance(threshold, np.ndarray) else threshold
    return select_entries(vectors, vectors.data >= floor)


def term_thresholds(vectors: sparse.csr_array, quantile: float) -> np.ndarray:
    """The weight [V] below which the given share of each term's weights lies."""
    columns = vectors.tocsc()
    thresholds = np.zeros(vectors.shape[1], dtype=np.float32)
    for term in np.flatnonzero(np.diff(columns.indptr)):
        weights = columns.data[columns.indptr[term] : columns.indptr[term + 1]]
        thresholds[term] = np.partition(weights, int(quantile * weights.size))[int(quantile * weights.size)]
    return thresholds
