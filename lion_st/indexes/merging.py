"""Keeping the parts of an index few, however small the additions to it are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Part = TypeVar("Part")


def merged(
    parts: list[Part], join: Callable[[Part, Part], Part], size: Callable[[Part], int], most: int = 4096
) -> list[Part]:
    """Parts of an index, the last ones joined until each is larger than the next: many small additions leave few.

    Args:
        parts: In the order of their documents.
        join: Makes one of two.
        size: Documents of one.
        most: Documents of what is joined, at most.
    """
    found: list[Part] = []
    for part in parts:
        found.append(part)
        while len(found) > 1 and size(found[-2]) <= size(found[-1]) and size(found[-2]) + size(found[-1]) <= most:
            found[-2:] = [join(*found[-2:])]
    return found
