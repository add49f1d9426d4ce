"""Recipes, MNTP adaptation and the training of retrievers.

The names below are imported on first use: recipes are read without importing what trains them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lion_st.lazy import attach

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

__getattr__, __dir__ = attach(__name__)
