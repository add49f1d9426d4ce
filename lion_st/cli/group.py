"""How a command fails: one line that says what was wrong, and an exit code."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lion_st.errors import FAILED, INTERRUPTED, WRONG_USAGE, UsageError, describe_error, shows_traceback


class OneLineErrors(TyperGroup):
    """Ends on an error with one line that names the command and its flags, unless LION_ST_TRACEBACK=1.

    The exit code is 2 for a command line that is not right, 130 for an interruption, and 1 for all else.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # ways to end that are not errors
            raise
        except KeyboardInterrupt:
            return self._end(ctx, "interrupted.", INTERRUPTED)
        except Exception as error:
            wrong = isinstance(error, UsageError) or getattr(error, "exit_code", None) == WRONG_USAGE
            if shows_traceback() and not wrong:
                raise
            message = getattr(error, "format_message", None)
            line = describe_error(error, self._flags(ctx)) if message is None else " ".join(message().split())
            return self._end(ctx, line, WRONG_USAGE if wrong else FAILED)

    @staticmethod
    def _end(ctx: Any, line: str, code: int) -> Any:
        names = [ctx.invoked_subcommand]
        while ctx.parent is not None:  # of a group within the group
            names.append(ctx.info_name)
            ctx = ctx.parent
        typer.echo(" ".join(("lion-st", *filter(None, reversed(names)))) + f": {line}", err=True)
        raise typer.Exit(code) from None

    def _flags(self, ctx: Any) -> dict[str, str]:
        """Options of the command that ran, by the name of the Python argument each becomes."""
        command = self.get_command(ctx, ctx.invoked_subcommand) if ctx.invoked_subcommand else None
        options = [parameter for parameter in getattr(command, "params", []) if parameter.param_type_name == "option"]
        return {option.name: max(option.opts, key=len) for option in options}
