"""Lay out what check.py found as Markdown tables, so that no figure is typed by hand.

python benchmarks/gpu/tables.py runs/gpu/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

TITLES = {
    "ceilings": "What the card can do at best",
    "attention": "Attention over packed texts beside each text alone, relative differences",
    "training": "A training step of Llama-3.2-1B's shape",
    "encode": "Encoding with Llama-3.2-1B's shape",
    "test counts": "Tests",
    "tests": "Tests that did not pass",
    "failures": "What did not run",
    "stages": "Stages",
}
Row = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """All tables of a run, with its card, commit and command above them."""
    return "\n\n".join([heading(results), *sections(results)])


def heading(results: dict[str, Any]) -> str:
    about = results["about"]
    card = results.get("card", [{}])[0].get("name", "an unknown card")
    versions = ", ".join(f"{name} {version}" for row in results.get("versions", []) for name, version in row.items())
    return f"Measured on {card}, commit {about['commit']}, by `{about['command']}` ({versions or 'versions unknown'})."


def sections(results: dict[str, Any]) -> Iterator[str]:
    import sparse_head

    for case, rows in by_case(results.get("head", [])):
        sparse_head.add_ratios(rows)
        yield table(f"The sparse head, {case}", rows)
    for section in ("training", "encode", "ceilings", "attention"):
        if results.get(section):
            yield table(TITLES[section], results[section])
    for case, rows in by_case(results.get("kernels", [])):
        yield table(f"Our kernels, forward and backward, {case}", rows)
    for case, rows in by_case(results.get("tuning", [])):
        yield table(f"Fastest configurations, {case}", sorted(rows, key=lambda row: row["ms"])[:6])
    for section in ("test counts", "tests", "failures", "stages"):
        if results.get(section):
            yield table(TITLES[section], results[section])


def by_case(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for case in dict.fromkeys(row["case"] for row in rows):
        yield case, [{key: value for key, value in row.items() if key != "case"} for row in rows if row["case"] == case]


def table(title: str, rows: list[Row]) -> str:
    from lion_st.evaluation.tables import format_table

    return f"**{title}**\n\n{format_table(rows)}"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
