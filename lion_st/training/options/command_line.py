"""The command lines of the two stages: options over a YAML file over a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lion_st.training.options.arguments import (
    NOT_READ_BY_MNTP,
    NOT_READ_BY_RETRIEVER,
    MntpArguments,
    MntpTrainingArguments,
    RetrieverArguments,
    RetrieverTrainingArguments,
)
from lion_st.training.options.reader import OptionsReader
from lion_st.training.options.released_code import mntp_options, recipe_options
from lion_st.training.published import PUBLISHED, chosen_recipe, own_backbones
from lion_st.training.recipes import MNTP_RECIPES
from lion_st.training.validation import require_read

# What `--help` shows of the many options of the trainers, and what it says where their own help is missing or not so.
SHOWN_ARGUMENTS: dict[str, str | None] = {
    "output_dir": "Folder of the result, its record and the checkpoints by which the same command goes on.",
    "max_steps": "Optimizer steps, in place of --num_train_epochs.",
    "max_seconds": None,
    "num_train_epochs": None,
    "learning_rate": "Learning rate at the end of the warmup.",
    "lr_scheduler_type": None,
    "warmup_steps": None,
    "per_device_train_batch_size": "Rows of a device in a forward pass.",
    "gradient_accumulation_steps": "Forward and backward passes of an optimizer step.",
    "activation_checkpointing": None,
    "seed": "Seed of weights, batches, negatives and dropout.",
    "bf16": None,
    "fp16": None,
    "use_cpu": "Train on CPUs, as is done where there is no GPU.",
    "logging_steps": "Steps from one line of the log to the next.",
    "save_steps": "Steps from one checkpoint to the next.",
    "save_total_limit": "Checkpoints that are kept.",
    "prompts": None,
    "eval_data": None,
    "eval_split": None,
    "eval_share": None,
    "eval_strategy": "When to evaluate: steps where there is --eval_data or --eval_share, unless given.",
    "eval_steps": None,
    "load_best_model_at_end": "Export the best checkpoint by --metric_for_best_model in place of the last.",
    "metric_for_best_model": "What the best checkpoint is best by; ndcg@10 unless given.",
    "early_stopping_patience": None,
    "report_to": "Reporters of the log: tensorboard, wandb, trackio, ...",
    "resume_from_checkpoint": "Go on from this checkpoint, in place of the last whole one in --output_dir.",
    "push_to_hub": "Push the finished result to --hub_model_id.",
    "hub_model_id": "Repository for --push_to_hub, owner/name.",
}
OF_RETRIEVERS = ("per_device_train_batch_size", "gradient_accumulation_steps")
RETRIEVER_HELP = SHOWN_ARGUMENTS | {
    name: f"{SHOWN_ARGUMENTS[name]} Follows from --batch_size." for name in OF_RETRIEVERS
}
MNTP_HELP = SHOWN_ARGUMENTS | dict.fromkeys(("max_steps", "eval_strategy"))


def parse_mntp_arguments(
    options: Sequence[str] | None = None, program: str = "adapt_mntp.py"
) -> tuple[MntpArguments, MntpTrainingArguments]:
    """Read the MNTP stage's options from the command line and a YAML file (`--config`).

    Where `--backbone` names a recipe, its values are the defaults.

    Raises:
        FileNotFoundError: If there is no such YAML file.
        UsageError: If an option is unknown or its value is wrong.
    """
    reader = OptionsReader(
        (MntpArguments, MntpTrainingArguments),
        program,
        "Adapt a causal language model to bidirectional attention with masked next-token prediction (MNTP). "
        f"--backbone is a recipe ({', '.join(MNTP_RECIPES)}), a folder or a Hub name.",
        MNTP_HELP,
        NOT_READ_BY_MNTP,
    )

    def defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
        recipe = MNTP_RECIPES.get(given.get("backbone", ""))
        return {} if recipe is None else mntp_options(recipe, given)

    arguments, training_arguments, _ = reader.read(options, defaults)
    if arguments.backbone in MNTP_RECIPES:
        arguments.backbone = MNTP_RECIPES[arguments.backbone].model
    return arguments, training_arguments


def parse_retriever_arguments(
    options: Sequence[str] | None = None, program: str = "train_retriever.py"
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """Read a fine-tuning's options: the recipe of backbone, paradigm and objective, then YAML, then the command line.

    Raises:
        FileNotFoundError: If there is no such YAML file.
        UsageError: If there is no such recipe, an option is unknown or not read by this setting, or a value is wrong.

    Example:
        >>> arguments, _ = parse_retriever_arguments(["--backbone", "micro", "--paradigm", "dense"])
        >>> arguments.temperature
        0.01
    """
    reader = OptionsReader(
        (RetrieverArguments, RetrieverTrainingArguments),
        program,
        f"Fine-tune a retriever. --backbone ({', '.join(own_backbones())}), --paradigm and --objective choose a "
        "recipe, whose values are the defaults of all other options: named beside --help, they are shown. --recipe "
        f"({', '.join(PUBLISHED)}) names one of other papers, --backbone what it is applied to; `lion-st recipes` "
        "lists both.",
        RETRIEVER_HELP,
        NOT_READ_BY_RETRIEVER,
    )

    def defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
        return recipe_options(chosen_recipe(given), given)

    arguments, training_arguments, given = reader.read(options, defaults)
    require_read(arguments, given)
    training_arguments.require_prompts(arguments.train_data)
    return arguments, training_arguments
