"""Documents are added, deleted and filtered without building an index anew, with the results of a new one."""

import copy
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from lion_st.encoding import to_csr
from lion_st.encoding.vectors import TokenVectors
from lion_st.indexes import create_index, exact_sparse, load_index, torch_search

VOCABULARY = 120


def vectors(count: int, seed: int, paradigm: str):
    """Small whole weights, so that many scores are equal, and a row without terms."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 4, (count, VOCABULARY)) * (rng.random((count, VOCABULARY)) < 0.15)
    rows[count // 2] = 0
    return to_csr(rows.astype(np.float32)) if paradigm == "sparse" else rows.astype(np.float32)


def brute_force(documents, ids: list[str], queries, k: int) -> list[list[tuple[str, float]]]:
    """The k best of some documents, of equal scores the earlier ones; those that share no term are not found."""
    dense = [one.toarray() if sparse.issparse(one) else one for one in (queries, documents)]
    scores = dense[0].astype(np.float64) @ dense[1].astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    keep_zero = not sparse.issparse(documents)
    return [
        [(ids[row], float(own[row])) for row in best if own[row] > 0 or keep_zero]
        for own, best in zip(scores, order, strict=True)
    ]


CASES = [
    ("exact", "sparse", {}),
    ("exact", "sparse", {"quantization": "uint16"}),
    ("exact", "dense", {}),
    ("torch", "sparse", {}),
    ("torch", "dense", {}),
]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sparse, "WINDOW", 64)
    monkeypatch.setattr(torch_search, "DOCUMENTS", 64)


@pytest.mark.parametrize("engine, paradigm, parameters", CASES)
def test_random_updates_leave_what_a_new_index_of_the_rest_finds(
    tmp_path, engine: str, paradigm: str, parameters: dict
) -> None:
    rng = np.random.default_rng(7)
    everything, queries = vectors(400, 0, paradigm), vectors(6, 1, paradigm)
    index = create_index(engine, paradigm, **parameters)
    alive: list[int] = []
    added = 0
    for step in range(12):
        count = int(rng.integers(1, 40))
        index.add([f"d{row}" for row in range(added, added + count)], everything[added : added + count])
        alive += range(added, added + count)
        added += count
        gone = set(rng.choice(alive, int(rng.integers(0, len(alive) // 2 + 1)), replace=False).tolist())
        index.delete([f"d{row}" for row in gone])
        alive = [row for row in alive if row not in gone]
        assert len(index) == len(alive)
        if paradigm == "sparse":
            counts = (everything[alive] > 0).sum(axis=0)
            assert index.document_frequencies().counts.tolist() == counts.tolist()
            with pytest.raises(ValueError, match=f"{VOCABULARY} terms and the queries 5: encode both with one model"):
                index.document_frequencies().weigh(np.ones((1, 5)))
        if step % 4 == 1:
            index.compact()
            assert index.ids == [f"d{row}" for row in alive]
        if step % 4 == 3:
            index = load_index(index.save(tmp_path / str(step)), memory_map=step == 3)
        kept = rng.choice(alive, int(rng.integers(1, len(alive) + 1)), replace=False)
        for rows, allowed in ((alive, None), (sorted(kept), {f"d{row}" for row in kept} | {"unknown"})):
            ids = [f"d{row}" for row in rows]
            for k in (1, 7, 1000):
                found = index.search(queries, k, allowed=allowed)
                expected = brute_force(everything[rows], ids, queries, k)
                if parameters:  # rounded weights tell documents apart that are equal
                    for hits, true in zip(found, expected, strict=True):
                        np.testing.assert_allclose([s for _, s in hits], [s for _, s in true], rtol=1e-3)
                else:
                    assert found == expected


@pytest.mark.parametrize("engine, paradigm, parameters", CASES)
def test_a_deleted_document_may_come_back_and_all_may_go(engine: str, paradigm: str, parameters: dict) -> None:
    rows = vectors(40, 2, paradigm)
    ids = [f"d{row}" for row in range(40)]
    index = create_index(engine, paradigm, **parameters)
    index.add(ids, rows)
    index.delete(["d3"])
    index.add(["d3"], rows[[5]])
    alone = create_index(engine, paradigm, **parameters)
    alone.add(["d3"], rows[[5]])
    assert index.search(rows[[5]], 40, allowed=["d3"])[0][0][1] == pytest.approx(alone.search(rows[[5]])[0][0][1], 1e-3)
    index.delete(ids)
    assert len(index) == 0 and index.search(rows[:2], 5) == [[], []]
    index.compact()
    assert index.search(rows[:2], 5) == [[], []]
    index.add(["new"], rows[[1]])
    assert [hit[0] for hit in index.search(rows[[1]], 5)[0]] == ["new"]


@pytest.mark.parametrize(
    "engine, paradigm, parameters",
    [*CASES, ("exact", "multi_vector", {}), ("exact", "hybrid", {}), ("seismic", "sparse", {}), ("faiss", "dense", {})],
)
@pytest.mark.parametrize("count", [40, 100])  # less than a window, and more
def test_what_happens_to_the_arrays_that_were_added_leaves_an_index_as_it_is(
    engine: str, paradigm: str, parameters: dict, count: int
) -> None:
    if engine in ("seismic", "faiss"):
        pytest.importorskip(engine)
    sparse_rows, dense_rows = vectors(count, 4, "sparse"), vectors(count, 4, "dense")
    given = {
        "sparse": sparse_rows,
        "dense": dense_rows,
        "multi_vector": TokenVectors(dense_rows, np.arange(count + 1)),
        "hybrid": (sparse_rows, dense_rows),
    }[paradigm]
    queries = given if paradigm == "hybrid" else given[:5]
    index = create_index(engine, paradigm, **parameters)
    undisturbed = create_index(engine, paradigm, **parameters)
    ids = [f"d{row}" for row in range(count)]
    for one in (index, undisturbed):
        one.add(ids, given)
    expected = undisturbed.search(queries, 9)
    asked = copy.deepcopy(queries)
    for array in (sparse_rows.data, sparse_rows.indices, sparse_rows.indptr, dense_rows):
        array[:] = 0
    assert index.search(asked, 9) == expected


def test_what_cannot_be_deleted_or_allowed_is_named() -> None:
    rows = vectors(20, 3, "sparse")
    index = create_index("exact", "sparse")
    index.add([f"d{row}" for row in range(20)], rows)
    with pytest.raises(KeyError, match="'d99' is not in the index"):
        index.delete(["d1", "d99"])
    assert len(index) == 20
    with pytest.raises(ValueError, match="None of the 2 allowed documents, 'x' for example"):
        index.search(rows, allowed=["y", "x"])
    with pytest.raises(TypeError, match="ids"):
        index.search(rows, allowed="d1")
    assert index.search(rows, allowed=[]) == [[]] * 20
    index.delete(["d4"])
    with pytest.raises(KeyError, match="'d4' is not in the index"):
        index.vectors(["d4"])
    with pytest.raises(KeyError, match="'d4'"):
        index.delete(["d4"])
    for engine in ("faiss", "seismic"):
        other = create_index(engine, "dense" if engine == "faiss" else "sparse")
        with pytest.raises(NotImplementedError, match=f"'{engine}' cannot delete documents, exact and torch can"):
            other.delete(["d1"])
        with pytest.raises(NotImplementedError, match=f"'{engine}' cannot search among some documents alone"):
            other.search(np.ones((1, 4)), allowed=["d1"])


@pytest.mark.parametrize(
    ("engine", "paradigm", "name"),
    [
        ("exact", "sparse", "_windows"),
        ("exact", "dense", "_blocks"),
        ("exact", "multi_vector", "_blocks"),
        ("torch", "sparse", "_parts"),
        ("torch", "dense", "_parts"),
    ],
)
def test_many_small_additions_leave_few_parts(engine: str, paradigm: str, name: str, tmp_path: Path) -> None:
    count = 100
    rows = vectors(count, 6, "sparse" if paradigm == "sparse" else "dense")
    given = TokenVectors(rows, np.arange(count + 1)) if paradigm == "multi_vector" else rows
    index, whole = create_index(engine, paradigm), create_index(engine, paradigm)
    whole.add(range(count), given)
    expected = whole.search(given, 9)
    for row in range(count):
        index.add([row], given[row : row + 1])
        index.search(given[:1], 1)
    assert len(getattr(index, name)) == 3  # 64 + 32 + 4
    assert index.search(given, 9) == expected
    assert load_index(index.save(tmp_path / "index")).search(given, 9) == expected
    for one in (index, whole):
        one.delete([str(row) for row in range(count) if row % 10])
        one.compact()
    assert index.search(given, 9) == whole.search(given, 9)


def test_no_window_has_more_postings_than_its_numbers_count(monkeypatch) -> None:
    rows, queries = vectors(100, 7, "sparse"), vectors(20, 8, "sparse")
    whole, index = create_index("exact", "sparse"), create_index("exact", "sparse")
    whole.add(range(100), rows)
    expected = whole.search(queries, 9)
    monkeypatch.setattr(exact_sparse, "POSTINGS", 200)  # about ten documents
    for start in range(0, 100, 5):
        index.add(range(start, start + 5), rows[start : start + 5])
        index.search(queries, 1)
    other = create_index("exact", "sparse")
    other.add(range(100), rows)
    for one in (index, other):
        assert one.search(queries, 9) == expected
        assert max(window.documents.size for window in one._windows) <= 200
