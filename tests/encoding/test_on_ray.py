"""Encoding on Ray with real local clusters: workers and drivers may die.

Ray's threads stay in a process that has used it, and crash what is forked from it: each test has one of its own.
"""

import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from processes import FORKSERVER
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import encode_corpus, encode_corpus_on_ray
from lion_st.indexes import StorageError

pytest.importorskip("ray")

DOCUMENTS = [{"id": f"d{number}", "text": " ".join([TEXTS[number % 8], str(number)] * 8)} for number in range(120)]
SETTINGS = {"shard_documents": 4, "tokens_per_batch": 64, "show_progress": False}
PATIENCE = 300  # seconds for a worker to start and write on a busy machine


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def wait_for(folder: Path, pattern: str, count: int, driver: BaseProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob(pattern))) < count:
        assert driver.is_alive(), f"the driver ended with exit code {driver.exitcode}"
        assert time.monotonic() < deadline, f"there are no {count} {pattern}"
        time.sleep(0.005)


def drive(checkpoint: Path, outputs: list[Path]) -> None:
    """Encode into one folder after the other, on a cluster that this process starts."""
    import ray

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    for output in outputs:
        encode_corpus_on_ray(checkpoint, DOCUMENTS, output, cpus_per_worker=0.5, **SETTINGS)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    def command(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            return ""

    return [one for one in driver.children(recursive=True) if "_ShardWorker" in command(one)]


@pytest.mark.usefixtures("one_thread")  # as a worker has
def test_killed_workers_and_killed_drivers_leave_no_trace(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(), "sparse", document_length=128)
    checkpoint = lion_st.export(model, tmp_path / "lion", verify=False)
    alone = contents(encode_corpus(lion_st.load(checkpoint), DOCUMENTS, tmp_path / "alone", **SETTINGS))
    first, second = tmp_path / "first", tmp_path / "second"

    driver = FORKSERVER.Process(target=drive, args=(checkpoint, [first, second]))
    driver.start()
    family = psutil.Process(driver.pid)
    started: list[psutil.Process] = []
    try:
        wait_for(first, "shard-*.safetensors", 3, driver)
        (worker,) = workers_of(family)
        worker.kill()
        wait_for(first, "manifest.json", 1, driver)
        wait_for(second, "shard-*.safetensors", 3, driver)
    finally:
        with suppress(psutil.NoSuchProcess):
            started = family.children(recursive=True)
        driver.kill()
        driver.join()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert contents(first) == alone
    assert 3 <= len(list(second.glob("shard-*.safetensors"))) < len(DOCUMENTS) / 4
    encode_corpus(lion_st.load(checkpoint), DOCUMENTS, second, **SETTINGS)  # one machine goes on where a cluster died
    assert contents(second) == alone


def refused(checkpoint: Path, folder: Path) -> None:
    """What encoding on a cluster refuses, on a cluster that this process starts."""
    import ray

    with pytest.raises(ValueError, match="standard input"):
        encode_corpus_on_ray(checkpoint, "-", folder / "out")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    settings = SETTINGS | {"cpus_per_worker": 0.5}
    corpus = [{"id": "a", "text": "A lion."}, {"id": "b", "text": " "}]
    with pytest.raises(ValueError, match=r"Bad record \(empty\): record 2"):
        encode_corpus_on_ray(checkpoint, corpus, folder / "bad", on_bad_record="raise", **settings)
    encode_corpus_on_ray(checkpoint, corpus, folder / "out", **settings)
    with pytest.raises(StorageError, match="dtype was 'float32', is 'float16'"):
        encode_corpus_on_ray(checkpoint, corpus, folder / "out", dtype="float16", **settings)


def test_an_error_in_a_task_is_raised_as_it_is(tiny_backbone, tmp_path) -> None:
    checkpoint = lion_st.export(lion_st.build(tiny_backbone(), "sparse"), tmp_path / "lion", verify=False)
    with ProcessPoolExecutor(1, mp_context=FORKSERVER) as process:
        process.submit(refused, checkpoint, tmp_path).result()
