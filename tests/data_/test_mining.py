"""The ensemble teacher's scores, and the hard negatives that it mines."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from lion_st.data import quickstart_data
from lion_st.data.mining import EnsembleTeacher, first_of_near_duplicates, mine_negatives


@pytest.fixture(scope="module")
def collection():
    """20 real queries, 200 real passages, the first 20 theirs in turn, and unit vectors in which those are close."""
    data = quickstart_data()
    documents = pq.read_table(data / "documents.parquet").slice(0, 3000).to_pylist()
    rows = {row["document_id"]: i for i, row in enumerate(documents)}
    queries = {row["query_id"]: row["text"] for row in pq.read_table(data / "queries.parquet").to_pylist()}
    pairs = [
        (queries[row["query_id"]], rows[row["document_ids"][0]])
        for row in pq.read_table(data / "train.parquet").to_pylist()
        if row["document_ids"][0] in rows
    ][:20]
    keep = [positive for _, positive in pairs] + [i for i in range(3000) if i not in {p for _, p in pairs}][:180]
    generator = np.random.default_rng(0)
    vectors = unit(generator.normal(size=(200, 16)))
    query_vectors = unit(vectors[:20] + 0.2 * generator.normal(size=(20, 16)))
    return [query for query, _ in pairs], query_vectors, [documents[i]["text"] for i in keep], vectors


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def teacher(collection):
    teacher = EnsembleTeacher(encoder=None)
    teacher.index(collection[2], collection[3])
    return teacher


def test_coverage_is_bm25_between_0_and_1(teacher, collection):
    import bm25s

    queries, query_vectors, documents, _ = collection
    bm25 = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    bm25.index(bm25s.tokenize(documents, show_progress=False), show_progress=False)
    blocks = list(teacher.score(queries, query_vectors, block_size=7))
    assert [block.start for block in blocks] == [0, 7, 14]
    coverage = np.concatenate([block.coverage for block in blocks])
    assert coverage.min() == 0 and 0.3 < coverage.max() < 1
    for query, covered in zip(queries, coverage, strict=True):
        tokens = sorted(set(bm25s.tokenize([query], return_ids=False, show_progress=False)[0]) & set(bm25.vocab_dict))
        scores = bm25.get_scores(tokens)
        ratio = covered[scores > 0] / scores[scores > 0]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_negatives_are_the_hardest_that_are_clearly_below_the_positive(teacher, collection):
    queries, query_vectors, _, _ = collection
    mined = mine_negatives(teacher, queries, list(range(20)), negatives=3, query_vectors=query_vectors)
    assert sum(found is not None for found in mined) >= 15
    (block,) = teacher.score(queries, query_vectors)
    mixed = 25 * block.mixed(0.5)
    for row, found in enumerate(mined):
        if found is None:
            continue
        assert found.documents[0] == row and len(set(found.documents)) == 4
        assert found.scores == pytest.approx(mixed[row, found.documents], abs=0.006)
        assert found.scores == sorted(found.scores, reverse=True)
        assert max(found.scores[1:]) <= 0.95 * found.scores[0] + 0.01
        allowed = mixed[row] <= 0.95 * mixed[row, row]
        hardest = [np.flatnonzero(allowed)[view[row][allowed].argmax()] for view in (block.cosine, block.coverage)]
        assert set(hardest) <= set(found.documents)


def test_a_query_whose_positive_ranks_low_is_left_out(teacher, collection):
    queries, query_vectors, _, _ = collection
    (block,) = teacher.score(queries[:1], query_vectors[:1])
    worst = int(block.mixed(0.5)[0].argmin())
    assert mine_negatives(teacher, queries[:1], [worst], query_vectors=query_vectors[:1]) == [None]


def test_only_the_first_of_near_duplicates_is_kept():
    vectors = unit(np.random.default_rng(1).normal(size=(9, 32)))
    vectors[5], vectors[7] = vectors[2], unit(vectors[2:3] + 0.01)[0]
    for block_size in (2, 4, 100):
        kept = first_of_near_duplicates(vectors, block_size=block_size)
        assert np.flatnonzero(~kept).tolist() == [5, 7]


def test_bad_arguments_are_named(teacher):
    with pytest.raises(ValueError, match=r"dense_weight is 1\.5"):
        EnsembleTeacher(encoder=None, dense_weight=1.5)
    with pytest.raises(ValueError, match="2 queries have 1 positives"):
        mine_negatives(teacher, ["a", "b"], [0])


def test_no_positive_of_a_query_becomes_its_negative(teacher, collection):
    """A query with several positives stands there as often; what is mined for one leaves the others alone."""
    queries, vectors, _, _ = collection
    options = dict(negatives=4, relative_margin=-9.0, positive_rank=200, query_vectors=vectors[[0, 0, 1]])
    (before, *_) = mine_negatives(teacher, [queries[0], "x", queries[1]], [0, 7, 1], **options)
    hard = before.documents[1]
    first, second, _ = mine_negatives(teacher, [queries[0], queries[0], queries[1]], [0, hard, 1], **options)
    assert hard not in first.documents and 0 not in second.documents
