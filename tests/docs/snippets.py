"""The fenced blocks of the documentation, run page by page."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?\n(.*?)^\1```$', re.M | re.S)
# Commands that would listen, take a cluster or need a service: their command lines are read, and nothing is run.
ONLY_READ = ("demo", "serve")
TRAINING = ("train", "adapt")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it shows, its text and the line that it begins on."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[2], match[3], "".join(line.removeprefix(match[1]) for line in match[4].splitlines(keepends=True)),
              text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]  # fmt: skip
    assert len(re.findall(r"^ *```", text, re.M)) == 2 * len(found), f"{page} has a fence that is not read"
    return found


@dataclass(frozen=True)
class Trainings:
    """How a page's trainings are run, instead of being read or estimated.

    Args:
        options: Appended to the commands, by name: what makes them short.
        environment: Of processes of their own, for `hf` and `torchrun`.
        token: What `hf auth login` is given.
    """

    options: Mapping[str, list[str]]
    environment: Mapping[str, str]
    token: str


def run_page(page: Path, trainings: Trainings | None = None) -> None:
    """Run a page's blocks in the current folder: files are written, Python shares one namespace, shell runs the CLI."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        elif block.language == "bash":
            for command in _commands(block.text):
                _run(command, where, trainings)
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), where
        else:
            assert block.language == "text", f"{where}: nothing runs {block.language!r}"


def _commands(text: str) -> list[list[str]]:
    """The commands of a shell block, with variables that it sets put in."""
    variables: dict[str, str] = {}
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: variables[name[1]], line)
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words:
            commands.append(words)
    return commands


def _run(words: list[str], where: str, trainings: Trainings | None) -> None:
    place = f"{where}: {shlex.join(words)}"
    match words:
        case ["hf", *rest] if trainings is not None:
            rest += ["--token", trainings.token] if rest == ["auth", "login"] else []
            _run_process(["huggingface_hub.cli.hf", *rest], trainings, place)
        case ["torchrun", "--nproc_per_node", _, "-m", "lion_st", *rest] if trainings is not None:
            launch = ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
            rest += trainings.options.get(rest[0], [])
            _run_process(["torch.distributed.run", *launch, "-m", "lion_st", *rest], trainings, place)
        case ["torchrun", *rest] if rest[2:4] == ["-m", "lion_st"]:
            assert rest[0].replace("-", "_") == "__nproc_per_node" and rest[1].isdigit(), place
            _run_lion_st(rest[4:], place, trainings)
        case ["lion-st", *rest]:
            _run_lion_st(rest, place, trainings)
        case ["pip", "install", *wanted]:
            named = re.fullmatch(r"lion-st(?:\[([\w,]+)\])?", " ".join(wanted))
            assert named, place
            extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
            for extra in filter(None, (named[1] or "").split(",")):
                assert re.search(rf"^{extra} = \[", extras, re.M), place
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), place
        case ["python", script, *_]:
            ast.parse((ROOT / script).read_text())
        case _:
            raise AssertionError(f"{place}: no test runs this command")


def _run_process(words: list[str], trainings: Trainings, place: str) -> None:
    environment = {**trainings.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{place}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _run_lion_st(words: list[str], place: str, trainings: Trainings | None) -> None:
    from lion_st.cli import app

    if trainings is not None and "--dry_run" not in words:
        result = CliRunner().invoke(app, [*words, *trainings.options.get(words[0], [])])
        assert result.exit_code == 0, f"{place}\n{result.output}"
        return
    if words[0] in ONLY_READ or "--ray" in words:
        group: Any = get_command(app)
        command = group.get_command(None, words[0])
        assert command is not None, place
        command.make_context(words[0], list(words[1:]))
        return
    if words[0] == "train" and "--dry_run" not in words:
        words = [*words, "--dry_run"]
    if words[0] == "adapt":
        from lion_st.training.options.command_line import parse_mntp_arguments

        parse_mntp_arguments(words[1:])
        return
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{place}\n{result.output}"
