"""What a study has found: rows, means over seeds, tests between cells, power laws, and the paper's three findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lion_st.data.trec import read_qrels, read_run
from lion_st.evaluation.compare import holm, randomization_test
from lion_st.evaluation.metrics import evaluate_queries
from lion_st.files import read_json
from lion_st.study.fits import Fit, Values, bootstrap_fit
from lion_st.study.grid import Plan, output_place
from lion_st.study.jobs import ENTROPY, ROWS
from lion_st.study.settings import DOMAIN_NAMES, DOMAINS, Domain

OBJECTIVE_NAMES = {"cl": "CL", "kd": "KD", "cl_kd": "CL+KD"}
SIGNIFICANT = 0.05


class Key(NamedTuple):
    """What cells share that differ in their seed alone."""

    size: int  # non-embedding parameters
    backbone: str
    paradigm: str
    objective: str
    label_noise: float
    budget: float

    def __str__(self) -> str:
        noise = f", {self.label_noise:.0%} shuffled" if self.label_noise else ""
        return f"{self.backbone} {self.paradigm} {OBJECTIVE_NAMES[self.objective]}{noise}"


class Interval(NamedTuple):
    """A mean over seeds, and half of its 95 % confidence interval; None for a single seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def interval(values: Sequence[float], alike: Sequence[Sequence[float]] = ()) -> Interval:
    """Mean and 95 % confidence interval by Student's t.

    Args:
        values: One of each seed.
        alike: Those of other trainings that seeds scatter as much: the variance is pooled, since two values alone say
            little of it.

    Example:
        >>> str(interval([0.4, 0.5, 0.6]))
        '0.500 ± 0.248'
        >>> str(interval([0.4, 0.5], [[0.5, 0.6], [0.7, 0.6]]))
        '0.450 ± 0.159'
    """
    from scipy.stats import t

    mean, groups = float(np.mean(values)), [np.asarray(group) for group in (values, *alike)]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return Interval(mean, None)
    variance = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / freedom
    return Interval(mean, float(t.ppf(0.975, freedom) * np.sqrt(variance / len(values))))


@dataclass
class Results:
    """The finished cells of a study.

    Args:
        plan: Of the study.
        folder: The study's output.
    """

    plan: Plan
    folder: Path
    _values: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each finished cell, test set and metric; paths are relative to the study's output.

        Raises:
            FileNotFoundError: If no cell is finished.
            ValueError: If one was finished with other settings than the plan's.
        """
        found = []
        for cell in self.plan.cells:
            place = output_place(self.folder, cell.name)
            if (place / ROWS).exists():
                for row in read_json(place / ROWS):
                    if row["configuration"] != cell.configuration:
                        raise ValueError(
                            f"{self.folder} holds {cell.name} with other settings than the study now has: report it "
                            "by the file that it was run with."
                        )
                    paths = {name: (place / row[name]).relative_to(self.folder).as_posix() for name in ("run", "qrels")}
                    found.append(row | paths)
        if not found:
            raise FileNotFoundError(f"No cell in {self.folder} is finished: run `lion-st study` first.")
        return found

    @cached_property
    def metric(self) -> str:
        """The main metric."""
        return self.plan.study.metrics[0]

    @cached_property
    def cells(self) -> dict[Key, list[str]]:
        """Names of the finished cells by what they share, smaller sizes first."""
        found: dict[Key, list[str]] = {}
        for cell in self.plan.cells:
            key = Key(cell.non_embedding_parameters, cell.backbone, cell.paradigm, cell.objective, cell.label_noise,
                      cell.budget_flops)  # fmt: skip
            if cell.name in {row["cell"] for row in self.rows}:
                found.setdefault(key, []).append(cell.name)
        order = {name: place for place, name in enumerate(OBJECTIVE_NAMES)}
        return dict(sorted(found.items(), key=lambda item: (item[0].size, item[0].paradigm, order[item[0].objective],
                                                            *item[0][4:])))  # fmt: skip

    def tests(self, domain: str | None = None) -> list[str]:
        """Names of the test sets, of one domain or all."""
        return [test.name for test in self.plan.study.tests if domain in (None, test.domain)]

    def domains(self) -> list[Domain]:
        """Domains with a test set."""
        return [domain for domain in DOMAINS if self.tests(domain)]

    def row(self, cell: str, test: str, metric: str) -> dict[str, Any]:
        """The row of a cell, test set and metric."""
        return self._row_of[cell, test, metric]

    def score(self, key: Key, tests: Sequence[str], metric: str) -> Interval:
        """Mean over test sets, and over seeds with its interval, by the variance of all sizes trained so."""

        def values(one: Key) -> list[float]:
            return [
                float(np.mean([self.row(cell, test, metric)["value"] for test in tests])) for cell in self.cells[one]
            ]

        return interval(values(key), [values(one) for one in self.cells if one != key and one[2:] == key[2:]])

    def figure(self, key: Key, tests: Sequence[str], name: str) -> float | None:
        """Mean over test sets and seeds of a size or time; None where there is none, as of dense models' terms."""
        rows = [self.row(cell, test, self.metric) for cell in self.cells[key] for test in tests]
        values = [row[name] for row in rows if row[name] is not None]
        return float(np.mean(values)) if len(values) == len(rows) else None

    def per_query(self, key: Key, test: str, metric: str) -> np.ndarray:
        """Values of single queries, [seeds, queries]; queries are in the order of their ids."""
        return np.stack([self._of_cell(cell, test, metric) for cell in self.cells[key]])

    @cached_property
    def _row_of(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        return {(row["cell"], row["test_set"], row["metric"]): row for row in self.rows}

    def _of_cell(self, cell: str, test: str, metric: str) -> np.ndarray:
        if (cell, test, metric) not in self._values:
            row = self.row(cell, test, metric)
            if metric == ENTROPY:
                file = output_place(self.folder, cell) / "evaluation" / test / "entropies.json"
                found = read_json(file)
            else:
                run, qrels = read_run(self.folder / row["run"]), read_qrels(self.folder / row["qrels"])
                found = evaluate_queries(qrels, run, [metric])[metric]
            self._values[cell, test, metric] = np.array([found[query] for query in sorted(found)])
        return self._values[cell, test, metric]

    @cached_property
    def comparisons(self) -> list[dict[str, Any]]:
        """Paired randomisation tests by the main metric, on values of queries that are means over seeds.

        Compared are sparse and dense, the objectives, and the smallest and the largest size, of each backbone that has
        it, all else equal. Holm's correction is for all comparisons on a test set.
        """
        found: list[dict[str, Any]] = []
        for test in self.tests():
            pairs = list(self._pairs())
            rows: list[dict[str, Any]] = []
            for question, a, b in pairs:
                left, right = (self.per_query(key, test, self.metric).mean(axis=0) for key in (a, b))
                rows.append({
                    "question": question, "test set": test, "a": str(a), "b": str(b), "mean a": float(left.mean()),
                    "mean b": float(right.mean()), "difference": float((right - left).mean()),
                    "p": randomization_test(left, right, permutations=20_000), "key_a": a, "key_b": b,
                })  # fmt: skip
            corrected = holm([float(row["p"]) for row in rows])
            found += [{**row, "p, Holm": p_holm} for row, p_holm in zip(rows, corrected, strict=True)]
        return found

    def _pairs(self) -> Iterator[tuple[str, Key, Key]]:
        keys = list(self.cells)
        for a, b in combinations(keys, 2):
            differing = {name for name in Key._fields if getattr(a, name) != getattr(b, name)}
            if differing == {"paradigm"}:
                first, second = sorted((a, b), key=lambda key: key.paradigm)
                yield f"{second.paradigm} or {first.paradigm}", first, second
            elif differing == {"objective"}:
                yield "objective", a, b
            elif differing == {"label_noise"}:
                yield "label noise", a, b
        for part in dict.fromkeys(key[2:] for key in keys):
            same = [key for key in keys if key[2:] == part]
            least, most = same[0].size, same[-1].size
            if least < most:
                ends = product(*([key for key in same if key.size == size] for size in (least, most)))
                yield from (("size", a, b) for a, b in ends)

    @cached_property
    def fits(self) -> list[tuple[dict[str, Any], Fit]]:
        """Power laws of the error (1 - main metric) and of the contrastive entropy.

        Against non-embedding parameters at each budget; and against training FLOPs, of the best size at each budget.
        """
        found = []
        noises = sorted({key.label_noise for key in self.cells})
        for paradigm in self.plan.study.paradigms:
            for objective in self.plan.study.objectives:
                for noise in noises:
                    keys = [key for key in self.cells if key[2:5] == (paradigm, objective, noise)]
                    for domain in self.domains() if keys else ():
                        for metric in (self.metric, ENTROPY):
                            found += list(self._fits(keys, domain, metric))
        return found

    def _fits(self, keys: Sequence[Key], domain: Domain, metric: str) -> Iterator[tuple[dict[str, Any], Fit]]:
        about = {
            "paradigm": keys[0].paradigm,
            "objective": OBJECTIVE_NAMES[keys[0].objective],
            "label noise": keys[0].label_noise,
            "domain": DOMAIN_NAMES[domain],
            "of": metric if metric == ENTROPY else f"1 - {metric}",
        }
        points = {key: self._errors(key, domain, metric) for key in keys}
        budgets = sorted({key.budget for key in keys})
        for budget in budgets:
            sizes = [(float(key.size), points[key]) for key in keys if key.budget == budget]
            yield about | {"against": "non-embedding parameters", "budget": budget}, bootstrap_fit(sizes)
        best: list[tuple[float, Values]] = []
        for budget in budgets:
            key = min((key for key in keys if key.budget == budget), key=lambda one: self._mean(points[one]))
            best.append((float(np.mean([self._flops(cell) for cell in self.cells[key]])), points[key]))
        yield about | {"against": "training FLOPs", "budget": None}, bootstrap_fit(best)

    def _errors(self, key: Key, domain: str, metric: str) -> Values:
        values = [self.per_query(key, test, metric) for test in self.tests(domain)]
        return values if metric == ENTROPY else [1 - one for one in values]

    @staticmethod
    def _mean(values: Values) -> float:
        return float(np.mean([one.mean() for one in values]))

    def _flops(self, cell: str) -> float:
        row = self.row(cell, self.tests()[0], self.metric)
        return row["flops"] + row["mntp_flops"]

    def fit_rows(self) -> list[dict[str, Any]]:
        """A row for each fit, for a table."""
        return [
            about
            | {
                "points": fit.points,
                "exponent": fit.law.exponent if fit.law else None,
                "low": fit.low if fit.law else None,
                "high": fit.high if fit.law else None,
                "floor": fit.law.floor if fit.law else None,
                "R²": fit.law.r_squared if fit.law else None,
                "supported": "no: " + fit.doubt if fit.doubt else "yes",
            }
            for about, fit in self.fits
        ]

    def comparison_rows(self) -> list[dict[str, Any]]:
        """The comparisons without what only programs read."""
        return [{name: value for name, value in row.items() if not name.startswith("key_")} for row in self.comparisons]

    def table(self) -> list[dict[str, Any]]:
        """The paper's table: a row for each size, paradigm and objective, with each test set and the zero-shot mean."""
        rows = []
        for key in self.cells:
            row: dict[str, Any] = {
                "backbone": key.backbone,
                "non-embedding": f"{key.size / 1e6:.2f} M",
                "paradigm": key.paradigm,
                "objective": OBJECTIVE_NAMES[key.objective],
            }
            if len({one.label_noise for one in self.cells}) > 1:
                row["shuffled"] = f"{key.label_noise:.0%}"
            if len({one.budget for one in self.cells}) > 1:
                row["budget"] = f"{key.budget:.3g}"
            row |= {test: str(self.score(key, [test], self.metric)) for test in self.tests()}
            if len(self.tests("zero_shot")) > 1:
                row["zero-shot mean"] = str(self.score(key, self.tests("zero_shot"), self.metric))
            rows.append(row)
        return rows

    def overlap(self) -> list[Mapping[str, Any]]:
        """What the check of the test sets against the training texts found."""
        return read_json(self.folder / "data" / "data.json")["overlap"]
