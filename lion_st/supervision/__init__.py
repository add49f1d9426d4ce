"""What a training learns from: hard negatives, and teachers' scores of them.

The names below are imported on first use.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.supervision.mining import IndexSearcher, mine_negatives
    from lion_st.supervision.scoring import teach
    from lion_st.supervision.teachers import Bm25, Encoder, Reranker, load_teacher

__all__ = [
    "Bm25",
    "Encoder",
    "IndexSearcher",
    "Reranker",
    "load_teacher",
    "mine_negatives",
    "teach",
]

__getattr__, __dir__ = attach(__name__)
