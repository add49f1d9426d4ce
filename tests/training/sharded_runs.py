"""Runs several trainings in one process after the other, for torchrun: `sharded_runs.py CASES.json`.

CASES.json is a list of [stage, options]: "train" or "adapt" with the options of that command, "head" with the file to
write, see `head_gradients`, or "memory" with that and the options of a training, see `peak_bytes`.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from lion_st.kernels import splade_pool
from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.retriever import (
    build_trainer,
    load_training_tuples,
    resolve_batches,
    step_memory,
    train_retriever,
)
from lion_st.training.runs import end_program
from lion_st.training.sharding import build_device, reading_for_shards
from lion_st.training.starting import build_model


def run(stage: str, options: list[str]) -> None:
    """One training, as if no other had been in this process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    counters.clear()
    if stage == "train":
        train_retriever(*parse_retriever_arguments(options))
        assert bool(counters["stats"]["unique_graphs"]) == ("--torch_compile_backend" in options)
    elif stage == "adapt":
        adapt_mntp(*parse_mntp_arguments(options))
    elif stage == "memory":
        peak_bytes(*options)
    else:
        head_gradients(*options)


def head_gradients(file: str) -> None:
    """Save the gradient of an LM head that is sharded and read without its module being called, and the mean one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    hidden = torch.randn(dist.get_world_size(), 2, 5, 8, generator=generator)
    head = nn.Linear(8, 50, bias=False)
    head.weight.data = weight.clone()
    fully_shard(head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    splade_pool(hidden[dist.get_rank()], head.weight, scale=1.0).sum().backward()
    actual = head.weight.grad.full_tensor()
    weight.requires_grad_(True)
    (sum(splade_pool(part, weight, scale=1.0).sum() for part in hidden) / len(hidden)).backward()
    if dist.get_rank() == 0:
        torch.save([actual, weight.grad], file)


def peak_bytes(file: str, *options: str) -> None:
    """Save what the first process holds at the peak of a training's step, and of what, and what a dry run says of it.

    Saved is also what it keeps of weights and optimizer where they are sharded, and what each process takes to build
    the model.
    """
    arguments, training = parse_retriever_arguments(options)
    training = resolve_batches(arguments, training)
    gc.collect()
    before = memory("VmRSS:")
    begin_peak()
    with reading_for_shards(training):
        model = build_model(arguments, build_device(training))
    read: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(read, memory("VmHWM:") - before)
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 0))
    trainer.add_callback(peak := PeakOfLastStep())
    trainer.train()
    states = [value for slots in trainer.optimizer.state.values() for value in slots.values()]
    kept = {
        name: sum(tensor.to_local().nbytes for tensor in tensors if isinstance(tensor, DTensor))
        for name, tensors in (("weights", model.parameters()), ("optimizer", states))
    }
    if dist.get_rank() == 0:
        estimated = step_memory(arguments, training, trainer.cost, dist.get_world_size())
        found = {"peak": peak.bytes - before, "kept": kept, "estimated": estimated, "read": read}
        Path(file).write_text(json.dumps(found))


class PeakOfLastStep(TrainerCallback):
    """Memory of this process at its highest in the last step."""

    bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bytes = memory("VmHWM:")


def begin_peak() -> None:
    """Count this process's peak of memory from now on."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    """Bytes of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for stage, options in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(stage, options)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the other process waits in a collective
    end_program("all are trained")
    assert not dist.is_initialized()
