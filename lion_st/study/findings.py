"""Which of the paper's three findings a study bears out: stated by rule from its comparisons, not by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lion_st.study.results import OBJECTIVE_NAMES, SIGNIFICANT, Key, Results
from lion_st.study.settings import DOMAIN_NAMES


class Finding(NamedTuple):
    """A finding of the paper, what the study says of it, and on what grounds."""

    finding: str
    verdict: str  # "holds", "does not hold" or "undecided"
    grounds: str


def findings(results: Results) -> list[Finding]:
    """The paper's findings, judged by the comparisons that are significant after Holm's correction.

    A finding holds if all that it claims is significant. It does not hold if something is significant that it excludes:
    KD that gains from size or CL that loses, another objective that beats CL+KD, dense retrieval that beats sparse at
    least as often as the other way round. All else leaves it undecided.
    """
    return [_scaling(results), *_sparse_or_dense(results), *_noise(results), _joint_objective(results)]


def _scaling(results: Results) -> Finding:
    title = "Contrastive training (CL) gains from size, distillation (KD) does not"
    found = [row for row in _clean(results, "size") if row["key_a"].objective in ("cl", "kd")]
    if not {row["key_a"].objective for row in found} >= {"cl", "kd"}:
        return Finding(title, "undecided", "CL and KD of two sizes are needed.")
    gains = {name: [_sign(row) for row in found if row["key_a"].objective == name] for name in ("cl", "kd")}
    said = "; ".join(
        f"{OBJECTIVE_NAMES[name]}: better in {signs.count(1)}, worse in {signs.count(-1)}, no significant difference "
        f"in {signs.count(0)} of {len(signs)}"
        for name, signs in gains.items()
    )
    holds = all(sign == 1 for sign in gains["cl"]) and 1 not in gains["kd"]
    verdict = _verdict(holds, 1 in gains["kd"] or -1 in gains["cl"])
    return Finding(title, verdict, f"The largest size against the smallest, by paradigm and test set. {said}.")


def _sparse_or_dense(results: Results) -> list[Finding]:
    title, further = "Sparse retrieval beats dense retrieval", "It does so by more out of domain"
    found = _clean(results, "sparse or dense")  # a is dense
    if not found:
        missing = "Sparse and dense cells of the same size and objective are needed."
        return [Finding(title, "undecided", missing), Finding(further, "undecided", missing)]
    said: list[str] = []
    signs: list[int] = []
    for domain in results.domains():
        rows = [row for row in found if row["test set"] in results.tests(domain)]
        own = [_sign(row) for row in rows]
        signs += own
        said.append(
            f"{DOMAIN_NAMES[domain]}: better in {own.count(1)}, worse in {own.count(-1)} of {len(own)}, mean "
            f"difference {sum(row['difference'] for row in rows) / len(rows):+.3f}"
        )
    verdict = _verdict(all(sign == 1 for sign in signs), -1 in signs and signs.count(-1) >= signs.count(1))
    first = Finding(title, verdict, "Sparse against dense, by size, objective and test set. " + "; ".join(said) + ".")
    if len(results.domains()) < 2:
        return [first, Finding(further, "undecided", "Test sets in domain and zero-shot are needed.")]
    signs = [_wider(results, row["key_a"], row["key_b"]) for row in found if row["test set"] == results.tests()[0]]
    verdict = _verdict(all(sign == 1 for sign in signs), -1 in signs and 1 not in signs)
    grounds = (
        f"The difference of sparse and dense is larger zero-shot in {signs.count(1)}, smaller in {signs.count(-1)} of "
        f"{len(signs)} pairs of size and objective, beyond the 95 % interval over queries."
    )
    return [first, Finding(further, verdict, grounds)]


def _wider(results: Results, dense: Key, sparse: Key) -> int:
    """1 where sparse gains more on dense zero-shot than in domain, -1 where less, 0 where the queries leave it open."""
    mean, variance = 0.0, 0.0
    for domain, sign in (("zero_shot", 1), ("in_domain", -1)):
        tests = results.tests(domain)
        for test in tests:
            both = (results.per_query(key, test, results.metric).mean(axis=0) for key in (dense, sparse))
            difference = -np.subtract(*both)
            mean += sign * float(difference.mean()) / len(tests)
            variance += float(difference.var(ddof=1)) / len(difference) / len(tests) ** 2
    return 0 if abs(mean) <= 1.96 * variance**0.5 else (1 if mean > 0 else -1)


def _noise(results: Results) -> list[Finding]:
    if len({key.label_noise for key in results.cells}) < 2:
        return []
    title = "Sparse retrieval suffers less from noisy supervision"
    found = [row for row in results.comparisons if row["question"] == "label noise"]
    drops: dict[str, list[float]] = {}
    for row in found:
        drops.setdefault(row["key_a"].paradigm, []).append(row["difference"])
    if not {"sparse", "dense"} <= set(drops):
        return [Finding(title, "undecided", "Sparse and dense cells at two shares of shuffled labels are needed.")]
    means = {name: sum(values) / len(values) for name, values in drops.items()}
    said = f"Mean change with more shuffled labels: sparse {means['sparse']:+.3f}, dense {means['dense']:+.3f}."
    clear = any(_sign(row) for row in found)
    is_less = means["sparse"] > means["dense"]
    verdict = _verdict(clear and is_less, clear and not is_less)
    return [Finding(title, verdict, said + ("" if clear else " No change is significant."))]


def _joint_objective(results: Results) -> Finding:
    title = "At the largest size, CL and KD together are best"
    largest = max(key.size for key in results.cells)
    found = [
        row
        for row in _clean(results, "objective")
        if row["key_a"].size == largest and "cl_kd" in (row["key_a"].objective, row["key_b"].objective)
    ]
    if not found:
        return Finding(title, "undecided", "CL+KD and another objective of the largest size are needed.")
    signs = [_sign(row) if row["key_b"].objective == "cl_kd" else -_sign(row) for row in found]
    return Finding(
        title,
        _verdict(all(sign == 1 for sign in signs), -1 in signs),
        f"CL+KD against CL and against KD, by paradigm and test set: better in {signs.count(1)}, worse in "
        f"{signs.count(-1)}, no significant difference in {signs.count(0)} of {len(signs)}.",
    )


def _clean(results: Results, question: str) -> list[dict[str, Any]]:
    """Comparisons without shuffled labels, at the largest budget."""
    budget = max(key.budget for key in results.cells)
    plain: Callable[[Key], bool] = lambda key: key.label_noise == 0 and key.budget == budget  # noqa: E731
    return [row for row in results.comparisons if row["question"] == question and plain(row["key_a"])]


def _verdict(holds: bool, is_contradicted: bool) -> str:
    return "holds" if holds else "does not hold" if is_contradicted else "undecided"


def _sign(row: dict[str, Any]) -> int:
    """1 where b is significantly better, -1 where it is worse, 0 where that is undecided."""
    return 0 if row["p, Holm"] >= SIGNIFICANT else (1 if row["difference"] > 0 else -1)
