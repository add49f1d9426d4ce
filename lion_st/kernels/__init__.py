"""The sparse head's kernels: one function, several backends."""

from __future__ import annotations

from lion_st.kernels.dispatch import choose_backend
from lion_st.kernels.pool import check_finite, splade_pool
from lion_st.kernels.reference import splade_pool_reference

__all__ = ["check_finite", "choose_backend", "splade_pool", "splade_pool_reference"]
