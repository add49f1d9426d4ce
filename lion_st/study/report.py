"""Everything that a study leaves to read: rows, tables, figures, and one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any

from lion_st.extras import require
from lion_st.files import atomic_write
from lion_st.study.figures import draw_figures
from lion_st.study.findings import findings
from lion_st.study.grid import Plan
from lion_st.study.results import OBJECTIVE_NAMES, Key, Results
from lion_st.tables import format_table

CAPTIONS = {
    "quality-size": "Quality against size, by objective; bars are 95 % confidence intervals over seeds, by the "
    "variance of all sizes of a paradigm and objective.",
    "sparse-dense": "Sparse against dense, by size and objective; lines are 95 % intervals over queries.",
    "quality-cost": "Quality against active terms and against the time that a query takes.",
    "quality-flops": "Quality against the training FLOPs that were spent.",
}
POWER_LAWS = (
    "y = coefficient / x ^ exponent + floor; a positive exponent is an error that falls. The band is of 95 % over "
    "queries and seeds."
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1a1a1a; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
th button {{ all: unset; cursor: pointer; font-weight: 600; }}
th button:focus-visible {{ outline: 2px solid #0072B2; }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
tr:target td, pre:target {{ background: #fff3c4; }}
figure {{ margin: 2rem 0; }} figure svg {{ max-width: 100%; height: auto; }}
.verdict {{ font-weight: 600; }}
pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: 13px; }}
</style></head><body>
{body}
<script>
for (const table of document.querySelectorAll("table")) for (const head of table.querySelectorAll("th")) {{
  head.firstChild.addEventListener("click", () => {{
    const place = [...head.parentNode.children].indexOf(head), up = head.ariaSort !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.children[place].dataset.v ?? row.children[place].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {{
      const x = value(a), y = value(b);
      return (isNaN(x) || isNaN(y) || x === "" || y === "" ? x.localeCompare(y) : x - y) * (up ? 1 : -1);
    }});
    table.tBodies[0].append(...rows);
  }});
}}
</script></body></html>
"""


def write_report(plan: Plan, folder: str | Path) -> Path:
    """Write what the finished cells of a study have found into its folder `report`.

    `rows.csv` and `rows.parquet` have a row for each cell, test set and metric; `table.md` is the paper's table, with
    the verdict on its findings; `comparisons.csv`, `fits.csv`, `overlap.csv`, `configurations.json`; `figures/` as SVG
    and PNG; and `report.html` shows all of it, every number leading to its row, and a row to its configuration.

    Returns:
        The HTML page.

    Raises:
        FileNotFoundError: If no cell is finished.
        ValueError: If one was finished with other settings than the plan's.
        ImportError: If matplotlib is missing; how it is installed.
    """
    folder = Path(folder).resolve()
    results = Results(plan, folder)
    target = folder / "report"
    rows = results.rows
    figures = draw_figures(results, target / "figures")
    _write_csv(target / "rows.csv", rows)
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), target / "rows.parquet")
    _write_csv(target / "comparisons.csv", results.comparison_rows())
    _write_csv(target / "fits.csv", results.fit_rows())
    _write_csv(target / "overlap.csv", results.overlap())
    configurations = _configurations(results)
    atomic_write(target / "configurations.json", json.dumps(configurations, indent=1) + "\n")
    atomic_write(target / "table.md", _markdown(results))
    page = target / "report.html"
    atomic_write(page, PAGE.format(title=escape(plan.study.name), body=_body(results, figures, configurations)))
    return page


def _configurations(results: Results) -> dict[str, Any]:
    """What decides on each finished cell, by its hash."""
    study, finished = results.plan.study, {row["cell"] for row in results.rows}
    stages = {stage.backbone: dict(stage.options) for stage in results.plan.stages}
    backbones = {choice.name: choice for choice in study.backbones}
    return {
        cell.configuration: {
            "cell": cell.name,
            "backbone": vars(backbones[cell.backbone]),
            "mntp": stages.get(cell.backbone),
            "training": dict(cell.options),
            "data": study.of_data(),
            "evaluation": study.of_evaluation(),
        }
        for cell in results.plan.cells
        if cell.name in finished
    }


def _markdown(results: Results) -> str:
    verdicts = [one._asdict() for one in findings(results)]
    return (
        f"# {results.plan.study.name}\n\n{results.metric}; intervals are of 95 % over seeds, by the variance of all "
        "sizes of a paradigm and objective.\n\n"
        f"{format_table(results.table())}\n\n{format_table(verdicts)}\n"
    )


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    out = StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, out.getvalue())


def _body(results: Results, figures: Sequence[Path], configurations: Mapping[str, Any]) -> str:
    study = results.plan.study
    missing = len(results.plan.cells) - len({row["cell"] for row in results.rows})
    parts = [f"<h1>{escape(study.name)}</h1>"]
    budgets = ", ".join(f"{budget:.3g}" for budget in study.flops)
    parts.append(
        f"<p>{len(results.plan.cells)} cells of {budgets} training FLOPs each. Numbers lead to their rows, rows to "
        "their configuration and commit; a click on a heading sorts.</p>"
    )
    if missing:
        parts.append(f"<p class=verdict>{missing} cells are not finished and are missing below.</p>")
    parts.append("<h2>The paper's findings</h2><dl>")
    for finding, verdict, grounds in findings(results):
        parts.append(
            f"<dt>{escape(finding)}: <span class=verdict>{escape(verdict)}</span></dt><dd>{escape(grounds)}</dd>"
        )
    parts.append(f"</dl><h2>{escape(results.metric)} by cell</h2>{_summary(results)}")
    for figure in figures:
        svg = figure.read_text(encoding="utf-8")
        caption = CAPTIONS[figure.stem]
        parts.append(f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>")
    parts.append(f"<h2>Power laws</h2><p>{POWER_LAWS}</p>")
    parts.append(_table(results.fit_rows()))
    parts.append("<h2>Comparisons</h2><p>Paired randomisation tests, corrected after Holm for all on a test set.</p>")
    parts.append(_table(results.comparison_rows()) if results.comparisons else "<p>There is nothing to compare.</p>")
    parts.append("<h2>Test texts among the training texts</h2>" + _table(results.overlap()))
    parts.append("<h2>Rows</h2>" + _all_rows(results))
    parts.append("<h2>Configurations</h2>")
    for name, content in configurations.items():
        shown = escape(json.dumps(content, indent=1, default=str))
        parts.append(f'<h3>{name}</h3><pre id="configuration-{name}">{shown}</pre>')
    return "\n".join(parts)


def _summary(results: Results) -> str:
    """The paper's table; a number leads to the row of its first seed, below which the others stand."""
    zero_shot = results.tests("zero_shot")
    columns = [[test] for test in results.tests()] + ([zero_shot] if len(zero_shot) > 1 else [])
    heads = ["backbone", "non-embedding", "paradigm", "objective", "shuffled", "budget"]
    heads += [tests[0] if len(tests) == 1 else "zero-shot mean" for tests in columns]
    lines = []
    for key in results.cells:
        cells = [_cell(value) for value in _described(key)]
        for tests in columns:
            score = results.score(key, tests, results.metric)
            target = _anchor(results.cells[key][0], tests[0], results.metric)
            cells.append(f'<td class=n data-v="{score.mean}"><a href="#{target}">{score}</a></td>')
        lines.append("".join(cells))
    return _page_table(heads, lines)


def _described(key: Key) -> tuple[Any, ...]:
    return key.backbone, key.size, key.paradigm, OBJECTIVE_NAMES[key.objective], key.label_noise, f"{key.budget:.3g}"


def _all_rows(results: Results) -> str:
    heads = [name for name in results.rows[0] if name not in ("study", "run", "qrels")]
    order = {cell: place for place, cells in enumerate(results.cells.values()) for cell in cells}
    lines, ids = [], []
    for row in sorted(results.rows, key=lambda row: (order[row["cell"]], row["test_set"], row["metric"], row["seed"])):
        ids.append(_anchor(row["cell"], row["test_set"], row["metric"]))
        lines.append("".join(_linked(row[name]) if name == "configuration" else _cell(row[name]) for name in heads))
    return _page_table(heads, lines, ids)


def _linked(configuration: str) -> str:
    return f'<td><a href="#configuration-{configuration}">{configuration}</a></td>'


def _anchor(cell: str, test: str, metric: str) -> str:
    return escape(f"{cell}/{test}/{metric}".replace(" ", "-"), quote=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return _page_table(heads, ["".join(_cell(row.get(name)) for name in heads) for row in rows])


def _page_table(heads: Sequence[str], lines: Sequence[str], ids: Sequence[str] | None = None) -> str:
    head = "".join(f"<th><button>{escape(name)}</button></th>" for name in heads)
    marks = [f' id="{one}"' for one in ids] if ids is not None else [""] * len(lines)
    body = "\n".join(f"<tr{mark}>{line}</tr>" for mark, line in zip(marks, lines, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, bool | str):
        return f"<td>{escape(str(value))}</td>"
    if isinstance(value, int):
        return f'<td class=n data-v="{value}">{value:,}</td>'
    shown = f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
    return f'<td class=n data-v="{value}">{shown}</td>'
