"""What two processes train with DeepSpeed ZeRO-2 and ZeRO-3 is what one process trains."""

from pathlib import Path
from typing import Any

import pytest
from pairs import STEPS, Case, Trainings, assert_same_adapters, assert_same_training, assert_same_weights, losses


def zero(stage: int) -> list[str]:
    # Every weight is divided, none being small, and what is sent has several buckets.
    small = '"reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0'
    return ["--deepspeed", f'{{"zero_optimization": {{"stage": {stage}, {small}}}}}']


CASES = {
    "3 sparse cl_kd": Case("sparse", "cl_kd", False, None, True, zero(3)),
    "3 sparse cl cached": Case("sparse", "cl", False, 1, False, zero(3), evaluated=True),
    "3 sparse cl adapter": Case("sparse", "cl", True, None, False, zero(3)),
    "3 sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, zero(3)),
    "3 dense cl cached": Case("dense", "cl", False, 1, True, zero(3)),
    "3 dense cl_kd adapter cached": Case("dense", "cl_kd", True, 1, False, zero(3)),
    "3 dense cl gemma4": Case("dense", "cl", False, None, True, zero(3), family="gemma4_text"),  # has saved buffers
    "3 dense kd accumulated": Case("dense", "kd", False, 1, True, zero(3)),
    "2 dense kd accumulated": Case("dense", "kd", False, 1, False, zero(2), evaluated=True),
    "2 sparse cl cached": Case("sparse", "cl", False, 1, True, zero(2)),
    "2 sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, False, zero(2)),
    "2 dense cl": Case("dense", "cl", False, None, True, zero(2)),
}
RESUMED = ("3 sparse cl_kd", "3 sparse cl_kd adapter cached", "2 dense cl")


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory) -> Path:
    """Folders `one/CASE` and `two/CASE`, of one process and of two."""
    pytest.importorskip("deepspeed")
    trainings = Trainings(tmp_path_factory.mktemp("deepspeed"), tiny_backbone, CASES, zero(3))
    for case in RESUMED:
        trainings.interrupt("one", "one to two", case)
        trainings.together("one to two", case)
    dropout: dict[str, Any] = dict(lora_dropout=0.3, max_steps=2, bf16=True)
    trainings.together("dropout", RESUMED[1], **dropout)
    trainings.together("recomputed", RESUMED[1], activation_checkpointing=True, **dropout)
    trainings.run_waiting(DS_ACCELERATOR="cpu")
    for case in RESUMED[1:]:
        trainings.interrupt("two", "to the other stage", case)
        trainings.together("to the other stage", case, divided=zero(2 if case[0] == "3" else 3))
    trainings.run_waiting(DS_ACCELERATOR="cpu")
    for case in RESUMED[1:]:
        trainings.interrupt("two", "two to one", case)
        trainings.alone("two to one", case)
    return trainings.root


@pytest.mark.parametrize("case", [*CASES, "mntp False", "mntp True"])
def test_two_processes_train_what_one_does(trained, case):
    assert_same_training(trained, case, steps=4 if "mntp" in case else STEPS)


@pytest.mark.parametrize(
    ("way", "case"),
    [
        *(("one to two", case) for case in RESUMED),
        *((way, case) for way in ("two to one", "to the other stage") for case in RESUMED[1:]),
    ],
)
def test_a_run_goes_on_with_and_without_deepspeed(trained, way, case):
    assert losses(trained / way / case) == pytest.approx(losses(trained / "one" / case), rel=1e-4)
    assert_same_weights(trained / way / case, trained / "one" / case)


def test_recomputed_activations_have_the_dropout_that_they_had(trained):
    assert_same_adapters(trained / "dropout" / RESUMED[1], trained / "recomputed" / RESUMED[1])
