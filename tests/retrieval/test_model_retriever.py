"""A model and an index together, and what they are opened from."""

import gc
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer, SparseEncoder
from sklearn.feature_extraction.text import TfidfTransformer
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus, encode_texts, load_encoder, model_fingerprint
from lion_st.encoding.shards import encoded_queries
from lion_st.encoding.vectors import keep_top_terms
from lion_st.evaluation import open_retriever
from lion_st.indexes import StorageError, create_index
from lion_st.retrieval import Bm25Retriever, ModelRetriever, index_corpus, search_run, search_texts
from lion_st.retrieval import retriever as retriever_module
from lion_st.training.query_encoders import save_query_encoder, truncated_query_encoder

DOCUMENTS = {f"d{number}": text for number, text in enumerate(TEXTS)}
RECORDS = [{"id": key, "text": text} for key, text in DOCUMENTS.items()]


@pytest.fixture(scope="module")
def model(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse", query_length=16, document_length=32, device="cpu")


def search(retriever: ModelRetriever) -> list:
    retriever.index(DOCUMENTS)
    return retriever.search(TEXTS[:3], 5)


def assert_same(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        assert dict(one) == pytest.approx(dict(other), rel=1e-4)


@pytest.mark.parametrize("kind", ["model", "bm25"])
def test_a_search_before_an_index_is_an_error(model, kind) -> None:
    retriever = ModelRetriever(model) if kind == "model" else Bm25Retriever()
    with pytest.raises(RuntimeError, match=r"call index\(documents\) before search"):
        retriever.search(["what is a lion"])
    with pytest.raises(TypeError, match="Give a list of queries, got the string 'what is a lion'"):
        retriever.search("what is a lion")


def test_documents_go_into_the_index_part_by_part(model, monkeypatch) -> None:
    expected = search(ModelRetriever(model))
    seen = []
    monkeypatch.setattr(retriever_module, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(
        retriever_module,
        "encode_texts",
        lambda model, texts, *a, **k: seen.append(len(texts)) or encode_texts(model, texts, *a, **k),
    )
    assert_same(search(ModelRetriever(model)), expected)
    assert seen == [3, 3, 2, 3]  # the last are the queries


def test_an_encoded_corpus_is_searched_as_it_is(model, tmp_path, monkeypatch) -> None:
    expected = search(ModelRetriever(model))
    encoded = encode_corpus(model, RECORDS, tmp_path / "encoded", shard_documents=3, show_progress=False)
    retriever = ModelRetriever(model, encoded=encoded)
    assert_same(search(retriever), expected)
    assert retriever.figures()["document_terms"] > 0


def test_an_encoded_corpus_of_something_else_is_refused(model, tiny_backbone, tmp_path) -> None:
    encoded = encode_corpus(model, RECORDS, tmp_path / "encoded", shard_documents=3, show_progress=False)
    other = lion_st.build(tiny_backbone("qwen3"), "sparse", device="cpu")
    with pytest.raises(StorageError, match="with other weights"):
        ModelRetriever(other, encoded=encoded).index(DOCUMENTS)
    with pytest.raises(StorageError, match="cut to 32 tokens, not to 20"):
        ModelRetriever(model, encoded=encoded, document_length=20).index(DOCUMENTS)
    shorter = encode_corpus(model, RECORDS, tmp_path / "shorter", max_tokens=8, show_progress=False)
    with pytest.raises(StorageError, match="cut to 8 tokens, not to 32"):
        ModelRetriever(model, encoded=shorter).index(DOCUMENTS)
    ended = lion_st.build(tiny_backbone(), "sparse", document_length=32, add_eos=True, device="cpu")
    with pytest.raises(StorageError, match="from other tokens than"):
        ModelRetriever(ended, encoded=encoded).index(DOCUMENTS)
    with pytest.raises(StorageError, match="holds 8 documents, and 7 are to be indexed"):
        ModelRetriever(model, encoded=encoded).index({key: DOCUMENTS[key] for key in list(DOCUMENTS)[1:]})
    with pytest.raises(StorageError, match="from 'd3' on"):
        ModelRetriever(model, encoded=encoded).index(DOCUMENTS | {"d4": "another text"})


@pytest.mark.parametrize(
    ("paradigm", "one", "other", "named"),
    [
        ("dense", {}, {"pooling": "last_token"}, "modules .*lasttoken"),
        ("dense", {}, {"normalize": True}, "modules .*Normalize"),
        ("dense", {}, {"causal": True}, "is_causal False, not True"),
        ("sparse", {}, {"activation": "double_log1p"}, "modules .*log1p_relu"),
        ("sparse", {}, {"scale": 1.0}, "scale 0.42.*, not 1.0"),
        ("hybrid", {"pooling": "mean"}, {}, "modules .*Normalize"),
    ],
)
def test_documents_encoded_by_the_same_weights_with_another_head_or_attention_are_refused(
    tiny_backbone, tmp_path, paradigm, one, other, named
) -> None:
    model, changed = (lion_st.build(tiny_backbone(), paradigm, device="cpu", **options) for options in (one, other))
    encoded = encode_corpus(model, RECORDS, tmp_path / "encoded", show_progress=False)
    ModelRetriever(model, encoded=encoded).index(DOCUMENTS)
    with pytest.raises(StorageError, match=f"with the weights of .* and other settings, with {named}"):
        ModelRetriever(changed, encoded=encoded).index(DOCUMENTS)
    index = index_corpus(encoded, tmp_path / "index").index
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_texts(model, index, TEXTS[:1])
    with pytest.warns(UserWarning, match="attention or head differ"):
        search_texts(changed, index, TEXTS[:1])
    queries = encode_corpus(changed, RECORDS, tmp_path / "queries", task="query", show_progress=False)
    with pytest.warns(UserWarning, match="attention or head differ"):
        encoded_queries(queries, EncodedCorpus(encoded))


def test_encodings_are_read_by_either_class_and_without_what_earlier_versions_did_not_note(model, tmp_path) -> None:
    lion_st.export(model, tmp_path / "model", model_type="SparseEncoder")
    encoded = encode_corpus(
        lion_st.load(tmp_path / "model", device="cpu"), RECORDS, tmp_path / "encoded", show_progress=False
    )
    stock = SparseEncoder(str(tmp_path / "model"), device="cpu")
    ModelRetriever(stock, encoded=encoded).index(DOCUMENTS)
    stock[1].embedding_dimension = None  # as of most published ones, until their first text
    before = model_fingerprint(stock)
    assert stock.encode("a text").shape[0] == stock[1].embedding_dimension and model_fingerprint(stock) == before
    encoded = encode_corpus(model, RECORDS, tmp_path / "older", show_progress=False)
    for file in ("settings.json", "manifest.json"):
        content = json.loads((encoded / file).read_text())
        content.get("settings", content).pop("model_settings")
        (encoded / file).write_text(json.dumps(content))
    encode_corpus(model, RECORDS, encoded, show_progress=False)
    ModelRetriever(model, encoded=encoded).index(DOCUMENTS)


def test_documents_encoded_with_another_limit_of_terms_are_refused(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(), "sparse", document_length=32, device="cpu")
    whole = encode_corpus(model, RECORDS, tmp_path / "whole", show_progress=False)
    model[1].document_max_active_dims = 3
    with pytest.raises(
        StorageError, match=r"holds all terms of a text, and the model keeps 3: .*--document-max-active-dims"
    ):
        ModelRetriever(model, encoded=whole).index(DOCUMENTS)
    few = encode_corpus(model, RECORDS, tmp_path / "few", show_progress=False)
    retriever = ModelRetriever(model, encoded=few)
    retriever.index(DOCUMENTS)
    assert retriever.figures()["document_terms"] == 3
    model[1].document_max_active_dims = None
    with pytest.raises(StorageError, match="holds 3 terms of a text, and the model keeps all"):
        ModelRetriever(model, encoded=few).index(DOCUMENTS)
    model[1].query_max_active_dims = 2  # decides nothing about documents
    ModelRetriever(model, encoded=whole).index(DOCUMENTS)


def test_an_interrupted_encoding_goes_on_with_smaller_batches(model, tmp_path) -> None:
    whole = encode_corpus(model, RECORDS, tmp_path / "whole", shard_documents=3, show_progress=False)
    broken = (row if row["id"] != "d5" else {"id": "d5", "text": 5} for row in RECORDS)
    settings = {"shard_documents": 3, "show_progress": False}
    with pytest.raises(ValueError, match="Bad record"):
        encode_corpus(model, broken, tmp_path / "parts", on_bad_record="raise", **settings)
    parts = encode_corpus(model, RECORDS, tmp_path / "parts", tokens_per_batch=64, **settings)
    for (ids, vectors), (other_ids, other) in zip(EncodedCorpus(parts), EncodedCorpus(whole), strict=True):
        assert ids == other_ids
        np.testing.assert_allclose(vectors.toarray(), other.toarray(), atol=1e-5)


def test_queries_of_a_beir_folder_are_its_queries(model, tmp_path: Path) -> None:
    (tmp_path / "beir").mkdir()
    for name in ("corpus", "queries"):
        (tmp_path / "beir" / f"{name}.jsonl").write_text(json.dumps({"_id": name, "text": f"lions in {name}"}) + "\n")
    for task, name in (("query", "queries"), ("document", "corpus")):
        encoded = encode_corpus(model, tmp_path / "beir", tmp_path / name, task=task, show_progress=False)
        assert EncodedCorpus(encoded).whole()[0] == [name]


def test_a_router_is_opened_as_the_class_that_saved_it(model, tiny_backbone, tmp_path) -> None:
    dense = lion_st.build(tiny_backbone(), "dense", query_length=16, device="cpu")
    for full, stock in ((model, SparseEncoder), (dense, SentenceTransformer)):
        student = truncated_query_encoder(full, 1)
        router = load_encoder(save_query_encoder(student, full, tmp_path / stock.__name__))
        assert isinstance(router, stock)
        for task, live in (("query", student), ("document", full)):
            difference = abs(encode_texts(router, TEXTS, task) - encode_texts(live, TEXTS, task)).max()
            assert difference < 1e-4
        assert_same(search(ModelRetriever(router)), search(ModelRetriever(full, query_model=student)))


def test_a_collection_with_documents_is_not_emptied(model, tmp_path) -> None:
    place = {"uri": str(tmp_path / "lion.db"), "collection": "mine"}
    mine = create_index("milvus", "sparse", **place)
    mine.add(["a"], encode_texts(model, TEXTS[:1], "document"))
    with pytest.raises(StorageError, match=r"'mine' at .* holds 1 documents"):
        ModelRetriever(model, "milvus", engine_parameters=place)
    mine.delete_collection()
    retriever = ModelRetriever(model, "milvus", engine_parameters=place)
    assert_same(search(retriever), search(ModelRetriever(model)))
    search(retriever)
    del retriever
    gc.collect()
    assert len(create_index("milvus", "sparse", **place)) == 0


def test_terms_are_limited_by_task_when_a_checkpoint_is_opened(tiny_backbone, model, tmp_path) -> None:
    model.save_pretrained(str(tmp_path / "sparse"), create_model_card=False)
    limited = load_encoder(tmp_path / "sparse", query_max_active_dims=3, document_max_active_dims=7)
    whole = load_encoder(tmp_path / "sparse")
    for task, count in (("query", 3), ("document", 7)):
        vectors = encode_texts(limited, TEXTS, task)
        assert vectors.nnz == count * len(TEXTS)
        heaviest = keep_top_terms(encode_texts(whole, TEXTS, task), count)
        assert abs(vectors - heaviest).max() < 1e-6
    retriever = open_retriever(
        str(tmp_path / "sparse"),
        load_options={"query_max_active_dims": 3, "document_max_active_dims": 7, "device": "cpu"},
    )
    assert retriever.name == "sparse-q3-d7" and retriever.fingerprint() != ModelRetriever(whole).fingerprint()
    search(retriever)
    assert (retriever.figures()["query_terms"], retriever.figures()["document_terms"]) == (3, 7)
    dense = lion_st.build(tiny_backbone(), "dense", device="cpu")
    dense.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    with pytest.raises(ValueError, match="dense model, which has no terms to limit"):
        load_encoder(tmp_path / "dense", query_max_active_dims=3)
    with pytest.raises(ValueError, match="document_max_active_dims is at least 1, got 0"):
        load_encoder(tmp_path / "sparse", document_max_active_dims=0)


def test_terms_of_queries_are_weighed_by_their_rarity_in_the_collection(tiny_backbone, model, monkeypatch):
    monkeypatch.setattr(retriever_module, "DOCUMENTS_AT_ONCE", 3)
    documents = encode_texts(model, TEXTS, "document").toarray()
    queries = encode_texts(model, TEXTS[:3], "query").toarray()
    idf = TfidfTransformer(norm=None, smooth_idf=True).fit(documents).idf_
    scores = (queries * idf) @ documents.T
    retriever = ModelRetriever(model, idf=True)
    for _ in range(2):  # of a second index alone, not of both
        found = search(retriever)
        for hits, row in zip(found, scores, strict=True):
            assert dict(hits) == pytest.approx({f"d{best}": row[best] for best in np.argsort(-row)[:5]}, rel=1e-4)
    (hits,) = retriever.rerank(TEXTS[:1], [["d1", "d4"]])
    assert dict(hits) == pytest.approx({"d1": scores[0, 1], "d4": scores[0, 4]}, rel=1e-4)
    assert search_texts(model, retriever.documents, TEXTS[:1], 1, idf=True)[0].score == pytest.approx(max(scores[0]))
    run = search_run(model, retriever.documents, {"q": TEXTS[0]}, 5, idf=True)
    assert run["q"] == pytest.approx(dict(found[0]))
    assert search_texts(model, create_index("exact", "sparse"), TEXTS[:1], idf=True) == []
    assert retriever.fingerprint() != ModelRetriever(model).fingerprint()
    assert open_retriever(model, idf=True).name == f"{open_retriever(model).name}-idf"
    with pytest.raises(ValueError, match=r"idf weighs terms of sparse models, and .* is dense"):
        ModelRetriever(lion_st.build(tiny_backbone(), "dense", device="cpu"), idf=True)


def test_blank_documents_are_never_found_and_ids_that_were_never_given_are_an_error(model) -> None:
    retriever = ModelRetriever(model)
    retriever.index(DOCUMENTS | {"blank": " ", "empty": ""})
    one, other = retriever.rerank(TEXTS[:2], [["blank", "empty"], ["d1", "blank"]])
    assert one == [] and [document for document, _ in other] == ["d1"]
    assert retriever.search(TEXTS[:2], allowed=["blank"]) == [[], []]
    for find in (
        lambda ids: retriever.rerank(TEXTS[:1], [ids]),
        lambda ids: retriever.search(TEXTS[:1], allowed=ids),
    ):
        with pytest.raises(ValueError, match="None of the 2 allowed documents, 'blank' for example, is indexed"):
            find(["d99", "blank"])
    with pytest.raises(ValueError, match="Got 1 lists of candidates for 2 queries"):
        retriever.rerank(TEXTS[:2], [["d1"]])


def test_queries_come_in_their_order_whatever_they_are_kept_in(model) -> None:
    pandas = pytest.importorskip("pandas")
    queries, labels = TEXTS[:4], [3, 0, 2, 1]
    kinds = {"a generator": lambda: iter(queries), "a series": lambda: pandas.Series(queries, index=labels)}
    for retriever in (ModelRetriever(model), Bm25Retriever()):
        retriever.index(DOCUMENTS)
        expected = retriever.search(queries, 3)
        assert retriever.search([], 3) == [] and all(expected)
        for make in kinds.values():
            assert retriever.search(make(), 3) == expected
    index, candidates = create_index("exact", "sparse"), [["d0", "d1"]] * 4
    vectors = encode_texts(model, queries, "query")
    index.add([*DOCUMENTS], encode_texts(model, np.array(TEXTS), "document"))
    retriever = ModelRetriever(model)
    retriever.index(DOCUMENTS)
    for make in kinds.values():
        assert (encode_texts(model, make(), "query") != vectors).nnz == 0
        assert [result.query for result in search_texts(model, index, make(), 1)] == queries
        assert retriever.rerank(make(), candidates) == retriever.rerank(queries, candidates)


def test_a_search_after_the_first_searches_once(model, monkeypatch) -> None:
    retriever = ModelRetriever(model)
    retriever.index(DOCUMENTS)
    retriever.search(TEXTS[:1])
    searched, search_index = [], retriever.documents.search
    monkeypatch.setattr(retriever.documents, "search", lambda *given: searched.append(given) or search_index(*given))
    retriever.search(TEXTS[:1])
    assert len(searched) == 1


def test_bm25_stems_words_when_asked_to() -> None:
    pytest.importorskip("Stemmer")
    plain, stemmed = Bm25Retriever(), Bm25Retriever(stemmer="porter")
    for bm25 in (plain, stemmed):
        bm25.index({"a": "a lion was hunting", "b": "tigers rest"})
    assert plain.search(["hunted"]) == [[]]
    assert [key for key, _ in stemmed.search(["hunted"])[0]] == ["a"]
    assert (plain.name, stemmed.name) == ("bm25", "bm25-porter")
    assert plain.fingerprint() != stemmed.fingerprint()
    with pytest.raises(ValueError, match=r"stemmer must be one of .*porter.*, or None, got 'krovetz'"):
        Bm25Retriever(stemmer="krovetz")


def test_bm25_says_what_it_cannot_do() -> None:
    bm25 = Bm25Retriever()
    with pytest.raises(ValueError, match="the documents have none"):
        bm25.index({"a": "", "b": "the of"})
    bm25.index(DOCUMENTS)
    with pytest.raises(ValueError, match="k is at least 1, got 0"):
        bm25.search(["lions"], 0)
