"""What is made of finished cells: tests between them, the verdict on the paper's findings, figures and the report."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from lion_st.evaluation import write_qrels, write_run
from lion_st.study import Results, findings, parse_study, plan_study, write_report
from lion_st.study.results import interval

QUERIES, RANKS = 60, 10


def write_cells(folder: Path, ranks: dict[tuple[str, str, str], Any], **changes: Any):
    """A study whose cells rank each query's document as asked: by (backbone, paradigm, objective), ranks [queries]."""
    values: dict[str, Any] = {
        "name": "Written <by> a test",
        "backbones": [{"name": name, "recipe": "micro", "num_layers": layers} for name, layers in
                      (("one", 1), ("two", 2), ("four", 4), ("twin", 4)) if any(key[0] == name for key in ranks)],
        "paradigms": list(dict.fromkeys(key[1] for key in ranks)),
        "objectives": list(dict.fromkeys(key[2] for key in ranks)),
        "seeds": [1],
        "budget": {"flops": 1e12, "lengths": "full"},
        "data": {"train": "lion-st/lion-quickstart"},
        "evaluation": {"in_domain": ["inside"], "zero_shot": ["outside"], "metrics": ["MRR@10"]},
    }  # fmt: skip
    plan = plan_study(parse_study(values | changes))
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "data.json").write_text(json.dumps({"overlap": [{"test set": "inside", "queries": 60}]}))
    qrels = {f"q{n}": {"right": 1} for n in range(QUERIES)}
    for cell in plan.cells:
        place = folder / "cells" / cell.name
        rows = []
        for test, domain in (("inside", "in_domain"), ("outside", "zero_shot")):
            wanted = ranks[cell.backbone, cell.paradigm, cell.objective]
            wanted = np.asarray(wanted[test] if isinstance(wanted, dict) else wanted)
            run = {
                f"q{n}": {("right" if rank == place else f"d{rank}"): 1.0 / rank for rank in range(1, RANKS + 1)}
                for n, place in enumerate(wanted)
            }
            output = place / "evaluation" / test
            write_run(output / "run.trec", run)
            write_qrels(output / "qrels", qrels)
            entropies = {f"q{n}": 0.1 + 0.1 * float(rank) for n, rank in enumerate(wanted)}
            (output / "entropies.json").write_text(json.dumps(entropies))
            shared = {
                "study": "x", "cell": cell.name, "backbone": cell.backbone, "paradigm": cell.paradigm,
                "objective": cell.objective, "seed": cell.seed, "label_noise": cell.label_noise,
                "configuration": cell.configuration,
                "flops": cell.flops, "mntp_flops": 0.0, "test_set": test, "domain": domain, "index_bytes": 10,
                "document_terms": 20.0 if cell.paradigm == "sparse" else None, "encode_ms_per_query": 1.0,
                "search_ms_per_query": 0.5, "commit": "abc", "run": f"evaluation/{test}/run.trec",
                "qrels": f"evaluation/{test}/qrels",
            }  # fmt: skip
            rows.append(shared | {"metric": "MRR@10", "value": float(np.mean(1 / wanted))})
            rows.append(shared | {"metric": "contrastive entropy", "value": float(np.mean(list(entropies.values())))})
        (place / "rows.json").write_text(json.dumps(rows))
    return plan


def at(rank: int) -> np.ndarray:
    return np.full(QUERIES, rank)


def grid(score: Any) -> dict[tuple[str, str, str], Any]:
    """Ranks of all cells of three sizes, two paradigms and three objectives."""
    return {
        (backbone, paradigm, objective): score(size, paradigm, objective)
        for size, backbone in enumerate(("one", "two", "four"))
        for paradigm in ("sparse", "dense")
        for objective in ("cl", "kd", "cl_kd")
    }


def verdicts(folder: Path, ranks: dict[tuple[str, str, str], Any]) -> list[str]:
    return [one.verdict for one in findings(Results(write_cells(folder, ranks), folder))]


def test_findings_hold_where_every_claim_is_significant(tmp_path: Path) -> None:
    def score(size: int, paradigm: str, objective: str) -> Any:
        base = {"cl": 6 - size, "kd": 6, "cl_kd": 6 - 2 * size}[objective]
        return {"inside": at(base + (paradigm == "dense")), "outside": at(base - 1 + 3 * (paradigm == "dense"))}

    assert verdicts(tmp_path, grid(score)) == ["holds", "holds", "holds", "holds"]


def test_findings_do_not_hold_where_the_contrary_is_significant(tmp_path: Path) -> None:
    def score(size: int, paradigm: str, objective: str) -> Any:
        base = {"cl": 3, "kd": 6 - 2 * size, "cl_kd": 5}[objective]
        return {"inside": at(base + 3 * (paradigm == "sparse")), "outside": at(base + 4 * (paradigm == "sparse"))}

    assert verdicts(tmp_path, grid(score)) == ["does not hold"] * 4


def test_findings_are_undecided_where_nothing_is_significant(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    same = generator.integers(1, RANKS + 1, QUERIES)

    def score(*_: Any) -> np.ndarray:
        ranks = same.copy()
        ranks[generator.integers(QUERIES)] = generator.integers(1, RANKS + 1)
        return ranks

    assert verdicts(tmp_path, grid(score)) == ["undecided"] * 4


def test_comparisons_are_paired_and_corrected_for_those_of_a_test_set(tmp_path: Path) -> None:
    ranks = {("one", "sparse", "cl"): at(1), ("one", "dense", "cl"): at(2), ("two", "sparse", "cl"): at(1),
             ("two", "dense", "cl"): at(2)}  # fmt: skip
    rows = Results(write_cells(tmp_path, ranks), tmp_path).comparisons
    inside = [row for row in rows if row["test set"] == "inside"]
    assert sorted(row["question"] for row in inside) == ["size", "size", "sparse or dense", "sparse or dense"]
    for row in inside:
        if row["question"] == "size":
            assert row["difference"] == 0 and row["p"] == row["p, Holm"] == 1
        else:
            assert (row["a"], row["b"]) in {(f"{size} dense CL", f"{size} sparse CL") for size in ("one", "two")}
            assert row["difference"] == pytest.approx(0.5)
            assert row["p"] == pytest.approx(1 / 20_001) and row["p, Holm"] == pytest.approx(4 / 20_001)


def test_exponents_are_those_of_the_cells(tmp_path: Path) -> None:
    ranks = {(name, "dense", "cl"): at(rank) for name, rank in (("one", 8), ("two", 4), ("four", 2))}
    fits = {(about["of"], about["against"]): (about, fit) for about, fit in
            Results(write_cells(tmp_path, ranks), tmp_path).fits if about["domain"] == "in domain"}  # fmt: skip
    _, fit = fits["1 - MRR@10", "non-embedding parameters"]
    slope = np.polyfit(np.log([1.0, 2.0, 4.0]), np.log([7 / 8, 3 / 4, 1 / 2]), 1)[0]
    assert fit.law is not None and fit.law.exponent == pytest.approx(-slope)
    assert "needs 3" in fits["contrastive entropy", "training FLOPs"][1].doubt


def test_backbones_of_one_size_both_count(tmp_path: Path) -> None:
    ranks = {(name, "dense", "cl"): at(rank) for name, rank in (("one", 8), ("two", 4), ("four", 2), ("twin", 4))}
    results = Results(write_cells(tmp_path, ranks), tmp_path)
    fit = next(fit for about, fit in results.fits if (about["of"], about["domain"]) == ("1 - MRR@10", "in domain"))
    slope = np.polyfit(np.log([1.0, 2.0, 4.0, 4.0]), np.log([7 / 8, 3 / 4, 1 / 2, 3 / 4]), 1)[0]
    assert fit.law is not None and fit.law.exponent == pytest.approx(-slope) and fit.points == 3
    sizes = {(row["a"], row["b"]) for row in results.comparisons if row["question"] == "size"}
    assert sizes == {("one dense CL", "four dense CL"), ("one dense CL", "twin dense CL")}


def test_the_report_of_two_cells_is_whole(tmp_path: Path) -> None:
    ranks = {("one", "sparse", "cl_kd"): at(1), ("one", "dense", "cl_kd"): at(2)}
    plan = write_cells(tmp_path, ranks)
    page = write_report(plan, tmp_path)
    folder = page.parent
    rows = list(csv.DictReader((folder / "rows.csv").open()))
    assert len(rows) == 2 * 2 * 2 == parquet.read_table(folder / "rows.parquet").num_rows
    figures = sorted(file.name for file in (folder / "figures").iterdir())
    stems = ("quality-cost", "quality-flops", "quality-size", "sparse-dense")
    assert figures == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    assert all(file.stat().st_size > 5000 for file in (folder / "figures").iterdir())
    html = page.read_text()
    assert "Written &lt;by&gt; a test" in html and html.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#)', html.split("<body>")[0]) and "http-equiv" not in html
    # Every link leads somewhere: a number to its row, a row to its configuration.
    targets = set(re.findall(r'<(?:tr|pre) id="([^"]+)"', html))
    links = set(re.findall(r'<a href="#([^"]+)"', html))
    assert links <= targets and {row["configuration"] for row in rows} <= {
        one.removeprefix("configuration-") for one in links
    }
    configurations = json.loads((folder / "configurations.json").read_text())
    assert {row["configuration"] for row in rows} == configurations.keys()
    again = (folder / "figures" / "quality-size.svg").read_bytes()
    write_report(plan, tmp_path)
    assert (folder / "figures" / "quality-size.svg").read_bytes() == again  # no dates or random ids


def test_a_report_of_no_finished_cell_says_what_to_do(tmp_path: Path) -> None:
    plan = write_cells(tmp_path / "other", {("one", "dense", "cl"): at(1)})
    with pytest.raises(FileNotFoundError, match="run `lion-st study` first"):
        write_report(plan, tmp_path)


def test_cells_of_other_settings_than_the_files_are_not_reported_as_its_own(tmp_path: Path) -> None:
    ranks = {("one", "dense", "cl"): at(1)}
    write_cells(tmp_path / "study", ranks)
    edited = write_cells(tmp_path / "other", ranks, budget={"flops": 2e12, "lengths": "full"})
    with pytest.raises(ValueError, match=r"holds one-dense-cl-seed1 with other settings .* by the file that"):
        write_report(edited, tmp_path / "study")


def test_intervals_of_few_seeds_are_by_the_variance_of_all_alike() -> None:
    generator = np.random.default_rng(0)
    covered, halves = 0, []
    for _ in range(2000):  # four sizes of two seeds each, whose true mean is 0
        seeds = generator.normal(size=(4, 2))
        mean, half = interval(seeds[0].tolist(), seeds[1:].tolist())
        covered += abs(mean) <= half
        halves.append(half)
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
    assert np.mean(halves) < 0.5 * np.mean([interval(generator.normal(size=2).tolist()).half for _ in range(2000)])
    assert interval([0.5]).half is None and interval([0.5], [[0.1]]).half is None
    assert interval([0.5], [[0.1, 0.3]]).half == pytest.approx(12.706 * 0.1 * 2**0.5, rel=1e-3)


def test_a_score_takes_the_variance_of_its_paradigm_and_objective_alone(tmp_path: Path) -> None:
    ranks = {
        (size, paradigm, "cl"): np.ones(QUERIES, int) for size in ("one", "two") for paradigm in ("sparse", "dense")
    }
    plan = write_cells(tmp_path, ranks, seeds=[1, 2])
    results = Results(plan, tmp_path)
    values = {
        "one-sparse-cl-seed1": 0.4,
        "one-sparse-cl-seed2": 0.5,
        "two-sparse-cl-seed1": 0.6,
        "two-sparse-cl-seed2": 0.9,
    }
    for row in results.rows:
        row["value"] = values.get(row["cell"], 0.1)
    key = next(key for key in results.cells if key.backbone == "one" and key.paradigm == "sparse")
    assert results.score(key, ["inside"], "MRR@10") == interval([0.4, 0.5], [[0.6, 0.9]])
