"""Reading, tokenizing and writing go on in threads beside the model, in order, and fail where they were called."""

import gc
import itertools
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus, encode_texts, shards
from lion_st.encoding.pipeline import HostCopy, computed_ahead, done_behind, read_ahead

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_one_result_is_computed_ahead_and_no_more():
    computed: list[int] = []
    readers = set()

    def items():
        for number in itertools.count():
            readers.add(threading.current_thread())
            yield number

    def square(number: int) -> int:
        computed.append(number)
        assert threading.current_thread() is not threading.main_thread()
        return number**2

    before = threading.active_count()
    for number, result in enumerate(itertools.islice(computed_ahead(square, items()), 5)):
        assert result == number**2
        assert len(computed) <= number + 2
    assert readers == {threading.main_thread()}
    assert list(read_ahead(range(7))) == list(range(7)) and list(read_ahead([])) == []
    gc.collect()  # the generator that was left
    assert threading.active_count() <= before  # or threads of other tests have ended meanwhile


def test_an_error_ahead_is_raised_in_its_turn():
    got = []
    with pytest.raises(ZeroDivisionError):
        for result in computed_ahead(lambda number: 1 / number, [1, 2, 0, 4]):
            got.append(result)
    assert got == [1, 0.5]


def test_calls_behind_keep_their_order_and_their_errors_come_back():
    done: list[int] = []
    started = threading.Event()
    go_on = threading.Event()

    def slow(number: int) -> None:
        started.set()
        go_on.wait(30)
        done.append(number)

    with done_behind() as behind:
        behind(slow, 0)
        started.wait(30)
        behind(done.append, 1)
        assert done == []
        threading.Timer(0.05, go_on.set).start()
        behind(done.append, 2)  # waits: one is under way and one to be done
        assert done[0] == 0
    assert done == [0, 1, 2]

    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), done_behind() as behind:
        behind(fail)
    with pytest.raises(OSError, match="no space"), done_behind() as behind:
        for number in itertools.count():
            behind(fail)
            time.sleep(0.01)
            assert number < 1000


@pytest.fixture(scope="module")
def model(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse", document_length=48, device="cpu")


def test_an_iterator_is_read_by_the_thread_that_gave_it(tmp_path, model):
    """A connection of sqlite3 refuses all other threads."""
    table = sqlite3.connect(":memory:")
    table.execute("create table documents (id text, text text)")
    table.executemany("insert into documents values (?, ?)", [(f"d{n}", text) for n, text in enumerate(TEXTS * 3)])
    rows = ({"id": key, "text": text} for key, text in table.execute("select id, text from documents"))
    output = encode_corpus(model, rows, tmp_path / "out", shard_documents=5, show_progress=False)
    ids, vectors = EncodedCorpus(output).whole()
    assert ids == [f"d{number}" for number in range(24)]
    assert abs(vectors - encode_texts(model, TEXTS * 3, "document")).max() < 1e-5


def test_an_error_of_writing_is_the_callers_and_leaves_no_thread(tmp_path, model, monkeypatch):
    before = threading.active_count()
    write = shards.atomic_file

    def refuse(path: Path):
        if path.name == "shard-000002.safetensors":
            raise OSError(28, "No space left on device", str(path))
        return write(path)

    monkeypatch.setattr(shards, "atomic_file", refuse)
    corpus = [{"id": f"d{n}", "text": text} for n, text in enumerate(TEXTS * 2)]
    output = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        encode_corpus(model, corpus, output, shard_documents=2, show_progress=False)
    assert not (output / "manifest.json").exists()
    assert threading.active_count() == before
    monkeypatch.undo()
    encode_corpus(model, corpus, output, shard_documents=2, show_progress=False)
    assert len(EncodedCorpus(output)) == 16


@pytest.mark.parametrize("layout", ["dense", "csr", "coo"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_copy_on_the_host_holds_what_the_device_had(layout, device):
    matrix = torch.relu(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)))
    vectors = matrix.to(device)
    if layout == "csr":
        vectors = vectors.to_sparse_csr()
    elif layout == "coo":
        vectors = vectors.to_sparse_coo()
    found = HostCopy(vectors).get()
    found = torch.from_numpy(found.toarray()) if layout == "csr" else found.to_dense() if layout == "coo" else found
    assert torch.equal(found, matrix)


@needs_cuda
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_nobody_waits_for_a_copy_before_it_is_asked_for(layout):
    matrix = torch.relu(torch.randn(64, 1000, device="cuda"))
    vectors = matrix.to_sparse_csr() if layout == "csr" else matrix
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # clock cycles, a fraction of a second
    copy = HostCopy(vectors)
    assert not copy._copied.query()
    found = copy.get()
    assert np.array_equal(found.toarray() if layout == "csr" else found.numpy(), matrix.cpu().numpy())


@needs_cuda
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_a_gpu_gives_the_vectors_of_the_cpu(tiny_backbone, tmp_path, paradigm):
    built = lion_st.build(tiny_backbone(), paradigm, document_length=48, device="cpu")
    expected = encode_texts(built, TEXTS * 5, "document", tokens_per_batch=200)
    built.to("cuda")
    found = encode_texts(built, TEXTS * 5, "document", tokens_per_batch=200)
    assert abs(found - expected).max() < 2e-2
    rows = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS * 5)]
    encoded = encode_corpus(built, rows, tmp_path / "out", shard_documents=7, tokens_per_batch=100, show_progress=False)
    assert abs(EncodedCorpus(encoded).whole()[1] - expected).max() < 2e-2
