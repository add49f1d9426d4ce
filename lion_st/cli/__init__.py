"""The command line `lion-st`; each command is a thin call into the library, which is imported when the command runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from lion_st.cli import data, demo, evaluation, hub, query_encoders, retrieval, serving, study, supervision, training
from lion_st.cli.group import OneLineErrors

app = typer.Typer(
    name="lion-st",
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse and dense retrievers from decoder-only LLMs: train, encode, index, search, evaluate, publish.",
    epilog="An error is one line, with exit code 2 for a wrong command line and 1 for all else; LION_ST_TRACEBACK=1 in "
    "the environment shows Python's traceback.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lion-st {version('lion-st')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for commands in (data, training, supervision, retrieval, serving, query_encoders, evaluation, study, hub, demo):
    commands.register(app)
