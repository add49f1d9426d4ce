"""How programs of lion_st fail: one line that says what was wrong, and an exit code."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from lion_st.extras import missing_extra

SHOW_TRACEBACK = "LION_ST_TRACEBACK"
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)  # whose message tells a user what to do
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """A command line that is not right; the message names the option and what would be."""


def require_list(values: Any, what: str) -> None:
    """Refuse one string where a list is expected, whose letters would be taken for its elements."""
    if isinstance(values, str | bytes):
        raise TypeError(f"Give a list of {what}, got the string {values[:40]!r}.")


def require_type(value: Any, kind: Any, what: str, remedy: str) -> None:
    """Refuse an argument of another type, such as a path where what lies there is expected."""
    if not isinstance(value, kind):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise TypeError(f"{what} expected, got {shown}, a {type(value).__name__}: {remedy}.")


def require_at_least(least: float, **settings: Any) -> None:
    """Refuse settings of an engine that are not numbers of at least `least`."""
    for name, value in settings.items():
        is_number = isinstance(value, int if isinstance(least, int) else int | float) and not isinstance(value, bool)
        if not is_number or not least <= value < math.inf:
            kind = "an integer" if isinstance(least, int) else "a finite number"
            raise ValueError(f"{name} is {kind} of at least {least}, got {value!r}.")


def as_weights(values: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of at least 0, of which one is above 0; None of anything else."""
    given = list(values) if isinstance(values, Iterable) else []
    are_numbers = all(isinstance(one, Real) and not isinstance(one, bool) for one in given)
    if len(given) != count or not are_numbers or not all(0 <= one < math.inf for one in given) or not any(given):
        return None
    return tuple(map(float, given))


def shows_traceback() -> bool:
    """Whether LION_ST_TRACEBACK=1 asks for the traceback of an error."""
    return os.environ.get(SHOW_TRACEBACK) == "1"


def describe_error(error: BaseException, flags: Mapping[str, str] | None = None) -> str:
    """An error as one line.

    Args:
        error: What was raised.
        flags: Options of the command line by the Python argument they become, which the line then names.

    Example:
        >>> describe_error(ValueError("Row 3 is short: pass drop_short=True."), {"drop_short": "--drop-short"})
        'Row 3 is short: pass --drop-short.'
        >>> describe_error(KeyError("shards"))
        "unexpected KeyError: 'shards' (LION_ST_TRACEBACK=1 shows where)"
    """
    message = " ".join((missing_extra(error) or str(error)).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {error.filename}"
    for name, flag in (flags or {}).items():
        message = re.sub(rf"\b{name}=(True|False)\b", flag, message)
        message = re.sub(rf"\b{name}=(?=[\w'\"])", f"{flag} ", message)
        if "_" in name:
            message = re.sub(rf"(?<![\w./'\"-]){name}(?![\w(/]|\.\w)", flag, message)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        message += (
            " Lower --mini_batch_size (training) or --tokens-per-batch (encoding); the same command then goes on where "
            "it stopped."
        )
    from_safetensors = type(error).__name__ == "SafetensorError"  # such as of a full disk; the class has no other base
    if not isinstance(error, EXPECTED) and not from_safetensors:
        message = f"unexpected {type(error).__name__}: {message} ({SHOW_TRACEBACK}=1 shows where)"
    return message or type(error).__name__


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """End the program on an error with one line on the standard error, unless LION_ST_TRACEBACK=1.

    The exit code is 2 for a command line that is not right, 130 for an interruption, and 1 for all else.

    Args:
        program: What the line begins with.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if shows_traceback():
            raise
        print(f"{program}: {describe_error(error)}", file=sys.stderr)
        raise SystemExit(WRONG_USAGE if isinstance(error, UsageError) else FAILED) from None
