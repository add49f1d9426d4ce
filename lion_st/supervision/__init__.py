"""What a training learns from: hard negatives, and teachers' scores of them.

The names below are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.supervision.mining import IndexSearcher, mine_negatives

__all__ = [
    "IndexSearcher",
    "mine_negatives",
]

__getattr__, __dir__ = attach(__name__)
