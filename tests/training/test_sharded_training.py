"""What several processes train, with weights whole (DDP) or sharded (FSDP2), is what one process trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import run
from tiny_runs import tiny_options, write_tuples

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
# Paradigm, objective, all weights or an adapter, texts of a mini-batch on each process, LM head tied, how divided.
CASES: dict[str, tuple[str, str, bool, int | None, bool, str]] = {
    "sparse cl_kd": ("sparse", "cl_kd", False, None, True, "fsdp"),
    "sparse cl cached": ("sparse", "cl", False, 1, False, "fsdp"),
    "sparse cl adapter": ("sparse", "cl", True, None, False, "fsdp"),
    "sparse cl_kd adapter cached": ("sparse", "cl_kd", True, 1, True, "fsdp"),
    "dense cl cached": ("dense", "cl", False, 1, True, "fsdp"),
    "dense cl_kd adapter cached": ("dense", "cl_kd", True, 1, False, "fsdp"),
    "ddp sparse cl_kd adapter cached": ("sparse", "cl_kd", True, 1, True, "ddp"),
    "ddp dense cl": ("dense", "cl", False, None, True, "ddp"),
    "ddp sparse cl_kd self-distilled": ("sparse", "cl_kd", False, None, True, "ddp"),
    "hybrid cl_kd cached": ("hybrid", "cl_kd", False, 1, False, "fsdp"),
    "ddp hybrid cl": ("hybrid", "cl", False, None, True, "ddp"),
}
STEPS, MIDDLE = 6, 3
RESUMED = ("sparse cl_kd", "sparse cl_kd adapter cached")  # from one process on two, and from two on one


def options(backbone: str, data: Path, output: Path, case: str, processes: int, **more: Any) -> list[str]:
    """Options of a case, with the same batch on one process and on two."""
    paradigm, objective, peft, mini, _, divided = CASES[case]
    values: dict[str, Any] = dict(
        use_peft=peft,
        mini_batch_size=mini and mini * 2 // processes,
        max_steps=STEPS,
        save_steps=MIDDLE,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # else a gradient that is nothing but rounding would be a step like any other
        lr_scheduler_type="constant",
        regularizer_warmup_ratio=0.5 if paradigm in ("sparse", "hybrid") else None,
        lora_dropout=0 if peft else None,  # each process draws its own
        self_distillation=True if "self-distilled" in case else None,
    )
    values = tiny_options(backbone, data, output, **(values | more))
    given = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    given += ["--fsdp"] if divided == "fsdp" and processes > 1 else []
    return ["--backbone", "micro", "--paradigm", paradigm, "--objective", objective, *given]


def adaptation(backbone: str, text: Path, output: Path, peft: bool, processes: int) -> list[str]:
    """Options of an MNTP stage of blocks of 16 tokens."""
    values = dict(
        backbone=backbone,
        texts=text,
        output_dir=output,
        block_size=16,
        eval_blocks=8,
        per_device_train_batch_size=4 // processes,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        use_peft=peft,
        lora_dropout=0,
        bf16=False,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    given = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return given + (["--fsdp"] if processes > 1 else [])


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a run as it was in its middle."""
    shutil.copytree(run / f"checkpoint-{MIDDLE}", copy / f"checkpoint-{MIDDLE}")
    record = json.loads((run / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(record | {"finished": False}))
    return copy


@pytest.fixture(scope="module")
def trained(tiny_backbone, tmp_path_factory) -> Path:
    """Folders `one/CASE` and `two/CASE`, of one process and of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("sharded")
    data = write_tuples(root / "tuples.jsonl", shared=True, negatives=2)
    text = root / "text.txt"
    text.write_text(
        "".join(f"Lions number {n} rest in place {n * 7 % 13}, and hunt at night {n}.\n" for n in range(99))
    )

    def train(folder: str, case: str, processes: int, **more: Any) -> list[Any]:
        return [
            "train",
            options(tiny_backbone(tied=CASES[case][4]), data, root / folder / case, case, processes, **more),
        ]

    for case in CASES:
        run(*train("one", case, 1))
    for peft in (False, True):
        run("adapt", adaptation(tiny_backbone(), text, root / "one" / f"mntp {peft}", peft, 1))
    pair = [train("two", case, 2) for case in CASES]
    pair += [
        ["adapt", adaptation(tiny_backbone(), text, root / "two" / f"mntp {peft}", peft, 2)] for peft in (False, True)
    ]
    interrupted(root / "one" / RESUMED[0], root / "one to two" / RESUMED[0])
    pair.append(train("one to two", RESUMED[0], 2))
    dropout: dict[str, Any] = dict(lora_dropout=0.3, max_steps=2, bf16=True)
    pair.append(train("dropout", RESUMED[1], 2, **dropout))
    recomputed = '{"activation_checkpointing": true, "fsdp_cpu_ram_efficient_loading": false}'
    pair.append(train("recomputed", RESUMED[1], 2, fsdp_config=recomputed, **dropout))
    pair.append(["head", [str(root / "head.pt")]])
    short = train("kept", RESUMED[0], 2, max_steps=1, save_strategy="no")[1]
    pair.append(["memory", [str(root / "kept.json"), *short]])
    (root / "cases.json").write_text(json.dumps(pair))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", str(Path(__file__).with_name("sharded_runs.py"))]
    command = [sys.executable, *launcher, str(root / "cases.json")]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-5000:]
    interrupted(root / "two" / RESUMED[1], root / "two to one" / RESUMED[1])
    run(*train("two to one", RESUMED[1], 1))
    torch.set_num_threads(threads)
    return root


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def assert_same_weights(actual: Path, expected: Path) -> None:
    found, wanted = load_file(actual / "model.safetensors"), load_file(expected / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # What training changes is some hundredths.
        difference = torch.linalg.vector_norm(found[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert difference < 1e-4, name


@pytest.mark.parametrize("case", [*CASES, "mntp False", "mntp True"])
def test_two_processes_train_what_one_does(trained, case):
    one, two = trained / "one" / case, trained / "two" / case
    assert len(losses(one)) == (4 if "mntp" in case else STEPS)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert max(losses(one)) > 1.001 * min(losses(one))
    assert_same_weights(two, one)
    # The same files: nothing in a checkpoint says that the weights were sharded.
    for checkpoint in one.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()} - {"rng_state.pth"}
        assert {path.name for path in (two / checkpoint.name).iterdir()} == names | {
            "rng_state_0.pth",
            "rng_state_1.pth",
        }


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


def test_each_process_keeps_the_share_of_weights_and_optimizer_that_a_dry_run_says(trained):
    kept, estimated = json.loads((trained / "kept.json").read_text())
    assert kept == pytest.approx(estimated, rel=0.2)
