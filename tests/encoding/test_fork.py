"""A process that is forked after encoding and searching does both, as with gunicorn --preload, or says why not."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, sys
import torch
torch.set_num_threads(2)
sys.path.insert(0, sys.argv[1])
from tiny_models import TEXTS
import lion_st
from lion_st.encoding import encode_texts
from lion_st.indexes import create_index
from lion_st.retrieval import search_texts

texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 8)]
searches = []
for paradigm, engines in (("dense", sys.argv[3].split()), ("sparse", ["exact", "torch"])):
    model = lion_st.build(sys.argv[2], paradigm, device="cpu")
    for engine in engines:
        index = create_index(engine, paradigm, **({"device": "cpu"} if engine == "torch" else {}))
        vectors = encode_texts(model, texts, "document")
        for copy in range(100):  # enough for threads
            index.add([f"{number} {copy}" for number in range(len(texts))], vectors)
        searches.append((model, index))

def search(number):
    model, index = searches[number]
    found = search_texts(model, index, texts[:20], k=3, threads=2)
    # Copies have equal scores but for rounding, which is another on one thread.
    return [hit.document.split()[0] for hit in found], torch.get_num_threads()

for number in range(len(searches)):
    expected, _ = search(number)
    assert torch.get_num_threads() == 2
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.map_async(search, [number]).get(timeout=120) == [(expected, 1)], number
    assert search(number) == (expected, 2)
"""

SEISMIC = """
import multiprocessing
from lion_st.indexes import create_index

index = create_index("seismic", "sparse")
index.add(["a", "b"], [[0.0, 1.5, 1.0], [0.5, 0.5, 0.0]])

def search(number):
    return index.search([[1.0, 1.0, 0.0]], k=1)

with multiprocessing.get_context("fork").Pool(1) as pool:
    assert pool.map_async(search, [0]).get(timeout=60)[0][0][0][0] == "a"
assert search(0)[0][0][0] == "a"
with multiprocessing.get_context("fork").Pool(1) as pool:
    try:
        pool.map_async(search, [0]).get(timeout=60)
        raise SystemExit("no error")
    except RuntimeError as error:
        assert "threads stayed there" in str(error)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork.")


def run(*arguments: str) -> None:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}  # tokenizers would look for their threads, too
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_forked_process_encodes_and_searches(tiny_backbone):
    engines = "exact torch faiss" if importlib.util.find_spec("faiss") else "exact torch"
    run(PROGRAM, str(Path(__file__).parents[1]), tiny_backbone(), engines)


def test_a_forked_process_cannot_use_its_parents_seismic_and_says_so():
    pytest.importorskip("seismic")
    run(SEISMIC)
