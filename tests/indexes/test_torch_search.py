"""The engine for GPUs against the engine "exact", on whatever device there is."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from power_law import power_law_vectors
from scipy import sparse

from lion_st.encoding import to_csr
from lion_st.indexes import StorageError, create_index, load_index, torch_search, torch_sparse
from lion_st.kernels import pair_scores, postings

VOCABULARY = 3000
IDS = [f"d{row}" for row in range(900)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")


@pytest.fixture(autouse=True)
def several_chunks_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_search, "DOCUMENTS", 250)
    monkeypatch.setattr(torch_search, "WORKSPACE", 4 * 250 * 12)
    monkeypatch.setattr(pair_scores, "ENTRIES", 500)
    monkeypatch.setattr(torch_sparse, "FREQUENT", 8)
    monkeypatch.setattr(postings, "STEP", 300)


def sparse_vectors(count: int, terms: int, seed: int) -> sparse.csr_array:
    """Terms by a power law, so that some are frequent and most are not; every tenth text again, for equal scores."""
    order = np.arange(count)
    order[9::10] = order[0:-9:10]
    return power_law_vectors(count, terms, seed, VOCABULARY)[order]


def alike_vectors(count: int, seed: int) -> sparse.csr_array:
    """Texts of the same terms, whose weights differ by less than bfloat16 can tell."""
    weights = 1 + np.random.default_rng(seed).random((count, 40)) / 2000
    return to_csr(sparse.csr_array(np.pad(weights, ((0, 0), (0, VOCABULARY - 40))), dtype=np.float32))


def filled(engine: str, paradigm: str, vectors, **parameters):
    index = create_index(engine, paradigm, **parameters)
    for start in range(0, vectors.shape[0], 170):
        stop = min(start + 170, vectors.shape[0])
        index.add(IDS[start:stop], vectors[start:stop])
    return index


def assert_same(index, other, queries, k: int, allowed=None) -> None:
    rows, scores = index.search_rows(queries, k, allowed=allowed)
    expected_rows, expected_scores = other.search_rows(queries, k, allowed=allowed)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert rows.dtype == expected_rows.dtype and scores.dtype == expected_scores.dtype


@pytest.mark.parametrize(
    "backend, k", [("blockwise", 1), ("blockwise", 10), ("blockwise", 300), ("blockwise", 2000), ("triton", 10)]
)
def test_sparse_search_finds_what_exact_finds_with_the_same_scores(monkeypatch, backend: str, k: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("LION_ST_KERNEL", backend)
    count = 900 if backend == "blockwise" else 300  # since Triton's interpreter takes its time
    documents, queries = sparse_vectors(count, 30, 0), sparse_vectors(count // 30, 15, 1).tolil()
    queries[7] = 0
    queries = to_csr(queries)
    index, exact = (filled(engine, "sparse", documents) for engine in ("torch", "exact"))
    assert_same(index, exact, queries, k)
    assert_same(index, exact, queries, k, allowed=IDS[:count:3])
    frequent = [len(chunk.frequent) for chunk in index._chunks]
    rare = [len(chunk.posting_values) for chunk in index._chunks]
    assert len(frequent) == count // 250 + 1 and min(frequent) > 0 and min(rare) > 0


@pytest.mark.parametrize("frequent", [8, 0])
def test_scores_that_bfloat16_cannot_tell_apart_are_in_the_right_order(monkeypatch, frequent: int) -> None:
    monkeypatch.setattr(torch_sparse, "MOST_FREQUENT", 1024 if frequent else 0)
    documents, queries = alike_vectors(900, 2), alike_vectors(5, 3)
    assert len(torch.unique(torch.tensor(documents.data).bfloat16())) == 1
    index, exact = (filled(engine, "sparse", documents) for engine in ("torch", "exact"))
    assert_same(index, exact, queries, 20)
    dense = documents.toarray()[:, :40]
    centred = np.concatenate([dense, -dense], axis=1)  # positive and negative scores, all but zero
    asked = np.concatenate([queries.toarray()[:, :40]] * 2, axis=1)
    asked[:, 0] += 0.001 * np.arange(5)
    found = filled("torch", "dense", centred)
    true = (asked.astype(np.float64) @ centred.T.astype(np.float64)).astype(np.float32)
    order = np.argsort(-true, axis=1, kind="stable")[:, :20]
    rows, scores = found.search_rows(asked, 20)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(true, order, 1))


@pytest.mark.parametrize("backend, k", [("blockwise", 1), ("blockwise", 15), ("blockwise", 2000), ("triton", 3)])
def test_dense_search_equals_brute_force(monkeypatch, backend: str, k: int) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("LION_ST_KERNEL", backend)
    rng = np.random.default_rng(4)
    documents = rng.standard_normal((900, 24), dtype=np.float32)
    documents[500:600] = documents[100:200]  # equal scores, in another chunk
    queries = rng.standard_normal((30, 24), dtype=np.float32)[: 30 if backend == "blockwise" else 4]
    index = filled("torch", "dense", documents)
    true = (queries.astype(np.float64) @ documents.T.astype(np.float64)).astype(np.float32)
    rows, scores = index.search_rows(queries, k)
    order = np.argsort(-true, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(true, order, axis=1))
    assert not (index.search_rows(queries, 5, allowed=IDS[::2])[0] % 2).any()


def test_a_batch_has_a_limited_number_of_queries_and_a_single_one_serves_all_chunks(monkeypatch) -> None:
    """Each query takes a number for each term, which in a small index is far more than its scores."""
    made = []
    make = torch_sparse.TorchSparseIndex._batch

    def counted(index, queries, part):
        made.append(make(index, queries, part))
        return made[-1]

    monkeypatch.setattr(torch_sparse.TorchSparseIndex, "_batch", counted)
    monkeypatch.setattr(torch_search, "BATCH", 8)
    documents, queries = sparse_vectors(900, 30, 10), sparse_vectors(30, 15, 11)
    index, exact = filled("torch", "sparse", documents[:40]), filled("exact", "sparse", documents[:40])
    assert_same(index, exact, queries, 2)
    assert [len(batch.table) for batch in made] == [8, 8, 8, 6]
    made.clear()
    index, exact = filled("torch", "sparse", documents), filled("exact", "sparse", documents)
    assert_same(index, exact, queries[:3], 5)
    assert len(index._chunks) == 4 and len(made) == 1
    for row in range(5):
        assert_same(index, exact, queries[[row]], 5)


def test_a_query_alone_has_the_candidates_that_it_has_among_others() -> None:
    torch.manual_seed(1)
    scores = torch.randn(6, 4096).round(decimals=2)
    scores[3, 100:] = -torch.inf
    best = torch_search.keys_of(torch.full((6, 3), 2.5), torch.arange(3).expand(6, 3))
    for relative, lowest in ((0.01, 0.0), (0.0, -torch.inf)):
        absolute = torch.full((6, 1), 0.05)
        query, document = torch_search.candidates(torch_search.Approximation(scores, relative, absolute), best, lowest)
        for row in range(6):
            alone = torch_search.Approximation(scores[[row]], relative, absolute[[row]])
            place, found = torch_search.candidates(alone, best[[row]], lowest)
            assert place.tolist() == [0] * len(found) and found.tolist() == document[query == row].tolist()
        assert len(query) > 20


@pytest.mark.parametrize("width", [1, 700])
def test_pairs_are_scored_in_float64_alike_by_all_backends(monkeypatch, width: int) -> None:
    """Of numbers whose sum in float32 is another."""
    pytest.importorskip("triton")
    rng = np.random.default_rng(12)
    queries, documents = (torch.tensor(rng.lognormal(0, 4, (4, width)).astype(np.float32)) for _ in range(2))
    query, document = torch.tensor([0, 0, 1, 3]), torch.tensor([3, 1, 2, 0])
    true = (queries[query].double() * documents[document].double()).sum(1).float()
    starts = torch.arange(5) * width
    terms = torch.arange(width).repeat(4).int()
    for backend in ("blockwise", "triton"):
        monkeypatch.setenv("LION_ST_KERNEL", backend)
        dense = pair_scores.dense_pair_scores(queries, documents, query, document)
        rows = (starts, terms, documents.flatten())
        few = pair_scores.sparse_pair_scores(queries, *rows, width, query, document)
        assert torch.equal(dense, true) and torch.equal(few, true)


def test_dense_vectors_whose_products_leave_the_range_are_refused() -> None:
    index = create_index("torch", "dense")
    with pytest.raises(ValueError, match=r"numbers up to 1e\+15, got 3e\+38: normalise them"):
        index.add(["a", "b"], [[3e38, 0.0], [1.0, 1.0]])
    index.add(["b"], [[1e15, 1.0]])
    assert index.search([[1.0, 2.0]]) == [[("b", float(np.float32(1e15)))]]
    with pytest.raises(ValueError, match="got 2e\\+15"):
        index.search([[0.0, -2e15]])


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_a_loaded_index_searches_and_grows_alike_wherever_it_was_made(
    tmp_path: Path, paradigm: str, memory_map: bool
) -> None:
    rows = sparse_vectors(900, 30, 5)
    rows = rows if paradigm == "sparse" else rows[:, :50].toarray()
    index = filled("torch", paradigm, rows[:600], device="cpu")
    assert "device" not in (index.save(tmp_path / "index") / "header.json").read_text()
    loaded = load_index(tmp_path / "index", memory_map=memory_map)
    assert loaded.device is None
    assert loaded.stats()["bytes"] is None and not loaded._chunks  # as no search has made what is searched
    for one in (index, loaded):
        one.search(rows[:2])  # chunks are made, and the last one has room for more
        one.add(IDS[600:], rows[600:])
    assert_same(loaded, index, rows[:10], 30)
    assert len(load_index(loaded.save(tmp_path / "again"))) == 900
    assert loaded.stats()["bytes"] > 0
    if paradigm == "sparse":
        assert (loaded.vectors(["d700", "d3"]) != rows[[700, 3]]).nnz == 0


def test_what_a_folder_holds_is_checked_before_it_is_searched(tmp_path: Path) -> None:
    rows = sparse_vectors(20, 5, 6)
    for name, change in (("starts", -1), ("terms", VOCABULARY), ("values", np.nan)):
        index = create_index("torch", "sparse")
        index.add(IDS[:20], rows)
        array = getattr(index._parts[0], name).copy()
        array[3] = change
        index._parts[0] = index._parts[0]._replace(**{name: array})
        if name != "starts":  # which are counted anew when saved
            index.save(tmp_path / name)
            with pytest.raises(StorageError, match="do not fit each other"):
                load_index(tmp_path / name)


def test_each_process_of_torchrun_searches_on_a_gpu_of_its_own(monkeypatch) -> None:
    """As its model runs there, and not all on the first one."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    index = create_index("torch", "dense")
    index.add(["a"], np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match="device='cuda:1' is not there, torch sees 1 GPUs"):
        index.search_rows(np.ones((1, 4), np.float32), 1)


def test_a_device_that_is_not_there_is_named(caplog) -> None:
    with pytest.raises(ValueError, match="such as 'cuda' or 'cuda:1', got 'gpu'"):
        create_index("torch", "sparse", device="gpu")
    with pytest.raises(ValueError, match=r"device='cuda:99' is not there, torch sees \d+ GPUs: use the engine 'exact'"):
        create_index("torch", "dense", device="cuda:99")
    with pytest.raises(ValueError, match="searches on CUDA GPUs, got device='mps'"):
        create_index("torch", "dense", device="mps")
    with pytest.raises(ValueError, match=r"memory_gb is a finite number of at least 0\.0, got -1"):
        create_index("torch", "sparse", memory_gb=-1)
    if not torch.cuda.is_available():
        index = create_index("torch", "dense")
        index.add(["a"], np.eye(1, 4))
        with caplog.at_level(logging.WARNING):
            index.search(np.eye(1, 4))
            index.search(np.eye(1, 4))
        assert [record.message for record in caplog.records] == [
            "There is no GPU: the engine 'torch' searches on the CPU, where 'exact' is faster."
        ]


@needs_gpu
@pytest.mark.parametrize("memory_gb", [None, 0.0, 0.0002])
def test_on_a_gpu_documents_beyond_the_limit_wait_in_main_memory(monkeypatch, caplog, memory_gb: float | None) -> None:
    monkeypatch.delenv("LION_ST_KERNEL", raising=False)
    documents, queries = sparse_vectors(900, 30, 7), sparse_vectors(30, 15, 8)
    index, exact = filled("torch", "sparse", documents, memory_gb=memory_gb), filled("exact", "sparse", documents)
    for k in (1, 10, 300):
        assert_same(index, exact, queries, k)
    on_gpu = [chunk.values.is_cuda for chunk in index._chunks]
    assert on_gpu[0] == (memory_gb != 0.0) and on_gpu[-1] == (memory_gb is None)
    told = [record.message for record in caplog.records if "copied there by each search" in record.message]
    assert len(told) == (memory_gb is not None)
    dense = np.random.default_rng(9).integers(-3, 4, (900, 64)).astype(np.float32)
    index, exact = filled("torch", "dense", dense, memory_gb=memory_gb), filled("exact", "dense", dense)
    assert_same(index, exact, dense[:40], 25)


@needs_gpu
def test_on_a_gpu_documents_of_many_chunks_are_found_as_by_exact(monkeypatch) -> None:
    monkeypatch.undo()
    documents = sparse.vstack([sparse_vectors(900, 120, seed) for seed in range(40)])
    queries = sparse_vectors(300, 80, 99)
    monkeypatch.setattr(torch_search, "DOCUMENTS", 20_000)
    found = []
    for engine in ("torch", "exact"):
        index = create_index(engine, "sparse")
        index.add([str(row) for row in range(documents.shape[0])], documents)
        found.append(index.search_rows(queries, 100, threads=8))
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("setting", ["bfloat16", "float64", "autocast"])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_settings_of_the_caller_change_no_score(paradigm: str, setting: str) -> None:
    make = np.random.default_rng(5).random
    index, expected = (create_index("torch", paradigm) for _ in range(2))
    documents, queries = (make((count, 40), dtype=np.float32) for count in (300, 7))
    for one in (index, expected):
        one.add(range(300), documents)
    found = expected.search(queries, 20)
    before = torch.get_default_dtype()
    if setting != "autocast":
        torch.set_default_dtype(getattr(torch, setting))
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            assert index.search(queries, 20) == found
    finally:
        torch.set_default_dtype(before)
