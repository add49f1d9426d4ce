import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from scipy import sparse
from threadpoolctl import threadpool_info

from lion_st.encoding import to_csr
from lion_st.encoding.storage import HEADER, contents_checksum
from lion_st.files import checksum
from lion_st.indexes import StorageError, create_index, exact_sparse, inverted, load_index

VOCABULARY = 300


def sparse_vectors(count: int, seed: int) -> sparse.csr_array:
    return to_csr(sparse.random(count, VOCABULARY, 0.1, "csr", np.float32, np.random.default_rng(seed)))


def dense_vectors(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 16), dtype=np.float32)


@pytest.mark.parametrize(
    ("engine", "paradigm", "parameters"),
    [
        ("exact", "sparse", {}),
        ("exact", "dense", {}),
        ("faiss", "dense", {"kind": "ivf_pq", "code_bytes": 4}),
        ("faiss", "dense", {"kind": "hnsw"}),
    ],
)
def test_the_first_searches_may_come_from_many_threads_at_once(engine: str, paradigm: str, parameters: dict) -> None:
    make = sparse_vectors if paradigm == "sparse" else dense_vectors
    documents, queries = make(600, 0), make(4, 1)

    def filled() -> object:
        index = create_index(engine, paradigm, **parameters)
        for start in range(0, 600, 50):
            index.add([f"d{row}" for row in range(start, start + 50)], documents[start : start + 50])
        return index

    expected = filled().search(queries, 10)
    for _ in range(5):
        index = filled()
        together = Barrier(8)

        def search(number: int, index: object = index, together: Barrier = together) -> object:
            together.wait()
            return index.search(queries, 10)

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(search, range(8))) == [expected] * 8
        assert index.search(queries, 10) == expected


def test_concurrent_dense_searches_leave_the_threads_of_blas_as_they_were() -> None:
    index = create_index("exact", "dense")
    index.add([str(row) for row in range(2000)], dense_vectors(2000, 0))
    before = threadpool_info()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda seed: index.search(dense_vectors(20, seed), 5), range(50)))
    assert threadpool_info() == before


@pytest.mark.parametrize(
    ("terms", "indptr"),
    [([0, VOCABULARY], [0, 2]), ([-1, 3], [0, 2]), ([0, 1], [0, 3, 2]), ([0, 1], [0, -1, 2]), ([2**31, 1], [0, 2])],
)
@pytest.mark.parametrize("form", ["scipy", "torch"])
def test_terms_outside_of_the_vocabulary_are_refused(form: str, terms: list[int], indptr: list[int]) -> None:
    weights = np.ones(2, dtype=np.float32)
    index = create_index("exact", "sparse")
    index.add(["d"], sparse_vectors(1, 0))
    shape = (len(indptr) - 1, VOCABULARY)
    if form == "scipy":
        matrix = sparse.csr_array(shape, dtype=np.float32)
        matrix.data, matrix.indices, matrix.indptr = weights, np.array(terms), np.array(indptr)
    else:
        parts = (torch.tensor(indptr), torch.tensor(terms), torch.from_numpy(weights))
        matrix = torch.sparse_csr_tensor(*parts, size=shape, check_invariants=False)
    with pytest.raises(ValueError, match=r"damaged|index"):
        index.search(matrix)
    with pytest.raises(ValueError, match=r"damaged|index"):
        index.add([str(row) for row in range(shape[0])], matrix)


def rewrite(folder: Path, name: str, change: object) -> None:
    """Change an array and give it the right checksums, as someone who means harm would."""
    header = json.loads((folder / HEADER).read_text())
    file = folder / header["data"] / f"{name}.npy"
    array = change(np.load(file))
    np.save(file, array)
    header["files"][f"{name}.npy"] = {"bytes": file.stat().st_size, "xxh3": checksum(file)}
    header["xxh3"] = contents_checksum(header)
    (folder / HEADER).write_text(json.dumps(header))


def put(array: np.ndarray, place: int, value: float) -> np.ndarray:
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("documents", lambda a: put(a, 3, 60_000)),
        ("indptr", lambda a: put(a, 10, -5)),
        ("indptr", lambda a: put(a, -1, a[-1] + 100)),
        ("indptr", lambda a: a[:-1]),
        ("values", lambda a: put(a, 0, 0.0)),
        ("values", lambda a: put(a, 0, np.nan)),
        ("values", lambda a: a[:-1]),
        ("upper", lambda a: put(a, 0, np.inf)),
        ("rows", lambda a: put(a, 0, 10**9)),
        ("ids_offsets", lambda a: put(a, -1, 10**9)),
    ],
)
def test_a_sparse_index_with_contents_out_of_range_is_refused(tmp_path: Path, name: str, change: object) -> None:
    index = create_index("exact", "sparse")
    index.add([f"d{row}" for row in range(50)], sparse_vectors(50, 0))
    index.save(tmp_path / "index")
    rewrite(tmp_path / "index", name, change)
    with pytest.raises(StorageError, match="damaged"):
        load_index(tmp_path / "index")


def test_a_dense_index_of_another_shape_is_refused(tmp_path: Path) -> None:
    index = create_index("exact", "dense")
    index.add([f"d{row}" for row in range(50)], dense_vectors(50, 0))
    index.save(tmp_path / "index")
    rewrite(tmp_path / "index", "vectors", lambda a: a[:-1])
    with pytest.raises(StorageError, match="damaged"):
        load_index(tmp_path / "index")


@pytest.mark.parametrize("data", ["/tmp", "..", "../index", None])
def test_a_header_does_not_lead_out_of_its_folder(tmp_path: Path, data: object) -> None:
    index = create_index("exact", "dense")
    index.add(["d"], dense_vectors(1, 0))
    index.save(tmp_path / "index")
    header = json.loads((tmp_path / "index" / HEADER).read_text())
    for changed in (header | {"data": data}, header | {"files": {}}):
        changed["xxh3"] = contents_checksum(changed)
        (tmp_path / "index" / HEADER).write_text(json.dumps(changed))
        with pytest.raises(StorageError, match=r"header\.json"):
            load_index(tmp_path / "index", verify=False)


def test_a_missing_folder_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_index(tmp_path / "index")


def test_texts_and_one_string_as_ids_are_type_errors() -> None:
    index = create_index("exact", "dense")
    with pytest.raises(TypeError, match="encode it"):
        index.search("lions")
    with pytest.raises(TypeError, match="encode it"):
        index.search(["lions"])
    with pytest.raises(TypeError, match="list of ids, one per document"):
        index.add("d1", dense_vectors(2, 0))


def test_no_more_is_kept_than_there_are_documents() -> None:
    for paradigm, make in (("sparse", sparse_vectors), ("dense", dense_vectors)):
        index = create_index("exact", paradigm)
        index.add(["a", "b"], make(2, 0))
        rows, scores = index.search_rows(make(1, 1), k=10**12)
        assert rows.shape == scores.shape == (1, 2)


def test_an_index_says_what_it_is() -> None:
    assert repr(create_index("exact", "sparse", quantization="uint8")) == (
        "ExactSparseIndex('sparse', quantization='uint8'): 0 documents"
    )


@pytest.mark.parametrize("how", ["add", "search", "save"])
def test_what_interrupts_an_index_leaves_it_as_it_was(monkeypatch, tmp_path: Path, how: str) -> None:
    monkeypatch.setattr(exact_sparse, "WINDOW", 1000 if how == "search" else 20)
    documents, ids = sparse_vectors(90, 3), [f"d{row}" for row in range(90)]
    index, whole = create_index("exact", "sparse"), create_index("exact", "sparse")
    whole.add(ids, documents)
    calls = {
        "add": lambda: index.add(ids, documents),
        "search": lambda: index.search(documents, 5),
        "save": lambda: index.save(tmp_path / "index"),
    }
    if how != "add":
        index.add(ids, documents)
    if how == "save":
        for one in (index, whole):
            one.delete(ids[::3])
    monkeypatch.setattr(exact_sparse, "WINDOW", 20)
    owner, name = (inverted, "keep") if how == "save" else (inverted, "count_postings")
    original, calls_left = getattr(owner, name), iter([True, True])

    def interrupted(*arguments: object) -> object:
        if next(calls_left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            calls[how]()
    calls[how]()
    assert index.search(documents, 9) == whole.search(documents, 9)


@pytest.mark.parametrize(
    ("engine", "paradigm", "parameters"), [("faiss", "dense", {"kind": "hnsw"}), ("seismic", "sparse", {})]
)
def test_what_an_interruption_left_with_too_many_vectors_is_refused(
    engine: str, paradigm: str, parameters: dict
) -> None:
    pytest.importorskip(engine)
    make = sparse_vectors if paradigm == "sparse" else dense_vectors
    index = create_index(engine, paradigm, **parameters)
    index.add(["a", "b"], make(2, 0))
    filled = getattr(index, "_filled", None)
    index._add(make(3, 2))  # what a KeyboardInterrupt leaves, which Python raises when the engine has returned
    index._filled = filled
    for call in (lambda: index.add(["c"], make(1, 1)), lambda: index.search(make(1, 1))):
        with pytest.raises(RuntimeError, match="5 vectors for 2 ids: build the index again"):
            call()


def test_an_index_says_why_it_is_not_copied() -> None:
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load_index"):
            copied(create_index("exact", "sparse"))


def test_ids_that_would_become_others_are_refused() -> None:
    index = create_index("exact", "dense")
    for one in (b"d1", None, 1.0, torch.tensor(1)):
        with pytest.raises(TypeError, match="An id, a string or an integer"):
            index.add([one], dense_vectors(1, 0))
    with pytest.raises(ValueError, match="not Unicode text"):
        index.add(["\ud800"], dense_vectors(1, 0))
    index.add(np.array([3, 5]), dense_vectors(2, 0))
    assert index.ids == ["3", "5"]


def test_ids_of_a_hybrid_index_may_be_read_once() -> None:
    index = create_index("exact", "hybrid")
    both = (sparse_vectors(9, 0), dense_vectors(9, 0))
    index.add((f"d{row}" for row in range(9)), both)
    index.delete(f"d{row}" for row in range(3))
    assert [len(side) for side in index.sides] == [6, 6]
    with pytest.raises(TypeError, match="pass a list or a set"):
        index.search(both, allowed=(f"d{row}" for row in range(9)))


def test_an_interruption_leaves_both_sides_of_a_hybrid_index_alike(monkeypatch) -> None:
    index, whole = create_index("exact", "hybrid"), create_index("exact", "hybrid")
    both = (sparse_vectors(9, 0), dense_vectors(9, 0))
    whole.add(range(9), both)

    def interrupted(vectors: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index.sides[0], "_add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            index.add(range(9), both)
    assert [len(side) for side in index.sides] == [0, 0]
    index.add(range(9), both)
    assert index.search(both, 5) == whole.search(both, 5)


FILLS_THE_DISK = """
import sys
import numpy as np
from scipy import sparse
from lion_st.indexes import create_index

index = create_index("exact", "sparse")
index.add(range(200), sparse.random(200, 400, 0.5, "csr", np.float32, np.random.default_rng(0)))
try:
    index.save(sys.argv[1] + "/index")
except OSError as error:
    print("is the disk full?" in str(error), len(index.search(np.ones((1, 400)), 3)[0]))
"""


def test_a_full_disk_does_not_end_the_process(tmp_path: Path) -> None:
    program = tmp_path / "fill.py"
    program.write_text(FILLS_THE_DISK)
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path} || exit 77"
    command = f"exec 3<{program}; {mount}; exec {sys.executable} /dev/fd/3 {tmp_path}"
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode in (1, 77) and not done.stdout:
        pytest.skip(f"this system lets nobody mount a small disk: {done.stderr}")
    assert done.stdout == "True 3\n", done.stderr
