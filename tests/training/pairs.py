"""Trainings of one process and of two that are to be the same."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import run
from tiny_runs import tiny_options, write_tuples

from lion_st.modules.splade_head import LEARNED_FILE

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore",
               "PYTHONFAULTHANDLER": "1"}  # fmt: skip
STEPS, MIDDLE = 6, 3


class Case(NamedTuple):
    """A training, and how two processes divide it."""

    paradigm: str
    objective: str
    peft: bool  # else all weights are trained
    mini: int | None  # texts of a mini-batch on each process
    tied: bool  # the LM head to the embeddings
    divided: list[str]  # options of two processes
    self_distilled: bool = False
    family: str = "llama"
    learned: bool = False  # thresholds of terms, and how many texts keep
    evaluated: bool = False  # on a share of the data, and the best checkpoint is the result
    little: bool = False  # one layer, adapters of one of its projections, texts of one length: less to compile


class Trainings:
    """Cases, and MNTP of all weights and of an adapter, trained by one process and by two.

    What one process trains is in the folders `one/CASE`, `one/mntp False` and `one/mntp True` once this is made. What
    two are to train is collected in `waiting`, with folders `two/...`, until `run_waiting`.

    Args:
        root: Of the folders.
        backbone: See the fixture `tiny_backbone`.
        cases: By name.
        divided: Options by which two processes divide MNTP.
    """

    def __init__(self, root: Path, backbone: Callable[..., str], cases: Mapping[str, Case], divided: list[str]) -> None:
        self.root, self.backbone, self.cases = root, backbone, cases
        self.data = write_tuples(root / "tuples.jsonl", shared=True, negatives=2)
        self.waiting: list[Any] = []
        for name in cases:
            self.alone("one", name)
            self.together("two", name)
        text = write_text(root / "text.txt")
        for peft in (False, True):
            one, two = (root / folder / f"mntp {peft}" for folder in ("one", "two"))
            with one_thread():
                run("adapt", adaptation(backbone(), text, one, peft))
            self.waiting.append(["adapt", adaptation(backbone(), text, two, peft, divided)])

    def alone(self, folder: str, name: str, **more: Any) -> None:
        """Train a case in this process."""
        with one_thread():
            run("train", self._options(folder, name, 1, **more))

    def together(self, folder: str, name: str, divided: list[str] | None = None, **more: Any) -> None:
        """Have two processes train a case, divided as the case says, or in another way."""
        self.waiting.append(["train", self._options(folder, name, 2, divided, **more)])

    def run_waiting(self, **environment: str) -> None:
        """Run what two processes are to do."""
        run_pair(self.waiting, self.root / "cases.json", **environment)
        self.waiting.clear()

    def interrupt(self, run: str, folder: str, name: str) -> None:
        """Copy a case's run as it was in its middle to another folder."""
        interrupted(self.root / run / name, self.root / folder / name)

    def _options(
        self, folder: str, name: str, processes: int, divided: list[str] | None = None, **more: Any
    ) -> list[str]:
        case = self.cases[name]
        case = case if divided is None else case._replace(divided=divided)
        output = self.root / folder / name
        backbone = self.backbone(case.family, tied=case.tied, **({"num_hidden_layers": 1} if case.little else {}))
        return options(backbone, self.data, output, case, processes, **more)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in each of two processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def options(backbone: str, data: Path, output: Path, case: Case, processes: int, **more: Any) -> list[str]:
    """Options of a case, with the same batch on one process and on two."""
    values: dict[str, Any] = dict(
        use_peft=case.peft,
        mini_batch_size=case.mini and case.mini * 2 // processes,
        max_steps=STEPS,
        save_steps=MIDDLE,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # else a gradient that is nothing but rounding would be a step like any other
        lr_scheduler_type="constant",
        regularizer_warmup_ratio=0.5 if case.paradigm in ("sparse", "hybrid") else None,
        lora_dropout=0 if case.peft else None,  # each process draws its own
        self_distillation=True if case.self_distilled else None,
    )
    if case.little:
        values |= dict(lora_target_modules="q_proj", query_length=8, document_length=8)
    if case.learned:
        values |= dict(learn_thresholds=True, learn_top_k=True, query_max_active_dims=60, document_max_active_dims=90)
    if case.evaluated:
        values |= dict(eval_share=0.3, load_best_model_at_end=True)
    values = tiny_options(backbone, data, output, **(values | more))
    given = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    given += case.divided if processes > 1 else []
    return ["--backbone", "micro", "--paradigm", case.paradigm, "--objective", case.objective, *given]


def adaptation(backbone: str, text: Path, output: Path, peft: bool, divided: list[str] | None = None) -> list[str]:
    """Options of an MNTP stage of blocks of 16 tokens, of two processes if it is said how they divide it."""
    values = dict(
        backbone=backbone,
        texts=text,
        output_dir=output,
        block_size=16,
        eval_blocks=8,
        per_device_train_batch_size=4 if divided is None else 2,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        use_peft=peft,
        lora_dropout=0,
        bf16=False,
        learning_rate=1e-3,
        disable_tqdm=True,
    )
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + (divided or [])


def write_text(path: Path) -> Path:
    """A text to adapt on."""
    path.write_text(
        "".join(f"Lions number {n} rest in place {n * 7 % 13}, and hunt at night {n}.\n" for n in range(99))
    )
    return path


def interrupted(run: Path, copy: Path) -> Path:
    """A copy of a run as it was in its middle."""
    shutil.copytree(run / f"checkpoint-{MIDDLE}", copy / f"checkpoint-{MIDDLE}")
    record = json.loads((run / "training.json").read_text())
    (copy / "training.json").write_text(json.dumps(record | {"finished": False}))
    return copy


def run_pair(trainings: list[Any], file: Path, **environment: str) -> None:
    """Run trainings, one after the other, in two processes; see `sharded_runs`."""
    file.write_text(json.dumps(trainings))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", str(Path(__file__).with_name("sharded_runs.py")), str(file)]
    done = subprocess.run(
        [sys.executable, *launcher], env=os.environ | ENVIRONMENT | environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-40_000:]  # what a process said before another one lost it stands above


def losses(folder: Path, name: str = "loss") -> list[float]:
    """The loss of every step, or what else was logged."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def assert_same_weights(actual: Path, expected: Path) -> None:
    """Compare exported tensors, and what a head has learned, in checkpoints too."""
    for file in (expected / "model.safetensors", *expected.rglob(LEARNED_FILE)):
        found, wanted = load_file(actual / file.relative_to(expected)), load_file(file)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            # What training changes is some hundredths.
            difference = torch.linalg.vector_norm(found[name] - tensor) / torch.linalg.vector_norm(tensor)
            assert difference < 1e-4, name


def assert_same_training(root: Path, case: str, steps: int = STEPS) -> None:
    """Losses, exported tensors and names of files of two processes are those of one."""
    one, two = root / "one" / case, root / "two" / case
    assert len(losses(one)) == steps
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert max(losses(one)) > 1.001 * min(losses(one))
    assert losses(two, "eval_ndcg@10") == pytest.approx(losses(one, "eval_ndcg@10"), rel=1e-4)
    assert_same_weights(two, one)
    assert_same_files(two, one)


def assert_same_adapters(one: Path, other: Path) -> None:
    """Compare losses and tensors to the bit."""
    assert losses(one) == losses(other)
    tensors, others = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def assert_same_files(two: Path, one: Path) -> None:
    """Nothing in a checkpoint says that the weights were sharded."""
    for checkpoint in one.glob("checkpoint-*"):
        names = {path.name for path in checkpoint.iterdir()} - {"rng_state.pth"}
        assert {path.name for path in (two / checkpoint.name).iterdir()} == names | {
            "rng_state_0.pth",
            "rng_state_1.pth",
        }
