"""What both kinds of training tell their data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Says which epoch begins, from 0, to what draws masks or negatives anew in each.

    The epoch is the trainer's own count, which goes by the length of the data loader: a run that resumes inside an
    epoch names the same one as before.

    Args:
        set_epoch: Called with the epoch before its first batch is read.
    """

    def __init__(self, set_epoch: Callable[[int], Any]) -> None:
        self.set_epoch = set_epoch
        self.epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Find the epoch a resumed run begins in."""
        steps_an_epoch = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self.epoch = state.global_step // steps_an_epoch

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Pass the epoch on."""
        self.set_epoch(self.epoch)
        self.epoch += 1
