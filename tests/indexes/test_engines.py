"""The approximate and the remote engines, against exact search."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from scipy import sparse

from lion_st import indexes
from lion_st.encoding import to_csr
from lion_st.indexes import StorageError, create_index, load_index
from lion_st.indexes import faiss as faiss_engine
from lion_st.retrieval import reciprocal_rank_fusion

VOCABULARY = 128_256  # Llama 3's: beyond the 65,536 terms of plain Seismic
IDS = [f"d{row}" for row in range(600)]


def clustered_vectors(count: int, seed: int) -> sparse.csr_array:
    """Term weights drawn around 20 topics that reach to the end of the vocabulary."""
    topics = np.random.default_rng(0).choice(VOCABULARY, size=(20, 60), replace=False)
    topics[:, 0] = VOCABULARY - 1 - np.arange(20)
    rng = np.random.default_rng(seed)
    rows = sparse.lil_array((count, VOCABULARY), dtype=np.float32)
    for row in range(count):
        terms = rng.choice(topics[rng.integers(20)], 25, replace=False)
        rows[row, terms] = rng.lognormal(-0.3, 0.6, 25)
    return to_csr(rows)


@pytest.fixture(scope="module")
def documents() -> sparse.csr_array:
    return clustered_vectors(600, 1)


@pytest.fixture(scope="module")
def queries() -> sparse.csr_array:
    return clustered_vectors(30, 2)


@pytest.fixture(scope="module")
def exact_hits(documents: sparse.csr_array, queries: sparse.csr_array) -> list:
    index = create_index("exact", "sparse")
    index.add(IDS, documents)
    return index.search(queries, 10)


def recall(found: list, expected: list) -> float:
    pairs = zip(found, expected, strict=True)
    return float(np.mean([len(dict(a).keys() & dict(b).keys()) / len(b) for a, b in pairs]))


def without_terms(vectors: sparse.csr_array, row: int) -> sparse.csr_array:
    rows = vectors.tolil()
    rows[row] = 0
    return to_csr(rows)


@pytest.fixture(scope="module")
def seismic_index(documents):
    index = create_index("seismic", "sparse", query_cut=40)
    index.add(IDS[:300], documents[:300])
    index.add(IDS[300:], documents[300:])
    return index


def test_seismic_finds_what_exact_search_finds_in_the_same_order(seismic_index, queries, exact_hits) -> None:
    found = seismic_index.search(queries, 10, threads=2)
    assert recall(found, exact_hits) > 0.95
    for hits, expected in zip(found, exact_hits, strict=True):
        assert hits[0][0] == expected[0][0]
        assert hits[0][1] == pytest.approx(expected[0][1], rel=1e-2)
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)


def test_seismic_keeps_the_place_of_an_empty_query(seismic_index, queries, exact_hits) -> None:
    found = seismic_index.search(without_terms(queries, 4), 10)
    assert found[4] == []
    assert found[5][0][0] == exact_hits[5][0][0]


def test_a_loaded_seismic_index_searches_alike_and_says_that_it_cannot_grow(
    tmp_path, seismic_index, documents, queries
) -> None:
    loaded = load_index(seismic_index.save(tmp_path / "index"))
    assert loaded.search(queries, 5) == seismic_index.search(queries, 5)
    assert loaded.stats()["query_cut"] == 40
    for one in (loaded, seismic_index):
        with pytest.raises(ValueError, match="saved or loaded cannot grow"):
            one.add(["new"], documents[[0]])


def test_seismic_finds_more_through_its_graph_of_neighbours_also_once_loaded(
    tmp_path, documents, queries, exact_hits
) -> None:
    index = create_index("seismic", "sparse", neighbours=10, query_cut=2, heap_factor=0.5)
    index.add(IDS, documents)
    found = index.search(queries, 10)
    loaded = load_index(index.save(tmp_path / "index"))
    assert loaded.search(queries, 10) == found
    loaded.neighbours = 0
    assert recall(loaded.search(queries, 10), exact_hits) < recall(found, exact_hits)
    with pytest.raises(ValueError, match="neighbours is an integer of at least 0, got -1"):
        create_index("seismic", "sparse", neighbours=-1)


def test_the_size_of_a_seismic_index_is_measured_once(tmp_path, documents, monkeypatch) -> None:
    folder, made = tempfile.TemporaryDirectory, []
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **options: made.append(options) or folder(**options))
    index = create_index("seismic", "sparse")
    index.add(IDS[:100], documents[:100])
    first = index.stats()["bytes"]
    assert index.stats()["bytes"] == first > 0
    assert len(made) == 1
    index.add(IDS[100:], documents[100:])
    saved = index.save(tmp_path / "index")
    (file,) = saved.glob("data-*/vectors*")
    assert [one.stats()["bytes"] for one in (index, load_index(saved))] == [file.stat().st_size] * 2
    assert file.stat().st_size > first
    assert len(made) == 1


def test_seismic_reports_nothing_on_standard_output(capfd) -> None:
    index = create_index("seismic", "sparse")
    index.add(IDS[:5], np.eye(5, 40))
    assert index.search(np.eye(1, 40), 1)[0][0][0] == "d0"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind, least", [("flat", 1.0), ("hnsw", 0.95), ("ivf_pq", 0.5)])
def test_faiss_agrees_with_exact_dense_search(tmp_path: Path, kind: str, least: float) -> None:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((40, 32), dtype=np.float32)
    vectors = centres[rng.integers(40, size=600)] + 0.3 * rng.standard_normal((600, 32), dtype=np.float32)
    exact, index = create_index("exact", "dense"), create_index("faiss", "dense", kind=kind, code_bytes=16)
    for one in (exact, index):
        one.add(IDS[:400], vectors[:400])
        one.add(IDS[400:], vectors[400:])
    expected = exact.search(vectors[:20], 10)
    assert recall(index.search(vectors[:20], 10), expected) >= least
    loaded = load_index(index.save(tmp_path / "index"))
    assert loaded.search(vectors[:20], 10) == index.search(vectors[:20], 10)
    assert index.stats()["bytes"] > 0


def test_faiss_ranks_equal_scores_as_exact_search_does() -> None:
    rng = np.random.default_rng(0)
    vectors, asked = (rng.integers(-2, 3, size=(count, 8)).astype(np.float32) for count in (400, 30))
    exact, index = create_index("exact", "dense"), create_index("faiss", "dense")
    for one in (exact, index):
        one.add(IDS[:400], vectors)
    assert index.search(asked, 400) == exact.search(asked, 400)
    assert index.search(np.zeros((1, 8), np.float32), 3) == [[("d0", 0.0), ("d1", 0.0), ("d2", 0.0)]]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf_pq"])
def test_the_size_of_a_faiss_index_is_counted_without_writing_it(tmp_path, monkeypatch, kind: str) -> None:
    monkeypatch.delattr(faiss, "serialize_index")
    index = create_index("faiss", "dense", kind=kind, code_bytes=16)
    index.add(IDS, np.random.default_rng(5).standard_normal((600, 32), dtype=np.float32))
    size = index.stats()["bytes"]
    saved = index.save(tmp_path / "index")
    (file,) = saved.glob("data-*/vectors.faiss")
    assert size == pytest.approx(file.stat().st_size, rel=0.02)
    assert [load_index(saved, memory_map=mapped).stats()["bytes"] for mapped in (False, True)] == [size, size]


def test_ivf_pq_keeps_no_vectors_in_memory_and_is_trained_on_a_sample(monkeypatch) -> None:
    monkeypatch.setattr(faiss_engine, "TRAINING_DOCUMENTS", 1000)
    monkeypatch.setattr(faiss_engine, "BLOCK", 700)
    train, trained = faiss.IndexIVFPQ.train, []

    def watched(index, vectors) -> None:
        trained.append(vectors[:, 0])
        train(index, vectors)

    monkeypatch.setattr(faiss.IndexIVFPQ, "train", watched)
    rng = np.random.default_rng(6)
    centres = rng.standard_normal((10, 512), dtype=np.float32)

    def shard(number: int) -> np.ndarray:
        noise = np.random.default_rng(number).standard_normal((500, 512), dtype=np.float32)
        return centres[np.arange(500) % 10] + 0.1 * noise

    index = create_index("faiss", "dense", kind="ivf_pq", code_bytes=16, clusters=10, probes=10)
    tracemalloc.start()
    try:
        for number in range(8):
            index.add([str(500 * number + row) for row in range(500)], shard(number))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 3 * shard(0).nbytes  # of the 8 that were added, and the ids
    everything = np.concatenate([shard(number) for number in range(8)])
    found = dict(index.search(everything[:1], 4000)[0])
    assert len(found) == 4000
    scores = np.array([found[str(row)] for row in range(4000)])
    assert np.corrcoef(scores, everything @ everything[0])[0, 1] > 0.9
    np.testing.assert_array_equal(trained, [everything[::4, 0]])
    index.add(["more"], everything[:1])
    assert len(index.search(everything[:1], 5000)[0]) == 4001


def test_faiss_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="'lsh'"):
        create_index("faiss", "dense", kind="lsh")
    with pytest.raises(ValueError, match="does not search 'sparse'"):
        create_index("faiss", "sparse")
    index = create_index("faiss", "dense", kind="ivf_pq", code_bytes=7)
    with pytest.raises(ValueError, match="code_bytes=7"):
        index.add(IDS[:2], np.ones((2, 32)))
    index = create_index("faiss", "dense", kind="ivf_pq", code_bytes=16)
    index.add(IDS[:2], np.ones((2, 32)))
    with pytest.raises(ValueError, match="got 2"):
        index.search(np.ones((1, 32)))


@pytest.fixture(params=["file", "server"])
def milvus_uri(request, tmp_path: Path) -> Iterator[str]:
    """A file for Milvus Lite, and the address of a server that speaks Milvus' protocol, as a cluster does."""
    if request.param == "file":
        yield str(tmp_path / "lion.db")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "milvus_lite",
        "server",
        "--data-dir",
        str(tmp_path / "server"),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_milvus_searches_sparse_dense_and_hybrid_collections(
    milvus_uri, tmp_path, documents, queries, exact_hits
) -> None:
    uri = milvus_uri
    dense = np.random.default_rng(4).standard_normal((600, 8), dtype=np.float32)
    dense_queries = dense[:30]
    index = create_index("milvus", "sparse", uri=uri, collection="sparse", rows_per_request=250)
    index.add(IDS, documents)
    found = index.search(without_terms(queries, 2), 10)
    assert found[2] == []
    assert recall(found, [*exact_hits[:2], [("none", 0)], *exact_hits[3:]]) > 29 / 30 - 1e-6
    assert found[0][0][1] == pytest.approx(exact_hits[0][0][1], rel=1e-4)

    dense_index = create_index("milvus", "dense", uri=uri, collection="dense")
    dense_index.add(IDS, dense)
    exact_dense = create_index("exact", "dense")
    exact_dense.add(IDS, dense)
    assert recall(dense_index.search(dense_queries, 10), exact_dense.search(dense_queries, 10)) > 0.99

    hybrid = create_index("milvus", "hybrid", uri=uri, collection="both", candidates=50)
    hybrid.add(IDS, (documents, dense))
    exact_sparse = create_index("exact", "sparse")
    exact_sparse.add(IDS, documents)
    rankings = [exact_sparse.search(queries[:3], 50), exact_dense.search(dense_queries[:3], 50)]
    fused = reciprocal_rank_fusion(rankings, k=5)
    hits = hybrid.search((queries[:3], dense_queries[:3]), 5)
    for found, expected in zip(hits, fused, strict=True):
        assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)
    leaning = create_index("milvus", "hybrid", uri=uri, collection="both", weights=(0.0, 1.0))
    assert leaning.search((queries[:1], dense_queries[:1]), 1)[0][0][0] == rankings[1][0][0][0]

    index.save(tmp_path / "saved")
    index.close()
    loaded = load_index(tmp_path / "saved")
    assert len(loaded) == 600
    loaded.add(["d0", "d0b"], documents[[5, 5]])  # an id again: replaced
    assert len(loaded) == 601
    with pytest.raises(ValueError, match=r"has the fields \['id', 'sparse'\]"):
        create_index("milvus", "dense", uri=uri, collection="sparse")
    loaded.delete_collection()
    assert loaded.search(queries[:2], 3) == [[], []]


def test_settings_of_milvus_that_cannot_be_are_named(tmp_path) -> None:
    pytest.importorskip("pymilvus")
    for weights in (0.5, [0.5], ["a", 1.0], [0.0, 0.0], [float("nan"), 1.0], "0.5,0.5", [True, 0.5]):
        with pytest.raises(ValueError, match=r"one finite weight >= 0 for each of the 2 rankings.*; got"):
            create_index("milvus", "hybrid", uri=str(tmp_path / "lion.db"), weights=weights)
    for uri in ("ftp://host:1", str(tmp_path / "corpus")):
        with pytest.raises(StorageError, match=rf"Milvus at {re.escape(uri)} cannot be opened.*ends in \.db.*http://"):
            create_index("milvus", "sparse", uri=uri)


def test_a_milvus_collection_takes_its_source_with_its_first_documents(milvus_uri, documents) -> None:
    first, second, third = (create_index("milvus", "sparse", uri=milvus_uri) for _ in range(3))
    first.source, second.source, third.source = {"model": "a"}, {"model": "b"}, {"model": "a"}
    first.add([], documents[:0])
    second.add(IDS[:2], documents[:2])
    with pytest.raises(StorageError, match="already holds 2 documents"):
        third.add(["d9"], documents[[9]])
    assert len(third) == 2
    third.delete_collection()
    third.add(["d9"], documents[[9]])
    with pytest.raises(StorageError, match="already holds 1 documents"):
        other = create_index("milvus", "sparse", uri=milvus_uri)
        other.source = {"model": "b"}
        other.add(IDS[:2], documents[:2])
    third.close()


def test_rows_acknowledged_by_milvus_survive_sigkill(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        import numpy as np
        from lion_st.indexes import create_index
        index = create_index("milvus", "sparse", uri=sys.argv[1])
        for number in range(10_000):
            index.add([f"d{number}-{row}" for row in range(20)], np.eye(20, 64) + 0.5)
            print(number, flush=True)
        """
    )
    uri = str(tmp_path / "lion.db")
    process = subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged == 4:
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    index = create_index("milvus", "sparse", uri=uri)
    found = dict(index.search(np.ones((1, 64)), 10_000)[0])
    assert acknowledged >= 4
    assert {f"d{number}-{row}" for number in range(acknowledged + 1) for row in range(20)} <= found.keys()
    index.close()


def test_milvus_refuses_what_it_cannot_store(tmp_path: Path, documents) -> None:
    index = create_index("milvus", "hybrid", uri=str(tmp_path / "lion.db"))
    with pytest.raises(ValueError, match="'b' has no sparse term"):
        index.add(["a", "b"], (without_terms(documents[:2], 1), np.ones((2, 4))))
    with pytest.raises(ValueError, match="one sparse and one dense vector, got 2 and 1"):
        index.add(["a", "b"], (documents[:2], np.ones((1, 4))))
    with pytest.raises(ValueError, match="600 bytes"):
        index.add(["x" * 600], (documents[:1], np.ones((1, 4))))
    index.close()


def test_exact_takes_the_place_of_seismic_where_it_has_no_package(monkeypatch, documents, queries, exact_hits) -> None:
    monkeypatch.setattr("lion_st.indexes.factory.find_spec", lambda package: None)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.17"))
    with pytest.warns(UserWarning, match="no package for this platform .*: the engine 'exact' takes its place"):
        index = create_index("seismic", "sparse", query_cut=5)
    index.add(IDS, documents)
    assert index.stats()["engine"] == "exact" and index.search(queries, 10) == exact_hits
    with pytest.raises(ValueError, match="seismic has no setting 'probes'"):
        create_index("seismic", "sparse", probes=5)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.34"))
    assert indexes.present_engine("seismic") == "seismic"  # it can be installed there, and the error says how
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    with pytest.warns(UserWarning, match="'exact' takes its place"):
        assert indexes.present_engine("seismic") == "exact"
    assert indexes.present_engine("faiss") == "faiss"
