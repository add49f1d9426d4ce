"""The command lines of the two stages: options over a YAML file over a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lion_st.training.options.arguments import (
    MntpArguments,
    MntpTrainingArguments,
    RetrieverArguments,
    RetrieverTrainingArguments,
)
from lion_st.training.options.reader import OptionsReader
from lion_st.training.options.released_code import mntp_options, recipe_options
from lion_st.training.published import PUBLISHED, chosen_recipe
from lion_st.training.recipes import BACKBONES, MNTP_RECIPES
from lion_st.training.validation import require_read

# What `--help` shows of the many options of the trainers.
SHOWN_ARGUMENTS = (
    "output_dir",
    "max_steps",
    "max_seconds",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "seed",
    "bf16",
    "fp16",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "prompts",
    "eval_data",
    "eval_split",
    "eval_share",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_patience",
    "report_to",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
)


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
        SHOWN_ARGUMENTS,
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
        f"Fine-tune a retriever. --backbone ({', '.join(BACKBONES)}), --paradigm and --objective choose a recipe, "
        "whose values are the defaults of all other options; `lion-st recipes` lists them. --recipe "
        f"({', '.join(PUBLISHED)}) names one of other papers, --backbone what it is applied to.",
        SHOWN_ARGUMENTS,
    )

    def defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
        return recipe_options(chosen_recipe(given), given)

    arguments, training_arguments, given = reader.read(options, defaults)
    require_read(arguments, given)
    training_arguments.require_prompts(arguments.train_data)
    return arguments, training_arguments
