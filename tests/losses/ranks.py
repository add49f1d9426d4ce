"""Runs a function in several gloo processes and returns what each of them returned."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import FORKSERVER


def _process(rank: int, world_size: int, folder: str, job: Callable[..., Any], arguments: tuple) -> None:
    # What torchrun sets, which trainers read; the file store below needs no port.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(job(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `job(*arguments)` by rank; `job` must be a module's function."""
    with TemporaryDirectory() as folder:
        ranks = (world_size, folder, job, arguments)
        mp.start_processes(_process, args=ranks, nprocs=world_size, start_method=FORKSERVER.get_start_method())
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]
