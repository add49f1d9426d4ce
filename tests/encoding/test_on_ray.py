"""Encoding on Ray with real local clusters: workers and drivers may die.

Ray's threads stay in a process that has used it, and crash what is forked from it: the driver is one of its own.
"""

import time
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


def drive(checkpoint: Path, folder: Path) -> None:
    """Encode into two folders on a cluster that this process starts, and see between them what is refused."""
    import ray

    with pytest.raises(ValueError, match="standard input"):
        encode_corpus_on_ray(checkpoint, "-", folder / "nothing")
    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    settings = SETTINGS | {"cpus_per_worker": 0.5}
    encode_corpus_on_ray(checkpoint, DOCUMENTS, folder / "first", **settings)
    with pytest.raises(StorageError, match="dtype was 'float32', is 'float16'"):
        encode_corpus_on_ray(checkpoint, DOCUMENTS, folder / "first", dtype="float16", **settings)
    empty = [{"id": "a", "text": "A lion."}, {"id": "b", "text": " "}]
    with pytest.raises(ValueError, match=r"Bad record \(empty\): record 2"):
        encode_corpus_on_ray(checkpoint, empty, folder / "bad", on_bad_record="raise", **settings)
    (folder / "refused").touch()
    encode_corpus_on_ray(checkpoint, DOCUMENTS, folder / "second", **settings)


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    def command(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            return ""

    return [one for one in driver.children(recursive=True) if "_ShardWorker" in command(one)]


@pytest.mark.usefixtures("one_thread")  # as a worker has
def test_killed_workers_and_drivers_leave_no_trace_and_errors_are_raised_as_they_are(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(), "sparse", document_length=128)
    checkpoint = lion_st.export(model, tmp_path / "lion", verify=False)
    alone = contents(encode_corpus(lion_st.load(checkpoint), DOCUMENTS, tmp_path / "alone", **SETTINGS))
    first, second = tmp_path / "first", tmp_path / "second"

    driver = FORKSERVER.Process(target=drive, args=(checkpoint, tmp_path))
    driver.start()
    family = psutil.Process(driver.pid)
    started: list[psutil.Process] = []
    try:
        wait_for(first, "shard-*.safetensors", 3, driver)
        (worker,) = workers_of(family)
        worker.kill()
        wait_for(first, "manifest.json", 1, driver)
        wait_for(tmp_path, "refused", 1, driver)
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
