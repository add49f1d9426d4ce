"""The figure of what search engines take, and the page that shows it."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_engine_has_a_line_measured_or_not(tmp_path, import_script):
    pytest.importorskip("matplotlib")
    search_figure = import_script("benchmarks/search_figure.py")
    rows = json.loads((ROOT / "benchmarks/results/search-lion-100000.json").read_text())["rows"]
    measured = [row for row in rows if "p50 ms, k=10" in row]
    left = [{"engine": "refusing", "note": "refuses it"}, {"engine": "slow", "stopped": "after 5 s"}]
    files = [tmp_path / name for name in ("all.svg", "measured.svg")]
    search_figure.draw([*rows, *left], "title", files[0])
    search_figure.draw(measured, "title", files[1])
    texts = [re.findall(r"<!-- (.*?) -->", file.read_text()) for file in files]
    assert {"refuses it", "stopped after 5 s", "slow", "refusing"} <= set(texts[0])
    for row in measured:
        (label,) = {one for one in texts[1] if one.startswith(f"{row['engine']}, ")}
        assert float(label.rpartition(" ")[2]) == pytest.approx(row["recall@10"], abs=1e-3)


def test_figures_of_the_benchmarks_lie_where_both_pages_find_them(import_script):
    pytest.importorskip("griffe")
    pytest.importorskip("typer")
    page = import_script("docs/hooks.py").benchmark_tables()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert shown and all((ROOT / "docs" / name).is_file() for name in shown)
