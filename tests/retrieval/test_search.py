import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus, encode_texts
from lion_st.indexes import Pruning, StorageError, create_index, load_index
from lion_st.indexes.seismic import SeismicIndex
from lion_st.retrieval import ModelRetriever, index_corpus, search_run, search_texts
from lion_st.retrieval.search import exact_hits, sampled_queries

DOCUMENTS = [{"id": f"d{number}", "text": f"{TEXTS[number % 8]} {number}"} for number in range(64)]


def changed(model):
    """The model, with other weights from here on."""
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    return model


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, sparse_model) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    return encode_corpus(sparse_model, DOCUMENTS, folder / "encoded", shard_documents=20, show_progress=False)


@pytest.mark.parametrize("engine", ["exact", "torch"])
def test_shards_become_an_index_that_answers_with_reasons(tmp_path, sparse_model, encoded, engine) -> None:
    report = index_corpus(encoded, tmp_path / "index", engine)
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


def test_a_retriever_finds_the_allowed_documents_alone(sparse_model) -> None:
    retriever = ModelRetriever(sparse_model)
    retriever.index({f"d{number}": text for number, text in enumerate(TEXTS)})
    everything = retriever.search(TEXTS[:2], k=8)
    some = retriever.search(TEXTS[:2], k=8, allowed={"d1", "d6"})
    assert some == [[hit for hit in hits if hit[0] in {"d1", "d6"}] for hits in everything] and all(some)


def test_an_approximate_index_is_measured_against_exact_search(tmp_path, sparse_model, encoded) -> None:
    report = index_corpus(encoded, tmp_path / "index", "seismic", recall_at=(1, 10))
    assert report.recall["Recall@10"] > 0.9
    assert report.recall.keys() == {"Recall@1", "Recall@10"}
    queries = encode_texts(sparse_model, TEXTS, "query")  # almost dense, of an untrained model
    whole = {"summary_energy": 1.0}
    real = index_corpus(encoded, tmp_path / "real", "seismic", engine_parameters=whole, queries=queries, recall_at=(5,))
    assert real.recall["Recall@5"] > 0.9
    with pytest.raises(ValueError, match=r"queries have 3 dimensions and the documents \d+: encode both"):
        index_corpus(encoded, tmp_path / "other", "seismic", queries=torch.ones(1, 3))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="the engines 'exact' and 'torch' keep"):
        search_texts(sparse_model, report.index, [TEXTS[0]], explain=True)


def test_a_quantised_index_is_measured_as_well(tmp_path, encoded) -> None:
    report = index_corpus(encoded, tmp_path / "index", engine_parameters={"quantization": "uint8"}, recall_at=(10,))
    assert 0.9 < report.recall["Recall@10"] <= 1.0
    assert index_corpus(encoded, tmp_path / "unmeasured", "seismic", sample=0).recall == {}


def test_an_index_is_built_without_measuring_its_size(tmp_path, encoded, monkeypatch) -> None:
    monkeypatch.setattr(SeismicIndex, "stats", None)
    assert len(index_corpus(encoded, tmp_path / "index", "seismic").recall) == 2


def test_queries_are_cut_to_a_length_of_choice(tmp_path, sparse_model, encoded) -> None:
    index = index_corpus(encoded, tmp_path / "index").index
    (cut,) = index.search(encode_texts(sparse_model, [TEXTS[2]], "query", max_tokens=3), 5)
    (whole,) = index.search(encode_texts(sparse_model, [TEXTS[2]], "query"), 5)
    assert cut != whole
    assert search_run(sparse_model, index, {"q": TEXTS[2]}, 5, max_tokens=3) == {"q": dict(cut)}
    results = search_texts(sparse_model, index, [TEXTS[2]], 5, max_tokens=3)
    assert [(result.document, result.score) for result in results] == cut


def test_a_run_of_many_queries_is_searched_in_blocks(tmp_path, sparse_model, encoded, monkeypatch) -> None:
    index = index_corpus(encoded, tmp_path / "index").index
    queries = {f"q{number}": text for number, text in enumerate(TEXTS)}
    whole = search_run(sparse_model, index, queries, 5)
    monkeypatch.setattr("lion_st.retrieval.search.QUERIES_AT_ONCE", 3)
    parts = search_run(sparse_model, index, queries, 5)
    assert list(parts) == list(queries)
    for query, hits in whole.items():
        assert parts[query] == pytest.approx(hits, rel=1e-5)


def test_exact_hits_of_shards_are_those_of_the_whole(sparse_model, encoded) -> None:
    queries = encode_texts(sparse_model, TEXTS[:3], "query")
    index = create_index("exact", "sparse")
    index.add(*EncodedCorpus(encoded).whole())
    assert exact_hits(EncodedCorpus(encoded), queries, 7) == index.search(queries, 7)


def test_shards_without_a_sampled_document_are_not_read(tmp_path, encoded) -> None:
    _, vectors = EncodedCorpus(encoded).whole()
    for count in (2, 3, 7, 200):
        step = -(-64 // count)
        sample = sampled_queries(EncodedCorpus(encoded), count, None)
        assert sample.shape[0] == len(range(0, 64, step)) and (sample != vectors[::step]).nnz == 0
    copy = shutil.copytree(encoded, tmp_path / "copy")
    (copy / "shard-000003.safetensors").unlink()
    assert sampled_queries(EncodedCorpus(copy), 2).shape[0] == 2  # of rows 0 and 32
    with pytest.raises(StorageError, match="shard-000003"):
        sampled_queries(EncodedCorpus(copy), 7)


def test_a_collection_that_holds_other_documents_is_not_added_to(tmp_path, encoded) -> None:
    pytest.importorskip("pymilvus")
    uri = str(tmp_path / "lion.db")
    create_index("milvus", "sparse", uri=uri).add(["other"], [[1.0] * 320])
    with pytest.raises(StorageError, match="already holds 1 documents"):
        index_corpus(encoded, tmp_path / "index", "milvus", engine_parameters={"uri": uri}, sample=0)
    assert len(create_index("milvus", "sparse", uri=uri)) == 1
    report = index_corpus(encoded, tmp_path / "new", "milvus", engine_parameters={"uri": uri, "collection": "new"})
    assert report.recall["Recall@10"] == 1.0
    report.index.close()
    assert len(load_index(tmp_path / "new")) == 64
    (tmp_path / "lion.db").rename(tmp_path / "moved.db")
    with pytest.raises(StorageError, match="which is gone"):
        load_index(tmp_path / "new")


def test_a_collection_holds_the_documents_of_one_source(tmp_path, sparse_model, encoded, tiny_backbone) -> None:
    pytest.importorskip("pymilvus")
    engine: dict[str, Any] = {"engine_parameters": {"uri": str(tmp_path / "lion.db")}, "sample": 0}
    index_corpus(encoded, tmp_path / "first", "milvus", **engine)
    queries = encode_texts(sparse_model, TEXTS[:3], "query")
    found = load_index(tmp_path / "first").search(queries)
    other_model = encode_corpus(
        changed(lion_st.build(tiny_backbone(), "sparse")), DOCUMENTS, tmp_path / "a", show_progress=False
    )
    other_corpus = encode_corpus(
        sparse_model,
        [{**document, "text": f"{document['text']} more"} for document in DOCUMENTS],
        tmp_path / "b",
        shard_documents=20,
        show_progress=False,
    )
    for folder, pruning in ((other_model, None), (other_corpus, None), (encoded, Pruning(top_terms=3))):
        with pytest.raises(StorageError, match="already holds 64 documents"):
            index_corpus(folder, tmp_path / "second", "milvus", pruning=pruning, **engine)
    index_corpus(encoded, tmp_path / "first", "milvus", overwrite=True, **engine)  # as after an interruption
    first = load_index(tmp_path / "first")
    assert first.search(queries) == found
    first.delete_collection()
    with pytest.raises(StorageError, match="is gone from"):
        load_index(tmp_path / "first")
    index_corpus(other_model, tmp_path / "second", "milvus", **engine)
    with pytest.raises(StorageError, match="was filled anew since"):
        load_index(tmp_path / "first")
    assert len(load_index(tmp_path / "second")) == 64


def test_retrievers_on_one_cluster_have_collections_of_their_own(tmp_path, sparse_model) -> None:
    pytest.importorskip("pymilvus")
    settings = {"uri": str(tmp_path / "lion.db")}
    one, two = (ModelRetriever(sparse_model, "milvus", engine_parameters=settings) for _ in range(2))
    one.index({"a": TEXTS[0]})
    two.index({"b": TEXTS[0]})
    assert [retriever.search([TEXTS[0]], 1)[0][0][0] for retriever in (one, two)] == ["a", "b"]


def test_an_index_knows_the_weights_it_was_built_with(tmp_path, sparse_model, encoded, tiny_backbone) -> None:
    index_corpus(encoded, tmp_path / "index")
    index = load_index(tmp_path / "index")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_texts(sparse_model, index, [TEXTS[0]])
    other = changed(lion_st.build(tiny_backbone(), "sparse"))
    with pytest.warns(UserWarning, match="weights, their type, attention or head differ"):
        search_run(other, index, {"q": TEXTS[0]})


def test_a_model_of_another_kind_of_vectors_is_refused_by_name(sparse_model, dense_model, tiny_backbone) -> None:
    others = [lion_st.build(tiny_backbone(), paradigm) for paradigm in ("hybrid", "multi_vector")]
    models = {lion_st.paradigm_of(model): model for model in (sparse_model, dense_model, *others)}
    for paradigm, model in models.items():
        index = create_index("exact", paradigm)  # type: ignore[arg-type]
        index.add(["a", "b"], encode_texts(model, TEXTS[:2], "document"))
        for other in models.values():
            if other is not model:
                with pytest.raises(ValueError, match=f"holds {paradigm} vectors, and .* model: give the model"):
                    search_texts(other, index, [TEXTS[0]])
                with pytest.raises(ValueError, match=f"and the documents' model {paradigm}: give one made for it"):
                    ModelRetriever(model, query_model=other)
        assert search_run(model, index, {"q": TEXTS[0]}, k=1)


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
