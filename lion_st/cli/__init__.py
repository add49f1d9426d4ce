"""The command line `lion-st`; each command is a thin call into the library, which is imported when the command runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

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


OF_DATA = typer.Typer(cls=OneLineErrors, no_args_is_help=True, help="Look at training data.")
OF_DATA.callback()(data.group)
OF_DATA.command()(data.check)
app.add_typer(OF_DATA, name="data", rich_help_panel="Train")
# The options of these are fields of dataclasses, which lion_st.training reads from the command line and YAML files.
for training_command in (training.train, training.adapt):
    own: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(rich_help_panel="Train", context_settings=own)(training_command)
for panel, commands in (
    ("Train", (training.report, training.recipes, supervision.mine, supervision.teach)),
    ("Retrieve", (retrieval.encode, retrieval.index, retrieval.search, retrieval.prune, retrieval.convert_index)),
    ("Retrieve", (serving.serve, query_encoders.query_encoder)),
    ("Evaluate", (evaluation.evaluate, evaluation.compare, evaluation.fuse, study.study)),
    ("Publish", (hub.export, hub.card, hub.publish, hub.publish_index)),
):
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.command("import", rich_help_panel="Publish")(hub.import_released)
app.command(rich_help_panel="Publish")(demo.demo)
