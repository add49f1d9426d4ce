"""Inner products of pairs in float64 on a GPU: a program takes one pair, whose numbers it reads once.

Written out in torch, gathered and widened numbers pass through memory about 17 times.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def dense_pair_scores_kernel(
    scores, queries, documents, query, document, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See `lion_st.kernels.pair_scores.dense_pair_scores`; rows have `stride` numbers."""
    pair = tl.program_id(0)
    own = queries + tl.load(query + pair) * stride
    other = documents + tl.load(document + pair) * stride
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, stride, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < stride
        left = tl.load(own + place, mask=inside, other=0.0).to(tl.float64)
        right = tl.load(other + place, mask=inside, other=0.0).to(tl.float64)
        total += left * right
    tl.store(scores + pair, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def sparse_pair_scores_kernel(
    scores, queries, starts, terms, values, query, document, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """See `lion_st.kernels.pair_scores.sparse_pair_scores`; queries have `stride` numbers."""
    pair = tl.program_id(0)
    own = queries + tl.load(query + pair) * stride
    row = tl.load(document + pair)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    while begin < end:
        place = begin + tl.arange(0, BLOCK)
        inside = place < end
        term = tl.load(terms + place, mask=inside, other=0)
        left = tl.load(own + term, mask=inside, other=0.0).to(tl.float64)
        right = tl.load(values + place, mask=inside, other=0.0).to(tl.float64)
        total += left * right
        begin += BLOCK
    tl.store(scores + pair, tl.sum(total, axis=0).to(tl.float32))


def dense_pair_scores(scores: Tensor, queries: Tensor, documents: Tensor, query: Tensor, document: Tensor) -> None:
    """Fill in the scores [P]; see `lion_st.kernels.pair_scores.dense_pair_scores`."""
    dense_pair_scores_kernel[(len(query),)](
        scores, queries, documents, query, document, queries.shape[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def sparse_pair_scores(
    scores: Tensor, queries: Tensor, starts: Tensor, terms: Tensor, values: Tensor, query: Tensor, document: Tensor
) -> None:
    """Fill in the scores [P]; see `lion_st.kernels.pair_scores.sparse_pair_scores`."""
    sparse_pair_scores_kernel[(len(query),)](
        scores, queries, starts, terms, values, query, document, queries.shape[1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
