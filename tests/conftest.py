"""Fixtures shared by all tests: tiny random backbones with their own tokenizer, and the golden values."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, TEXTS, tiny_config, tiny_tokenizer

# Asked for before anything imports Triton: without a GPU its kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_CASES = ("h64_tied_rope_default", "h128_untied_rope_llama32")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test, with the fixtures it is the first to ask for, draws the same numbers alone as after any others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory) -> Callable[..., str]:
    """`tiny_backbone(family="llama", tied=True, **config)` is a saved random causal LM with its tokenizer."""
    made: dict[tuple, str] = {}

    def make(family: str = "llama", tied: bool = True, *, tokenizer: bool = True, dtype: str = "float32", **config):
        key = (family, tied, tokenizer, dtype, repr(sorted(config.items())))
        if key not in made:
            import torch
            from transformers import AutoModelForCausalLM

            path = tmp_path_factory.mktemp(f"{family}-{'tied' if tied else 'untied'}")
            words = tiny_tokenizer(bos=family != "qwen3")
            settings = dict(vocab_size=len(words), pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id)
            torch.manual_seed(0)
            causal_lm = AutoModelForCausalLM.from_config(
                tiny_config(family, tied, bos_token_id=words.bos_token_id, **(settings | config))
            )
            # Wide weights and uneven norms: untrained defaults are so flat that a wrong model would look right.
            with torch.no_grad():
                for name, parameter in causal_lm.named_parameters():
                    parameter.normal_(std=0.2)
                    if "norm" in name and not family.startswith("gemma"):
                        parameter.add_(1.0)
                for name, buffer in causal_lm.named_buffers():
                    if name.endswith("layer_scalar"):
                        buffer.fill_(0.5)
            causal_lm.to(getattr(torch, dtype)).save_pretrained(path)
            if tokenizer:
                words.save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return make


@pytest.fixture(scope="module")
def sparse_model(tiny_backbone) -> Any:
    """A sparse model on a tiny backbone."""
    import lion_st

    return lion_st.build(tiny_backbone(), "sparse", query_length=32, document_length=48)


@pytest.fixture(scope="module")
def dense_model(tiny_backbone) -> Any:
    """The same of a dense model."""
    import lion_st

    return lion_st.build(tiny_backbone(), "dense", query_length=32, document_length=48)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    """Name of one decoder family; a test that takes it runs once for each."""
    return request.param


@pytest.fixture
def texts() -> list[str]:
    """Eight short English texts of different lengths."""
    return list(TEXTS)


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> None:
    """A cache of `datasets` of a test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread, as in processes that share a machine: sums, and so bits, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forkable(one_thread: None) -> Iterator[None]:
    """Forked processes wait for no threads that they lack, and killed ones leave no lock of progress bars behind."""
    from tqdm.auto import tqdm

    shared = tqdm.get_lock()  # between all forked processes
    tqdm.set_lock(threading.RLock())
    yield
    tqdm.set_lock(shared)


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden_case(request) -> Path:
    """Folder of one golden case."""
    return GOLDEN / request.param


@pytest.fixture(scope="session")
def golden_backbone(golden_case, tmp_path_factory) -> str:
    """The golden case's model beside a tokenizer, which the case itself does not have."""
    path = tmp_path_factory.mktemp(golden_case.name) / "model"
    shutil.copytree(golden_case / "model", path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


STOCK_PROCESS = """
import sys

class NoLion:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lion_st":
            raise ImportError("lion_st is not installed here")

sys.meta_path.insert(0, NoLion())
import json, numpy, torch, sentence_transformers
for line in sys.stdin:
    jobs, texts, out = json.loads(line)
    vectors = {}
    for path, kind in jobs:
        model = getattr(sentence_transformers, kind)(path, device="cpu", local_files_only=True)
        for task in ("query", "document"):
            if kind == "MultiVectorEncoder":
                rows = torch.nn.utils.rnn.pad_sequence(getattr(model, f"encode_{task}")(texts), batch_first=True)
            else:
                rows = getattr(model, f"encode_{task}")(texts, convert_to_tensor=True)
            vectors[f"{path}|{kind}|{task}"] = (rows.to_dense() if rows.is_sparse else rows).float().numpy()
    assert "lion_st" not in sys.modules
    numpy.savez(out, **vectors)
    print("done", flush=True)
"""


@pytest.fixture(scope="session")
def stock_vectors(tmp_path_factory) -> Iterator[Callable[..., dict[tuple[str, str, str], np.ndarray]]]:
    """Encode texts with stock models in a process that cannot import lion_st.

    `stock_vectors([(path, "SentenceTransformer"), ...], texts)` maps (path, class, task) to vectors.
    """
    folder = tmp_path_factory.mktemp("stock")
    out = folder / "vectors.npz"
    command = [sys.executable, "-c", STOCK_PROCESS]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def encode(jobs: list[tuple[Any, str]], texts: list[str]) -> dict[tuple[str, str, str], np.ndarray]:
            print(
                json.dumps([[(str(path), kind) for path, kind in jobs], texts, str(out)]),
                file=process.stdin,
                flush=True,
            )
            assert process.stdout.readline() == "done\n"
            with np.load(out) as vectors:
                return {tuple(name.split("|")): vectors[name] for name in vectors.files}

        yield encode
