import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from power_law import power_law_vectors
from scipy import sparse

from lion_st import files
from lion_st.encoding import storage, to_csr
from lion_st.encoding.vectors import HybridVectors, to_dense
from lion_st.indexes import StorageError, create_index, exact_sparse, load_index

VOCABULARY = 700
sparse_vectors = partial(power_law_vectors, vocabulary=VOCABULARY)


def brute_force(documents: sparse.csr_array, queries: sparse.csr_array, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ documents.astype(np.float64).T).toarray().astype(np.float32)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, rows, axis=1)
    return np.where(best > 0, rows, -1), best


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sparse, "WINDOW", 128)


@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("query_terms", [2, 12, 60])
def test_exact_sparse_search_equals_brute_force_across_windows(small_windows: None, k: int, query_terms: int) -> None:
    documents, queries = sparse_vectors(1000, 20, 0), sparse_vectors(25, query_terms, 1)
    index = create_index("exact", "sparse")
    for start in range(0, 1000, 90):
        part = documents[start : start + 90]
        index.add([f"d{start + row}" for row in range(part.shape[0])], part)
    rows, scores = index.search_rows(queries, k)
    expected_rows, expected_scores = brute_force(documents, queries, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_pruned_terms_leave_the_ranking_exact(small_windows: None) -> None:
    """One heavy rare term and many light common ones: most documents can be dismissed before their light terms."""
    rng = np.random.default_rng(2)
    documents = sparse_vectors(2000, 30, 3).tolil()
    documents[rng.choice(2000, 40, replace=False), VOCABULARY - 1] = 9.0
    documents = to_csr(documents)
    queries = sparse_vectors(20, 30, 4).tolil()
    queries[:, VOCABULARY - 1] = 3.0
    queries = to_csr(queries)
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(2000)], documents)
    rows, _ = index.search_rows(queries, 10)
    np.testing.assert_array_equal(rows, brute_force(documents, queries, 10)[0])


def test_equal_documents_rank_in_the_order_they_were_added(small_windows: None) -> None:
    document = sparse_vectors(1, 40, 5)
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(400)], sparse.vstack([document] * 400))
    rows, scores = index.search_rows(document, 300)
    assert rows[0].tolist() == list(range(300))
    assert len(set(scores[0].tolist())) == 1


def test_threads_do_not_change_the_result() -> None:
    documents, queries = sparse_vectors(500, 20, 6), sparse_vectors(200, 8, 7)
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(500)], documents)
    alone, together = index.search(queries, 10), index.search(queries, 10, threads=3)
    assert alone == together


def test_a_query_without_terms_finds_nothing_and_keeps_its_place() -> None:
    queries = sparse_vectors(3, 8, 8).tolil()
    queries[1] = 0
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(50)], sparse_vectors(50, 20, 9))
    found = index.search(to_csr(queries), 5)
    assert [len(hits) for hits in found] == [5, 0, 5]


@pytest.mark.parametrize("quantization, tolerance", [("uint16", 1e-4), ("uint8", 3e-2)])
def test_quantised_scores_stay_within_their_stated_error(quantization: str, tolerance: float) -> None:
    documents, queries = sparse_vectors(800, 20, 10), sparse_vectors(20, 10, 11)
    plain, coarse = create_index("exact", "sparse"), create_index("exact", "sparse", quantization=quantization)
    for index in (plain, coarse):
        index.add([str(row) for row in range(800)], documents)
    expected, scores = (dict(index.search(queries[[0]], 800)[0]) for index in (plain, coarse))
    assert scores.keys() == expected.keys()
    assert max(abs(scores[key] - expected[key]) / max(expected.values()) for key in expected) < tolerance
    assert coarse.stats()["bytes"] < plain.stats()["bytes"]


def test_numbers_that_float16_cannot_hold_are_refused_and_nothing_is_added():
    for paradigm, vectors in (("dense", [[1e5, 0.0], [1.0, 1.0]]), ("multi_vector", [[[1e5, 0.0]], [[1.0, 1.0]]])):
        index = create_index("exact", paradigm, dtype="float16")
        with pytest.raises(ValueError, match=r"float16 ends at 65,504, and a vector has 100000: use dtype='float32'"):
            index.add(["a", "b"], np.array(vectors))
        assert len(index) == 0
        index.add(["a", "b"], np.array(vectors) / 2)
        assert len(index.search(np.array(vectors)[:1] / 1e5)[0]) == 2


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float16", 2e-3)])
def test_exact_dense_search_equals_brute_force(monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float) -> None:
    monkeypatch.setattr(exact_sparse, "WINDOW", 64)
    rng = np.random.default_rng(12)
    documents = rng.standard_normal((300, 16), dtype=np.float32)
    queries = rng.standard_normal((7, 16), dtype=np.float32)
    index = create_index("exact", "dense", dtype=dtype)
    index.add([str(row) for row in range(150)], documents[:150])
    index.add([str(row) for row in range(150, 300)], documents[150:])
    for k in (5, 400):
        _, scores = index.search_rows(queries, k)
        expected = -np.sort(-(queries @ documents.T), axis=1)[:, :k]
        np.testing.assert_allclose(scores[:, : expected.shape[1]], expected, atol=10 * tolerance)
    assert len(index.search(queries, 400)[0]) == 300


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_torch_vectors_of_any_layout_are_accepted(layout: str) -> None:
    documents = sparse_vectors(30, 5, 13)
    dense = torch.from_numpy(documents.toarray())
    vectors = {"dense": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]
    assert (to_csr(vectors) != documents).nnz == 0


@pytest.mark.parametrize("paradigm, parameters", [("sparse", {"quantization": "uint8"}), ("sparse", {}), ("dense", {})])
@pytest.mark.parametrize("memory_map", [False, True])
def test_a_loaded_index_searches_and_grows_like_the_saved_one(
    tmp_path: Path, small_windows: None, paradigm: str, parameters: dict, memory_map: bool
) -> None:
    vectors = sparse_vectors(400, 20, 14)
    vectors = vectors if paradigm == "sparse" else vectors.toarray()
    index = create_index("exact", paradigm, **parameters)
    index.add([f"é{row}" for row in range(300)], vectors[:300])
    index.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", memory_map=memory_map)
    assert loaded.search(vectors[:10], 20) == index.search(vectors[:10], 20)
    for one in (index, loaded):
        one.add([f"new{row}" for row in range(100)], vectors[300:])
    assert loaded.search(vectors[:10], 20) == index.search(vectors[:10], 20)
    loaded.save(tmp_path / "index", overwrite=True)
    assert len(load_index(tmp_path / "index")) == 400
    assert len(list((tmp_path / "index").glob("[!.]*"))) == 2  # header and one data folder: nothing is left behind


def test_an_empty_index_saves_loads_and_finds_nothing(tmp_path: Path) -> None:
    create_index("exact", "sparse").save(tmp_path / "index")
    assert load_index(tmp_path / "index").search(sparse_vectors(2, 3, 15), 5) == [[], []]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(50)], sparse_vectors(50, 10, 16))
    return index.save(tmp_path / "index")


def test_a_truncated_index_is_refused(saved: Path) -> None:
    values = next(saved.glob("data-*/values.npy"))
    values.write_bytes(values.read_bytes()[:-10])
    with pytest.raises(StorageError, match="truncated"):
        load_index(saved, verify=False)


def test_a_flipped_bit_is_refused(saved: Path) -> None:
    values = next(saved.glob("data-*/values.npy"))
    content = bytearray(values.read_bytes())
    content[-3] ^= 4
    values.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="checksum"):
        load_index(saved)


def test_a_foreign_or_newer_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no header\.json"):
        load_index(tmp_path)
    header = json.loads((saved / "header.json").read_text())
    (saved / "header.json").write_text(json.dumps({**header, "version": 99}))
    with pytest.raises(StorageError, match="version 99"):
        load_index(saved)
    (saved / "header.json").write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        load_index(saved)
    for damaged in ("{", "[]", "{}"):
        (saved / "header.json").write_text(damaged)
        with pytest.raises(StorageError, match=r"header\.json cannot be read .* delete"):
            create_index("exact", "sparse").save(saved, overwrite=True)


def test_a_folder_with_other_contents_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        create_index("exact", "sparse").save(tmp_path)


def test_a_failed_save_leaves_the_earlier_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_index(saved)
    bigger = load_index(saved)
    bigger.add(["more"], sparse_vectors(1, 10, 17))

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full_disk)
    with pytest.raises(OSError, match="No space"):
        bigger.save(saved, overwrite=True)
    monkeypatch.undo()
    assert load_index(saved).ids == before.ids
    bigger.save(saved, overwrite=True)
    assert len(load_index(saved)) == 51
    assert len(list(saved.glob("[!.]*"))) == 2


def test_the_data_folder_is_on_the_disk_before_the_header_names_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = files.fsync, os.replace

    def watched_fsync(path: Path) -> None:
        done.append(path.name.split("-")[0])
        fsync(path)

    def watched_replace(source: Path, target: Path) -> None:
        done.append("renamed")
        replace(source, target)

    for module in (files, storage):
        monkeypatch.setattr(module, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    load_index(saved).save(saved, overwrite=True)
    assert {"values.npy", "data", "index"} <= set(done[: done.index("renamed")])


def test_the_vectors_of_documents_are_looked_up_and_not_searched_for() -> None:
    class Unsearchable(list):
        def index(self, *arguments: object) -> int:
            raise AssertionError("goes through all ids")

    vectors = sparse_vectors(60, 10, 20)
    index = create_index("exact", "sparse")
    index.add([f"d{row}" for row in range(50)], vectors[:50])
    index.ids = Unsearchable(index.ids)
    assert (index.vectors(["d7", "d49"]) != vectors[[7, 49]]).nnz == 0
    index.add([f"d{row}" for row in range(50, 60)], vectors[50:])
    assert (index.vectors(["d55", "d0"]) != vectors[[55, 0]]).nnz == 0
    with pytest.raises(KeyError, match="'d60' is not in the index"):
        index.vectors(["d60"])


def test_bad_input_is_refused_and_adds_nothing() -> None:
    index = create_index("exact", "sparse")
    vectors = sparse_vectors(2, 5, 18)
    with pytest.raises(ValueError, match="3 ids for 2 vectors"):
        index.add(["a", "b", "c"], vectors)
    with pytest.raises(ValueError, match="'a' occurs twice"):
        index.add(["a", "a"], vectors)
    with pytest.raises(ValueError, match="got nan"):
        index.add(["a"], np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"got -1\.0"):
        index.add(["a"], np.array([[-1.0, 1.0]]))
    index.add(["a", "b"], vectors)
    with pytest.raises(ValueError, match="'b' occurs twice"):
        index.add(["b"], vectors[[0]])
    with pytest.raises(ValueError, match="700 dimensions and got vectors of 3"):
        index.search(np.ones((1, 3)))
    with pytest.raises(ValueError, match="k=0"):
        index.search(vectors, k=0)
    with pytest.raises(ValueError, match=r"the shape \(700,\): encode a list of texts"):
        index.search(torch.ones(700))
    assert index.ids == ["a", "b"]


def test_unknown_engines_and_wrong_paradigms_are_named() -> None:
    with pytest.raises(ValueError, match="Unknown engine 'lucene'"):
        create_index("lucene", "sparse")
    with pytest.raises(ValueError, match="'colbert'"):
        create_index("exact", "colbert")
    with pytest.raises(TypeError, match="paradigm='sparse'"):
        create_index("exact", "dense").add(["a"], sparse_vectors(1, 3, 19))
    rows = sparse_vectors(2, 3, 19)
    both = HybridVectors(rows, rows.toarray())
    for paradigm in ("sparse", "dense"):
        with pytest.raises(TypeError, match="paradigm='hybrid'"):
            create_index("exact", paradigm).add(["a", "b"], both)
        with pytest.raises(TypeError, match="one matrix of numbers"):
            create_index("exact", paradigm).add(["a", "b"], (both.sparse, both.dense))


def test_rows_that_were_encoded_one_by_one_are_one_matrix() -> None:
    rows = sparse_vectors(5, 10, 3)
    tensor = torch.from_numpy(rows.toarray())
    for given in (
        [*tensor],
        [*tensor.to_sparse()],
        [*tensor.double().requires_grad_()],
        [rows[[row]] for row in range(5)],
    ):
        assert (to_csr(given) != rows).nnz == 0
    assert (to_dense([*tensor.bfloat16()]) == tensor.bfloat16().float().numpy()).all()
