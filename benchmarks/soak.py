"""Kill a training at random, also while it writes a checkpoint, start it again, and compare its result to the bit.

    make soak
    python benchmarks/soak.py --kills 30 --processes 2

A small retriever is trained with dropout, a LoRA adapter, a FLOPS ramp, negatives that change with the epoch and an
evaluation at every checkpoint: once without interruption, and once with SIGKILL, in turn at any moment and while a
checkpoint is being written, of one process or of several at once. Both have to end with the same weights, bit for bit,
the same number of operations and no file too many. Training processes are forked from one that has imported all.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT_FOR_A_CHECKPOINT = 600.0  # seconds
Options = dict[str, Any]


def train(options: Options, rank: int = 0, processes: int = 1, meeting: str = "") -> None:
    """One process of a training; its output goes into a log beside the run."""
    import torch

    log = os.open(f"{options['output_dir']}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "lo"}
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    from lion_st.training import get_recipe, retriever_arguments, train_retriever

    options = dict(options)
    recipe = get_recipe("micro", options.pop("paradigm"), options.pop("objective"))
    train_retriever(*retriever_arguments(recipe, **options))


class Runner:
    """Starts trainings as processes that are forked from one which has imported what they need."""

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["lion_st.training.retriever", "lion_st.training.evaluation", "datasets"])
        first = self.context.Process(target=int)  # waits for the imports
        first.start()
        first.join()

    def start(self, options: Options) -> list[Any]:
        """Start a training."""
        meeting = tempfile.mktemp(prefix="soak-")
        started = [
            self.context.Process(target=train, args=(options, rank, self.processes, meeting))
            for rank in range(self.processes)
        ]
        for process in started:
            process.start()
        return started

    @staticmethod
    def kill(processes: list[Any]) -> None:
        """Kill all processes of a training, the last one first."""
        for process in reversed(processes):
            process.kill()
        for process in processes:
            process.join()

    def finish(self, processes: list[Any], options: Options) -> None:
        """Wait for the end of a training.

        Raises:
            RuntimeError: If it fails; with the end of its log.
        """
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            log = Path(f"{options['output_dir']}.log").read_text(errors="replace")
            raise RuntimeError(f"The training ended with {codes}:\n{log[-3000:]}")


def at_any_moment(seconds: float, processes: list[Any], output: Path, chance: random.Random) -> None:
    """Wait for up to the time that the whole run takes."""
    deadline = time.monotonic() + chance.uniform(0, seconds)
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        time.sleep(0.01)


def while_it_writes(seconds: float, processes: list[Any], output: Path, chance: random.Random) -> None:
    """Wait until a checkpoint is begun, and up to a few hundredths of a second more."""
    deadline = time.monotonic() + WAIT_FOR_A_CHECKPOINT
    while time.monotonic() < deadline and any(process.is_alive() for process in processes):
        if any(output.glob("checkpoint-*/.unsealed")):
            time.sleep(chance.uniform(0, 0.05))
            return
        time.sleep(0.001)


MOMENTS: tuple[Callable[..., None], ...] = (while_it_writes, at_any_moment)


def differences(whole: Path, killed: Path) -> list[str]:
    """In what a run that was killed differs from one that was not."""
    import torch
    from safetensors.torch import load_file

    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    found = [f"weights {name}" for name in one if name not in other or not torch.equal(one[name], other[name])]
    records = [json.loads((folder / "training.json").read_text()) for folder in (whole, killed)]
    found += [name for name in ("steps", "floating_point_operations") if records[0][name] != records[1][name]]
    files = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"}
        for folder in (whole, killed)
    ]
    return found + sorted(files[0] ^ files[1])


def soak(runner: Runner, options: Options, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Train once without and then with kills, and say in what the results differ.

    Args:
        runner: Starts the processes.
        options: Of `retriever_arguments`, with `paradigm` and `objective`.
        folder: Where all runs are written.
        kills: How many times to kill; a run that ends before is compared, and another one begun.
        seed: Of the moments.
    """
    chance = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    alone, victim = (options | {"output_dir": str(output)} for output in (whole, killed))
    begin = time.monotonic()
    runner.finish(runner.start(alone), alone)
    seconds = time.monotonic() - begin
    moments = dict.fromkeys((moment.__name__ for moment in MOMENTS), 0)
    found: list[str] = []
    cut_off = runs = 0
    is_over = False
    while not is_over:
        is_over = sum(moments.values()) == kills
        processes = runner.start(victim)
        if not is_over:
            wait = MOMENTS[sum(moments.values()) % len(MOMENTS)]
            wait(seconds, processes, killed, chance)
            if any(process.is_alive() for process in processes):
                runner.kill(processes)
                moments[wait.__name__] += 1
                cut_off += any(killed.glob("checkpoint-*/.unsealed"))
                continue
        runner.finish(processes, victim)
        found += differences(whole, killed)
        runs += 1
        shutil.rmtree(killed)
    return {
        "kills": moments,
        "cut_off_checkpoints": cut_off,
        "runs": runs,
        "seconds_of_a_run": round(seconds, 1),
        "differences": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    from lion_st.data import quickstart_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: Options = {
            "paradigm": "sparse",
            "objective": "cl_kd",
            "model": str(ROOT / "hub_uploads" / "models" / "lion-micro-base"),
            "train_data": str(quickstart_data()),
            "train_split": "train[:60]",
            "eval_share": 0.05,
            "num_layers": 2,
            "query_length": 8,
            "document_length": 16,
            "use_peft": True,
            "lora_dropout": 0.1,
            "negatives": 2,
            "batch_size": 4,
            "mini_batch_size": 4,
            "max_steps": 20,  # an epoch has about 13
            "save_steps": 2,
            "logging_steps": 2,
            "bf16": False,
            "disable_tqdm": True,
        }
        result = soak(Runner(chosen.processes), options, folder, chosen.kills, chosen.seed)
    print(json.dumps(result, indent=2))
    if result["differences"]:
        sys.exit("The killed training did not end as the other did.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
