"""Scores of embeddings in float32, dot products or MaxSim, whatever precision the embeddings come in.

Under bfloat16 or autocast a plain `queries @ documents.T` returns bfloat16: a score of 30 is rounded to a multiple of
1/8 before the softmax, which is more than many of the margins that the loss should see. The functions here accumulate
and return float32 and give gradients in the precision of the embeddings. They are also the `similarity_fct` to hand to
sentence-transformers' own losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.scoring import colbert_scores, colbert_scores_pairwise
from sentence_transformers.util import maxsim
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

# Numbers of one operand that are held in float32 at a time (64 MiB): 112 rows of Llama 3's 128,256 terms.
_BLOCK = 2**24
# Products of query and document tokens that are held at a time (256 MiB).
_TOKEN_PRODUCTS = 2**26


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
    return scale * _DotScores.apply(queries, documents)


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


def scores_of_columns(queries: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """Scores of every query and document: dot products of vectors, MaxSim where a text has several.

    Of MaxSim only the scores are kept for the backward pass, in which the products of tokens are computed once more.

    Args:
        queries: [N, D], or [N, L, D] in which a token of zeros does not count.
        columns: 1 + n tensors [B, D], or [B, L', D] of any lengths L'.

    Returns:
        Scores [N, (1 + n) * B], float32 (float64 dot products if an input is), column after column.
    """
    if queries.ndim == 2:
        return _DotScores.apply(queries, *columns)
    return torch.cat([_max_sim(queries, documents) for documents in columns], dim=1)


def cat_texts(parts: Sequence[Tensor]) -> Tensor:
    """Embeddings [B_i, D] or [B_i, L_i, D] one after the other, the latter filled up with zeros to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([part if part.ndim == 2 else pad(part, (0, 0, 0, longest - part.shape[1])) for part in parts])


def maxsim_scores(queries: Tensor, documents: Tensor, **masks: Any) -> Tensor:
    """sentence-transformers' `colbert_scores` in float32: the `similarity_fct` of its multi-vector losses."""
    return _in_float32(colbert_scores, queries, documents, **masks)


def pairwise_maxsim_scores(queries: Tensor, documents: Tensor, scale: float = 1.0, **masks: Any) -> Tensor:
    """sentence-transformers' `colbert_scores_pairwise` in float32, times `scale`."""
    return scale * _in_float32(colbert_scores_pairwise, queries, documents, **masks)


def _in_float32(function: Any, queries: Tensor, documents: Tensor, **masks: Any) -> Tensor:
    dtype = _score_dtype(queries, documents)
    with torch.autocast(queries.device.type, enabled=False):
        return function(queries.to(dtype), documents.to(dtype), **masks)


def _max_sim(queries: Tensor, documents: Tensor) -> Tensor:
    """MaxSim [N, B] of queries [N, L, D] and documents [B, L', D], some queries at a time; zeros count as padding."""
    products = queries.shape[1] * documents.shape[0] * documents.shape[1]
    parts = queries.split(max(1, _TOKEN_PRODUCTS // max(1, products)))
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    scores: list[Any] = [checkpoint(_in_float32, maxsim, part, documents, **options) for part in parts]
    return torch.cat(scores)
