"""What the benchmarks share: the machine's name, inputs, sides in processes of their own, reports."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results"


def machine_name(device: str = "cpu") -> str:
    """The GPU, or the processor and its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token for each of the words w3, w4, ... up to the vocabulary's size, and a first token before every text."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def msmarco_lengths(rng: np.random.Generator, count: int, median: int = 75, longest: int = 128) -> np.ndarray:
    """Token counts as MS MARCO's: passages of about 75 tokens, queries of about 9, cut at the longest."""
    return np.clip(rng.lognormal(np.log(median), 0.4, count).astype(int), 3, longest)


def in_process(script: str, arguments: list[str]) -> dict[str, Any] | None:
    """The figures that a script prints last in a process of its own; None if it ran out of memory."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    signs = ("out of memory", "DefaultCPUAllocator", "MemoryError", "Cannot allocate memory", "bad_alloc")
    if done.returncode < 0 or any(sign in done.stderr for sign in signs):
        return None
    raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def report(
    folder: Path, name: str, title: str, rows: list[dict[str, Any]], settings: dict[str, Any], device: str = "cpu"
) -> None:
    """Print the table below its title, and write it with the machine and the settings to `folder/name.json`."""
    from lion_st.evaluation import format_table

    machine = machine_name(device)
    print(f"\n{title}, {machine}\n\n{format_table(rows)}\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"machine": machine, "torch": torch.__version__, "settings": settings, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(contents, indent=1, default=str) + "\n")
