"""Rows of figures as Markdown, HTML or LaTeX tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def format_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | None = None,
    style: Literal["markdown", "html", "latex"] = "markdown",
) -> str:
    """Lay out rows as a table.

    Args:
        rows: One mapping per row; a missing value or None stays blank.
        columns: Columns in order; by default all, in order of first appearance.
        style: "markdown", "html" or "latex" (booktabs).

    Raises:
        ValueError: If there is no row or the style is unknown.

    Example:
        >>> print(format_table([{"model": "bm25", "nDCG@10": 0.6569}]))
        | model | nDCG@10 |
        |---|---:|
        | bm25 | 0.657 |
    """
    if not rows:
        raise ValueError("A table needs at least one row.")
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    is_number = [all(isinstance(row.get(column), int | float | None) for row in rows) for column in columns]
    if style == "markdown":
        head = "| " + " | ".join(columns) + " |"
        rule = "|" + "|".join("---:" if number else "---" for number in is_number) + "|"
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
        return "\n".join([head, rule, *body])
    if style == "html":
        aligned = [' style="text-align: right"' if number else "" for number in is_number]
        head = "".join(f"<th{align}>{escape(column)}</th>" for align, column in zip(aligned, columns, strict=True))
        lines = [
            "".join(f"<td{align}>{escape(cell)}</td>" for align, cell in zip(aligned, line, strict=True))
            for line in cells
        ]
        body = [f"<tr>{line}</tr>" for line in lines]
        return "\n".join(["<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, "</tbody>", "</table>"])
    if style == "latex":
        alignment = "".join("r" if number else "l" for number in is_number)
        lines = [" & ".join(_latex(cell) for cell in line) + r" \\" for line in [list(columns), *cells]]
        begin, end = f"\\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", end])
    raise ValueError(f"style is markdown, html or latex, got {style!r}.")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 0.001:
            return f"{value:.2g}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _latex(text: str) -> str:
    return "".join(_LATEX_SPECIAL.get(character, character) for character in text)
