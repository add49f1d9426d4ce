"""What several processes train, with weights whole (DDP) or sharded (FSDP2), is what one process trains."""

from __future__ import annotations

import json
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

from lion_st.modules.splade_head import LEARNED_FILE

FSDP = ["--fsdp"]
COMPILED = [*FSDP, "--torch_compile_backend", "aot_eager"]  # each layer, which is then sharded
CASES = {
    "sparse cl_kd": Case("sparse", "cl_kd", False, None, True, FSDP),
    "sparse cl cached": Case("sparse", "cl", False, 1, False, FSDP),
    "sparse cl adapter": Case("sparse", "cl", True, None, False, FSDP),
    "sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, FSDP),
    "dense cl cached": Case("dense", "cl", False, 1, True, FSDP),
    "dense cl_kd adapter cached": Case("dense", "cl_kd", True, 1, False, FSDP),
    "sparse cl_kd adapter cached compiled": Case("sparse", "cl_kd", True, 1, False, COMPILED),
    "ddp sparse cl_kd adapter cached": Case("sparse", "cl_kd", True, 1, True, []),
    "ddp dense cl": Case("dense", "cl", False, None, True, []),
    "ddp sparse cl_kd self-distilled": Case("sparse", "cl_kd", False, None, True, [], self_distilled=True),
    "ddp sparse cl_kd learned": Case("sparse", "cl_kd", False, 1, True, [], learned=True),
    "hybrid cl_kd cached": Case("hybrid", "cl_kd", False, 1, False, FSDP),
    "ddp hybrid cl": Case("hybrid", "cl", False, None, True, []),
}
MEASURED = {
    f"{division} {objective} {'adapter' if peft else 'all'} {mini}": Case("sparse", objective, peft, mini, False, given)
    for division, given in (("ddp", []), ("fsdp", FSDP))
    for objective, peft, mini in (("cl_kd", False, None), ("cl", False, 4), ("cl_kd", True, 4))
}
RESUMED = ("sparse cl_kd", "sparse cl_kd adapter cached")  # from one process on two, and from two on one


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory) -> Path:
    """Folders `one/CASE` and `two/CASE`, of one process and of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sharded")
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
        ["adapt", adaptation(tiny_backbone(), text, root / "two" / f"mntp {peft}", peft, FSDP)]
        for peft in (False, True)
    ]
    interrupted(root / "one" / RESUMED[0], root / "one to two" / RESUMED[0])
    pair.append(train("one to two", RESUMED[0], 2))
    dropout: dict[str, Any] = dict(lora_dropout=0.3, max_steps=2, bf16=True)
    pair.append(train("dropout", RESUMED[1], 2, **dropout))
    recomputed = '{"activation_checkpointing": true, "fsdp_cpu_ram_efficient_loading": false}'
    pair.append(train("recomputed", RESUMED[1], 2, fsdp_config=recomputed, **dropout))
    pair.append(["head", [str(root / "head.pt")]])
    apart = write_tuples(root / "apart.jsonl")
    for case in MEASURED:
        wide = tiny_backbone(tied=False, vocab_size=40_000, hidden_size=128)
        length = dict(query_length=8, document_length=8, negatives=4, batch_size=24)
        given = options(wide, apart, root / case, MEASURED[case], 2, max_steps=3, save_strategy="no", **length)
        pair.append(["memory", [str(root / f"{case}.json"), *given]])
    # What is freed goes back to the system at once, so that a peak is of what is held.
    run_pair(pair, root / "cases.json", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    interrupted(root / "two" / RESUMED[1], root / "two to one" / RESUMED[1])
    run(*train("two to one", RESUMED[1], 1))
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
    assert len([*one.rglob(LEARNED_FILE)]) == (3 if "learned" in case else 0)  # two checkpoints and the result


@pytest.mark.parametrize(("way", "case"), zip(("one to two", "two to one"), RESUMED, strict=True))
def test_a_run_goes_on_from_whole_weights_with_sharded_ones_and_the_other_way(trained, way, case):
    assert losses(trained / way / case) == pytest.approx(losses(trained / "one" / case), rel=1e-4)
    assert_same_weights(trained / way / case, trained / "one" / case)


def test_recomputed_activations_have_the_dropout_that_they_had(trained):
    case = RESUMED[1]
    first, second = (losses(trained / folder / case) for folder in ("dropout", "recomputed"))
    assert first == second
    adapters = [load_file(trained / folder / case / "model.safetensors") for folder in ("dropout", "recomputed")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


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
