"""README.md says what is so: its commands parse, its Python runs, and its links work wherever it is shown."""

import re
import shlex
import subprocess

import pytest
import typer
from conftest import ROOT
from runnable import run

import lion_st
from lion_st.cli import app
from lion_st.hub import publish
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the shell blocks, in words, without comments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_it_is_short_and_its_links_work_on_pypi() -> None:
    assert len(README.splitlines()) <= 150
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)", README) + re.findall(r"(?:src|href)=\"([^\"]+)", README)
    assert links and all(link.startswith("https://") for link in links), links
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", README)  # PyPI shows the words in place of the picture
    assert pictures and all(len(words) > 60 and (ROOT / path).is_file() for words, path in pictures), pictures
    for path in re.findall(r"`((?:[\w-]+/)+|[\w/-]+\.(?:md|cff))`", README):
        assert (ROOT / path).exists(), path


def test_its_shell_commands_parse() -> None:
    assert {words[0] for words in commands()} <= {"make", "pip", "lion-st", "torchrun"}
    for block in blocks("bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", project, re.MULTILINE))
    group = typer.main.get_command(app)
    shown = set()
    for words in commands():
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "pip":
            for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(named.split(",")) <= extras, words
        else:
            command, *rest = words[1:] if words[0] == "lion-st" else words[words.index("lion_st") + 1 :]
            shown.add(command)
            if command in ("adapt", "train"):
                (parse_mntp_arguments if command == "adapt" else parse_retriever_arguments)(rest)
            else:
                group.commands[command].make_context(command, rest)  # raises on an unknown option or a missing argument
    assert {"encode", "index", "search", "train", "publish"} <= shown


def test_its_python_runs(micro, retriever, connected, tmp_path, monkeypatch, one_thread) -> None:
    """Against a Hub that has the placeholder's checkpoint, and with the micro backbone in place of a large one."""
    publish(lion_st.load(retriever), "org/lion-sp-8b", license="apache-2.0")
    monkeypatch.chdir(tmp_path)
    use, train = [
        run(block, f"README.md, Python block {number}", texts={"meta-llama/Llama-3.2-1B": micro})
        for number, block in enumerate(blocks("python"), 1)
    ]
    assert use["query"].ndim == 1 and use["documents"].shape[0] == 2
    assert use["sparse"].encode_query("what do lions eat?").is_sparse
    loaded, exported = re.findall(r"`(lion_st\.\w+\(.*?\))`", README)
    names = {"lion_st": lion_st, "model": eval(loaded, {"lion_st": lion_st})}
    eval(exported, names)
    assert lion_st.paradigm_of(names["model"]) == "sparse" and (tmp_path / "my-lion-sp" / "modules.json").is_file()
    assert train["loss"].scale == 100.0 and (tmp_path / "my-lion-ds" / "modules.json").is_file()


def test_it_calls_the_placeholder_one() -> None:
    assert re.search(r"`org/lion-sp-8b` stands for", README)


@pytest.mark.parametrize("name", ["encode.py", "query_encoders.py", "search.py", "sparse_head.py", "training_step.py"])
def test_every_benchmark_has_its_table(name: str) -> None:
    shown = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    section = shown[shown.index("## On two CPU cores") : shown.index("## On a GPU")]
    part = next(part for part in section.split("\n### ") if f"`{name}`" in part)
    assert part.count("\n| ") >= 5
