"""Verbs of the training room; training itself is started by the scripts of training_scripts/."""

from __future__ import annotations

import typer

from lion_st.cli.options import TableStyle


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(rich_help_panel="Train")(recipes)


def recipes(style: TableStyle = "markdown") -> None:
    """List the training recipes: backbone, stage, and the paper's settings of each."""
    from lion_st.evaluation import format_table
    from lion_st.training import recipes_table

    typer.echo(format_table(recipes_table(), style=style))
