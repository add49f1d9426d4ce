"""What the documentation takes from elsewhere when it is built: the commands' help and the tables of the benchmarks."""

from __future__ import annotations

import os
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import griffe
import typer
from typer.main import get_command

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the text in the place of its mark."""
    for mark, text in (("<!-- commands -->", commands_reference), ("<!-- benchmarks -->", benchmark_tables)):
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown


class CodeInExamples(griffe.Extension):
    """Reads the section `Example:` of a docstring as griffe reads `Examples:`, and takes the `::` out of it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a function, class or module."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"^ *::\n\n", "", text, flags=re.M)


def benchmark_tables() -> str:
    """What benchmarks/README.md says below its title; its links lead into the repository and become paths, and its
    figures are this folder's."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("\n")[2]
    text = re.sub(r"!\[([^]]+)\]\(\.\./docs/([^)]+)\)", r"![\1](\2)", text)
    return re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", text)


def commands_reference() -> str:
    """A section for each command: what it does, its arguments and its options."""
    from lion_st.cli import app

    group: Any = get_command(app)
    context = typer.Context(group, info_name="lion-st")
    return "\n".join(_section(group.get_command(context, name), context) for name in group.list_commands(context))


def _section(command: Any, parent: typer.Context) -> str:
    lines = [f"## lion-st {command.name}\n", command.help or "", ""]
    if command.context_settings.get("ignore_unknown_options"):  # training reads its options itself
        return "\n".join([*lines, "```text", _own_help(command, parent), "```", ""])
    context = typer.Context(command, info_name=command.name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    lines += ["```text", f"lion-st {command.name} {usage}", "```", "", "| | | default |", "|---|---|---|"]
    for parameter in command.params:
        record = parameter.get_help_record(context) if parameter.param_type_name == "option" else None
        name = record[0] if record else str(parameter.name)
        default = parameter.default if record and parameter.default not in (None, False, []) else ""
        lines.append(f"| `{_cell(name)}` | {_cell(getattr(parameter, 'help', None) or '')} | {_cell(str(default))} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _own_help(command: Any, parent: typer.Context) -> str:
    os.environ["COLUMNS"] = "100"
    shown = StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        command.main(["--help"], prog_name=f"lion-st {command.name}", standalone_mode=False, parent=parent)
    return shown.getvalue().rstrip()
