"""The examples in the docstrings of training, of its data and of the command line do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import lion_st.cli
import lion_st.supervision
import lion_st.training

MODULES = [
    "lion_st.errors",
    "lion_st.data.teachers",
    *(
        module.name
        for package in (lion_st.cli, lion_st.supervision, lion_st.training)
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__")
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    assert sum(bool(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name))) >= 6
