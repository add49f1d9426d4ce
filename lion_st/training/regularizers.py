"""The regularizers of a run, by name, and what a run that resumes needs of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lion_st.data.fields import TASKS, Task
from lion_st.errors import UsageError
from lion_st.losses import FlopsRegularizer
from lion_st.losses.hybrid import regularizer_of
from lion_st.losses.regularizers import (
    DfFlopsRegularizer,
    IdfFlopsRegularizer,
    L1Regularizer,
    RegularizerName,
    TargetRegularizer,
)
from lion_st.training.query_tables import training_idf
from lion_st.training.validation import require_positive

if TYPE_CHECKING:
    from datasets import Dataset

    from lion_st.training.options.arguments import RetrieverArguments

logger = logging.getLogger(__name__)
MISSED = 0.2  # share of a target by which the last batches may be off before it is said


@dataclass
class RegularizerArguments:
    """How sparse models are made sparse."""

    regularizer: RegularizerName = field(
        default="flops",
        metadata={
            "help": "Sparse: flops; l1; df_flops (of documents: terms of many documents cost more); idf_flops (terms "
            "of many texts cost more); target (reaches --query_target_terms and --document_target_terms)."
        },
    )
    df_alpha: float = field(
        default=0.1, metadata={"help": "df_flops: share of documents at which a term costs half as much as in flops."}
    )
    df_beta: float = field(default=10.0, metadata={"help": "df_flops: steepness around that."})
    query_target_terms: float | None = field(default=None, metadata={"help": "target: mean active terms of queries."})
    document_target_terms: float | None = field(default=None, metadata={"help": "target: the same for documents."})

    def require_regularizer(self) -> None:
        """Refuse settings that make no regularizer."""
        require_positive(self, "df_alpha", "df_beta", "query_target_terms", "document_target_terms")
        if not self.df_alpha < 1:
            raise UsageError(f"--df_alpha is a share of documents, below 1, got {self.df_alpha}.")
        missing = [f"--{task}_target_terms" for task in TASKS if getattr(self, f"{task}_target_terms") is None]
        if self.regularizer == "target" and missing:
            raise UsageError(f"--regularizer target reaches a number of terms: give {' and '.join(missing)}.")


def make_regularizer(
    model: Any, arguments: RetrieverArguments, task: str, columns: int = 1, gather: bool = True
) -> nn.Module:
    """The regularizer of queries or of documents.

    Args:
        model: The model to train.
        arguments: Of the run.
        task: `"query"` or `"document"`.
        columns: See `FlopsRegularizer`.
        gather: Of all devices, or of each alone.
    """
    settings: dict[str, Any] = {"gather_across_devices": gather, "columns": columns}
    name = arguments.regularizer
    if name == "l1":
        return L1Regularizer(model)
    if name == "df_flops" and task == "document":  # posting lists are of documents
        return DfFlopsRegularizer(model, arguments.df_alpha, arguments.df_beta, **settings)
    if name == "idf_flops":
        return IdfFlopsRegularizer(model, **settings)
    if name == "target":
        return TargetRegularizer(model, getattr(arguments, f"{task}_target_terms"), **settings)
    return FlopsRegularizer(model, **settings)


def prepare_regularizers(
    loss: nn.Module, model: Any, sources: dict[str, Dataset], ramp: float
) -> list[TrainerCallback]:
    """Give regularizers what they need of the data, and return the callbacks that keep what they learn.

    Args:
        loss: Of the run.
        model: Whose tokenizer splits texts into terms.
        sources: The training tuples; the first positives of each are looked at.
        ramp: Share of the run's steps in which target regularizers go to their number.
    """
    if not isinstance(loss, SpladeLoss):
        return []
    found = {task: regularizer_of(loss, task) for task in TASKS}
    without = [one for one in found.values() if isinstance(one, IdfFlopsRegularizer) and one.idf is None]
    if without:
        idf = training_idf(model, sources.values())
        for one in without:
            one.set_idf(idf)
    targets = {task: one for task, one in found.items() if isinstance(one, TargetRegularizer)}
    return [TargetCallback(targets, ramp)] if targets else []


class TargetCallback(TrainerCallback, ExportableState):
    """Has target regularizers reach their number within the first part of a run, whose state keeps theirs.

    A resumed run goes on with it. A number that the run does not reach is said in a warning.

    Args:
        targets: By task.
        ramp: Share of the run's steps after which the number should be reached.
    """

    def __init__(self, targets: Mapping[Task, TargetRegularizer], ramp: float) -> None:
        self.targets = targets
        self.ramp = ramp

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "args": {"ramp": self.ramp},
            "attributes": {task: target.get_state() for task, target in self.targets.items()},
        }

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint kept."""
        callbacks: Any = state.stateful_callbacks or {}
        kept = callbacks.get(type(self).__name__)
        if state.global_step and isinstance(kept, dict):
            for task, of_task in kept["attributes"].items():
                self.targets[task].set_state(of_task)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Follow the number of steps, which a budget of time may lower."""
        for target in self.targets.values():
            target.steps = max(1.0, self.ramp * state.max_steps * args.gradient_accumulation_steps)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Warn of a number that was not reached."""
        for task, target in self.targets.items():
            mean, least = target.mean.item(), target.multiplier.item() <= 2 * target.bounds[0]
            if state.is_world_process_zero and not abs(mean - target.target) <= MISSED * target.target:
                logger.warning(
                    "The last batches had %.3g active terms a %s in place of --%s_target_terms %.3g: %s.",
                    mean,
                    task,
                    task,
                    target.target,
                    "the model keeps no more without any penalty"
                    if mean < target.target and least
                    else "give more steps or a larger learning rate",
                )
