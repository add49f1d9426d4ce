"""The command line as such: it starts fast and fails in one line."""

import contextlib
import inspect
import json
import os
import subprocess
import sys
import zlib
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from lion_st.cli import app
from lion_st.engines import ENGINES, engine_settings
from lion_st.errors import describe_error
from lion_st.indexes.factory import engine_class

runner = CliRunner()


def test_help_and_recipes_import_nothing_heavy() -> None:
    program = (
        "import sys\nfrom lion_st.cli import app\n"
        "for arguments in (['--help'], ['encode', '--help'], ['recipes']):\n"
        "    app(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'mteb', 'transformers', 'scipy', 'datasets', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| llama-3-8b | sparse cl_kd |" in done.stdout


def test_every_command_has_help() -> None:
    commands = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    known = {"recipes", "encode", "index", "search", "prune", "query-encoder", "evaluate", "compare", "publish", "demo"}
    assert known <= set(commands)
    for command in commands:
        result = runner.invoke(app, [command, "--help"])
        assert result.exit_code == 0, result.output
        assert "usage" in result.output.lower()
        if command not in ("train", "adapt"):
            assert runner.invoke(app, [command, "-h"]).output == result.output


def test_an_error_is_one_line_and_exit_code_1(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["index", str(tmp_path / "nothing"), str(tmp_path / "index")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("lion-st index: ")
    assert "There is no such folder" in result.stderr and "nothing" in result.stderr
    monkeypatch.setenv("LION_ST_TRACEBACK", "1")
    assert isinstance(runner.invoke(app, arguments).exception, FileNotFoundError)


def test_a_misspelt_command_or_choice_is_a_usage_error() -> None:
    for arguments, message in (
        (["serach"], "No such command 'serach'. Did you mean 'search'"),
        (["index", "a", "b", "--engine", "lucene"], "'lucene' is not one of 'exact'"),
        (["index", "a", "b", "--threshhold", "1"], "--threshold"),
        (["index", "a"], "Missing argument"),
        (["data", "chek", "a"], "lion-st data: No such command 'chek'. Did you mean 'check'"),
        (
            ["index", "a", "b", "--set", "query_cut=5"],
            "exact has no setting 'query_cut': choose from quantization, dtype",
        ),
        (["search", "a", "b", "q", "--queries", "c"], "Give one QUERY or a file of --queries"),
        (["search", "a", "b", "--run", "c"], "give --queries with --run"),
        (["evaluate", "bm25"], "give --data or --trec"),
        (["evaluate", "bm25", "--data", "d", "--hybrid", "convex"], "give it as --dev"),
        (["fuse", "a", "b", "--output", "c", "--weight", "1"], "2 runs need as many --weight"),
        (["train", "--backbone", "llama-5"], "There is no recipe for backbone 'llama-5'"),
        (["train", "--backbone", "micro", "--lerning_rate", "1"], "did you mean --learning_rate?"),
        (["adapt", "--backbone", "llama-3-8b", "--text", "a"], "did you mean --texts?"),
    ):
        result = runner.invoke(app, arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert message in result.stderr


def test_errors_name_the_flags_of_the_command_line() -> None:
    flags = {"drop_short": "--drop-short", "top_terms": "--top-terms", "k": "-k", "quantization": "--quantization"}
    for message, line in (
        ("leave them out with drop_short=True.", "leave them out with --drop-short."),
        ("top_terms must be positive", "--top-terms must be positive"),
        ("quantization='uint8' is lossy", "--quantization 'uint8' is lossy"),
        ("no folder '/data/top_terms/x' or top_terms.json", "no folder '/data/top_terms/x' or top_terms.json"),
        ("two\n  lines", "two lines"),
    ):
        assert describe_error(ValueError(message), flags) == line
    assert describe_error(KeyError("shards")) == "unexpected KeyError: 'shards' (LION_ST_TRACEBACK=1 shows where)"
    assert describe_error(OSError(28, "No space left on device", "/x/y")) == "No space left on device: /x/y"
    line = describe_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert line.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. Lower --mini_batch_size (training) or ")


@pytest.mark.parametrize(
    "error",
    [KeyError("shards"), EOFError("cut off"), AssertionError(), zlib.error("bad"), OSError(28, "No space left")],
)
def test_any_failure_of_a_command_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("lion_st.training.recipes_table", fail)
    result = runner.invoke(app, ["recipes"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("lion-st recipes: ")


def test_an_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lion_st.training.recipes_table", interrupt)
    result = runner.invoke(app, ["recipes"])
    assert (result.exit_code, result.stderr) == (130, "lion-st recipes: interrupted.\n")


def test_version_and_module() -> None:
    assert runner.invoke(app, ["--version"]).output == f"lion-st {version('lion-st')}\n"
    assert "LION_ST_TRACEBACK" in runner.invoke(app, ["-h"]).output
    done = subprocess.run([sys.executable, "-m", "lion_st", "--version"], capture_output=True, text=True)
    assert done.stdout == f"lion-st {version('lion-st')}\n"
    shell = os.environ | {"_LION_ST_COMPLETE": "complete_bash", "COMP_WORDS": "lion-st sea", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "lion_st"], capture_output=True, text=True, env=shell)
    assert done.stdout.split() == ["search"]


def test_missing_paths_and_taken_places_are_refused_before_anything_heavy_is_imported(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    (tmp_path / "qrels").write_text("q 0 d 1\n")
    there, no, taken = str(tmp_path), str(tmp_path / "no"), str(tmp_path / "taken")
    commands = [
        ["encode", no, there, no], ["encode", there, no, no], ["encode", there, there, taken],
        ["index", no, no], ["index", there, taken], ["index", there, no, "--queries", no],
        ["search", no, there, "q"], ["search", there, no, "q"], ["search", there, there, "--queries", no],
        ["search", there, there, "--queries", there, "--run", taken + "/file"],
        ["prune", no, "--queries", there, "--qrels", no, "--report", no],
        ["prune", there, "--queries", there, "--qrels", taken + "/file", "--report", taken],
        ["evaluate", no, "--data", there], ["evaluate", "bm25", "--data", no],
        ["compare", no, no, "--qrels", no], ["fuse", no, no, "--output", no],
        ["fuse", taken + "/file", taken + "/file", "--output", taken + "/file"],
        ["export", no, taken], ["export", there, taken], ["card", there, "--output", taken + "/file"],
        ["import", there, taken], ["publish", no, "me/it"], ["demo", no], ["query-encoder", there, there, taken],
        ["train", "--config", no], ["adapt", "--config", no], ["data", "check", no], ["publish", "runs/no", "me/it"],
    ]  # fmt: skip
    program = (
        "import json, sys\nfrom typer.testing import CliRunner\nfrom lion_st.cli import app\n"
        "results = [CliRunner().invoke(app, command) for command in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'mteb', 'transformers', 'scipy', 'datasets', 'numba'} & set(sys.modules)\n"
        "print(json.dumps([sorted(heavy), [[one.exit_code, one.stderr] for one in results]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, results = json.loads(done.stdout)
    assert not heavy
    for command, (code, line) in zip(commands, results, strict=True):
        assert (code, line.count("\n")) == (1, 1), (command, line)
        name = "data check" if command[0] == "data" else command[0]
        assert line.startswith(f"lion-st {name}: ") and ("no" in line or "--overwrite" in line), line
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_help_lists_the_settings_that_engines_have() -> None:
    shown = runner.invoke(app, ["index", "--help"], env={"COLUMNS": "200"}).output
    shown = " ".join(shown.replace("│", " ").split())  # wherever the lines of the table end
    for engine, paradigms in ENGINES.items():
        for paradigm in paradigms:
            with contextlib.suppress(ImportError):
                taken = inspect.signature(engine_class(engine, paradigm)).parameters.values()
                names = {one.name for one in taken if one.kind is not one.VAR_KEYWORD}  # those of its two indexes
                assert names - {"paradigm"} == set(engine_settings(engine, paradigm))
        assert f"{engine}: {engine_settings(engine)[0]}" in shown
