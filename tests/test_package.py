"""What importing the package costs, and which way its rooms import each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lion_st

HEAVY = ("torch", "transformers", "sentence_transformers", "mteb", "faiss", "trl", "datasets", "peft", "numba")


def test_importing_the_package_imports_nothing_heavy():
    program = f"import sys, lion_st; print(sorted(set({HEAVY!r}) & set(sys.modules)), lion_st.__version__)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.split()[0] == "[]"


def test_every_public_name_can_be_imported():
    assert all(getattr(lion_st, name) is not None for name in lion_st.__all__)


def test_a_room_imports_earlier_ones_alone():
    rooms = ["kernels", "losses", "modules", "guard", "checkpoints", "models", "stock"]
    rooms += ["data", "training", "retrieval", "evaluation", "hub", "demo", "cli"]
    package = Path(lion_st.__file__).parent
    backwards = [
        f"{file.relative_to(package)} imports {imported}"
        for file in package.rglob("*.py")
        if (room := file.relative_to(package).parts[0].removesuffix(".py")) in rooms
        for imported in re.findall(
            r"^\s*(?:from|import) lion_st\.(\w+)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
        if imported in rooms and rooms.index(imported) > rooms.index(room)
    ]
    assert not backwards
