"""Stages of a GPU run: resumable, side by side, with what they leave kept in parts; and the plan's commands."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lion_st.study import plan_study, read_study
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments

SCRIPTS = Path(__file__).parents[2] / "training_scripts" / "gpu_run"


def run(tmp_path, stages, *options):
    (tmp_path / "plan.json").write_text(json.dumps(stages))
    folders = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    command = [sys.executable, SCRIPTS / "run.py", "--plan", tmp_path / "plan.json", *folders, *options]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return json.loads((tmp_path / "out" / "results.json").read_text())


def stage(name, command, lane="one", seconds=20, **more):
    return {"name": name, "lane": lane, "seconds": seconds, "command": command, **more}


def test_stages_that_ended_well_are_not_run_again_and_a_failed_one_ends_its_lane(tmp_path):
    stages = [
        stage("first", "echo x >> {work}/first.txt", keep=["first.txt"]),
        stage("fails", "echo why; exit 3"),
        stage("never", "echo x >> {work}/never.txt"),
        stage("beside", "echo y > {work}/beside.txt", lane="two"),
    ]
    results = run(tmp_path, stages)
    assert results["fails"]["status"] == 3 and "why" in results["fails"]["tail"]
    assert "never" not in results
    assert (tmp_path / "work" / "beside.txt").read_text() == "y\n"
    stages[1]["command"] = "true"
    run(tmp_path, stages)
    assert (tmp_path / "out" / "first.txt").read_text() == "x\n"
    assert (tmp_path / "work" / "never.txt").read_text() == "x\n"


def test_a_stage_waits_for_one_of_another_lane_and_not_for_one_that_has_failed(tmp_path):
    stages = [
        stage("slow", "sleep 1; touch {work}/slow.txt"),
        stage("fails", "exit 3"),
        stage("next", "ls {work}/slow.txt", lane="two", after="slow"),
        stage("never", "true", lane="three", after="fails"),
    ]
    results = run(tmp_path, stages)
    assert results["next"]["status"] == 0
    assert results["never"]["status"] == "fails has not ended well"


def test_a_stage_that_outlasts_its_seconds_is_stopped_with_its_children(tmp_path):
    results = run(tmp_path, [stage("slow", "sleep 100 & sleep 100", seconds=6)], "--grace", "0")
    assert results["slow"]["status"] == "out of time"


def test_large_files_travel_in_parts(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)) * 20_000)

    def parts(*options):
        command = [sys.executable, SCRIPTS / "parts.py", *options, "--folder", tmp_path / "parts"]
        return subprocess.run([str(part) for part in command], capture_output=True, text=True)

    parts("split", tmp_path / "weights.bin", "--megabytes", "2").check_returncode()
    assert len(list((tmp_path / "parts").glob("weights.bin.part*"))) == 3
    parts("join", "--target", tmp_path / "joined").check_returncode()
    assert (tmp_path / "joined" / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "parts" / "weights.bin.part001").unlink()
    refused = parts("join", "--target", tmp_path / "joined")
    assert refused.returncode and "Parts of weights.bin are missing" in refused.stderr


def planned() -> list[dict]:
    made = subprocess.run([sys.executable, SCRIPTS / "make_plan.py"], check=True, capture_output=True, text=True)
    return json.loads(made.stdout)


@pytest.mark.parametrize("item", planned(), ids=lambda item: item["name"])
def test_the_plan_s_commands_are_understood(item):
    values = {"work": "runs/w", "data": "data/d", "out": "runs/o", "seconds": 30, "python": "python"}
    words = shlex.split(item["command"].format(**values))
    if words[1:4] == ["-m", "lion_st", "train"]:
        _, training = parse_retriever_arguments(words[4:])
        assert training.max_seconds == 30
    elif words[1:4] == ["-m", "lion_st", "adapt"]:
        _, training = parse_mntp_arguments(words[4:])
        assert training.max_seconds == 30
    elif words[1:4] == ["-m", "lion_st", "study"]:
        plan_study(read_study(SCRIPTS.parents[1] / words[4]))
    elif words[0] != "tar":
        script = (SCRIPTS.parents[1] / words[1]).read_text()
        options = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert [one for one in options if f'"--{one}"' not in script and f"    {one}: " not in script] == []
