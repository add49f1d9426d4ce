"""Commands that train: train, adapt, report, recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lion_st.cli.options import Overwrite, TableStyle, require_folder, require_new


def train(context: typer.Context) -> None:
    """Fine-tune a sparse (Lion-SP), dense (Lion-DS), multi-vector or hybrid retriever by a recipe, and export it."""
    _check(context.args, needs_recipe=True)
    from lion_st.training.dry_run import describe_run
    from lion_st.training.options.command_line import parse_retriever_arguments
    from lion_st.training.retriever import train_retriever
    from lion_st.training.runs import end_program

    arguments, training_arguments = parse_retriever_arguments(context.args, "lion-st train")
    end_program((describe_run if arguments.dry_run else train_retriever)(arguments, training_arguments))


def adapt(context: typer.Context) -> None:
    """Adapt a causal language model to bidirectional attention with masked next-token prediction (MNTP)."""
    _check(context.args)
    from lion_st.training.mntp import adapt_mntp
    from lion_st.training.options.command_line import parse_mntp_arguments
    from lion_st.training.runs import end_program

    result = adapt_mntp(*parse_mntp_arguments(context.args, "lion-st adapt")) / "mntp.json"
    end_program(f"{result}\n{result.read_text(encoding='utf-8').rstrip()}")


def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a training: finished, interrupted or still going.")],
    output: Annotated[
        Path | None, typer.Option(help="Figure without its ending; by default RUN/report, which is drawn anew.")
    ] = None,
    figure: Annotated[bool, typer.Option(help="Draw the figure, as .svg and .png.")] = True,
    style: TableStyle = "markdown",
    overwrite: Overwrite = False,
) -> None:
    """Show how a training goes: a table, and a figure of loss, nDCG and active terms over steps."""
    require_folder(run, "the output folder of a training")
    files = [Path(f"{output or run / 'report'}.{kind}") for kind in ("svg", "png")]
    for file in files if figure and output is not None else ():
        require_new(file, overwrite)
    from lion_st.tables import format_table
    from lion_st.training.progress.history import draw_history, history_rows, read_history

    history = read_history(run)
    typer.echo(history.describe())
    rows = history_rows(history)
    if rows:
        typer.echo(format_table(rows, style=style))
    if figure:
        for file in draw_history(history, files):
            typer.echo(file)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this one in full: repllama, laconic, ..., or BACKBONE-PARADIGM-OBJECTIVE."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Backbone of a published recipe.")] = None,
    style: TableStyle = "markdown",
) -> None:
    """List the training recipes: the paper's settings of each backbone and stage, and those of other papers."""
    from lion_st.training.published import PUBLISHED, describe_recipe

    if name is not None:
        typer.echo(describe_recipe(name, backbone))
        return
    from lion_st.evaluation import format_table
    from lion_st.training import recipes_table

    typer.echo(format_table(recipes_table(), style=style))
    rows = [{"recipe": name, "source": one.source, "published": one.published} for name, one in PUBLISHED.items()]
    typer.echo("\nOf other papers (--recipe NAME):\n\n" + format_table(rows, style=style))


def _check(options: Sequence[str], needs_recipe: bool = False) -> None:
    """Refuse a missing YAML file or an unknown recipe before anything heavy is imported."""
    from lion_st.training.options.reader import HELP, chosen
    from lion_st.training.published import chosen_recipe

    if not set(HELP).isdisjoint(options):
        return
    names = chosen(options)
    if needs_recipe:
        chosen_recipe(names)
