"""Dot products of embeddings in float32, whatever precision the embeddings come in.

Under bfloat16 or autocast a plain `queries @ documents.T` returns bfloat16: a score of 30 is rounded to a multiple of
1/8 before the softmax, which is more than many of the margins that the loss should see. Both functions accumulate and
return float32 and give gradients in the precision of the embeddings. They are also the `similarity_fct` to hand to
sentence-transformers' own losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers of one operand that are held in float32 at a time (64 MiB): 112 rows of Llama 3's 128,256 terms.
_BLOCK = 2**24


class _DotScores(torch.autograd.Function):
    """`queries @ cat(columns).T` in float32 that neither joins the columns nor copies an operand as a whole."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, *columns: Tensor) -> Tensor:
        ctx.save_for_backward(queries, *columns)
        rows = [len(documents) for documents in columns]
        scores = queries.new_zeros(len(queries), sum(rows), dtype=_score_dtype(queries, *columns))
        for block in _blocks(queries, *columns):
            q = queries[:, block].to(scores.dtype)
            for part, documents in zip(scores.split(rows, dim=1), columns, strict=True):
                part.addmm_(q, documents[:, block].to(scores.dtype).T)  # in place: autocast leaves it alone
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        queries, *columns = ctx.saved_tensors
        parts = gradient.split([len(documents) for documents in columns], dim=1)
        query_gradient, *column_gradients = (torch.empty_like(operand) for operand in ctx.saved_tensors)
        with torch.autocast(queries.device.type, enabled=False):
            for block in _blocks(queries, *columns):
                q = queries[:, block].to(gradient.dtype)
                total = torch.zeros_like(q)
                for part, documents, column_gradient in zip(parts, columns, column_gradients, strict=True):
                    total.addmm_(part, documents[:, block].to(gradient.dtype))
                    column_gradient[:, block] = part.T @ q
                query_gradient[:, block] = total
        return query_gradient, *column_gradients


def _blocks(*operands: Tensor) -> Iterator[slice]:
    """Slices of the dimensions in which no operand has more than `_BLOCK` numbers."""
    width = max(1, _BLOCK // max(1, *(len(operand) for operand in operands)))
    return (slice(start, start + width) for start in range(0, operands[0].shape[1], width))


def _score_dtype(*operands: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (operand.dtype for operand in operands), torch.float32)


def dot_scores_of_columns(queries: Tensor, columns: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Scores of every query and document, the documents given column by column.

    Args:
        queries: [N, D] embeddings.
        columns: 1 + n tensors of embeddings [B, D].
        scale: Factor on the scores, 1 / temperature.

    Returns:
        Scores [N, (1 + n) * B], float32 (float64 if an input is), column after column.
    """
    return scale * _DotScores.apply(queries, *columns)


def dot_scores(queries: Tensor, documents: Tensor, scale: float = 1.0) -> Tensor:
    """Scores s(q, d) = scale * q . d of every query and document, in float32.

    Args:
        queries: [N, D] embeddings.
        documents: [M, D] embeddings.
        scale: Factor on the scores, 1 / temperature.

    Returns:
        Scores [N, M], float32 (float64 if an input is).

    Example:
        ::

            MultipleNegativesRankingLoss(model, scale=100.0, similarity_fct=dot_scores)
    """
    return dot_scores_of_columns(queries, [documents], scale)


def pairwise_dot_scores(queries: Tensor, documents: Tensor, scale: float = 1.0) -> Tensor:
    """Scores s(q_i, d_i) = scale * q_i . d_i of paired rows, in float32.

    Args:
        queries: [N, D] embeddings.
        documents: [N, D] embeddings.
        scale: Factor on the scores, 1 / temperature.

    Returns:
        Scores [N], float32 (float64 if an input is).

    Example:
        ::

            MarginMSELoss(model, similarity_fct=partial(pairwise_dot_scores, scale=100.0))
    """
    dtype = _score_dtype(queries, documents)
    return scale * (queries.to(dtype) * documents.to(dtype)).sum(dim=-1)
