"""The regularizers of a run, by name, and what a run that resumes needs of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lion_st.errors import UsageError
from lion_st.losses import FlopsRegularizer
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

    from lion_st.training.arguments import RetrieverArguments

TASKS = ("query", "document")


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
        """Refuse settings that make no regularizer.

        Raises:
            UsageError: Naming the option.
        """
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


def prepare_regularizers(loss: nn.Module, model: Any, sources: dict[str, Dataset]) -> list[TrainerCallback]:
    """Give regularizers what they need of the data, and return the callbacks that keep what they learn.

    Args:
        loss: Of the run.
        model: Whose tokenizer splits texts into terms.
        sources: The training tuples; the first positives of each are looked at.
    """
    if not isinstance(loss, SpladeLoss):
        return []
    found = {task: getattr(loss, f"{task}_regularizer", None) for task in TASKS}
    without = [one for one in found.values() if isinstance(one, IdfFlopsRegularizer) and one.idf is None]
    if without:
        idf = training_idf(model, sources.values())
        for one in without:
            one.set_idf(idf)
    targets = {task: one for task, one in found.items() if isinstance(one, TargetRegularizer)}
    return [MultiplierCallback(targets)] if targets else []


class MultiplierCallback(TrainerCallback, ExportableState):
    """Keeps the multipliers of target regularizers in the trainer's state, with which a resumed run goes on.

    Args:
        targets: By task.
    """

    def __init__(self, targets: dict[str, TargetRegularizer]) -> None:
        self.targets = targets

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {task: one.multiplier.item() for task, one in self.targets.items()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint kept."""
        callbacks: Any = state.stateful_callbacks or {}
        kept = callbacks.get(type(self).__name__)
        if state.global_step and isinstance(kept, dict):
            for task, multiplier in kept["attributes"].items():
                target = self.targets[task]
                target.multiplier = torch.tensor(multiplier, dtype=torch.float64, device=target.multiplier.device)
