"""What several processes train, with weights whole (DDP) or sharded (FSDP2), is what one process trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import (
    STEPS,
    Case,
    Trainings,
    assert_same_adapters,
    assert_same_training,
    assert_same_weights,
    losses,
    options,
)
from tiny_runs import write_tuples

from lion_st.modules.splade_head import LEARNED_FILE

FSDP = ["--fsdp"]
COMPILED = [*FSDP, "--torch_compile_backend", "aot_eager"]  # each layer, which is then sharded
CASES = {
    "sparse cl_kd": Case("sparse", "cl_kd", False, None, True, FSDP),
    "sparse cl cached": Case("sparse", "cl", False, 1, False, FSDP, evaluated=True),
    "sparse cl adapter": Case("sparse", "cl", True, None, False, FSDP),
    "sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, FSDP),
    "dense cl cached": Case("dense", "cl", False, 1, True, FSDP),
    "dense cl_kd adapter cached": Case("dense", "cl_kd", True, 1, False, FSDP, evaluated=True),
    "sparse cl_kd adapter compiled": Case("sparse", "cl_kd", True, None, False, COMPILED, little=True),
    "ddp sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, []),
    "ddp dense cl": Case("dense", "cl", False, None, True, []),
    "ddp sparse cl_kd self-distilled": Case("sparse", "cl_kd", False, None, True, [], self_distilled=True),
    "ddp sparse cl_kd learned": Case("sparse", "cl_kd", False, 1, True, [], learned=True),
    "hybrid cl_kd cached": Case("hybrid", "cl_kd", False, 1, False, FSDP),
    "dense cl gemma4": Case("dense", "cl", False, None, True, FSDP, family="gemma4_text"),  # has saved buffers
    "ddp hybrid cl": Case("hybrid", "cl", False, None, True, []),
}
WIDE = (24_000, 128)  # vocabulary and hidden size
MEASURED = {
    f"{division} {objective} {'adapter' if peft else 'all'} {mini}": Case("sparse", objective, peft, mini, False, given)
    for division, given in (("ddp", []), ("fsdp", FSDP))
    for objective, peft, mini in (("cl_kd", False, None), ("cl", False, 8), ("cl_kd", True, 8))
}
RESUMED = ("sparse cl_kd", "sparse cl_kd adapter cached")  # from one process on two, and from two on one


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory) -> Path:
    """Folders `one/CASE` and `two/CASE`, of one process and of two."""
    root = tmp_path_factory.mktemp("sharded")
    trainings = Trainings(root, tiny_backbone, CASES, FSDP)
    trainings.interrupt("one", "one to two", RESUMED[0])
    trainings.together("one to two", RESUMED[0])
    dropout: dict[str, Any] = dict(lora_dropout=0.3, max_steps=2, bf16=True)
    trainings.together("dropout", RESUMED[1], **dropout)
    recomputed = '{"activation_checkpointing": true, "fsdp_cpu_ram_efficient_loading": false}'
    trainings.together("recomputed", RESUMED[1], fsdp_config=recomputed, **dropout)
    trainings.waiting.append(["head", [str(root / "head.pt")]])
    apart = write_tuples(root / "apart.jsonl")
    for name, case in MEASURED.items():
        dtype = (
            "float32" if case.peft else "bfloat16"
        )  # all weights are trained in float32, a copy of those of the file
        wide = tiny_backbone(tied=False, dtype=dtype, vocab_size=WIDE[0], hidden_size=WIDE[1])
        length = dict(query_length=8, document_length=8, negatives=4, batch_size=24)
        given = options(wide, apart, root / name, case, 2, max_steps=2, save_strategy="no", **length)
        trainings.waiting.append(["memory", [str(root / f"{name}.json"), *given]])
    # What is freed goes back to the system at once, so that a peak is of what is held.
    trainings.run_waiting(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    trainings.interrupt("two", "two to one", RESUMED[1])
    trainings.alone("two to one", RESUMED[1])
    return root


@pytest.mark.parametrize("case", [*CASES, "mntp False", "mntp True"])
def test_two_processes_train_what_one_does(trained, case):
    assert_same_training(trained, case, steps=4 if "mntp" in case else STEPS)
    learned = [*(trained / "one" / case).rglob(LEARNED_FILE)]
    assert len(learned) == (3 if "learned" in case else 0)  # two checkpoints and the result


@pytest.mark.parametrize(("way", "case"), zip(("one to two", "two to one"), RESUMED, strict=True))
def test_a_run_goes_on_from_whole_weights_with_sharded_ones_and_the_other_way(trained, way, case):
    assert losses(trained / way / case) == pytest.approx(losses(trained / "one" / case), rel=1e-4)
    assert_same_weights(trained / way / case, trained / "one" / case)


def test_recomputed_activations_have_the_dropout_that_they_had(trained):
    assert_same_adapters(trained / "dropout" / RESUMED[1], trained / "recomputed" / RESUMED[1])


def test_the_gradient_of_a_sharded_head_that_is_read_in_place_is_the_mean_of_all_processes(trained):
    torch.testing.assert_close(*torch.load(trained / "head.pt"))


@pytest.mark.parametrize("case", MEASURED)
def test_a_step_takes_the_memory_that_a_dry_run_says(trained, case):
    found = json.loads((trained / f"{case}.json").read_text())
    assert found["peak"] == pytest.approx(sum(found["estimated"].values()), rel=0.25)  # .2, and the allocator's share
    if "fsdp" in case:
        kept = {name: found["estimated"][name] for name in ("weights", "optimizer")}
        if "adapter" in case:
            kept["weights"] *= 2  # a dry run takes frozen weights as half precision; this backbone's are float32
        assert found["kept"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("case", [name for name, case in MEASURED.items() if not case.peft])
def test_the_weights_of_a_model_that_is_sharded_are_read_by_one_process(trained, case):
    first, second = json.loads((trained / f"{case}.json").read_text())["read"]
    weights = 4 * 2 * WIDE[0] * WIDE[1]  # of embeddings and LM head, in float32
    assert first > weights
    assert second < weights / 10 if "fsdp" in case else second > weights
