"""One optimizer step of the paper's CL+KD setting: lion_st beside the same model in stock sentence-transformers.

    python benchmarks/training_step.py                        # CPU: the 1B setting with a smaller backbone
    python benchmarks/training_step.py --device cuda          # Llama-3.2-1B's shape, random weights, bfloat16
    python benchmarks/training_step.py --sides lion_st "lion_st compiled" "lion_st padded"   # what speeds it up

A query, its positive and 16 negatives make a row; token counts follow MS MARCO's (queries of about 9 tokens, passages
of about 75, cut at 64 and 128). Both sides train LoRA r16 on the same weights. lion_st computes the joint objective;
stock has no such loss and computes its contrastive half alone (SpladeLoss of SparseMultipleNegativesRankingLoss), which
is less work. Every measurement runs in a process of its own: tokens/s over real tokens, and the peak of the process
(CPU) or of the GPU. "largest batch" is the largest power of two of rows whose step fits into --memory-gib; a side that
fits fewer rows than --rows is timed with as many as fit. Gradient caching fits any number of rows.

Switches stand behind the side's name, any of them together: cached (gradient caching), recomputed (activations),
compiled (torch.compile of the decoder layers), liger (its kernels in them), 4bit (QLoRA), padded (texts padded to the
longest one, as stock does, not packed).
"first step s" holds what is compiled and tuned once; every step has other lengths of text than the one before.
"""

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, SHAPES, in_process, make_models, msmarco_lengths, peak_mib, report

SIDES = ("lion_st", "stock", "lion_st cached", "stock cached")
SWITCHES = {
    "lion_st": ("cached", "recomputed", "compiled", "liger", "4bit", "padded"),
    "stock": ("cached", "recomputed"),
}
MOST_ROWS = 4096


def side_name(text: str) -> str:
    """A side with its switches, checked."""
    name, *switches = text.split()
    if name not in SWITCHES or not set(switches) <= set(SWITCHES[name]):
        known = ", ".join(f"{side} [{' '.join(given)}]" for side, given in SWITCHES.items())
        raise argparse.ArgumentTypeError(f"{text!r} is not a side: {known}")
    return text


def make_columns(
    rows: int, negatives: int, vocabulary: int, device: str, seed: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """Token columns of a batch, padded on the left, and how many tokens are real."""
    rng = np.random.default_rng(seed)
    columns, real = [], 0
    for column in range(2 + negatives):
        lengths = msmarco_lengths(rng, rows) if column else msmarco_lengths(rng, rows, median=9, longest=64)
        width = int(lengths.max())
        mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
        ids = torch.tensor(rng.integers(3, vocabulary, (rows, width))) * mask + 1 * ~mask
        columns.append({"input_ids": ids.to(device), "attention_mask": mask.long().to(device)})
        real += int(lengths.sum())
    return columns, real


def make_step(side: str, folder: Path, options: argparse.Namespace) -> Any:
    """A function that takes columns and labels and makes one optimizer step."""
    from peft import LoraConfig
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.losses import (
        CachedSpladeLoss,
        SparseMultipleNegativesRankingLoss,
        SpladeLoss,
    )

    import lion_st
    from lion_st.modules.compilation import compile_layers
    from lion_st.modules.liger import liger_kernels

    name, *switches = side.split()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=options.lora_dropout, target_modules=targets)
    if name == "lion_st":
        model: Any = lion_st.build(
            folder / "backbone", "sparse", lora=lora, as_sparse_encoder=True, device=options.device,
            load_in_4bit="4bit" in switches,
        )  # fmt: skip
        inner: Any = lion_st.ContrastiveDistillationLoss(model)
        regularizers = {f"{kind}_regularizer": lion_st.FlopsRegularizer(model) for kind in ("query", "document")}
        if "padded" in switches:
            model[0].runs_packed = False
            model[0].model.set_attn_implementation("sdpa")
    else:
        model = SparseEncoder(str(folder / "stock"), device=options.device)
        model.add_adapter(lora)
        inner = SparseMultipleNegativesRankingLoss(model)
        regularizers = {}
    cached = {"mini_batch_size": options.mini_batch_size} if "cached" in switches else {}
    loss: Any = (CachedSpladeLoss if cached else SpladeLoss)(
        model, inner, query_regularizer_weight=0.05, document_regularizer_weight=0.04, **regularizers, **cached
    )
    if "recomputed" in switches:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "compiled" in switches:
        compile_layers(model[0].model)
    if "liger" in switches:
        ExitStack().enter_context(liger_kernels(model[0].model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(columns: list[dict[str, Any]], labels: torch.Tensor) -> float:
        terms = loss([dict(column) for column in columns], labels)
        total = sum(terms.values()) if isinstance(terms, dict) else terms
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total.detach())

    return step


def time_steps(step: Any, rows: int, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of some steps after one to warm up, their median time, and memory at the peak."""
    on_gpu = options.device == "cuda"
    labels = torch.randn(rows, 1 + options.negatives, device=options.device)
    before = peak_mib() / 2**10
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    times, tokens = [], []
    for number in range(steps + 1):
        columns, real = make_columns(rows, options.negatives, options.vocabulary, options.device, seed=number)
        tokens.append(real)
        began = time.perf_counter()
        step(columns, labels)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_mib() / 2**10
    return {
        "seconds/step": float(np.median(times[1:])),
        "tokens/s": float(np.median(np.divide(tokens, times)[1:])),
        "first step s": times[0],
        "step's memory GiB": peak - before,
        "peak GiB": peak,
    }


def run_side(side: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of one side as they come; called in a process of its own.

    A CPU's process is ended by the limit of memory. On a GPU the number of rows is halved until they fit, and then
    doubled as long as they do.
    """
    torch.manual_seed(0)
    step = make_step(side, folder, options)
    if options.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory_gib * 2**30),) * 2)
        yield {"rows": options.rows, **time_steps(step, options.rows, options.steps, options)}
        return
    torch.cuda.set_per_process_memory_fraction(
        min(1.0, options.memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    )
    rows, figures = options.rows, fitting(step, options.rows, options.steps, options)
    while figures is None and rows > 1:
        rows //= 2
        figures = fitting(step, rows, options.steps, options)
    if figures is None:
        yield {"rows": 0, "failed": "out of memory"}
        return
    yield {"rows": rows, **figures}
    most = rows
    while options.largest_batch and "cached" not in side and most < MOST_ROWS:
        yield {"rows": rows, **figures, "largest batch": most}
        if rows < options.rows or fitting(step, 2 * most, 1, options) is None:
            return
        most *= 2


def fitting(step: Any, rows: int, steps: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Figures of steps on a GPU; None if they do not fit into its memory."""
    try:
        return time_steps(step, rows, steps, options)
    except torch.cuda.OutOfMemoryError:
        pass  # the error holds on to the step's tensors until here
    gc.collect()
    torch.cuda.empty_cache()
    return None


def largest_batch(side: str, arguments: list[str], seconds: float) -> int:
    """The largest power of two of rows whose step fits into a CPU's memory."""
    rows = 1
    while rows <= MOST_ROWS:
        figures = in_process(__file__, [*arguments, "--side", side, "--rows", str(rows), "--steps", "1"], seconds)
        if not figures or "stopped" in figures:
            break
        print(f"{side}: {rows} rows fit", flush=True)
        rows *= 2
    return rows // 2


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), help="small on a CPU, else Llama-3.2-1B")
    parser.add_argument("--active-terms", type=int, help="of a text, about (default: half of the vocabulary)")
    parser.add_argument("--rows", type=int, help="queries a step (default: 2 on a CPU, 16 on a GPU)")
    parser.add_argument("--negatives", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--mini-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, help="default: 8 on a CPU, all of a GPU's")
    parser.add_argument("--lora-dropout", type=float, default=0.05)
    parser.add_argument(
        "--sides", nargs="+", type=side_name, default=list(SIDES), help="such as lion_st 'lion_st compiled cached'"
    )
    parser.add_argument("--no-largest-batch", dest="largest_batch", action="store_false", help="time --rows alone")
    parser.add_argument("--seconds", type=float, default=600, help="limit of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", type=side_name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.shape = options.shape or ("Llama-3.2-1B" if on_gpu else "small")
    options.rows = options.rows or (16 if on_gpu else 2)
    options.memory_gib = options.memory_gib or (
        torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 8.0
    )
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.side:
        for figures in run_side(options.side, options.folder, options):
            print(json.dumps(figures), flush=True)
        return

    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name), options.shape, options.vocabulary, options.active_terms, options.device, options.dtype)
        arguments = [
            "--device", options.device, "--negatives", str(options.negatives), "--vocabulary", str(options.vocabulary),
            "--mini-batch-size", str(options.mini_batch_size), "--memory-gib", str(options.memory_gib),
            "--lora-dropout", str(options.lora_dropout), "--folder", name,
            *([] if options.largest_batch else ["--no-largest-batch"]),
        ]  # fmt: skip
        for side in options.sides:
            timed = [*arguments, "--side", side, "--steps", str(options.steps)]
            most = None
            if options.device == "cpu" and options.largest_batch and "cached" not in side:
                most = largest_batch(side, arguments, options.seconds)
            count = options.rows if most is None else min(options.rows, most)
            figures = in_process(__file__, [*timed, "--rows", str(count)], options.seconds) if count else None
            rows.append({"side": side, "rows": count, **(figures or {}), **({"largest batch": most} if most else {})})
            print(f"{side}: done", flush=True)
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "side", "folder")}
    settings |= SHAPES[options.shape]
    title = f"vocabulary {options.vocabulary:,}, {options.shape}, {options.dtype}"
    report(options.output, f"training_step-{options.device}", title, rows, settings, options.device)


if __name__ == "__main__":
    main()
