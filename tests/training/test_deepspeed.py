"""What two processes train with DeepSpeed ZeRO-2 and ZeRO-3 is what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    STEPS,
    Case,
    adaptation,
    assert_same_files,
    assert_same_weights,
    interrupted,
    losses,
    options,
    run_pair,
    write_text,
)
from safetensors.torch import load_file
from sharded_runs import run
from tiny_runs import write_tuples


def zero(stage: int) -> list[str]:
    # Every weight is divided, none being small, and what is sent has several buckets.
    small = '"reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0'
    return ["--deepspeed", f'{{"zero_optimization": {{"stage": {stage}, {small}}}}}']


CASES = {
    "3 sparse cl_kd": Case("sparse", "cl_kd", False, None, True, zero(3)),
    "3 sparse cl cached": Case("sparse", "cl", False, 1, False, zero(3)),
    "3 sparse cl adapter": Case("sparse", "cl", True, None, False, zero(3)),
    "3 sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, zero(3)),
    "3 dense cl cached": Case("dense", "cl", False, 1, True, zero(3)),
    "3 dense cl_kd adapter cached": Case("dense", "cl_kd", True, 1, False, zero(3)),
    "3 dense kd accumulated": Case("dense", "kd", False, 1, True, zero(3)),
    "2 dense kd accumulated": Case("dense", "kd", False, 1, False, zero(2)),
    "2 sparse cl cached": Case("sparse", "cl", False, 1, True, zero(2)),
    "2 sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, False, zero(2)),
    "2 dense cl": Case("dense", "cl", False, None, True, zero(2)),
}
RESUMED = ("3 sparse cl_kd", "3 sparse cl_kd adapter cached", "2 dense cl")


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory) -> Path:
    """Folders `one/CASE` and `two/CASE`, of one process and of two."""
    pytest.importorskip("deepspeed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("deepspeed")
    data = write_tuples(root / "tuples.jsonl", shared=True, negatives=2)
    text = write_text(root / "text.txt")

    def train(folder: str, name: str, processes: int, **more: Any) -> list[Any]:
        case = CASES[name]
        return ["train", options(tiny_backbone(tied=case.tied), data, root / folder / name, case, processes, **more)]

    for case in CASES:
        run(*train("one", case, 1))
    for peft in (False, True):
        run("adapt", adaptation(tiny_backbone(), text, root / "one" / f"mntp {peft}", peft))
    pair = [train("two", case, 2) for case in CASES]
    pair += [
        ["adapt", adaptation(tiny_backbone(), text, root / "two" / f"mntp {peft}", peft, zero(3))]
        for peft in (False, True)
    ]
    for case in (RESUMED[0], RESUMED[2]):
        interrupted(root / "one" / case, root / "one to two" / case)
        pair.append(train("one to two", case, 2))
    dropout: dict[str, Any] = dict(lora_dropout=0.3, max_steps=2, bf16=True)
    pair.append(train("dropout", RESUMED[1], 2, **dropout))
    pair.append(train("recomputed", RESUMED[1], 2, activation_checkpointing=True, **dropout))
    run_pair(pair, root / "cases.json", DS_ACCELERATOR="cpu")
    for case in RESUMED[1:]:
        interrupted(root / "two" / case, root / "two to one" / case)
        run(*train("two to one", case, 1))
    torch.set_num_threads(threads)
    return root


@pytest.mark.parametrize("case", [*CASES, "mntp False", "mntp True"])
def test_two_processes_train_what_one_does(trained, case):
    one, two = trained / "one" / case, trained / "two" / case
    assert len(losses(one)) == (4 if "mntp" in case else STEPS)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert max(losses(one)) > 1.001 * min(losses(one))
    assert_same_weights(two, one)
    assert_same_files(two, one)


@pytest.mark.parametrize(
    ("way", "case"),
    [("one to two", RESUMED[0]), ("one to two", RESUMED[2]), ("two to one", RESUMED[1]), ("two to one", RESUMED[2])],
)
def test_a_run_goes_on_with_and_without_deepspeed(trained, way, case):
    assert losses(trained / way / case) == pytest.approx(losses(trained / "one" / case), rel=1e-4)
    assert_same_weights(trained / way / case, trained / "one" / case)


def test_recomputed_activations_have_the_dropout_that_they_had(trained):
    case = RESUMED[1]
    first, second = (losses(trained / folder / case) for folder in ("dropout", "recomputed"))
    assert first == second
    adapters = [load_file(trained / folder / case / "model.safetensors") for folder in ("dropout", "recomputed")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
