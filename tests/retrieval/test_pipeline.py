from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import TEXTS

import lion_st
from lion_st.retrieval import (
    EncodedCorpus,
    Pruning,
    StorageError,
    create_index,
    encode_corpus,
    encode_texts,
    index_corpus,
    load_index,
    search_run,
    search_texts,
)
from lion_st.retrieval.pipeline import exact_hits

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


def test_a_quantised_index_is_measured_as_well(tmp_path, encoded) -> None:
    report = index_corpus(encoded, tmp_path / "index", engine_parameters={"quantization": "uint8"}, recall_at=(10,))
    assert 0.9 < report.recall["Recall@10"] <= 1.0
    assert index_corpus(encoded, tmp_path / "unmeasured", "seismic", sample=0).recall == {}


def test_exact_hits_of_shards_are_those_of_the_whole(sparse_model, encoded) -> None:
    queries = encode_texts(sparse_model, TEXTS[:3], "query")
    index = create_index("exact", "sparse")
    index.add(*EncodedCorpus(encoded).whole())
    assert exact_hits(EncodedCorpus(encoded), queries, 7) == index.search(queries, 7)


def test_thresholds_by_term_are_those_of_the_corpus_and_not_of_a_shard(tmp_path, encoded) -> None:
    pruning = Pruning(term_quantile=0.5)
    index = index_corpus(encoded, tmp_path / "index", pruning=pruning).index
    ids, vectors = EncodedCorpus(encoded).whole()
    assert (index.vectors(ids) != pruning.apply(vectors)).nnz == 0
    assert index.source["pruning"] == "term_quantile=0.5"


def test_a_collection_that_holds_other_documents_is_not_added_to(tmp_path, encoded) -> None:
    pytest.importorskip("pymilvus")
    uri = str(tmp_path / "lion.db")
    create_index("milvus", "sparse", uri=uri).add(["other"], [[1.0] * 320])
    with pytest.raises(StorageError, match="was not empty"):
        index_corpus(encoded, tmp_path / "index", "milvus", engine_parameters={"uri": uri}, sample=0)
    report = index_corpus(encoded, tmp_path / "new", "milvus", engine_parameters={"uri": uri, "collection": "new"})
    assert report.recall["Recall@10"] == 1.0
    report.index.close()
    assert len(load_index(tmp_path / "new")) == 64
    (tmp_path / "lion.db").rename(tmp_path / "moved.db")
    with pytest.raises(StorageError, match="which is gone"):
        load_index(tmp_path / "new")


def test_an_index_knows_the_weights_it_was_built_with(tmp_path, sparse_model, encoded, tiny_backbone) -> None:
    index_corpus(encoded, tmp_path / "index")
    index = load_index(tmp_path / "index")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_texts(sparse_model, index, [TEXTS[0]])
    other = lion_st.build(tiny_backbone(), "sparse")
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    with pytest.warns(UserWarning, match="weights or their type differ"):
        search_run(other, index, {"q": TEXTS[0]})


def test_pruning_shrinks_the_index(tmp_path, encoded) -> None:
    whole = index_corpus(encoded, tmp_path / "whole").index
    report = index_corpus(encoded, tmp_path / "pruned", pruning=Pruning(top_terms=10))
    pruned = report.index
    assert report.recall["Recall@10"] < 1.0
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
