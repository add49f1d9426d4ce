"""What the benchmarks share: the machine's name, models and inputs, sides in processes of their own, reports."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "Llama-3.2-1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64),
    "small": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=64),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16),
}  # fmt: skip
OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "MemoryError", "Cannot allocate memory", "bad_alloc")


def machine_name(device: str = "cpu") -> str:
    """The GPU, or the processor and its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def peak_mib() -> float:
    """Largest resident memory of this process since it began, in MiB (what getrusage says includes its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token for each of the words w3, w4, ... up to the vocabulary's size, and a first token before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def msmarco_lengths(rng: np.random.Generator, count: int, median: int = 75, longest: int = 128) -> np.ndarray:
    """Token counts as MS MARCO's: passages of about 75 tokens, queries of about 9, cut at the longest."""
    return np.clip(rng.lognormal(np.log(median), 0.4, count).astype(int), 3, longest)


def random_texts(count: int, vocabulary: int, median: int = 75) -> Iterator[str]:
    """Texts of random words of `word_tokenizer`, as long as MS MARCO's passages."""
    rng = np.random.default_rng(0)
    for length in msmarco_lengths(rng, count, median):
        yield " ".join(f"w{number}" for number in rng.integers(3, vocabulary, length - 1))


def make_models(
    folder: Path,
    shape: str,
    vocabulary: int,
    active_dims: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> float:
    """Save a random Llama as `folder/backbone`, and the stock checkpoint of the same sparse encoder as `folder/stock`.

    Args:
        folder: Where to.
        shape: One of `SHAPES`.
        vocabulary: Number of terms.
        active_dims: How many terms of a text are above zero, about, as in a trained retriever; else about half are.
        device: Where the model is made and checked.
        dtype: Of the weights.

    Returns:
        How far stock vectors are from lion_st's, as a share of their norm.

    Raises:
        SystemExit: If stock sentence-transformers computes other vectors from its checkpoint than lion_st does.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    import lion_st

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], vocab_size=vocabulary, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = word_tokenizer(vocabulary)
    with torch.device(device):
        backbone = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if active_dims is not None:
        _make_sparse(backbone, tokenizer, vocabulary, active_dims)
    backbone.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    del backbone
    model = lion_st.build(
        folder / "backbone", "sparse", scale=1.0, document_length=128, as_sparse_encoder=True, device=device
    )
    # Verified below instead, on texts of words that its tokenizer knows.
    lion_st.export(model, folder / "stock", model_type="SparseEncoder", verify=False, create_model_card=False)
    return _compare_vectors(model, folder / "stock", list(random_texts(8, vocabulary)))


@torch.no_grad()
def _make_sparse(backbone: Any, tokenizer: PreTrainedTokenizerFast, vocabulary: int, active_dims: int) -> None:
    """Give random weights a trained retriever's sparsity.

    The first hidden dimension is 1 in every token, no layer adds to it, and the final norm gives it the factor by which
    it lowers all logits.
    """
    decoder, head = backbone.model, backbone.lm_head.weight
    head[:, 0] = 1.0  # the embeddings too, which are the same tensor
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    shifts, maxima = [], []
    for text in random_texts(8, vocabulary):
        states = decoder(**tokenizer(text, return_tensors="pt").to(head.device)).last_hidden_state[0].float()
        shifts.append(states[:, 0].mean())
        states[:, 0] = 0.0
        maxima.append((states @ head.float().T).amax(0))
    floor = torch.stack(maxima).kthvalue(vocabulary - active_dims, dim=1).values.mean()
    decoder.norm.weight[0] *= -floor / torch.stack(shifts).mean()


@torch.no_grad()
def _compare_vectors(model: Any, stock: Path, texts: list[str]) -> float:
    from sentence_transformers import SparseEncoder

    theirs = SparseEncoder(str(stock), device=str(model.device), local_files_only=True)
    ours, expected = (
        torch.stack([row.float().to_dense() for row in one.encode_document(texts, convert_to_sparse_tensor=False)])
        for one in (model, theirs)
    )
    difference = float((ours - expected).norm() / expected.norm())
    limit = 1e-3 if model.dtype == torch.float32 else 0.3  # a wrong model, such as a causal one, is off by 1 or so
    if not difference <= limit:
        raise SystemExit(
            f"Stock vectors of {stock} differ from lion_st's by {difference:.2g} of their norm, more than {limit}: "
            "the two sides would not compute the same. Is sentence-transformers 6.2 or newer installed?"
        )
    return difference


def in_process(script: str, arguments: list[str], seconds: float | None = None) -> dict[str, Any] | None:
    """The figures that a script prints last in a process of its own; None if it ran out of memory.

    A process that a signal ended, other than the one that the system sends when memory runs out, is marked as stopped.

    Args:
        script: Path of the Python script.
        arguments: Its command line.
        seconds: Its time; what it printed until then counts, marked as stopped.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, script, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, start_new_session=True)
        stopped = {}
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = {"stopped": f"after {seconds:g} s"}
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
        output.seek(0)
        errors.seek(0)
        lines, complaints = output.read().splitlines(), errors.read()
    figures = [line for line in lines if line.startswith("{") and line.endswith("}")]
    if stopped or process.returncode == 0:
        return (json.loads(figures[-1]) if figures else {}) | stopped
    if process.returncode == -signal.SIGKILL or any(sign in complaints for sign in OUT_OF_MEMORY):
        return None
    if process.returncode < 0:
        return {"stopped": f"by {signal.Signals(-process.returncode).name}"}
    raise SystemExit(f"{script} {' '.join(arguments)} failed:\n{complaints[-3000:]}")


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
