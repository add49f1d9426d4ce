"""Is one run better than another? Paired randomisation tests, corrected for their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lion_st.errors import require_list, require_type
from lion_st.evaluation.metrics import Qrels, Run, evaluate_queries, warn_of_missing


@dataclass(frozen=True)
class Comparison:
    """Two runs by one metric.

    Attributes:
        difference: Mean of b minus mean of a.
        p_value: Two-sided, of the paired randomisation test.
        p_holm: Corrected by Holm's method for all comparisons made together.
        wins, ties, losses: Queries on which b is better, equal, worse.
        gains, drops: The queries with the largest differences in favour of b and of a, with those differences.
    """

    metric: str
    a: str
    b: str
    mean_a: float
    mean_b: float
    difference: float
    p_value: float
    p_holm: float
    wins: int
    ties: int
    losses: int
    gains: tuple[tuple[str, float], ...]
    drops: tuple[tuple[str, float], ...]

    def row(self) -> dict[str, Any]:
        """The figures without the lists of queries, for a table."""
        return {key: value for key, value in asdict(self).items() if key not in ("gains", "drops")}


def compare_runs(
    qrels: Qrels,
    runs: Mapping[str, Run],
    metrics: Iterable[str] = ("nDCG@10",),
    baseline: str | None = None,
    permutations: int = 100_000,
    seed: int = 0,
    biggest: int = 5,
    relevance_level: int = 1,
) -> list[Comparison]:
    """Compare runs pair by pair.

    The test is Fisher's, recommended by Smucker, Allan and Carterette (CIKM 2007): under the null hypothesis the sign
    of each query's difference is arbitrary, so signs are flipped at random and the p-value is the share of flips whose
    mean difference is at least as large as the one observed, (count + 1) / (permutations + 1).

    Args:
        qrels: Relevance judgements.
        runs: At least two runs by name.
        metrics: See `evaluate_queries`.
        baseline: Compare every other run with this one alone; otherwise all pairs.
        permutations: Random flips.
        seed: Of the random flips.
        biggest: Queries listed in `gains` and `drops`.
        relevance_level: See `evaluate_queries`.

    Raises:
        ValueError: If there are fewer than two runs, the baseline is not among them, or a run has no judged query.

    Warns:
        UserWarning: If a run lacks some of the judged queries, which count as 0.
    """
    require_type(runs, Mapping, "Runs by name", "pass {name: read_run(path), ...}")
    require_list(metrics, "metrics")
    if len(runs) < 2:
        raise ValueError(f"A comparison needs two runs or more, got {list(runs)}.")
    if baseline is not None and baseline not in runs:
        raise ValueError(f"The baseline {baseline!r} is not among the runs {list(runs)}.")
    pairs = (
        list(combinations(runs, 2)) if baseline is None else [(baseline, other) for other in runs if other != baseline]
    )
    metrics = list(metrics)
    values = {name: evaluate_queries(qrels, run, metrics, relevance_level) for name, run in runs.items()}
    for name, run in runs.items():
        if not run.keys() & qrels.keys():
            raise ValueError(f"The run {name!r} has no query that is judged: is it of another test set?")
        warn_of_missing(f"The run {name!r}", run, qrels)
    queries = list(qrels)
    found = []
    for metric in metrics:
        for a, b in pairs:
            left, right = (np.array([values[name][metric][query] for query in queries]) for name in (a, b))
            found.append((metric, a, b, left, right, randomization_test(left, right, permutations, seed)))
    corrected = holm([p_value for *_, p_value in found])
    return [
        Comparison(metric, a, b, p_value=p_value, p_holm=p_holm, **_figures(left, right, queries, biggest))
        for (metric, a, b, left, right, p_value), p_holm in zip(found, corrected, strict=True)
    ]


def randomization_test(a: np.ndarray, b: np.ndarray, permutations: int = 100_000, seed: int = 0) -> float:
    """Two-sided p-value of a paired randomisation test on per-query values [Q]."""
    differences = b - a
    observed = abs(differences.sum()) * (1 - 1e-12)
    generator = np.random.default_rng(seed)
    count, done = 0, 0
    while done < permutations:
        block = min(permutations - done, max(1, 10_000_000 // max(1, differences.size)))
        signs = generator.integers(0, 2, size=(block, differences.size), dtype=np.int8) * 2 - 1
        count += int((np.abs(signs @ differences) >= observed).sum())
        done += block
    return (count + 1) / (permutations + 1)


def holm(p_values: list[float]) -> list[float]:
    """Correct p-values for multiple comparisons by Holm's step-down method."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = running
    return corrected.tolist()


def _figures(left: np.ndarray, right: np.ndarray, queries: list[str], biggest: int) -> dict[str, Any]:
    """What `Comparison` says of two runs' values beside the test."""
    differences = right - left
    order = np.argsort(-differences, kind="stable")
    signed = [(queries[place], float(differences[place])) for place in order]
    return {
        "mean_a": float(left.mean()),
        "mean_b": float(right.mean()),
        "difference": float(differences.mean()),
        "wins": int((differences > 0).sum()),
        "ties": int((differences == 0).sum()),
        "losses": int((differences < 0).sum()),
        "gains": tuple(one for one in signed[:biggest] if one[1] > 0),
        "drops": tuple(one for one in signed[::-1][:biggest] if one[1] < 0),
    }
