"""Distillation without a teacher: from the exponential moving average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lion_st.losses.scoring import cat_texts, scores_of_columns

EMA_FILE = "ema.safetensors"  # in a run's checkpoint
ALL_AT_ONCE = 2**31


class EmaTeacher(CachedLossMixin):
    """Scores a batch's documents with the moving average of a model's trained weights (a mean teacher).

    After optimizer step t each weight's average becomes d * average + (1 - d) * weight with
    d = min(decay, (1 + t) / (10 + t)), which forgets the beginning of a run sooner than its end. The average begins as
    the weights, is held in float32 beside them, and is put in their place while a batch is scored: without
    dropout and gradients, and with all terms of a text where the model learns how many it keeps.

    Args:
        model: The model that is trained. Of an adapter the average is of its weights alone.
        decay: d of a long run, at least 0 and below 1.
        scale: Factor on the scores, as on the student's.
        mini_batch_size: Texts that are embedded at a time; None for all of a column.

    References:
        Tarvainen and Valpola, Mean Teachers Are Better Role Models, 2017: https://arxiv.org/abs/1703.01780.
    """

    def __init__(self, model: Any, decay: float = 0.99, scale: float = 1.0, mini_batch_size: int | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is at least 0 and below 1, got {decay!r}.")
        self.model = model
        self.decay = decay
        self.scale = scale
        self.mini_batch_size = mini_batch_size or ALL_AT_ONCE
        self.trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.averages = {name: one.detach().float().clone() for name, one in self.trained.items()}

    @torch.no_grad()
    def scores(self, columns: Sequence[dict[str, Tensor]]) -> Tensor:
        """Scores [B, 1 + n] of each query and its own documents.

        Args:
            columns: Features of queries, positives and n columns of negatives, B texts each, as losses take them.
        """
        with self._in_place():
            queries, *documents = [
                cat_texts([part for part, _ in self.embed_minibatch_iter(column, False, False)]) for column in columns
            ]
            scores = self.scale * scores_of_columns(queries, documents)
        own = torch.arange(scores.shape[1], device=scores.device).view(len(documents), -1).T  # [B, 1 + n]
        return scores.gather(1, own)

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the weights after optimizer step `steps` into their average."""
        self._follow_device()
        decay = min(self.decay, (1 + steps) / (10 + steps))
        weights = [one.detach().float() for one in self.trained.values()]
        get_ema_multi_avg_fn(decay)(list(self.averages.values()), weights, None)

    def save(self, folder: str | Path) -> None:
        """Write the averages into a checkpoint."""
        save_file({name: one.contiguous() for name, one in self.averages.items()}, Path(folder) / EMA_FILE)

    def load(self, folder: str | Path) -> None:
        """Go on with the averages of a checkpoint.

        Raises:
            FileNotFoundError: If it has none.
            ValueError: If they are of other weights.
        """
        file = Path(folder) / EMA_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {EMA_FILE}: the run that wrote it was without --self_distillation."
            )
        found = load_file(file)
        if {name: one.shape for name, one in found.items()} != {n: one.shape for n, one in self.averages.items()}:
            raise ValueError(f"{str(file)!r} holds the averages of other weights than those that are trained.")
        self.averages = {name: found[name] for name in self.trained}

    def _follow_device(self) -> None:
        self.averages = {name: one.to(self.trained[name].device) for name, one in self.averages.items()}

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The averages in place of the weights; what autocast has cast of either is forgotten."""
        self._follow_device()
        transformer, head = self.model[0], self.model[-1]
        was_training, weights = transformer.training, {name: one.data for name, one in self.trained.items()}
        torch.clear_autocast_cache()
        try:
            transformer.eval()
            head.prunes = False
            for name, one in self.trained.items():
                one.data = self.averages[name].to(one.dtype)
            yield
        finally:
            for name, one in self.trained.items():
                one.data = weights[name]
            head.prunes = True
            transformer.train(was_training)
            torch.clear_autocast_cache()


class EmaCallback(TrainerCallback):
    """Updates the average after each optimizer step."""

    def __init__(self, teacher: EmaTeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Update."""
        self.teacher.update(state.global_step)
