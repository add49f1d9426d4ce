"""One optimizer step of the paper's CL+KD setting: lion_st beside the same model in stock sentence-transformers.

    python benchmarks/training_step.py                        # CPU: the 1B setting with a smaller backbone
    python benchmarks/training_step.py --device cuda          # Llama-3.2-1B's shape, random weights, bfloat16

A query, its positive and 16 negatives make a row; token counts follow MS MARCO's (queries of about 9 tokens, passages
of about 75, cut at 64 and 128). Both sides train LoRA r16 on the same weights. lion_st computes the joint objective;
stock has no such loss and computes its contrastive half alone (SpladeLoss of SparseMultipleNegativesRankingLoss), which
is less work. Every measurement runs in a process of its own: tokens/s over real tokens, and the peak of the process
(CPU) or of the GPU. "largest batch" is the largest power of two of rows whose step fits into --memory-gib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

QUERY_LENGTH, DOCUMENT_LENGTH = 64, 128
SHAPES = {
    "cuda": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                 num_key_value_heads=8, head_dim=64),
    "cpu": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=64),
}  # fmt: skip


def make_models(folder: Path, device: str, vocabulary: int) -> None:
    """Save a random backbone, and the stock checkpoint of the same retriever."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import lion_st

    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[device], vocab_size=vocabulary, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "backbone")
    fast.save_pretrained(folder / "backbone")
    model = lion_st.build(folder / "backbone", "sparse", device=device)
    lion_st.export(model, folder / "stock", model_type="SparseEncoder", verify=False)


def make_columns(rows: int, negatives: int, vocabulary: int, device: str) -> tuple[list[dict[str, Any]], int]:
    """Token columns of a batch, padded on the left, and how many tokens are real."""
    rng = np.random.default_rng(0)
    columns, real = [], 0
    for column in range(2 + negatives):
        mean, limit = (9, QUERY_LENGTH) if column == 0 else (75, DOCUMENT_LENGTH)
        lengths = np.clip(rng.lognormal(np.log(mean), 0.4, rows).astype(int), 3, limit)
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


def in_process(side: str, rows: int, folder: Path, arguments: list[str]) -> dict[str, Any] | None:
    """Figures of one side, None if its step did not fit into memory."""
    command = [sys.executable, __file__, *arguments, "--side", side, "--folder", str(folder), "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    short_of_memory = ("out of memory", "DefaultCPUAllocator", "MemoryError", "Cannot allocate memory", "bad_alloc")
    if done.returncode < 0 or any(sign in done.stderr for sign in short_of_memory):
        return None
    raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")


def largest_batch(side: str, folder: Path, arguments: list[str]) -> int:
    """The largest power of two of rows whose step fits into memory."""
    rows = 1
    while rows <= 4096 and in_process(side, rows, folder, [*arguments, "--steps", "1"]) is not None:
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
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
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

    from lion_st.evaluation import format_table

    arguments = [
        "--device", options.device, "--negatives", str(options.negatives), "--vocabulary", str(options.vocabulary),
        "--mini-batch-size", str(options.mini_batch_size), "--memory-gib", str(options.memory_gib),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, options.device, options.vocabulary)
        rows = []
        for side in ("lion_st", "stock", "lion_st cached", "stock cached"):
            figures = in_process(side, options.rows, folder, [*arguments, "--steps", str(options.steps)])
            print(f"{side}: done", flush=True)
            rows.append({"side": side, "rows": options.rows, **(figures or {"tokens/s": None})})
        for row in rows[:2]:
            row["largest batch"] = largest_batch(str(row["side"]), folder, arguments)
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"\nvocabulary {options.vocabulary:,}, {SHAPES[options.device]}, {machine}\n\n{format_table(rows)}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "options": vars(options), "shape": SHAPES[options.device], "rows": rows}
    file = options.output / f"training_step-{options.device}.json"
    file.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
