"""Encoding on Ray with real local clusters: workers and drivers may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import TEXTS

import lion_st
from lion_st.retrieval import encode_corpus, encode_corpus_on_ray

pytest.importorskip("ray")

DOCUMENTS = [{"id": f"d{number}", "text": " ".join([TEXTS[number % 8], str(number)] * 8)} for number in range(120)]
SETTINGS = {"shard_documents": 4, "tokens_per_batch": 64, "show_progress": False}


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "lion"
    return lion_st.export(lion_st.build(tiny_backbone(), "sparse", document_length=128), folder)


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    return contents(encode_corpus(lion_st.load(checkpoint), DOCUMENTS, folder / "encoded", **SETTINGS))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def wait_for_shards(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shard-*.safetensors"))) < count:
        assert time.monotonic() < deadline, "no shard came"
        time.sleep(0.01)


def test_a_killed_worker_is_replaced_and_leaves_no_trace(checkpoint, alone, tmp_path) -> None:
    import ray

    output = tmp_path / "encoded"
    killed = []

    def kill_a_worker() -> None:
        wait_for_shards(output, 3)
        for process in psutil.Process().children(recursive=True):
            if "_ShardWorker" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)
                return

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killer = threading.Thread(target=kill_a_worker)
        killer.start()
        encode_corpus_on_ray(checkpoint, DOCUMENTS, output, workers=2, cpus_per_worker=0.5, **SETTINGS)
        killer.join()
    finally:
        ray.shutdown()
    assert len(killed) == 1
    assert contents(output) == alone


def test_a_killed_driver_is_continued_from_its_shards(checkpoint, alone, tmp_path) -> None:
    program = textwrap.dedent(
        f"""
        import ray
        from lion_st.retrieval import encode_corpus_on_ray
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        rows = {DOCUMENTS!r}
        output, settings = {str(tmp_path / "encoded")!r}, {SETTINGS!r}
        encode_corpus_on_ray({str(checkpoint)!r}, rows, output, cpus_per_worker=0.5, **settings)
        """
    )
    driver = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        wait_for_shards(tmp_path / "encoded", 3)
    finally:
        family = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        for process in family:
            if process.is_running():
                process.kill()
    done = len(list((tmp_path / "encoded").glob("shard-*.safetensors")))
    assert 3 <= done < len(DOCUMENTS) / 4
    encode_corpus(lion_st.load(checkpoint), DOCUMENTS, tmp_path / "encoded", **SETTINGS)
    assert contents(tmp_path / "encoded") == alone
