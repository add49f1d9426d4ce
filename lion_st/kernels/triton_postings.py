"""Posting lists added to scores on a GPU.

A program takes one query's list of one term. The pairs come query by query, so that the programs that run at the same
time add to the scores of a few queries, which lie in the second-level cache, where the additions take place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lion_st.kernels.postings import Postings

BLOCK = 512


@triton.jit
def add_postings_kernel(
    scores, stride, starts, documents, values, rows, terms, weights,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See `lion_st.kernels.postings.add_postings`; scores have `stride` columns."""
    pair = tl.program_id(0)
    term = tl.load(terms + pair)
    begin = tl.load(starts + term)
    end = tl.load(starts + term + 1)
    weight = tl.load(weights + pair)
    own = scores + tl.load(rows + pair) * stride
    while begin < end:
        position = begin + tl.arange(0, BLOCK)
        inside = position < end
        document = tl.load(documents + position, mask=inside, other=0)
        value = tl.load(values + position, mask=inside, other=0.0)
        tl.atomic_add(own + document, value * weight, mask=inside, sem="relaxed")
        begin += BLOCK


def add_postings(scores: Tensor, postings: Postings, rows: Tensor, terms: Tensor, weights: Tensor) -> None:
    """See `lion_st.kernels.postings.add_postings`."""
    add_postings_kernel[(rows.numel(),)](
        scores, scores.shape[1], postings.starts, postings.documents, postings.values, rows, terms, weights,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
