"""The sparse head alone: hidden states and an LM head in, one weight per text and term out.

    python benchmarks/sparse_head.py                                        # CPU: 16 texts of 128 tokens, float32
    python benchmarks/sparse_head.py --device cuda                          # 128 texts of MS MARCO's lengths, bfloat16
    python benchmarks/sparse_head.py --device cuda --hidden-size 4096

"matmul" is the product of the real tokens with the LM head and nothing else, whole and in tiles of the vocabulary: the
floor of every forward pass. "eager" masks, rectifies and maximizes padded logits in plain torch; "compiled" is the same
under torch.compile. "stock" is what sentence-transformers runs: the LM head's linear layer as a causal LM applies it,
then its SpladePooling, whole and with chunk_size. All get the same inputs, in which the chosen share of terms is
active, and the gradient of the hidden states (--weight-gradient: of the LM head too). Every side runs in a process of
its own; memory is what the step adds at its peak to inputs and gradients, of the process (CPU) or of the GPU.
"""

import argparse
import ctypes
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, in_process, msmarco_lengths, report
from torch import Tensor

SIDES = ("matmul", "matmul in tiles", "eager", "compiled", "stock", "stock in chunks", "lion_st")
DEFAULTS = {
    "cpu": {"texts": 16, "lengths": "full", "dtype": "float32", "repeats": 3},
    "cuda": {"texts": 128, "lengths": "msmarco", "dtype": "bfloat16", "repeats": 20},
}
CHUNK = 16  # tokens, of stock's chunk_size
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [B, L, D], weight [V, D], mask [B, L] -> [B, V]


def make_inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, LM head and mask, of which `options.active` of the pairs of text and term are positive."""
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator(options.device).manual_seed(0)
    random: dict[str, Any] = {"generator": generator, "device": options.device, "dtype": dtype}
    lengths = np.full(options.texts, options.length)
    if options.lengths == "msmarco":
        lengths = msmarco_lengths(np.random.default_rng(0), options.texts, longest=options.length)
    mask = torch.arange(options.length)[None] >= options.length - torch.tensor(lengths)[:, None]
    mask = mask.long().to(options.device)
    hidden = torch.randn(options.texts, options.length, options.hidden_size, **random)
    weight = torch.randn(options.vocabulary, options.hidden_size, **random).mul_(options.hidden_size**-0.5)
    # One dimension is constant and so shifts all logits alike, which a bias would do, but stock has none.
    hidden[..., 0] = 4
    weight[:, 0] = 0
    sample = (hidden @ weight[:: max(1, options.vocabulary // 1000)].T).float()
    maxima = sample.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    weight[:, 0] = -torch.quantile(maxima.flatten()[:1_000_000], 1 - options.active) / 4
    return hidden, weight, mask


def whole_product(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return hidden[mask.bool()] @ weight.T


def product_in_tiles(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    from lion_st.kernels import blockwise

    tokens = hidden[mask.bool()]
    tile = blockwise.tile_terms(len(tokens), tokens)
    buffer = tokens.new_empty(len(tokens) * tile)
    for offset in range(0, len(weight), tile):
        rows = weight[offset : offset + tile]
        torch.mm(tokens, rows.T, out=buffer[: len(tokens) * len(rows)].view(len(tokens), len(rows)))
    return buffer


def eager(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.masked_fill(mask[..., None] == 0, 0).relu().log1p().amax(1)


def stock(chunk_size: int | None, training: bool) -> Head:
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    pooling = SpladePooling("max", chunk_size=chunk_size).train(training)

    def head(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return pooling({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"]

    return head


def make_head(side: str, training: bool) -> Head:
    if side.startswith("stock"):
        return stock(CHUNK if side == "stock in chunks" else None, training)
    if side == "lion_st":
        from lion_st.kernels import splade_pool

        return lambda hidden, weight, mask: splade_pool(hidden, weight, mask, scale=1.0)
    heads: dict[str, Head] = {"matmul": whole_product, "matmul in tiles": product_in_tiles, "eager": eager}
    return torch.compile(eager) if side == "compiled" else heads[side]


class Memory:
    """Peak of the memory in use since the start, in MiB."""

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed goes back to the system, to be counted again
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
            self.before = self._status("VmRSS")

    def added(self) -> float:
        """What came on top at the peak."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else self._status("VmHWM")
        return peak - self.before

    @staticmethod
    def _status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def measure(step: Callable[[], Any], device: str, repeats: int) -> tuple[float, float]:
    """Median milliseconds of a step after one to warm up, and the MiB that it adds at its peak."""
    step()  # what compiling and tuning needed once does not count
    memory = Memory(device)
    if device == "cuda":
        torch.cuda.synchronize()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        times = [before.elapsed_time(after) for before, after in itertools.pairwise(marks)]
    else:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            step()
            times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times)), memory.added()


def run_side(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side; called in a process of its own."""
    hidden, weight, mask = make_inputs(options)
    head = make_head(side, training=False)
    with torch.no_grad():
        milliseconds, added = measure(lambda: head(hidden, weight, mask), options.device, options.repeats)
        figures: dict[str, Any] = {"forward ms": milliseconds, "forward MiB": added}
        if side.startswith("matmul"):
            operations = 2 * int(mask.sum()) * options.hidden_size * options.vocabulary
            return figures | {"TFLOP/s": operations / milliseconds / 1e9}
        values = head(hidden, weight, mask)
    figures["active %"] = 100 * float((values > 0).float().mean())
    upstream = torch.randn(values.shape, device=options.device, dtype=values.dtype)
    del values
    hidden.requires_grad_()
    weight.requires_grad_(options.weight_gradient)
    trained = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    for tensor in trained:
        tensor.grad = torch.zeros_like(tensor)
    training_head = make_head(side, training=True)

    def step() -> None:
        gradients = torch.autograd.grad(training_head(hidden, weight, mask), trained, upstream)
        for tensor, gradient in zip(trained, gradients, strict=True):
            tensor.grad = gradient

    milliseconds, added = measure(step, options.device, options.repeats)
    return figures | {"forward+backward ms": milliseconds, "forward+backward MiB": added}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--texts", type=int, help="16 on a CPU, else 128")
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest text")
    parser.add_argument("--lengths", choices=["full", "msmarco"], help="full on a CPU, else msmarco: 75 in the median")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--active", type=float, default=0.01, help="share of the terms of a text that are active")
    parser.add_argument("--weight-gradient", action="store_true")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Beside each forward pass the best floor, and beside each step how much faster lion_st's is."""
    floors = [row["forward ms"] for row in rows if row["side"].startswith("matmul") and "forward ms" in row]
    ours = next((row for row in rows if row["side"] == "lion_st"), {})
    for row in rows:
        if floors and "forward ms" in row:
            row["forward / matmul"] = row["forward ms"] / min(floors)
        for what in ("forward+backward ms", "forward+backward MiB"):
            if what in row and ours.get(what, 0) > 0:
                row[f"{what.removesuffix(' MiB').removesuffix(' ms')} {what[-3:].strip()} / lion_st"] = (
                    row[what] / ours[what]
                )


def main() -> None:
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.side:
        print(json.dumps(run_side(options.side, options)))
        return

    rows: list[dict[str, Any]] = []
    for side in options.sides:
        rows.append(
            {"side": side, **(in_process(__file__, [*arguments, "--side", side]) or {"failed": "out of memory"})}
        )
        print(f"{side}: done", flush=True)
    add_ratios(rows)
    shape = f"{options.texts} texts, {options.lengths} lengths to {options.length}, D {options.hidden_size}"
    trained = ", the LM head trains" if options.weight_gradient else ""
    title = f"{shape}, V {options.vocabulary:,}, {options.dtype}{trained}"
    name = f"sparse_head-{options.device}-{options.dtype}-{options.hidden_size}"
    name += "-weight-gradient" * options.weight_gradient
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "side", "sides")}
    report(options.output, name, title, rows, settings, options.device)


if __name__ == "__main__":
    main()
