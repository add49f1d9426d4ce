"""One optimizer step of the paper's CL+KD setting: lion_st beside the same model in stock sentence-transformers.

    python benchmarks/training_step.py                        # CPU: the 1B setting with a smaller backbone
    python benchmarks/training_step.py --device cuda          # Llama-3.2-1B's shape, random weights, bfloat16

A query, its positive and 16 negatives make a row; token counts follow MS MARCO's (queries of about 9 tokens, passages
of about 75, cut at 64 and 128). Both sides train LoRA r16 on the same weights. lion_st computes the joint objective;
stock has no such loss and computes its contrastive half alone (SpladeLoss of SparseMultipleNegativesRankingLoss), which
is less work. Every measurement runs in a process of its own: tokens/s over real tokens, and the peak of the process
(CPU) or of the GPU. "largest batch" is the largest power of two of rows whose step fits into --memory-gib; a side that
fits fewer rows than --rows is timed with as many as fit. Gradient caching fits any number of rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, in_process, msmarco_lengths, report, word_tokenizer

SHAPES = {
    "cuda": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                 num_key_value_heads=8, head_dim=64),
    "cpu": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=64),
}  # fmt: skip


def make_models(folder: Path, device: str, vocabulary: int) -> None:
    """Save a random backbone, and the stock checkpoint of the same retriever."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lion_st

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[device], vocab_size=vocabulary, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "backbone")
    word_tokenizer(vocabulary).save_pretrained(folder / "backbone")
    model = lion_st.build(folder / "backbone", "sparse", device=device)
    lion_st.export(model, folder / "stock", model_type="SparseEncoder", verify=False)


def make_columns(rows: int, negatives: int, vocabulary: int, device: str) -> tuple[list[dict[str, Any]], int]:
    """Token columns of a batch, padded on the left, and how many tokens are real."""
    rng = np.random.default_rng(0)
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

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    if side.startswith("lion_st"):
        model: Any = lion_st.build(
            folder / "backbone", "sparse", lora=lora, as_sparse_encoder=True, device=options.device
        )
        inner: Any = lion_st.ContrastiveDistillationLoss(model)
        regularizers = {f"{kind}_regularizer": lion_st.FlopsRegularizer(model) for kind in ("query", "document")}
    else:
        model = SparseEncoder(str(folder / "stock"), device=options.device)
        model.add_adapter(lora)
        inner = SparseMultipleNegativesRankingLoss(model)
        regularizers = {}
    cached = {"mini_batch_size": options.mini_batch_size} if side.endswith("cached") else {}
    loss: Any = (CachedSpladeLoss if cached else SpladeLoss)(
        model, inner, query_regularizer_weight=0.05, document_regularizer_weight=0.04, **regularizers, **cached
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step(columns: list[dict[str, Any]], labels: torch.Tensor) -> float:
        terms = loss([dict(column) for column in columns], labels)
        total = sum(terms.values()) if isinstance(terms, dict) else terms
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return step


def run_side(side: str, rows: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time steps of one side; called in a process of its own."""
    on_gpu = options.device == "cuda"
    torch.manual_seed(0)
    step = make_step(side, folder, options)
    columns, real = make_columns(rows, options.negatives, options.vocabulary, options.device)
    labels = torch.randn(rows, 1 + options.negatives, device=options.device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if on_gpu:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, options.memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.memory_gib * 2**30),) * 2)
    times = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        step(columns, labels)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else resource.getrusage(0).ru_maxrss / 2**20
    seconds = float(np.median(times[1:]))
    return {"seconds/step": seconds, "tokens/s": real / seconds, "step's memory GiB": peak - before, "peak GiB": peak}


def largest_batch(side: str, arguments: list[str]) -> int:
    """The largest power of two of rows whose step fits into memory."""
    rows = 1
    while rows <= 4096 and in_process(__file__, [*arguments, "--side", side, "--rows", str(rows), "--steps", "1"]):
        print(f"{side}: {rows} rows fit", flush=True)
        rows *= 2
    return rows // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--rows", type=int, help="queries a step (default: 2 on a CPU, 16 on a GPU)")
    parser.add_argument("--negatives", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--mini-batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--memory-gib", type=float, help="default: 8 on a CPU, all of a GPU's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.rows = options.rows or (16 if on_gpu else 2)
    options.memory_gib = options.memory_gib or (
        torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 8.0
    )
    if options.side:
        print(json.dumps(run_side(options.side, options.rows, options.folder, options)))
        return

    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name), options.device, options.vocabulary)
        arguments = [
            "--device", options.device, "--negatives", str(options.negatives), "--vocabulary", str(options.vocabulary),
            "--mini-batch-size", str(options.mini_batch_size), "--memory-gib", str(options.memory_gib),
            "--folder", name,
        ]  # fmt: skip
        rows = []
        for side in ("lion_st", "stock", "lion_st cached", "stock cached"):
            most = largest_batch(side, arguments) if not side.endswith("cached") else None
            count = options.rows if most is None else min(options.rows, most)
            timed = [*arguments, "--side", side, "--rows", str(count), "--steps", str(options.steps)]
            figures = in_process(__file__, timed) if count else None
            rows.append({"side": side, "rows": count, **(figures or {}), "largest batch": most})
            print(f"{side}: done", flush=True)
    shape = SHAPES[options.device]
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "side", "folder")}
    settings["shape"] = shape
    title = f"vocabulary {options.vocabulary:,}, {shape}"
    report(options.output, f"training_step-{options.device}", title, rows, settings, options.device)


if __name__ == "__main__":
    main()
