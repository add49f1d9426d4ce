"""Retrieval metrics as trec_eval computes them, through pytrec_eval."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from lion_st.errors import require_list, require_type
from lion_st.extras import require

Qrels: TypeAlias = Mapping[str, Mapping[str, int]]  # query id -> document id -> relevance
Run: TypeAlias = Mapping[str, Mapping[str, float]]  # query id -> document id -> score

METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP", "R_cap@100")

_MEASURES = {"nDCG": "ndcg_cut", "Recall": "recall", "MAP": "map_cut", "P": "P", "Success": "success", "R_cap": "P"}
_UNCUT = {"nDCG": "ndcg", "MRR": "recip_rank", "MAP": "map", "Rprec": "Rprec"}


def evaluate_run(
    qrels: Qrels, run: Run, metrics: Iterable[str] = METRICS, relevance_level: int = 1
) -> dict[str, float]:
    """Mean of each metric over the judged queries; see `evaluate_queries`."""
    per_query = evaluate_queries(qrels, run, metrics, relevance_level)
    return {name: float(np.mean(list(values.values()))) for name, values in per_query.items()}


def evaluate_queries(
    qrels: Qrels, run: Run, metrics: Iterable[str] = METRICS, relevance_level: int = 1
) -> dict[str, dict[str, float]]:
    """Compute metrics for every query, with trec_eval's conventions.

    Documents are ordered by score (rounded to 32 bits) and, where scores are equal, by falling document id, whatever
    ranks the run had. A judged query that the run lacks scores 0 (`trec_eval -c`), a query without judgements is left
    out, an unjudged document counts as not relevant, and nDCG takes the relevance grade itself as the gain.

    Args:
        qrels: Relevance judgements, whole numbers.
        run: Scores of the retrieved documents.
        metrics: Any of nDCG@k, MRR@k, Recall@k, MAP@k, P@k, Success@k, R_cap@k (relevant documents among the first k
            over the smaller of k and the number of relevant documents), nDCG, MRR, MAP, Rprec.
        relevance_level: Lowest grade that counts as relevant in all metrics but nDCG; TREC Deep Learning takes 2.

    Returns:
        Metric -> query id -> value.

    Raises:
        TypeError: If judgements or run are a path, the metrics one string, or an id is not a string.
        ValueError: If a metric is unknown, nothing is judged, a grade is not a whole number, or a score is NaN.

    Example:
        >>> evaluate_queries({"q": {"d1": 1}}, {"q": {"d2": 2.0, "d1": 1.0}}, ["MRR@10"])
        {'MRR@10': {'q': 0.5}}
    """
    pytrec_eval = require("pytrec_eval")

    require_judgements(qrels)
    require_run(run)
    require_list(metrics, "metrics")
    if not qrels:
        raise ValueError("There are no relevance judgements: metrics need at least one judged query.")
    judged = {query: whole_grades(query, grades) for query, grades in qrels.items()}
    run = {query: _scores(query, hits) for query, hits in run.items() if query in judged}
    require_ids([*judged, *run])
    parsed = {metric: _parse(metric) for metric in metrics}
    outputs = {metric: _output(*name_and_cut) for metric, name_and_cut in parsed.items()}
    measures = {re.sub(r"_(\d+)$", r".\1", output) for output in outputs.values()}
    values = pytrec_eval.RelevanceEvaluator(judged, measures, relevance_level=relevance_level).evaluate(run)
    result: dict[str, dict[str, float]] = {}
    for metric, (name, cut) in parsed.items():
        found = {query: values.get(query, {}).get(outputs[metric], 0.0) for query in judged}
        if name == "MRR" and cut is not None:
            found = {query: value if value and round(1 / value) <= cut else 0.0 for query, value in found.items()}
        if name == "R_cap" and cut is not None:
            for query, precision in found.items():
                relevant = sum(grade >= relevance_level for grade in judged[query].values())
                found[query] = precision * cut / min(relevant, cut) if relevant else 0.0
        result[metric] = found
    return result


def require_judgements(qrels: Any) -> None:
    """Raise a TypeError unless these are grades by query and document, and not their file."""
    require_type(qrels, Mapping, "Judgements", "lion_st.evaluation.read_qrels(path) reads them")


def whole_grades(query: str, grades: Mapping[str, Any]) -> dict[str, int]:
    """A query's grades as Python's integers, whatever numbers they were read as."""
    require_type(grades, Mapping, f"Grades of the query {query!r} by document", 'pass {"d1": 1}')
    require_ids(grades)
    for document, grade in grades.items():
        if not isinstance(grade, Real) or grade != grade // 1:
            raise ValueError(f"Document {document!r} of query {query!r} has the grade {grade!r}: give a whole number.")
    return {document: int(grade) for document, grade in grades.items()}


def _scores(query: str, hits: Mapping[str, Any]) -> dict[str, float]:
    require_type(hits, Mapping, f"Scores of the query {query!r} by document", "pass dict(hits) of a list of pairs")
    require_ids(hits)
    scores = {document: float(score) for document, score in hits.items()}
    if math.isnan(sum(scores.values())):  # also of an infinity and its opposite, which have an order
        unranked = [document for document, score in scores.items() if math.isnan(score)]
        if unranked:
            raise ValueError(f"Document {unranked[0]!r} has the score nan for query {query!r}: NaN ranks nowhere.")
    return scores


def require_ids(ids: Collection[str]) -> None:
    """Raise unless ids of queries or documents are strings of Unicode text: others end the process in pytrec_eval."""
    try:
        "".join(ids).encode()
    except TypeError:
        other = next(one for one in ids if not isinstance(one, str))
        raise TypeError(f"Ids in runs and judgements are strings, got {other!r}: pass str(id) in both.") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"An id holds {error.object[error.start]!r}, which is not Unicode text.") from None


def require_run(run: Any) -> None:
    """Raise a TypeError unless these are scores by query and document, and not their file."""
    require_type(run, Mapping, "A run", "lion_st.evaluation.read_run(path) reads one")


def warn_of_missing(name: str, run: Run, qrels: Qrels) -> None:
    """Warn if a run lacks queries that are judged: trec_eval without `-c` would leave them out of its means."""
    missing = [query for query in qrels if query not in run]
    if missing:
        warnings.warn(
            f"{name} lacks {len(missing):,} of the {len(qrels):,} judged queries, such as {missing[0]!r}, which count "
            "as 0: if it was made of the others alone, give their judgements alone.",
            stacklevel=3,
        )


def is_metric(name: str) -> bool:
    """Whether `evaluate_queries` knows a metric of this name."""
    try:
        _parse(name)
    except ValueError:
        return False
    return True


def metric_depth(name: str) -> int | None:
    """How many documents a metric looks at, the k of its name; None if it looks at all.

    Raises:
        ValueError: If the metric is unknown.
    """
    return _parse(name)[1]


def require_metrics(metrics: Iterable[str], depth: int) -> None:
    """Refuse metrics that are unknown, or that look deeper than a ranking and would be another's under their name."""
    require_list(metrics, "metrics")
    for metric in metrics:
        if (needed := metric_depth(metric) or 0) > depth:
            raise ValueError(
                f"{metric} looks deeper than the {depth} documents per query: set k to {needed} or more, or choose "
                f"a metric of at most @{depth}."
            )


def _output(name: str, cut: int | None) -> str:
    """What pytrec_eval calls it; MRR is cut afterwards."""
    return _UNCUT[name] if cut is None or name == "MRR" else f"{_MEASURES[name]}_{cut}"


def _parse(metric: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(\w+?)(?:@([1-9]\d*))?", metric)
    name, cut = (match[1], match[2]) if match else (metric, None)
    if cut is None and name in _UNCUT:
        return name, None
    if cut is not None and name in (*_MEASURES, "MRR"):
        return name, int(cut)
    raise ValueError(
        f"Unknown metric {metric!r}: choose from {', '.join(f'{one}@k' for one in (*_MEASURES, 'MRR'))}, "
        f"{', '.join(_UNCUT)}."
    )
