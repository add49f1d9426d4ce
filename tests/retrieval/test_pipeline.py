from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TEXTS

import lion_st
from lion_st.retrieval import Pruning, encode_corpus, encode_texts, index_corpus, load_index, search_texts

DOCUMENTS = [{"id": f"d{number}", "text": f"{TEXTS[number % 8]} {number}"} for number in range(64)]


@pytest.fixture(scope="module")
def sparse_model(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse")


@pytest.fixture(scope="module")
def dense_model(tiny_backbone):
    return lion_st.build(tiny_backbone(), "dense")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, sparse_model) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    return encode_corpus(sparse_model, DOCUMENTS, folder / "encoded", shard_documents=20, show_progress=False)


def test_shards_become_an_index_that_answers_with_reasons(tmp_path, sparse_model, encoded) -> None:
    report = index_corpus(encoded, tmp_path / "index")
    assert report.recall == {}
    index = load_index(tmp_path / "index", memory_map=True)
    results = search_texts(sparse_model, index, [TEXTS[2], TEXTS[5]], k=3, explain=True)
    assert [(result.query, result.rank) for result in results] == [
        (TEXTS[i], rank) for i in (2, 5) for rank in (1, 2, 3)
    ]
    for result in results:
        assert sum(term.share for term in result.terms) == pytest.approx(1.0)
        total = sum(term.query_weight * term.document_weight for term in result.terms)
        assert total == pytest.approx(result.score, rel=1e-5)
    assert search_texts(sparse_model, index, [TEXTS[0]], k=1)[0].terms == []


def test_an_approximate_index_is_measured_against_exact_search(tmp_path, sparse_model, encoded) -> None:
    report = index_corpus(encoded, tmp_path / "index", "seismic", recall_at=(1, 10))
    assert report.recall["Recall@10"] > 0.9
    assert report.recall.keys() == {"Recall@1", "Recall@10"}
    real = index_corpus(
        encoded, tmp_path / "real", "seismic", queries=encode_texts(sparse_model, TEXTS, "query"), recall_at=(5,)
    )
    assert real.recall["Recall@5"] > 0.9
    with pytest.raises(ValueError, match="engine='exact'"):
        search_texts(sparse_model, report.index, [TEXTS[0]], explain=True)


def test_pruning_shrinks_the_index(tmp_path, encoded) -> None:
    whole = index_corpus(encoded, tmp_path / "whole").index
    pruned = index_corpus(encoded, tmp_path / "pruned", pruning=Pruning(top_terms=10)).index
    assert len(pruned) == len(whole) == 64
    assert (pruned.vectors(["d7"]) > 0).sum() == 10


def test_dense_shards_become_dense_indexes(tmp_path, dense_model) -> None:
    encoded = encode_corpus(dense_model, DOCUMENTS, tmp_path / "encoded", dtype="float16", show_progress=False)
    exact = index_corpus(encoded, tmp_path / "exact")
    graph = index_corpus(encoded, tmp_path / "hnsw", "faiss", engine_parameters={"kind": "hnsw"}, recall_at=(10,))
    assert graph.recall["Recall@10"] > 0.9
    assert (
        search_texts(dense_model, exact.index, ["lions"], 2)[0].document
        == search_texts(dense_model, graph.index, ["lions"], 2)[0].document
    )
    with pytest.raises(ValueError, match="dense model"):
        index_corpus(encoded, tmp_path / "pruned", pruning=Pruning(top_terms=10))
