"""How a verb fails: one line that says what was wrong, and exit code 1."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from lion_st.extras import missing_extra

SHOW_TRACEBACK = "LION_ST_TRACEBACK"
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)


class OneLineErrors(TyperGroup):
    """Prints an error that a user can act on without a traceback, unless LION_ST_TRACEBACK=1 asks for it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # ways to end that are no errors
            raise
        except EXPECTED as error:
            if os.environ.get(SHOW_TRACEBACK) == "1":
                raise
            message = " ".join((missing_extra(error) or str(error)).split()) or type(error).__name__
            typer.echo(f"lion-st {ctx.invoked_subcommand}: {message}", err=True)
            raise typer.Exit(1) from None
