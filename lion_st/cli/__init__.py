"""The command line `lion-st`; each verb is a thin call into a room of the library, imported when the verb runs."""

from __future__ import annotations

import typer

from lion_st.cli import demo, evaluation, hub, query_encoders, retrieval, training
from lion_st.cli.group import OneLineErrors

app = typer.Typer(
    name="lion-st",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sparse and dense retrievers from decoder-only LLMs: train, encode, index, search, evaluate, publish.",
)

for room in (training, retrieval, query_encoders, evaluation, hub, demo):
    room.register(app)
