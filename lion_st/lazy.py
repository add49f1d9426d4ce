"""Packages whose names are imported on first use, as Scientific Python's SPEC 1 asks, each name written once."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__`.

    What stands under its `if TYPE_CHECKING:`, where type checkers and editors see it, is imported on first use; so are
    its modules.

    Example:
        ::

            if TYPE_CHECKING:
                from lion_st.retrieval.bm25 import Bm25Retriever

            __all__ = ["Bm25Retriever"]
            __getattr__, __dir__ = attach(__name__)
    """

    def get(name: str) -> Any:
        module = sys.modules[package]
        if name in module.__all__ and name in _homes(package):
            value = getattr(import_module(_homes(package)[name]), name)
            setattr(module, name, value)
            return value
        if not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        module = sys.modules[package]
        return sorted({*module.__all__, *(found.name for found in iter_modules(module.__path__))} - {"__main__"})

    return get, names


@cache
def _homes(package: str) -> dict[str, str]:
    """The module of each name that a package imports under `if TYPE_CHECKING:`."""
    source = sys.modules[package].__loader__.get_source(package)  # type: ignore[union-attr]
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
