"""The command line as such: it starts fast and fails in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lion_st.cli import app

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


def test_every_verb_has_help() -> None:
    verbs = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
    rooms = {"recipes", "encode", "index", "search", "prune", "query-encoder", "evaluate", "compare", "publish", "demo"}
    assert rooms <= set(verbs)
    for verb in verbs:
        result = runner.invoke(app, [verb, "--help"])
        assert result.exit_code == 0, result.output
        assert "Usage" in result.output


def test_an_error_is_one_line_and_exit_code_1(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["index", str(tmp_path / "nothing"), str(tmp_path / "index")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("lion-st index: ")
    assert "no manifest.json" in result.stderr
    monkeypatch.setenv("LION_ST_TRACEBACK", "1")
    assert isinstance(runner.invoke(app, arguments).exception, ValueError)


def test_a_misspelt_verb_or_choice_is_a_usage_error() -> None:
    assert runner.invoke(app, ["serach"]).exit_code == 2
    assert runner.invoke(app, ["index", "a", "b", "--engine", "lucene"]).exit_code == 2
