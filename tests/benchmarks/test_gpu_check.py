"""The command that checks and measures on a GPU runs at toy shapes without one, and needs few packages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "benchmarks" / "gpu" / "check.py"
sys.path.insert(0, str(CHECK.parent))
import check  # noqa: E402
import tables  # noqa: E402

# Python runs this at its start: these packages are not found, whether they are installed or not.
WITHOUT = """
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, PackageNotFoundError

ABSENT = {
    "bm25s", "datasets", "evaluate", "faiss", "gradio", "milvus_lite", "mteb", "pymilvus", "pytrec_eval", "ray",
    "seismic", "trl",
}
find, from_name = PathFinder.find_spec, Distribution.from_name

@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)

@classmethod
def named(cls, name):
    if name in ABSENT:
        raise PackageNotFoundError(name)
    return from_name(name)

PathFinder.find_spec, Distribution.from_name = find_spec, named
"""

# The model, a training step and an encoding as check.py runs them, but in one process, which imports once.
MODEL_STAGES = """
import json, sys
from pathlib import Path

import stages, training_step, encode

folder, sizes = Path(sys.argv[1]), stages.SIZES["cpu"]
common = ["--folder", str(folder), "--vocabulary", str(sizes["vocabulary"])]
stages.model("cpu", folder)
options = training_step.parse([*common, "--side", "lion_st", *sizes["training"]])
options.memory_gib = 64  # the limit is the process's own
print(json.dumps(list(training_step.run_side("lion_st", folder, options))))
options = encode.parse([*common, "--side", "encode_corpus", "--documents", "8"])
print(json.dumps(list(encode.run_side("encode_corpus", folder, options))))
assert not {"datasets", "mteb", "trl", "faiss"} & sys.modules.keys()
"""


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """Environment of a process that finds the packages of a bare GPU machine alone."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    folders = [tmp_path / "site", ROOT, ROOT / "benchmarks", ROOT / "benchmarks" / "gpu"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # as a worker of xdist
    return own | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_rehearsal_measures_the_head_and_lays_out_its_tables(bare, tmp_path):
    output = tmp_path / "out"
    arguments = ["--device", "cpu", "--output", str(output), "--stages", "machine", "head"]
    printed = run(bare | {"COMMIT": "abc1234"}, str(CHECK), *arguments)
    results = json.loads((output / "results.json").read_text())
    assert [(row["stage"], row["outcome"]) for row in results["stages"]] == [
        (name, "done") for name in ("about", "machine", "head")
    ]
    sides = {row["side"] for row in results["head"] if row["case"] == "D 64, 1 % active"}
    assert sides == {"matmul", "matmul in tiles", "eager", "stock", "stock in chunks", "lion_st"}
    assert not [row for row in results["head"] if "failed" in row]
    assert "commit abc1234" in printed and "**The sparse head, D 64, 1 % active**" in printed
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "benchmarks" / "README.md").read_text())
    for _ in range(2):  # tables take the place of earlier ones
        tables.insert(tables.render(results), readme)
    assert tables.render(results) in printed and readme.read_text().count(tables.render(results)) == 1


def test_the_model_trains_and_encodes_with_the_packages_of_a_bare_machine(bare, tmp_path):
    *_, training, encoding = run(bare, "-c", MODEL_STAGES, str(tmp_path / "model")).splitlines()
    assert json.loads(training)[-1]["tokens/s"] > 0
    assert 50 < json.loads(encoding)[-1]["terms/document"] < 500  # as sparse as a trained retriever


def test_the_tests_for_gpus_are_collected_with_the_packages_of_a_bare_machine(bare):
    _, *command = check.pytest_command(check.gpu_tests(), workers=0)
    listed = run(bare, *command, "--collect-only")
    assert "tests/kernels/test_gpu.py::test_no_logits_are_allocated" in listed and "not collected" not in listed


def test_a_stage_that_fails_or_hangs_stops_no_other_and_keeps_what_it_found(tmp_path):
    finding = "import json, sys, time; print(json.dumps({'ms': 1}), flush=True);"
    results = check.Results(tmp_path / "results.json", {"commit": "abc1234", "command": "none"})
    one = check.Run(results, tmp_path / "log.txt", 60, dict(os.environ))
    for name, rest in (("hangs", "time.sleep(60)"), ("fails", "sys.exit(3)"), ("runs", "")):
        command = [sys.executable, "-c", finding + rest]
        one.together([check.Stage(name, 8 if name == "hangs" else 30, command, "times", {"side": name})])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["side"] for row in found["times"]] == ["hangs", "fails", "runs"]
    outcomes = [row["outcome"] for row in found["stages"]]
    assert outcomes == ["stopped after 8 s", "failed with status 3", "done"]


def test_outcomes_of_tests_are_gathered(bare, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n\ndef test_right(): pass\n\ndef test_wrong(): assert 2 == 3\n\n"
        "@pytest.mark.skip(reason='not here')\ndef test_absent(): pass\n\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n\ndef test_broken(broken): pass\n"
    )
    results = check.Results(tmp_path / "results.json", {"commit": "abc1234", "command": "none"})
    command = check.pytest_command([str(file)], workers=2)
    check.Run(results, tmp_path / "log.txt", 60, bare).one(check.Stage("tests", 60, command))
    assert results.contents["test counts"] == [{"run": "tests", "passed": 1, "failed": 2, "skipped": 1}]
    outcomes = {row["test"].partition("::")[2]: row["outcome"] for row in results.contents["tests"]}
    assert outcomes == {"test_wrong": "failed", "test_absent": "skipped", "test_broken": "failed"}
    assert "assert 2 == 3" in str(results.contents["tests"])
