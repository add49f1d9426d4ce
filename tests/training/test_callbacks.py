"""A budget of seconds ends a run on its own schedule."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lion_st.training.options.arguments import MntpTrainingArguments, RetrieverTrainingArguments
from lion_st.training.progress import callbacks
from lion_st.training.progress.callbacks import SecondsBudget


class Clock:
    """Seconds that pass when a test says so, so that a busy machine counts the same steps."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock of budgets."""
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


class Slow(nn.Module):
    """A model whose pass takes some seconds by a clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock = clock
        self.seconds = seconds

    def forward(self, x, labels=None):
        self.clock.seconds += self.seconds
        return {"loss": (self.weight * x.mean()).square().sum()}


class Rates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


def train(tmp_path, clock, seconds, steps=2000, schedule="linear", **options):
    rates = Rates()
    trainer = Trainer(
        model=Slow(clock, 0.01),
        args=TrainingArguments(
            str(tmp_path), max_steps=steps, learning_rate=1.0, lr_scheduler_type=schedule, warmup_steps=0.1,
            per_device_train_batch_size=1, use_cpu=True, report_to="none", save_strategy="no",
            **options,
        ),
        train_dataset=[{"x": torch.ones(1)} for _ in range(50)],
        callbacks=[SecondsBudget(seconds), rates],
    )  # fmt: skip
    trainer.train()
    return trainer.state.global_step, rates.rates


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_comes_to_its_end(tmp_path, clock, schedule):
    steps, rates = train(tmp_path, clock, seconds=2.5, schedule=schedule)
    assert steps == pytest.approx(250, abs=1)  # of 2,000
    assert max(rates) > 0.1
    assert rates[-1] < 0.15 * max(rates)


def test_a_schedule_of_three_parts_keeps_their_shares(tmp_path, clock):
    parts = {"num_stable_steps": 1300, "num_decay_steps": 500}
    steps, rates = train(tmp_path, clock, 2.5, schedule="warmup_stable_decay", lr_scheduler_kwargs=parts)
    assert steps == pytest.approx(250, abs=1)
    assert rates[steps // 2] == max(rates) == 1 and rates[-1] < 0.15


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_schedules_without_an_end_fit_too(tmp_path, clock, schedule):
    steps, rates = train(tmp_path, clock, seconds=600, steps=25, schedule=schedule)
    assert steps == 25
    assert rates[-1] == pytest.approx(1, abs=0.8)


def test_a_run_that_gets_faster_takes_more_steps(tmp_path, clock):
    """Steps of 60 ms at first, of 5 ms from the thirtieth on: at the first pace there would be 66, not 470."""
    model = Slow(clock, 0.06)

    class Faster(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 30:
                model.seconds = 0.005

    rates = Rates()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=1000, learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=0.1,
            per_device_train_batch_size=1, use_cpu=True, report_to="none", save_strategy="no",
        ),
        train_dataset=[{"x": torch.ones(1)} for _ in range(50)],
        callbacks=[SecondsBudget(4), Faster(), rates],
    )  # fmt: skip
    trainer.train()
    assert 400 < trainer.state.global_step <= 470
    assert rates.rates[-1] < 0.15


def test_a_run_within_its_budget_is_left_alone(tmp_path, clock):
    steps, rates = train(tmp_path, clock, seconds=600, steps=30)
    assert steps == 30
    assert rates[-1] == 0


def steps_by_an_own_clock(seconds: float) -> tuple[int, int]:
    """Steps that a rank takes and last planned; a step of rank r takes 0.1 + 0.03 r seconds by its clock."""
    now = 0.0
    state, control = TrainerState(max_steps=1000), TrainerControl()
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), lambda step: 1.0)
    budget = SecondsBudget(seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now))
        budget.on_train_begin(None, state, control, scheduler)
        while state.global_step < state.max_steps and not control.should_training_stop:
            state.global_step += 1
            now += 0.1 + 0.03 * dist.get_rank()
            budget.on_step_end(None, state, control, scheduler)
    return state.global_step, state.max_steps


@pytest.mark.parametrize("seconds", [1.0, 20.0])
def test_processes_whose_clocks_differ_end_at_the_same_step(seconds):
    """Else those that go on would wait for the others until NCCL's time is over."""
    first, second = run_ranks(2, steps_by_an_own_clock, seconds)
    assert first == second
    assert abs(first[0] - 10 * seconds) <= 5


def test_a_budget_is_positive():
    with pytest.raises(ValueError, match="max_seconds must be positive, got 0"):
        SecondsBudget(0)


def test_a_lost_loss_is_not_logged_as_zero():
    assert RetrieverTrainingArguments(output_dir="x").logging_nan_inf_filter is False
    assert MntpTrainingArguments(output_dir="x").logging_nan_inf_filter is False
