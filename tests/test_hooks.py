"""Private names of dependencies are where lion_st looks for them, and are used in one file alone."""

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

import pytest

from lion_st.hooks import CHECKED, OVERRIDDEN, USED

ROOT = Path(__file__).parents[1]
UNCHECKED = "raise the pin in pyproject.toml and the version in lion_st/hooks.py once the hook's use is mended"


@pytest.mark.parametrize("hook", USED)
def test_a_used_hook_is_there(hook):
    try:
        resolve_name(hook)
    except (AttributeError, ImportError):
        pytest.fail(f"{hook} is gone: {UNCHECKED}")


@pytest.mark.parametrize(("ours", "theirs", "methods"), [(ours, *rest) for ours, rest in OVERRIDDEN.items()])
def test_overridden_methods_are_there_and_all_are_listed(ours, theirs, methods):
    own, base = resolve_name(ours), resolve_name(theirs)
    gone = [name for name in methods if not hasattr(base, name)]
    assert not gone, f"{theirs} has no {', '.join(gone)} any more: {UNCHECKED}"
    private = {name for name in vars(own) if re.match(r"_[a-z]", name) and inspect.isroutine(getattr(own, name))}
    assert {name for name in private if hasattr(base, name)} == set(methods)


def test_the_pins_are_those_that_were_checked():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, checked in CHECKED.items():
        major, minor = map(int, checked.split(".")[:2])
        if name != "transformers":  # none of its releases is ruled out
            assert re.search(rf'"{name}>=[\d.]+,<{major}\.{minor + 1}"', text), name
            assert version(name).split(".")[:2] == checked.split(".")[:2], UNCHECKED


# What every named tuple and argparse's parser have.
STANDARD = {"_replace", "_asdict", "_actions"}
# Of DeepSpeed, which the tests do without: one file has its names.
OF_DEEPSPEED = "training/zero.py"


def private_names(source: str) -> list[tuple[int, str]]:
    """Private names read of anything but `self` and `cls`, imported, or imported from, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lion_st"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names if name not in USED for name in name.split(".")]
    return [(line, name) for line, name in found if re.match(r"_[a-z]", name)]


def own_names(source: str) -> set[str]:
    """Private names that a file of lion_st defines."""
    tree = list(ast.walk(ast.parse(source)))
    names = {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in tree if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored = [node for node in tree if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return names | {node.attr for node in stored if ast.unparse(node.value) in ("self", "cls")}


def test_no_other_file_uses_private_names_of_dependencies():
    sources = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "lion_st").rglob("*.py"))}
    overridden = {name for _, methods in OVERRIDDEN.values() for name in methods}
    own = set().union(*map(own_names, sources.values())) - overridden | STANDARD
    elsewhere = [
        f"{file.relative_to(ROOT)}:{line} uses {name}"
        for file, source in sources.items()
        if file.name != "hooks.py" and not file.match(f"*/{OF_DEEPSPEED}")
        for line, name in private_names(source)
        if name not in own
        and not any(file.samefile(inspect.getfile(resolve_name(ours))) and name in methods
                    for ours, (_, methods) in OVERRIDDEN.items())
    ]  # fmt: skip
    assert not elsewhere, "\n".join(elsewhere)
