"""What a run has logged, as a table and a figure."""

import json
import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import lion
from typer.testing import CliRunner

from lion_st.cli import app
from lion_st.training.progress.history import draw_history, history_rows, read_history


def entries(steps: int) -> list[dict]:
    found = []
    for step in range(10, steps + 1, 10):
        terms = {"query_active_dims": 900 / step, "document_active_dims": 9000 / step}
        found.append({"step": step, "epoch": 0.1, "loss": 5 / step, "contrastive_loss": 4 / step, **terms})
        if step % 50 == 0:
            scores = {"eval_a_dot_ndcg@10": 0.3, "eval_b_dot_ndcg@10": 0.5}
            found.append({"step": step, "eval_ndcg@10": 0.9 if step == 150 else 0.4, **scores})
    return found


def write_state(path: Path, steps: int, max_steps: int = 1000, age: float = 0.0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    state = {"log_history": entries(steps), "global_step": steps, "max_steps": max_steps}
    (path / "trainer_state.json").write_text(json.dumps(state))
    modified = (path / "trainer_state.json").stat().st_mtime - age
    os.utime(path / "trainer_state.json", (modified, modified))
    return path


def test_a_run_that_goes_on_is_shown_with_its_newest_whole_state(tmp_path):
    write_state(tmp_path / "checkpoint-500", 500, age=90)
    write_state(tmp_path, 700, age=45)
    cut_off = tmp_path / "checkpoint-800" / "trainer_state.json"
    cut_off.parent.mkdir()
    cut_off.write_text('{"log_history": [')
    history = read_history(tmp_path)
    assert (history.steps, history.max_steps, history.is_finished) == (700, 1000, False)
    assert "step 700 of 1,000, not finished, last written 4" in history.describe()
    (tmp_path / "training.json").write_text('{"finished": true}')
    assert read_history(tmp_path).describe().endswith("step 700 of 1,000, finished.")
    (tmp_path / "training.json").rename(tmp_path / "mntp.json")
    assert read_history(tmp_path).is_finished
    (tmp_path / "trainer_state.json").unlink()
    assert read_history(tmp_path).steps == 500


def test_the_table_has_few_rows_and_always_the_best(tmp_path):
    rows = history_rows(read_history(write_state(tmp_path, 1000)), most=7)
    assert [rows[0]["step"], rows[-1]["step"]] == [10, 1000] and len(rows) <= 8
    assert rows[-1] == {
        "step": 1000, "loss": 0.005, "CL": 0.004, "query terms": 0.9, "document terms": 9.0, "nDCG@10": 0.4,
    }  # fmt: skip
    assert max(row.get("nDCG@10", 0) for row in rows) == 0.9


def test_the_command_prints_the_table_and_draws_both_figures(tmp_path):
    run = write_state(tmp_path / "run", 200)
    for _ in range(2):  # the run's own figure is drawn anew
        shown = lion("report", run)
    assert "| step | loss | CL |" in shown and "| 200 |" in shown
    assert (run / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawing = ElementTree.parse(run / "report.svg").getroot()
    axes = [group for group in drawing.iter() if group.get("id", "").startswith("axes_")]
    assert len(axes) == 3
    lines = [[part.get("id") for part in group if part.get("id", "").startswith("line2d")] for group in axes]
    assert [len(found) for found in lines] == [2, 3, 2]  # loss and CL; the mean, a and b; documents and queries
    elsewhere = ("report", run, "--output", tmp_path / "figure")
    lion(*elsewhere)
    assert "--overwrite" in lion(*elsewhere, exit_code=1)
    lion(*elsewhere, "--overwrite")


def test_both_losses_of_hybrid_models_are_shown(tmp_path):
    log = [{"step": 10, "loss": 3.0, "sparse_contrastive_loss": 2.0, "dense_contrastive_loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 10, "max_steps": 20}))
    history = read_history(tmp_path)
    assert history_rows(history) == [{"step": 10, "loss": 3.0, "sparse CL": 2.0, "dense CL": 1.0}]
    draw_history(history, [tmp_path / "a.svg"])
    lines = [one.get("id", "") for one in ElementTree.parse(tmp_path / "a.svg").getroot().iter()]
    assert (tmp_path / "a.svg").read_text().count("sparse CL") == 1 and any("line2d" in one for one in lines)


def test_the_score_of_multi_vector_models_is_drawn(tmp_path):
    log = [{"step": step, "loss": 1.0, "eval_ndcg@10": 0.4, "eval_a_maxsim_ndcg@10": 0.4} for step in (10, 20)]
    state = {"log_history": log, "global_step": 20, "max_steps": 20}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    draw_history(read_history(tmp_path), [tmp_path / "a.svg"])
    axes = [one.get("id", "") for one in ElementTree.parse(tmp_path / "a.svg").getroot().iter()]
    assert len({one for one in axes if one.startswith("axes_")}) == 2  # of the loss and of nDCG@10


def test_without_matplotlib_the_table_is_printed_and_the_extra_named(tmp_path, monkeypatch):
    run = write_state(tmp_path / "run", 50)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 1
    assert "| step | loss |" in result.stdout and "pip install 'lion-st[train]'" in result.stderr
    lion("report", run, "--no-figure")


def test_a_folder_without_a_history_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no trainer_state\.json, nor a checkpoint"):
        read_history(tmp_path)
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="none of these can be read"):
        read_history(tmp_path)
    with pytest.raises(ValueError, match="has logged no loss yet"):
        draw_history(read_history(write_state(tmp_path, 0)), [tmp_path / "a.svg"])
