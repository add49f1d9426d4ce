"""Hybrid runs made of run files."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lion_st.cli import app
from lion_st.evaluation import evaluate_run, fit_run_weights, fuse_runs, read_run, write_qrels, write_run

SPARSE = {"q1": {"a": 9.0, "b": 5.0, "c": 1.0}, "q2": {"d": 2.0}}
DENSE = {"q1": {"b": 0.9, "c": 0.8, "a": 0.1}, "q3": {"e": 0.5}}
QRELS = {"q1": {"b": 1}, "q3": {"e": 1}}


def test_runs_are_fused_by_ranks_or_weights() -> None:
    fused = fuse_runs([SPARSE, DENSE])
    assert fused["q1"] == pytest.approx({"a": 1 / 61 + 1 / 63, "b": 1 / 62 + 1 / 61, "c": 1 / 63 + 1 / 62})
    assert fused["q2"] == pytest.approx({"d": 1 / 61}) and fused["q3"] == pytest.approx({"e": 1 / 61})
    fused = fuse_runs([SPARSE, DENSE], weights=(3, 1), k=2)
    assert fused["q1"] == pytest.approx({"a": 0.75, "b": 0.75 * 0.5 + 0.25})


def test_weights_are_those_that_score_best_on_the_development_set() -> None:
    weights = fit_run_weights([SPARSE, DENSE], QRELS, "MRR@10")
    assert evaluate_run(QRELS, fuse_runs([SPARSE, DENSE], weights), ["MRR@10"])["MRR@10"] == 1.0
    assert evaluate_run(QRELS, fuse_runs([SPARSE, DENSE], (1, 0)), ["MRR@10"])["MRR@10"] < 1.0
    with pytest.raises(ValueError, match="No query of the development runs is judged"):
        fit_run_weights([SPARSE, DENSE], {"q9": {"a": 1}})
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        fuse_runs([SPARSE])


def test_the_command_fuses_files(tmp_path: Path) -> None:
    files = [str(write_run(tmp_path / f"{name}.trec", run)) for name, run in (("sp", SPARSE), ("ds", DENSE))]
    qrels = str(write_qrels(tmp_path / "dev.qrels", QRELS))
    output = tmp_path / "hybrid.trec"

    def fuse(*options: str) -> str:
        done = CliRunner().invoke(app, ["fuse", *files, "--output", str(output), *options])
        assert (done.exit_code == 0) == ("lion-st fuse:" not in done.stderr), done.output
        return done.stdout + done.stderr

    assert "3 queries, fused by reciprocal ranks" in fuse()
    assert read_run(output)["q1"] == pytest.approx(fuse_runs([SPARSE, DENSE])["q1"])
    weights = ("--weight", "3", "--weight", "1", "-k", "2")
    assert "pass --overwrite to replace it" in fuse(*weights)
    assert "weights 3.00, 1.00" in fuse(*weights, "--overwrite")
    assert read_run(output)["q1"] == pytest.approx({"a": 0.75, "b": 0.625})
    development = ("--dev", files[0], "--dev", files[1], "--dev-qrels", qrels, "--metric", "MRR@10")
    assert "fused by weights" in fuse(*development, "--overwrite")
    assert "takes --dev runs with their --dev-qrels" in fuse("--dev", files[0])
    assert "no such file" in fuse(*development[:4], "--dev-qrels", "missing.qrels").lower()
    assert "2 runs need as many --dev runs, got 1" in fuse("--dev", files[0], "--dev-qrels", qrels)
    assert "2 runs need as many --weight, got 1" in fuse("--weight", "1")
    assert "--weight is a finite number of at least 0, got -1.0" in fuse("--weight", "1", "--weight", "-1")
    for weights in ((1.0, -1.0), (float("nan"), 1.0), (float("inf"), 1.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="one finite weight >= 0 for each of the 2 rankings"):
            fuse_runs([SPARSE, DENSE], weights)
