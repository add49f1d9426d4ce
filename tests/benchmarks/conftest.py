import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def import_script() -> Callable[[str], ModuleType]:
    """Import a script by its path in the repository, with its neighbours on the path of imports."""

    def load(script: str) -> ModuleType:
        file = ROOT / script
        sys.path.insert(0, str(file.parent))
        try:
            spec = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
        return module

    return load
