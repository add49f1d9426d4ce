"""The command line as tests run it."""

from typing import Any

from typer.testing import CliRunner

from lion_st.cli import app


def lion(*arguments: object, exit_code: int | None = 0, **options: Any) -> str:
    """Run a command in this process, and return what it prints, or of one that fails its error.

    Args:
        arguments: Words of the command line after `lion-st`.
        exit_code: What it ends with; None stands for all that say that it failed.
        options: Of the runner, such as its standard input.
    """
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    assert done.exit_code if exit_code is None else done.exit_code == exit_code, done.output
    return done.stderr if done.exit_code else done.stdout
