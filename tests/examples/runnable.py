"""Programs and snippets that are read by people, run with constants of a test."""

import ast
from typing import Any


def run(code: str, name: str, constants: dict[str, Any] | None = None, texts: dict[str, str] | None = None) -> dict:
    """Run a program as a script and return its names.

    Args:
        code: The program.
        name: For tracebacks.
        constants: Values in place of those that the program assigns at its top level; each must be there.
        texts: Strings in place of others, wherever the program has them as a whole.
    """
    tree = ast.parse(code, name)
    left = dict(constants or {})
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=target)]) if target in left:
                statement.value = ast.copy_location(ast.parse(repr(left.pop(target)), mode="eval").body, statement)
    assert not left, f"{name} has no constants {sorted(left)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = (texts or {}).get(node.value, node.value)
    names: dict[str, Any] = {"__name__": "__main__", "__file__": name}
    exec(compile(ast.fix_missing_locations(tree), name, "exec"), names)
    return names
