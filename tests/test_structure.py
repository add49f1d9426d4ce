"""Types, which way the packages import each other, how long files are, and where lazy names are looked for."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lion_st"
# A package imports its own layer and those above it, inside functions too.
LAYERS = (
    ("engines", "errors", "extras", "files", "hooks", "lazy", "tables"),
    ("data",),
    ("kernels", "losses", "modules", "wrong_class"),
    ("checkpoints", "model_classes", "model_options", "models", "exporting"),
    ("encoding",),
    ("indexes",),
    ("training", "retrieval"),
    ("evaluation", "supervision"),
    ("study",),
    ("hub",),
    ("demo", "serving", "cli"),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# Within a layer, too, one way: what stands first imports nothing of what follows.
WITHIN = {
    ("extras", "errors"),
    ("files", "hooks"),
    ("kernels", "modules"),
    ("checkpoints", "exporting"),
    ("checkpoints", "model_classes"),
    ("checkpoints", "models"),
    ("model_classes", "models"),
    ("model_options", "models"),
    ("model_classes", "exporting"),
    ("models", "exporting"),
    ("demo", "cli"),
    ("serving", "cli"),
}
LONGEST = 450


def imports(source: str) -> Iterator[tuple[int, str]]:
    """The packages of lion_st that a file imports, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"lion_st.{alias.name}" for alias in node.names] if node.module == "lion_st" else [node.module]
        else:
            continue
        yield from ((node.lineno, module.split(".")[1]) for module in modules if module.startswith("lion_st."))


def offences(source: str, own: str) -> list[tuple[int, str]]:
    """Lines that import a package of a later layer, or of the same one the wrong way."""
    return [
        (line, imported)
        for line, imported in imports(source)
        if imported in LAYER_OF and imported != own
        if LAYER_OF[imported] > LAYER_OF[own] or (LAYER_OF[imported] == LAYER_OF[own] and (imported, own) not in WITHIN)
    ]


def package_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if not package_of(file).startswith("__")]


def test_every_package_has_a_layer():
    assert {package_of(file) for file in FILES} == LAYER_OF.keys()


def test_packages_import_earlier_layers_alone():
    found = [
        f"{file.relative_to(PACKAGE.parent)}:{line} imports lion_st.{imported}"
        for file in FILES
        for line, imported in offences(file.read_text(encoding="utf-8"), package_of(file))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "import lion_st.cli.group",
        "from lion_st import hub",
        "from lion_st.cli import app",
        "def f():\n    import lion_st.cli",
    ],
)
def test_an_import_of_a_later_layer_is_found(line):
    assert offences(line, "data")
    assert not offences(line, "cli")


def test_files_are_short_enough_to_read():
    sizes = {
        str(file.relative_to(PACKAGE)): len(file.read_text(encoding="utf-8").splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert not {name: f"{size} lines, at most {LONGEST}" for name, size in sizes.items() if size > LONGEST}


def test_files_of_tests_have_names_of_their_own():
    files = [file.name for file in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(files) == sorted(set(files))  # else pytest, which imports them by name, ends before the first test


def test_the_table_of_training_names_its_files():
    folder = PACKAGE / "training"
    named = set(re.findall(r"`(\w+)/?`", ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))))
    files = {file.stem for file in folder.iterdir() if file.suffix == ".py" or (file / "__init__.py").is_file()}
    assert named - {"configs"} == files - {"__init__"}


def test_types_fit():
    pytest.importorskip("mypy")
    checked = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
