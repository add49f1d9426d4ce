"""The CPU kernels among threads and processes, each in a process of its own: numba starts its threads once."""

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import prange

from lion_st.kernels.compiling import Parallel

THREADS = """
import os, threading
os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # what numba falls back to, and what ends the process
import torch
from lion_st.kernels import splade_pool
torch.manual_seed(0)
hidden, weight = torch.randn(4, 30, 16), torch.randn(4000, 16)
results = []

def encode():
    for _ in range(15):
        states = hidden.clone().requires_grad_()
        values = splade_pool(states, weight, scale=1.0)
        values.sum().backward()
        results.append((values.detach(), states.grad))

threads = [threading.Thread(target=encode) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import numba
assert numba.threading_layer() == "workqueue", numba.threading_layer()
assert len(results) == 90
assert all(torch.equal(values, results[0][0]) and torch.equal(grad, results[0][1]) for values, grad in results)
"""

FORKED = """
import multiprocessing, os, sys
import torch
torch.set_num_threads(2)
from lion_st.kernels import splade_pool
torch.manual_seed(0)
hidden, weight = torch.randn(4, 30, 16), torch.randn(4000, 16)

def encode(_=None):
    states = hidden.clone().requires_grad_()
    values = splade_pool(states, weight, scale=1.0)
    values.sum().backward()
    product = torch.randn(300, 300) @ torch.randn(300, 300)  # by torch's own threads
    return values.detach().numpy(), states.grad.numpy(), torch.get_num_threads()

values, gradient, threads = encode()
assert threads == 2
with multiprocessing.get_context("fork").Pool(2) as pool:
    for other_values, other_gradient, others in pool.map_async(encode, range(4)).get(timeout=120):
        assert (other_values == values).all() and abs(other_gradient - gradient).max() < 1e-5 and others == 1
assert encode()[2] == 2
"""


NO_FOLDER = """
import os
os.environ["NUMBA_CACHE_LOCATOR_CLASSES"] = "UserProvidedCacheLocator"  # which takes NUMBA_CACHE_DIR and nothing else
os.environ.pop("NUMBA_CACHE_DIR", None)
import lion_st.kernels.cpu
"""
COUNT = """
import numpy as np
from lion_st.indexes import inverted
indptr = np.zeros(4, dtype=np.int64)
inverted.count_postings(np.array([0, 2, 2], dtype=np.int32), indptr)
assert indptr.tolist() == [0, 1, 1, 3], indptr
"""
NO_CACHE = "assert not inverted.count_postings.stats.cache_path"
NO_ROOM = """
import os, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""
NO_FILES = "assert not [*os.walk(os.environ['NUMBA_CACHE_DIR'])][-1][2]"


def run(program: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_threads_encode_at_once_whatever_layer_numba_has():
    run(THREADS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork.")
def test_a_process_forked_after_encoding_encodes_too():
    """As gunicorn --preload and multiprocessing do; the parent keeps its threads, and torch as many as it had."""
    run(FORKED)


def test_an_installation_without_a_folder_for_numbas_cache():
    """One that cannot be written, of a user without a home: every function of the package is compiled all the same."""
    run(NO_FOLDER + COUNT + NO_CACHE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit.")
def test_a_full_disk_leaves_functions_uncached(tmp_path):
    """Or a home over its quota: what they compute is written elsewhere."""
    run(NO_ROOM + COUNT + NO_FILES, NUMBA_CACHE_DIR=str(tmp_path))


def test_a_parallel_function_runs_on_one_thread_too():
    @Parallel
    def double(values):
        for place in prange(values.size):
            values[place] *= 2

    for run_it in (double.parallel, double.serial):
        values = np.arange(3.0)
        run_it(values)
        assert values.tolist() == [0, 2, 4]
