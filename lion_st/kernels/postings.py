"""Adding posting lists to the scores of a batch of queries: for any device, and in Triton on GPUs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lion_st.kernels.dispatch import choose_backend

STEP = 2**22  # postings that are written out at a time where there is no Triton


class Postings(NamedTuple):
    """Lists of documents by term.

    Attributes:
        starts: int64 [V + 1], where each term's postings begin.
        documents: int32 [P], document numbers, rising inside a term.
        values: float32 [P], weights.
    """

    starts: Tensor
    documents: Tensor
    values: Tensor


def add_postings(scores: Tensor, postings: Postings, rows: Tensor, terms: Tensor, weights: Tensor) -> None:
    """Add `weights[pair] * value` to `scores[rows[pair], document]` for all postings of `terms[pair]`.

    Args:
        scores: float32 [Q, N], changed in place; sums of one score are taken in no fixed order.
        postings: Of N documents or fewer.
        rows: int64 [pairs], rows of `scores`.
        terms: int64 [pairs].
        weights: float32 [pairs].
    """
    if not (rows.numel() and postings.documents.numel()):
        return
    if choose_backend(scores.device) == "triton":
        from lion_st.kernels.triton_postings import add_postings as add
    else:
        add = _add_postings
    add(scores, postings, rows, terms, weights)


def _add_postings(scores: Tensor, postings: Postings, rows: Tensor, terms: Tensor, weights: Tensor) -> None:
    counts = postings.starts[terms + 1] - postings.starts[terms]
    ends = counts.cumsum(0)
    flat = scores.view(-1)
    # Slices of the pairs with about STEP postings together, a longer list alone.
    marks = torch.arange(STEP, int(ends[-1]) + STEP, STEP, device=ends.device)
    stops = torch.unique(torch.searchsorted(ends, marks, right=True).clamp(max=len(ends)))
    start = 0
    for stop in [*stops.tolist(), len(ends)]:
        if stop == start:
            continue
        own = slice(start, stop)
        pair = torch.repeat_interleave(torch.arange(start, stop, device=ends.device), counts[own])
        first = ends[start] - counts[start]
        position = (postings.starts[terms] - ends + counts)[pair] + first
        position += torch.arange(len(pair), device=ends.device)
        places = rows[pair] * scores.shape[1] + postings.documents[position]
        flat.index_add_(0, places, postings.values[position] * weights[pair])
        start = stop
