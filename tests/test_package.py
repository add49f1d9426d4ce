"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "sentence_transformers", "mteb", "faiss", "trl", "datasets", "peft", "numba")


def test_importing_the_package_imports_nothing_heavy():
    program = f"import sys, lion_st; print(sorted(set({HEAVY!r}) & set(sys.modules)), lion_st.__version__)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.split()[0] == "[]"


def test_every_public_name_can_be_imported():
    import lion_st

    assert all(getattr(lion_st, name) is not None for name in lion_st.__all__)
