"""The figures of a study: quality against size, sparse against dense, against terms and latency, against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.extras import require
from lion_st.study.results import OBJECTIVE_NAMES, Interval, Key, Results
from lion_st.study.settings import DOMAIN_NAMES

# Okabe and Ito's colours, which people with any colour vision tell apart; markers and lines say the same again.
COLOURS = {"cl": "#0072B2", "kd": "#D55E00", "cl_kd": "#009E73"}
MARKERS = {"cl": "o", "kd": "s", "cl_kd": "^"}
PARADIGM_COLOURS = {"sparse": "#0072B2", "dense": "#D55E00", "multi_vector": "#009E73", "hybrid": "#CC79A7"}
LINES = {"sparse": "-", "dense": (0, (4, 2)), "multi_vector": (0, (1, 1.5)), "hybrid": (0, (5, 1.5, 1, 1.5))}
PANEL = (4.3, 3.5)  # inches
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lion_st",
}


def draw_figures(results: Results, folder: Path) -> list[Path]:
    """Draw all figures as SVG and PNG.

    Returns:
        The SVG files.

    Raises:
        ImportError: If matplotlib is missing; how it is installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Results, Path], None]] = {
        "quality-size": quality_by_size,
        "sparse-dense": sparse_against_dense,
        "quality-cost": quality_by_cost,
        "quality-flops": quality_by_flops,
    }
    for name, draw in drawings.items():
        draw(results, folder / name)
    return [folder / f"{name}.svg" for name in drawings]


def quality_by_size(results: Results, path: Path) -> None:
    """Main metric by non-embedding parameters: a panel for each objective, in domain above and zero-shot below."""
    objectives = [one for one in OBJECTIVE_NAMES if any(key.objective == one for key in results.cells)]
    domains = results.domains()
    with _figure(path, len(domains), len(objectives), sharex=True, sharey="row") as axes:
        for row, domain in enumerate(domains):
            for column, objective in enumerate(objectives):
                panel = axes[row, column]
                for paradigm in results.plan.study.paradigms:
                    keys = [key for key in _plain(results) if (key.paradigm, key.objective) == (paradigm, objective)]
                    scores = [results.score(key, results.tests(domain), results.metric) for key in keys]
                    _line(panel, [key.size for key in keys], scores, paradigm, objective, paradigm)
                panel.set_xscale("log")
                _millions(panel, sorted({key.size for key in _plain(results)}))
                if row == 0:
                    panel.set_title(OBJECTIVE_NAMES[objective])
                if column == 0:
                    panel.set_ylabel(f"{results.metric}, {DOMAIN_NAMES[domain]}")
                if row == len(domains) - 1:
                    panel.set_xlabel("non-embedding parameters")
        axes[0, 0].legend()


def sparse_against_dense(results: Results, path: Path) -> None:
    """Difference of sparse and dense, by size and objective, with the 95 % interval over queries, by test set."""
    rows = [
        row for row in results.comparisons if row["question"] == "sparse or dense" and row["key_b"] in _plain(results)
    ]
    tests = results.tests()
    with _figure(path, 1, len(tests), sharey=True, sharex=True) as axes:
        for column, test in enumerate(tests):
            panel = axes[0, column]
            own = [row for row in rows if row["test set"] == test]
            for place, row in enumerate(reversed(own)):
                low, high = _bootstrap(results, row)
                colour = COLOURS[row["key_b"].objective]
                panel.plot([low, high], [place, place], color=colour, linewidth=2)
                panel.plot(row["difference"], place, MARKERS[row["key_b"].objective], color=colour, markersize=7)
            labels = [f"{row['key_b'].backbone}, {OBJECTIVE_NAMES[row['key_b'].objective]}" for row in reversed(own)]
            panel.set_yticks(range(len(own)), labels)
            panel.axvline(0, color="#333333", linewidth=1)
            domain = next(one.domain for one in results.plan.study.tests if one.name == test)
            panel.set_title(f"{test} ({DOMAIN_NAMES[domain]})")
            panel.set_xlabel(f"{results.metric}: sparse − dense")


def quality_by_cost(results: Results, path: Path) -> None:
    """Main metric over all test sets by active terms of a document (of sparse vectors), and by latency of a query."""
    with _figure(path, 1, 2, sharey=True) as axes:
        for panel, name, title in (
            (axes[0, 0], "document_terms", "active terms of a document"),
            (axes[0, 1], "latency", "milliseconds a query: encoding and search"),
        ):
            for key in _plain(results):
                x = _cost(results, key, name)
                if x is not None:
                    _point(panel, x, results.tests(), results, key)
            panel.set_xlabel(title)
            panel.margins(0.1)
        axes[0, 0].set_ylabel(f"{results.metric}, mean of the test sets")
        _legend_of_points(results, axes[0, 1])


def quality_by_flops(results: Results, path: Path) -> None:
    """Main metric by the training FLOPs that were spent, MNTP included, by domain."""
    domains = results.domains()
    power = int(np.log10(max(row["flops"] + row["mntp_flops"] for row in results.rows)))
    with _figure(path, 1, len(domains)) as axes:
        for column, domain in enumerate(domains):
            panel = axes[0, column]
            for key in results.cells:
                if key.label_noise == min(one.label_noise for one in results.cells):
                    first = results.row(results.cells[key][0], results.tests()[0], results.metric)
                    spent = (first["flops"] + first["mntp_flops"]) / 10**power
                    _point(panel, spent, results.tests(domain), results, key)
            panel.set_title(DOMAIN_NAMES[domain])
            panel.set_xlabel(f"$10^{{{power}}}$ training FLOPs, MNTP included")
            panel.margins(0.15)
        axes[0, 0].set_ylabel(results.metric)
        _legend_of_points(results, axes[0, -1])


@contextmanager
def _figure(path: Path, rows: int, columns: int, **options: Any) -> Iterator[np.ndarray]:
    """Axes [rows, columns] of a figure that is written as SVG and PNG."""
    matplotlib = require("matplotlib")
    figures = require("matplotlib.figure")

    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False, **options)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        figure.savefig(path.with_suffix(".png"), dpi=110)


def _point(panel: Any, x: float, tests: list[str], results: Results, key: Key) -> None:
    """A key's main metric over test sets: larger for larger models, filled for sparse ones."""
    colour = PARADIGM_COLOURS[key.paradigm]
    panel.plot(x, results.score(key, tests, results.metric).mean, MARKERS[key.objective], color=colour,
               mfc=colour if key.paradigm == "sparse" else "white", markersize=_marker_size(results, key))  # fmt: skip


def _line(panel: Any, x: list[int], scores: list[Interval], paradigm: str, objective: str, label: str) -> None:
    means = [score.mean for score in scores]
    bars = None if any(score.half is None for score in scores) else [score.half for score in scores]
    filled = PARADIGM_COLOURS[paradigm] if paradigm == "sparse" else "white"
    panel.errorbar(x, means, yerr=bars, color=PARADIGM_COLOURS[paradigm], linestyle=LINES[paradigm], label=label,
                   marker=MARKERS[objective], mfc=filled, markersize=7, capsize=3)  # fmt: skip


def _millions(panel: Any, sizes: list[int]) -> None:
    panel.set_xticks(sizes, [_size(size) for size in sizes])
    panel.margins(x=0.14)
    panel.set_xticks([], minor=True)


def _plain(results: Results) -> list[Key]:
    """Keys with the least noise and the largest budget."""
    noise, budget = min(key.label_noise for key in results.cells), max(key.budget for key in results.cells)
    return [key for key in results.cells if key.label_noise == noise and key.budget == budget]


def _cost(results: Results, key: Key, name: str) -> float | None:
    if name != "latency":
        return results.figure(key, results.tests(), name)
    parts = [results.figure(key, results.tests(), one) for one in ("encode_ms_per_query", "search_ms_per_query")]
    return None if None in parts else sum(part for part in parts if part is not None)


def _marker_size(results: Results, key: Key) -> float:
    """Larger for larger models."""
    sizes = sorted({one.size for one in results.cells})
    return 6 + 7 * sizes.index(key.size) / max(1, len(sizes) - 1)


def _legend_of_points(results: Results, panel: Any) -> None:
    """What colours, markers and their sizes mean, beside a panel."""
    lines = require("matplotlib.lines")
    keys = list(results.cells)
    marks = [
        lines.Line2D([], [], color=PARADIGM_COLOURS[name], marker="o", linestyle="none", label=name,
                     mfc=PARADIGM_COLOURS[name] if name == "sparse" else "white")
        for name in PARADIGM_COLOURS if any(key.paradigm == name for key in keys)
    ]  # fmt: skip
    marks += [
        lines.Line2D([], [], color="#555555", marker=MARKERS[name], linestyle="none", label=OBJECTIVE_NAMES[name])
        for name in OBJECTIVE_NAMES
        if any(key.objective == name for key in keys)
    ]
    by_size = {key.size: key for key in keys}
    marks += [
        lines.Line2D([], [], color="#555555", marker="o", mfc="none", linestyle="none", label=_size(size),
                     markersize=_marker_size(results, by_size[size]))
        for size in sorted(by_size)
    ]  # fmt: skip
    panel.legend(handles=marks, loc="center left", bbox_to_anchor=(1.0, 0.5), labelspacing=0.7)


def _bootstrap(results: Results, row: dict[str, Any], samples: int = 2000) -> tuple[float, float]:
    """95 % of the mean differences of samples of the queries."""
    left, right = (
        results.per_query(row[key], row["test set"], results.metric).mean(axis=0) for key in ("key_a", "key_b")
    )
    difference = right - left
    chosen = np.random.default_rng(0).integers(len(difference), size=(samples, len(difference)))
    low, high = np.quantile(difference[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _size(parameters: int) -> str:
    millions = parameters / 1e6
    return f"{millions / 1000:.2g} B" if millions >= 1000 else f"{millions:.{1 if millions >= 1 else 2}f} M"
