"""Inner products of some pairs of a query and a document, summed in float64: for any device, and in Triton on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_st.kernels.dispatch import choose_backend

ENTRIES = 2**24  # numbers of documents that are written out at a time where there is no Triton


def dense_pair_scores(queries: Tensor, documents: Tensor, query: Tensor, document: Tensor) -> Tensor:
    """The inner products of pairs of rows, summed in float64.

    Args:
        queries: float32 [Q, D], contiguous.
        documents: float32 [N, D], contiguous.
        query: int64 [P], rows of `queries`.
        document: int64 [P], rows of `documents`.

    Returns:
        float32 [P].
    """
    scores = torch.empty(len(query), dtype=torch.float32, device=query.device)
    if len(query) and choose_backend(query.device) == "triton":
        from lion_st.kernels.triton_pair_scores import dense_pair_scores as score

        score(scores, queries, documents, query, document)
        return scores
    step = max(1, ENTRIES // queries.shape[1])
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        scores[part] = (queries[query[part]].double() * documents[document[part]].double()).sum(1).float()
    return scores


def sparse_pair_scores(
    queries: Tensor, starts: Tensor, terms: Tensor, values: Tensor, longest: int, query: Tensor, document: Tensor
) -> Tensor:
    """The inner products of pairs of a query and a document of term weights, summed in float64.

    Args:
        queries: float32 [Q, V], contiguous.
        starts: int64 [N + 1], where each document's terms begin.
        terms: int32 [entries].
        values: float32 [entries], their weights.
        longest: Terms of a document, at most.
        query: int64 [P], rows of `queries`.
        document: int64 [P], numbers of documents that have terms.

    Returns:
        float32 [P].
    """
    scores = torch.empty(len(query), dtype=torch.float32, device=query.device)
    if len(query) and choose_backend(query.device) == "triton":
        from lion_st.kernels.triton_pair_scores import sparse_pair_scores as score

        score(scores, queries, starts, terms, values, query, document)
        return scores
    lanes = torch.arange(longest, device=query.device)
    step = max(1, ENTRIES // max(1, longest))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        begin = starts[document[part], None]
        place = begin + lanes
        inside = place < starts[document[part] + 1, None]
        place = torch.where(inside, place, begin)
        products = queries[query[part, None], terms[place].long()].double() * values[place].double()
        scores[part] = torch.where(inside, products, 0.0).sum(1).float()
    return scores
