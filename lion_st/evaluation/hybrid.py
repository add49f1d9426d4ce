"""Fusing retrievers, or the runs that they left, with weights that were fitted on a development set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.encoding.encode import encode_texts
from lion_st.errors import require_list
from lion_st.evaluation.metrics import Qrels, Run, evaluate_run, require_judgements, require_metrics, require_run
from lion_st.evaluation.mteb_search import document_texts, query_text
from lion_st.evaluation.tasks import get_task, loaded
from lion_st.indexes import Hits
from lion_st.indexes.fusion import convex_fusion, fit_convex_weights, hits_to_run, reciprocal_rank_fusion
from lion_st.retrieval.hybrid import HybridRetriever
from lion_st.retrieval.retriever import ModelRetriever, Retriever, require_retriever

if TYPE_CHECKING:
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from sentence_transformers import SentenceTransformer


def fit_hybrid(
    retrievers: Sequence[Retriever],
    data: str | Path | AbsTaskRetrieval,
    split: str = "dev",
    *,
    metric: str = "nDCG@10",
    depth: int = 1000,
    name: str | None = None,
    show_progress: bool = False,
) -> HybridRetriever:
    """Fuse two retrievers by the convex combination that scores best on a development set.

    Args:
        retrievers: Two retrievers, such as Lion-SP and Lion-DS; both are left with the development set indexed.
        data: The development set, see `get_task`; it must not be the one that the result is reported on.
        split: Split of a folder.
        metric: What is maximised, see `evaluate_queries`.
        depth: Documents taken from each retriever.
        name: Name in tables and result files; by default it shows the weights.
        show_progress: Show progress bars.

    Raises:
        ValueError: If there are not exactly two retrievers, the development set has several parts, or the metric is
            unknown or looks deeper than `depth`.

    Example:
        >>> hybrid = fit_hybrid([sparse, dense], "data/msmarco", split="dev")  # doctest: +SKIP
        >>> hybrid.weights  # doctest: +SKIP
        [0.65, 0.35]
    """
    require_metrics([metric], depth)
    require_list(retrievers, "retrievers")
    for retriever in retrievers:
        require_retriever(retriever)
    if len(retrievers) != 2:
        raise ValueError(f"Weights are fitted for two retrievers, got {len(retrievers)}.")
    documents, queries, qrels = _development_set(data, split)
    rankings = []
    for retriever in retrievers:
        retriever.index(documents, show_progress)
        rankings.append(retriever.search(list(queries.values()), depth, show_progress))
    weights = _fitted(rankings, list(queries), qrels, metric, depth)
    shown = name or "+".join(
        f"{weight:.2f} {retriever.name.split('/')[-1]}" for weight, retriever in zip(weights, retrievers, strict=True)
    )
    return HybridRetriever(retrievers, weights, depth, shown)


def fit_fusion(
    model: SentenceTransformer,
    data: str | Path | AbsTaskRetrieval,
    split: str = "dev",
    *,
    metric: str = "nDCG@10",
    depth: int = 1000,
    show_progress: bool = False,
) -> tuple[float, float]:
    """Fit the weights of a hybrid model's two scores on a development set, and store them in the model.

    What saves or exports the model keeps them, and searches with it use them.

    Args:
        model: Of the paradigm "hybrid"; its `fusion_weights` are set.
        data: See `fit_hybrid`, as are the next ones.
        split: Split of a folder.
        metric: What is maximised.
        depth: Documents taken by each score.
        show_progress: Show progress bars.

    Returns:
        The weights of the sparse and of the dense score.

    Raises:
        ValueError: If the model is of another paradigm, and as `fit_hybrid`.

    Example:
        >>> fit_fusion(model, "data/msmarco")  # doctest: +SKIP
        (0.65, 0.35)
        >>> lion_st.export(model, "runs/hybrid")  # doctest: +SKIP
    """
    require_metrics([metric], depth)
    retriever = ModelRetriever(model)
    if retriever.paradigm != "hybrid":
        raise ValueError(
            f"fit_fusion takes a hybrid model, this one is {retriever.paradigm}: fit_hybrid fuses two retrievers."
        )
    documents, queries, qrels = _development_set(data, split)
    retriever.index(documents, show_progress)
    index: Any = retriever.documents
    vectors = encode_texts(model, list(queries.values()), "query", show_progress=show_progress)
    rankings = index.search_sides(vectors, depth)
    weights = _fitted(rankings, list(queries), qrels, metric, depth)
    head: Any = model[1]
    head.fusion_weights = weights
    return weights


def _development_set(
    data: str | Path | AbsTaskRetrieval, split: str
) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Documents and queries by id, and the judgements."""
    task = get_task(data, split)
    with loaded(task) as dataset:
        parts = [part for subset in dataset.values() for part in subset.values()]
        if len(parts) != 1:
            raise ValueError(f"{task.metadata.name} has {len(parts)} parts: fit weights on a set of one.")
        documents = document_texts(parts[0]["corpus"])
        queries = {row["id"]: query_text(row, task.metadata.name) for row in parts[0]["queries"]}
        return documents, queries, parts[0]["relevant_docs"]


def fuse_runs(
    runs: Sequence[Run], weights: Sequence[float] | None = None, k: int = 1000
) -> dict[str, dict[str, float]]:
    """Fuse runs, whatever engines and machines made them.

    Args:
        runs: Two or more. A query that one of them lacks is answered by the others.
        weights: One a run, see `convex_fusion`; None fuses by reciprocal rank.
        k: Documents per query.

    Raises:
        ValueError: If there are fewer than two runs, or the weights do not fit.
    """
    queries, rankings = _rankings(runs)
    fused = reciprocal_rank_fusion(rankings, k) if weights is None else convex_fusion(rankings, weights, k)
    return hits_to_run(queries, fused)


def fit_run_weights(runs: Sequence[Run], qrels: Qrels, metric: str = "nDCG@10", k: int = 1000) -> tuple[float, float]:
    """The weights of two runs on a development set that score best, for `fuse_runs`.

    Args:
        runs: Two runs of the development set's queries.
        qrels: Its judgements.
        metric: What is maximised, see `evaluate_queries`.
        k: Depth of the fused runs.

    Raises:
        ValueError: If there are not exactly two runs, no query of theirs is judged, or the metric is unknown or looks
            deeper than `k`.
    """
    require_metrics([metric], k)
    require_judgements(qrels)
    queries, rankings = _rankings(runs)
    if not set(queries) & qrels.keys():
        raise ValueError("No query of the development runs is judged: give runs and judgements of one set.")
    return _fitted(rankings, queries, qrels, metric, k)


def _fitted(
    rankings: list[list[Hits]], queries: list[str], qrels: Qrels, metric: str, depth: int
) -> tuple[float, float]:
    measure = lambda run: evaluate_run(qrels, run, [metric])[metric]  # noqa: E731
    return fit_convex_weights(rankings, queries, measure, k=depth)[0]


def _rankings(runs: Sequence[Run]) -> tuple[list[str], list[list[Hits]]]:
    """All queries of some runs, and the hits of each run in their order."""
    require_list(runs, "runs")
    for run in runs:
        require_run(run)
    if len(runs) < 2:
        raise ValueError(f"Fusion needs two runs or more, got {len(runs)}.")
    queries = list(dict.fromkeys(query for run in runs for query in run))
    best_first = [
        {query: sorted(hits.items(), key=lambda hit: (-hit[1], hit[0])) for query, hits in run.items()} for run in runs
    ]
    return queries, [[run.get(query, []) for query in queries] for run in best_first]
