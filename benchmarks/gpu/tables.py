"""Lay out what check.py found as Markdown tables, so that no figure is typed by hand.

python benchmarks/gpu/tables.py runs/gpu/results.json ...                       # print them
python benchmarks/gpu/tables.py runs/gpu/results.json ... benchmarks/README.md  # put them between the file's marks
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

BEGIN, END = "<!-- what tables.py wrote begins here -->", "<!-- and ends here -->"
MAIN = {
    "training": "A training step of the paper's CL+KD setting, Llama-3.2-1B's shape",
    "encode": "Encoding a corpus, Llama-3.2-1B's shape",
    "ceilings": "What the card can do at best",
    "attention": "Attention over packed texts beside each text alone, differences in % of the norm",
    "test counts": "Tests",
}
DETAILS = {
    "stages": "Stages",
    "model": "The model of the training step and the encoding",
    "failures": "What did not run",
    "tests": "Tests that did not pass",
}
Row = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """The tables to publish, below their card, commit and command."""
    import sparse_head

    about = results["about"]
    card = results.get("card", [{}])[0].get("name", "an unknown card")
    versions = ", ".join(f"{name} {version}" for row in results.get("versions", []) for name, version in row.items())
    parts = [f"Measured on {card}, commit {about['commit']}, with `{about['command']}` ({versions})."]
    if "note" in about:
        parts.append(about["note"])
    for case, rows in by_case(results.get("head", [])):
        sparse_head.add_ratios(rows)
        parts.append(table(f"The sparse head, {case}", rows))
    return "\n\n".join([*parts, *sections(results, MAIN)])


def details(results: dict[str, Any]) -> str:
    """What explains the tables: the time of kernels, and what went wrong."""
    parts = list(sections(results, DETAILS))
    for case, rows in by_case(results.get("kernels", [])):
        parts.append(table(f"Kernels of a forward and backward pass, {case}", rows))
    return "\n\n".join(parts)


def sections(results: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    for section, title in titles.items():
        if results.get(section):
            yield table(title, results[section])


def by_case(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    for case in dict.fromkeys(row["case"] for row in rows):
        yield case, [{key: value for key, value in row.items() if key != "case"} for row in rows if row["case"] == case]


def table(title: str, rows: list[Row]) -> str:
    from lion_st.tables import format_table

    return f"**{title}**\n\n{format_table(rows)}"


def insert(tables: str, file: Path) -> None:
    """Put tables into a Markdown file in place of what stands between its marks.

    Raises:
        SystemExit: If the file has no marks.
    """
    before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{file} has no lines {BEGIN!r} and {END!r}: write them where the tables belong.")
    file.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    target = files.pop() if files and files[-1].suffix == ".md" else None
    if not files:
        raise SystemExit(__doc__)
    tables = "\n\n".join(render(json.loads(file.read_text(encoding="utf-8"))) for file in files)
    if target is not None:
        insert(tables, target)
    else:
        print(tables)


if __name__ == "__main__":
    main()
