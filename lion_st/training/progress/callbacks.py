"""What every kind of training tells its data, and a bound on its time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sentence_transformers.util import get_world_size
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lion_st.training.progress.checkpoints import decided_by_first_rank


class EpochCallback(TrainerCallback):
    """Says which epoch begins, from 0, to what draws masks or negatives anew in each.

    The epoch is the trainer's own count, which goes by the length of the data loader: a run that resumes inside an
    epoch names the same one as before.
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


class SecondsBudget(TrainerCallback):
    """Fits a run into a number of seconds: fewer steps where `max_steps` would take longer, and schedules to match.

    The pace is measured again as the run goes on, slower or faster, and steps, learning rate and the ramp of
    regularizers follow it. What stands at the end is a run whose schedule came to its end, not one that was cut off.

    Several processes go by the clock of the first one, at every fifth step: by their own, one would take its last step
    before the others, which would wait for it.

    Args:
        seconds: From the start of training in this process, without loading before and saving after it.
        ramp: Callback with `total_steps`, `warmup_steps` and `warmup_ratio`, such as sentence-transformers' of SPLADE.
    """

    MEASURED_AT = (20, 40, 80, 150, 300, 600, 1200, 2400, 4800)  # steps of this process
    WARM = 5  # steps that compile and allocate

    def __init__(self, seconds: float, ramp: Any = None) -> None:
        if not seconds > 0:
            raise ValueError(f"max_seconds must be positive, got {seconds}.")
        self.seconds = seconds
        self.ramp = ramp
        self.is_over = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        self._warm = 0.0  # seconds after the start
        self._first = state.global_step
        self._planned = state.max_steps
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        self._schedules = list(getattr(scheduler, "lr_lambdas", ()))  # none of one that follows the evaluations

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Measure the pace since the last time and fit what is left."""
        done = state.global_step - self._first
        if get_world_size() > 1 and done % self.WARM:
            return
        now = decided_by_first_rank(lambda: time.monotonic() - self._start)
        if done == self.WARM:
            self._warm, self._measured = now, done
        if done in self.MEASURED_AT:
            pace = (now - self._warm) / (done - self._measured)
            self._warm, self._measured = now, done
            steps = state.global_step + max(1, int((self.seconds - now) / pace))
            self._fit(min(steps, self._planned), state, lr_scheduler)
        if now > self.seconds:
            self.is_over = control.should_training_stop = True

    def _fit(self, steps: int, state: TrainerState, lr_scheduler: Any) -> None:
        state.max_steps = steps
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        scheduler.lr_lambdas = [self._fitted(schedule, steps) for schedule in self._schedules]
        if self.ramp is not None:
            self.ramp.total_steps = steps
            self.ramp.warmup_steps = max(1, int(steps * self.ramp.warmup_ratio))

    def _fitted(self, schedule: Any, steps: int) -> Any:
        """A schedule whose numbers of steps, of which each kind has its own, shrink as the run does."""
        if not isinstance(schedule, partial):  # of a constant rate
            return schedule
        numbers = {name: one for name, one in schedule.keywords.items() if re.fullmatch(r"num_\w+_steps", name)}
        fitted = {name: math.ceil(one * steps / self._planned) for name, one in numbers.items()}
        if "num_stable_steps" in fitted:  # what warmup and decay leave
            fitted["num_stable_steps"] = max(0, steps - fitted["num_warmup_steps"] - fitted["num_decay_steps"])
        return partial(schedule.func, **schedule.keywords | fitted)


class StopAfter(TrainerCallback):
    """Ends a run after a number of steps and leaves its schedule as it is, which is then not at its end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.is_over = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count."""
        if state.global_step >= self.steps:
            self.is_over = control.should_training_stop = True


def require_all_steps(trainer: Any, output: Any) -> None:
    """Refuse a run that has stopped before its last step, other than by `SecondsBudget` or `StopAfter`."""
    state = trainer.state
    ended = any(getattr(callback, "is_over", False) for callback in trainer.callback_handler.callbacks)
    if state.global_step < state.max_steps and not ended:
        raise ValueError(
            f"{output}: training stopped at step {state.global_step} of {state.max_steps}. Repeat the command to go on "
            "from its last checkpoint; if it stops there again, give more data or a smaller batch."
        )
