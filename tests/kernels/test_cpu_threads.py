"""The CPU kernels among threads and processes, each in a process of its own: numba starts its threads once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lion_st.kernels.compiling import Parallel, compiled

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


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_threads_encode_at_once_whatever_layer_numba_has():
    run(THREADS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork.")
def test_a_process_forked_after_encoding_encodes_too():
    """As gunicorn --preload and multiprocessing do; the parent keeps its threads, and torch as many as it had."""
    run(FORKED)


def test_functions_that_numba_cannot_keep_on_disk_run_all_the_same():
    """As in an installation that cannot be written, by a user without a home: numba finds no folder for this source."""
    import numba

    names: dict = {"prange": numba.prange}
    exec("def double(values):\n    for place in prange(values.size):\n        values[place] *= 2", names)
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(names["double"])
    for double in (compiled(nogil=True)(names["double"]), Parallel(names["double"]).serial):
        import numpy as np

        values = np.arange(3.0)
        double(values)
        assert values.tolist() == [0, 2, 4]
