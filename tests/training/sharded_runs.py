"""Runs several trainings in one process after the other, for torchrun: `sharded_runs.py CASES.json`.

CASES.json is a list of [stage, options]: "train" or "adapt" with the options of that command, or "head" with the file
to write, see `head_gradients`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lion_st.kernels import splade_pool
from lion_st.training.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.mntp import adapt_mntp
from lion_st.training.retriever import train_retriever


def run(stage: str, options: list[str]) -> None:
    """One training, as if no other had been in this process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    if stage == "train":
        train_retriever(*parse_retriever_arguments(options))
    elif stage == "adapt":
        adapt_mntp(*parse_mntp_arguments(options))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for stage, options in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(stage, options)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the other process waits in a collective
