"""Static pruning: fewer terms per document, for a smaller and faster index at some loss of quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import keep_top_terms, select_entries, to_csr


@dataclass(frozen=True)
class Pruning:
    """What to keep of sparse vectors; both limits apply together.

    Args:
        top_terms: Keep at most this many terms of a text, the heaviest ones.
        threshold: Keep weights of at least this value.
    """

    top_terms: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.top_terms is not None and self.top_terms < 1:
            raise ValueError(f"top_terms is at least 1, got {self.top_terms}.")
        if self.threshold is not None and not 0 <= self.threshold < np.inf:
            raise ValueError(f"threshold is a finite weight of at least 0, got {self.threshold}.")

    def __str__(self) -> str:
        limits = [f"{name}={value:g}" for name, value in vars(self).items() if value is not None]
        return ", ".join(limits) or "none"

    def apply(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """Prune vectors [N, V]."""
        vectors = to_csr(vectors)
        if self.threshold is not None:
            vectors = select_entries(vectors, vectors.data >= self.threshold)
        return vectors if self.top_terms is None else keep_top_terms(vectors, self.top_terms)
