"""Recipes, MNTP adaptation and the training of retrievers.

| you look for | |
|---|---|
| the paper's recipes, those of others, YAML files | `recipes`, `published`, `configs/` |
| options: dataclasses, YAML and command line, `--preset released` | `options/`, with `validation` and `prompts` |
| a run, from data to checkpoint | `retriever`, `starting` (the model), `contract`, `trainers`, `runs` (the result) |
| what is learned from what | `objectives`, `regularizers`, `learned_sparsity`, `teacher`, `self_distillation` |
| queries without a network | `query_tables` (trained along), `query_encoders`, `query_distillation` (afterwards) |
| batches | `sampling`, `mixing` |
| evaluation meanwhile | `evaluation`, `hybrid_evaluation` |
| several GPUs, memory, speed | `sharding` (FSDP2), `zero` (DeepSpeed), `divided` (both), `speed`, `cost`, `dry_run` |
| checkpoints, record, collapse, pace, report | `progress/` |
| the adaptation of a backbone | `mntp` |

The names below are imported on first use: recipes are read without importing what trains them.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.training.mntp import adapt_mntp
    from lion_st.training.objectives import build_loss
    from lion_st.training.options.arguments import (
        MntpArguments,
        MntpTrainingArguments,
        RetrieverArguments,
        RetrieverTrainingArguments,
        retriever_arguments,
    )
    from lion_st.training.recipes import MntpRecipe, RetrieverRecipe, get_recipe, recipes_table
    from lion_st.training.retriever import build_trainer, train_retriever

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
