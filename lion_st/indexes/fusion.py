"""Hybrid search: one ranking out of several, whatever engines made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lion_st.errors import as_weights, require_list, require_type
from lion_st.indexes.base import Hits


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Hits]], k: int = 10, rank_constant: int = 60) -> list[Hits]:
    """Fuse by the sum of 1 / (rank_constant + rank) (Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        rankings: One list of hits per query from each retriever.
        k: Documents per query in the result.
        rank_constant: How slowly a rank's worth falls.

    Returns:
        Hits per query, best first, equal scores by rising id.

    Example:
        >>> reciprocal_rank_fusion([[[("a", 9.0), ("b", 8.0)]], [[("b", 0.7)]]], k=1)[0][0][0]
        'b'
    """
    return _fuse(rankings, k, lambda hits: {doc: 1 / (rank_constant + rank) for rank, (doc, _) in enumerate(hits, 1)})


def convex_fusion(rankings: Sequence[Sequence[Hits]], weights: Sequence[float], k: int = 10) -> list[Hits]:
    """Fuse by the weighted mean of min-max normalised scores (Bruch, Gai and Ingber, TOIS 2023).

    Each query's scores of a retriever are mapped to 0..1; a document that the retriever did not return counts as 0.

    Args:
        rankings: One list of hits per query from each retriever.
        weights: One weight per retriever, at least 0 and not all 0; only their ratios matter.
        k: Documents per query in the result.

    Returns:
        Hits per query, best first, equal scores by rising id.

    Raises:
        ValueError: If weights and rankings do not fit.
    """
    _require_rankings(rankings)
    require_weights(weights, len(rankings))
    total = float(sum(weights))
    shares = [float(weight) / total for weight in weights]
    scaled = [
        [[(doc, share * score) for doc, score in _normalised(hits).items()] for hits in ranking]
        for ranking, share in zip(rankings, shares, strict=True)
    ]
    return _fuse(scaled, k, dict)


def require_weights(weights: Sequence[float], count: int) -> None:
    """Raise a ValueError unless there are `count` weights, finite and at least 0, of which one is above 0."""
    if as_weights(weights, count) is None:
        raise ValueError(f"Give one finite weight >= 0 for each of the {count} rankings, not all 0; got {weights!r}.")


def fit_convex_weights(
    rankings: Sequence[Sequence[Hits]],
    queries: Sequence[str],
    measure: Callable[[Mapping[str, Mapping[str, float]]], float],
    steps: int = 20,
    k: int = 100,
) -> tuple[tuple[float, float], float]:
    """Choose the weights of two retrievers that score best on a development set.

    Args:
        rankings: Hits of the two retrievers per query.
        queries: Ids of the queries.
        measure: Value of a run (query -> document -> score), such as
            `lambda run: evaluate_run(qrels, run, ["nDCG@10"])["nDCG@10"]`.
        steps: The first weight is tried at 0, 1/steps, ..., 1.
        k: Depth of the fused runs.

    Returns:
        The weights, summing to 1, and their value; of equally good ones those nearest to 1/2.

    Raises:
        ValueError: If there are not exactly two rankings.
    """
    _require_rankings(rankings)
    require_list(queries, "ids of queries")
    if len(rankings) != 2:
        raise ValueError(f"Weights are fitted for two retrievers, got {len(rankings)}.")
    best: tuple[float, float, float] | None = None
    for step in range(steps + 1):
        weight = step / steps
        fused = convex_fusion(rankings, (weight, 1 - weight), k)
        value = measure(hits_to_run(queries, fused))
        candidate = (value, -abs(weight - 0.5), weight)
        best = candidate if best is None else max(best, candidate)
    assert best is not None
    return (best[2], 1 - best[2]), best[0]


def hits_to_run(queries: Iterable[str], hits: Iterable[Hits]) -> dict[str, dict[str, float]]:
    """Pair query ids with the lists that a search returned."""
    return {query: dict(found) for query, found in zip(queries, hits, strict=True)}


def _require_rankings(rankings: Any) -> None:
    """Raise a TypeError unless each retriever gives a list of hits per query."""
    remedy = "pass what index.search returns of each retriever; lion_st.evaluation.fuse_runs takes runs"
    require_type(rankings, list | tuple, "A list of rankings", remedy)
    for ranking in rankings:
        require_type(ranking, list | tuple, "A list of hits per query", remedy)
        for hits in ranking:
            require_type(hits, list | tuple, "A list of (document, score)", remedy)


def _normalised(hits: Hits) -> dict[str, float]:
    if not hits:
        return {}
    scores = [score for _, score in hits]
    low, high = min(scores), max(scores)
    if high == low:
        return {doc: 1.0 for doc, _ in hits}
    return {doc: (score - low) / (high - low) for doc, score in hits}


def _fuse(rankings: Sequence[Sequence[Hits]], k: int, score: Callable[[Hits], Mapping[str, float]]) -> list[Hits]:
    if k < 1:
        raise ValueError(f"k is at least 1, got {k}.")
    _require_rankings(rankings)
    if len({len(ranking) for ranking in rankings}) != 1:
        raise ValueError(f"All rankings answer the same queries, got {[len(ranking) for ranking in rankings]} of them.")
    fused = []
    for hits_of_query in zip(*rankings, strict=True):
        totals: dict[str, float] = {}
        for hits in hits_of_query:
            for document, value in score(hits).items():
                totals[document] = totals.get(document, 0.0) + value
        fused.append(sorted(totals.items(), key=lambda hit: (-hit[1], hit[0]))[:k])
    return fused
