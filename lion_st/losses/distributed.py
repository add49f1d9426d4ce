"""What the losses exchange between data-parallel ranks.

The trainer averages parameter gradients over ranks. A loss is therefore the same function of the global batch at every
world size if each rank's value is the mean of its own share, and if whatever a rank's share does to embeddings of
other ranks flows back to them as a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.util import get_rank, get_world_size
from torch import Tensor
from torch.nn.functional import pad

from lion_st.losses.scoring import scores_of_columns


class _AllGather(torch.autograd.Function):
    """[N, ...] of each rank -> [W * N, ...] of all; the gradient of a row is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


class _AllToAll(torch.autograd.Function):
    """[W, ...] -> [W, ...]: slice w goes to rank w, and what comes back is slice `rank` of each rank."""

    @staticmethod
    def forward(ctx: Any, slices: Tensor) -> Tensor:
        received = torch.empty_like(slices, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, slices.contiguous())
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _AllToAll.apply(gradient)


class _MeanAcrossRanks(torch.autograd.Function):
    """Mean over ranks; the gradient passes unchanged, because the trainer's own average is the 1 / W."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total / get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def mean_across_ranks(value: Tensor, shrink_gradient: bool = False) -> Tensor:
    """The mean of every rank's value, with the gradient that makes it invariant to the world size.

    Args:
        value: Any shape, the same on all ranks: the mean over the rank's own rows.
        shrink_gradient: Divide the gradient by the number of ranks, as the released code does.

    Returns:
        The mean, on every rank.
    """
    if get_world_size() == 1:
        return value
    mean = _MeanAcrossRanks.apply(value)
    if shrink_gradient:
        share = 1 / get_world_size()
        mean = share * mean + ((1 - share) * mean).detach()
    return mean


def scores_of_all_documents(queries: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Scores of this rank's queries against the documents of all ranks.

    The queries travel, and the scores come back: each rank scores everybody's queries against its own documents. What
    a rank receives is W * B query rows in place of W * B * (1 + n) document rows. With 16 negatives, V = 128,256 and
    bfloat16, 8 ranks of 14 queries each hold 29 MB in place of 488 MB, and the gradients travel as little.

    Args:
        queries: [B, D], the rank's own; or [B, L, D], see `scores_of_columns`, of any length L on each rank.
        columns: 1 + n tensors [B, D] or [B, L', D], the rank's own documents.

    Returns:
        Scores [B, W * (1 + n) * B] in float32: rank after rank, and for each of them column after column.

    Raises:
        ValueError: If the ranks do not hold the same shapes.
    """
    world_size = get_world_size()
    if world_size == 1:
        return scores_of_columns(queries, columns)
    _check_same_shapes(queries, columns)
    if queries.ndim == 3:
        queries = pad(queries, (0, 0, 0, _longest(queries) - queries.shape[1]))
    scores = scores_of_columns(_AllGather.apply(queries), columns)  # [W * B, (1 + n) * B]
    received = _AllToAll.apply(scores.unflatten(0, (world_size, -1)))  # [W, B, (1 + n) * B]
    return received.transpose(0, 1).flatten(1)


def _longest(queries: Tensor) -> int:
    """The most tokens that the queries [B, L, D] of any rank are padded to."""
    length = torch.tensor(queries.shape[1], device=queries.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    return int(length)


def _check_same_shapes(queries: Tensor, columns: Sequence[Tensor]) -> None:
    # Collectives of unequal shapes hang or return garbage, so a few bytes and a wait are spent on an error.
    # In every step: a rank whose own shapes are those of the step before cannot know that another's are not.
    own = torch.tensor([len(queries), queries.shape[-1], len(columns)], device=queries.device)
    shapes = own.new_empty(get_world_size() * len(own))
    dist.all_gather_into_tensor(shapes, own)
    by_rank = shapes.view(-1, len(own)).tolist()
    if any(shape != by_rank[0] for shape in by_rank):
        seen = "; ".join(f"{b} x {n} of {d} dimensions" for b, d, n in by_rank)
        raise ValueError(
            f"Every rank must hold as many queries and document columns, but rank by rank they are: {seen} (this is "
            f"rank {get_rank()}). Set dataloader_drop_last=True, and train on data sets with as many negatives each "
            "or pass gather_across_devices=False."
        )
