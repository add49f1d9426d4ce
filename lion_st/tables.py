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
    if style not in _LAYOUTS:
        raise ValueError(f"style is markdown, html or latex, got {style!r}.")
    return _LAYOUTS[style](list(columns), cells, is_number)


def _markdown(columns: list[str], cells: list[list[str]], is_number: list[bool]) -> str:
    head = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join("---:" if number else "---" for number in is_number) + "|"
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return "\n".join([head, rule, *body])


def _html(columns: list[str], cells: list[list[str]], is_number: list[bool]) -> str:
    aligned = [' style="text-align: right"' if number else "" for number in is_number]

    def row(tag: str, texts: list[str]) -> str:
        return "".join(f"<{tag}{align}>{escape(text)}</{tag}>" for align, text in zip(aligned, texts, strict=True))

    body = [f"<tr>{row('td', line)}</tr>" for line in cells]
    return "\n".join(
        ["<table>", f"<thead><tr>{row('th', columns)}</tr></thead>", "<tbody>", *body, "</tbody>", "</table>"]
    )


def _booktabs(columns: list[str], cells: list[list[str]], is_number: list[bool]) -> str:
    alignment = "".join("r" if number else "l" for number in is_number)
    head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in (columns, *cells))
    begin, end = f"\\begin{{tabular}}{{{alignment}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end])


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


_LAYOUTS = {"markdown": _markdown, "html": _html, "latex": _booktabs}
