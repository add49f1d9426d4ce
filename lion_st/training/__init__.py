"""Recipes, MNTP adaptation and the training of retrievers.

The names below are imported on first use: recipes are read without importing what trains them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lion_st.training.arguments import (
        MntpArguments,
        MntpTrainingArguments,
        RetrieverArguments,
        RetrieverTrainingArguments,
        retriever_arguments,
    )
    from lion_st.training.mntp import adapt_mntp
    from lion_st.training.recipes import MntpRecipe, RetrieverRecipe, get_recipe, recipes_table
    from lion_st.training.retriever import build_loss, build_trainer, train_retriever

_HOME = {
    "MntpArguments": "arguments",
    "MntpRecipe": "recipes",
    "MntpTrainingArguments": "arguments",
    "RetrieverArguments": "arguments",
    "RetrieverRecipe": "recipes",
    "RetrieverTrainingArguments": "arguments",
    "adapt_mntp": "mntp",
    "build_loss": "retriever",
    "build_trainer": "retriever",
    "get_recipe": "recipes",
    "recipes_table": "recipes",
    "retriever_arguments": "arguments",
    "train_retriever": "retriever",
}

__all__ = [
    "MntpArguments",
    "MntpRecipe",
    "MntpTrainingArguments",
    "RetrieverArguments",
    "RetrieverRecipe",
    "RetrieverTrainingArguments",
    "adapt_mntp",
    "build_loss",
    "build_trainer",
    "get_recipe",
    "recipes_table",
    "retriever_arguments",
    "train_retriever",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
