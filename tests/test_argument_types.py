"""A path, a text or a string where another thing is expected is a TypeError that says what to pass."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import lion_st
from lion_st import encoding, evaluation, indexes, retrieval
from lion_st.encoding import fingerprints
from lion_st.retrieval.explain import expanded_terms
from lion_st.retrieval.search import require_term_weights

ROWS = sparse.csr_array(np.eye(2, 5, dtype=np.float32))
HITS = [[("d", 1.0)]]
RUN = {"q": {"d": 1.0}}
QRELS = {"q": {"d": 1}}


@pytest.fixture(scope="module")
def given(tiny_backbone):
    """A model, an index of its dimensions, and a tokenizer."""
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    index = indexes.create_index("exact", "sparse")
    index.add(["d"], model.encode_document(["a lion"]))
    return {"model": model, "index": index, "tokenizer": model.tokenizer}


OPENS_INDEX = r"lion_st\.indexes\.load_index\(path\) opens one"
OPENS_MODEL = r"lion_st\.load\(path\) makes one"
READS_RUN = r"lion_st\.evaluation\.read_run\(path\) reads one"
READS_QRELS = r"lion_st\.evaluation\.read_qrels\(path\) reads them"
RETRIEVER = r"pass a ModelRetriever\(lion_st\.load\(path\)\) or a Bm25Retriever\(\)"
LIST = r"Give a list of {}, got the string 'path'"
TOKENIZER = "pass model.tokenizer"
QUERY_IDS = LIST.format("ids of queries")
DOCUMENT_IDS = LIST.format("ids, one per document")
ENCODE = "encode it, as `search_texts` does"
CASES = {
    # retrieval
    "search_texts index": (lambda g: retrieval.search_texts(g["model"], "path", ["a"]), OPENS_INDEX),
    "search_texts model": (lambda g: retrieval.search_texts("path", g["index"], ["a"]), OPENS_MODEL),
    "search_texts query": (lambda g: retrieval.search_texts(g["model"], g["index"], "path"), LIST.format("queries")),
    "search_texts None": (lambda g: retrieval.search_texts(g["model"], g["index"], [None]), "query 0 expected"),
    "search_texts mapping": (lambda g: retrieval.search_texts(g["model"], g["index"], {"q": "a"}), "queries.values"),
    "search_run index": (lambda g: retrieval.search_run(g["model"], Path("path"), {"q": "a"}), OPENS_INDEX),
    "search_run model": (lambda g: retrieval.search_run("path", g["index"], {"q": "a"}), OPENS_MODEL),
    "search_run queries": (lambda g: retrieval.search_run(g["model"], g["index"], "path"), r"read_topics\(path\)"),
    "search_run list": (lambda g: retrieval.search_run(g["model"], g["index"], ["a"]), "pass texts by id"),
    "explain index": (lambda g: require_term_weights("path"), OPENS_INDEX),
    "explain_score": (lambda g: retrieval.explain_score("a query", ROWS[[0]], g["tokenizer"]), ENCODE),
    "explain_score document": (lambda g: retrieval.explain_score(ROWS[[0]], ["a text"], g["tokenizer"]), ENCODE),
    "explain_score tokenizer": (lambda g: retrieval.explain_score(ROWS[[0]], ROWS[[0]], "path"), TOKENIZER),
    "explain_score model": (lambda g: retrieval.explain_score(ROWS[[0]], ROWS[[0]], None), TOKENIZER),
    "top_terms": (lambda g: retrieval.top_terms("a text", g["tokenizer"]), ENCODE),
    "expanded_terms": (lambda g: expanded_terms("a text", "a text", g["tokenizer"]), ENCODE),
    "index_corpus queries": (lambda g: retrieval.index_corpus("a", "b", queries=["a"]), ENCODE),
    "index_corpus queries path": (lambda g: retrieval.index_corpus("a", "b", queries=Path("q")), r"\.whole\(\) reads"),
    "index_corpus pruning": (lambda g: retrieval.index_corpus("a", "b", pruning="top_terms=3"), "Pruning"),
    "ModelRetriever": (lambda g: retrieval.ModelRetriever("path"), OPENS_MODEL),
    "ModelRetriever query_model": (lambda g: retrieval.ModelRetriever(g["model"], query_model="path"), OPENS_MODEL),
    "ModelRetriever.index": (lambda g: retrieval.ModelRetriever(g["model"]).index("path"), "pass texts by id"),
    "ModelRetriever.index list": (lambda g: retrieval.ModelRetriever(g["model"]).index(["a"]), "pass texts by id"),
    "ModelRetriever.index None": (lambda g: retrieval.ModelRetriever(g["model"]).index({"d": None}), "document 'd'"),
    "ModelRetriever.search": (lambda g: retrieval.ModelRetriever(g["model"]).search("path"), LIST.format("queries")),
    "Bm25Retriever.index": (lambda g: retrieval.Bm25Retriever().index("path"), "pass texts by id"),
    "Bm25Retriever.index number": (lambda g: retrieval.Bm25Retriever().index({1: "a"}), "An id of a document"),
    "Bm25Retriever.search": (lambda g: retrieval.Bm25Retriever().search("path"), LIST.format("queries")),
    "HybridRetriever": (lambda g: retrieval.HybridRetriever("path"), LIST.format("retrievers")),
    "HybridRetriever paths": (lambda g: retrieval.HybridRetriever(["a", "b"]), RETRIEVER),
    "HybridRetriever models": (lambda g: retrieval.HybridRetriever([g["model"], g["model"]]), RETRIEVER),
    "reciprocal_rank_fusion": (lambda g: retrieval.reciprocal_rank_fusion("path"), "fuse_runs takes runs"),
    "reciprocal_rank_fusion runs": (lambda g: retrieval.reciprocal_rank_fusion([RUN, RUN]), "fuse_runs takes runs"),
    "convex_fusion": (lambda g: retrieval.convex_fusion(["a", "b"], [1, 1]), "fuse_runs takes runs"),
    "fit_convex_weights": (lambda g: retrieval.fit_convex_weights([HITS, HITS], "path", len), QUERY_IDS),
    # encoding
    "encode_corpus": (lambda g: encoding.encode_corpus("path", "corpus", "out"), OPENS_MODEL),
    "encode_texts": (lambda g: encoding.encode_texts("path", ["a"], "query"), OPENS_MODEL),
    "model_name": (lambda g: fingerprints.model_name("path"), OPENS_MODEL),
    "model_fingerprint": (lambda g: fingerprints.model_fingerprint("path"), OPENS_MODEL),
    "weights_fingerprint": (lambda g: fingerprints.weights_fingerprint(Path("path")), OPENS_MODEL),
    # indexes
    "add texts": (lambda g: indexes.create_index("exact", "sparse").add(["d"], ["a text"]), ENCODE),
    "add one id": (lambda g: indexes.create_index("exact", "sparse").add("path", ROWS), DOCUMENT_IDS),
    "add path": (lambda g: indexes.create_index("exact", "sparse").add(["d"], Path("path")), r"\.whole\(\) reads them"),
    "search texts": (lambda g: g["index"].search(["a text"]), ENCODE),
    "load_index": (lambda g: indexes.load_index(g["index"]), "PathLike"),
    # evaluation
    "evaluate_run qrels": (lambda g: evaluation.evaluate_run("path", RUN), READS_QRELS),
    "evaluate_run run": (lambda g: evaluation.evaluate_run(QRELS, "path"), READS_RUN),
    "evaluate_queries metrics": (lambda g: evaluation.evaluate_queries(QRELS, RUN, "path"), LIST.format("metrics")),
    "compare_runs": (lambda g: evaluation.compare_runs(QRELS, ["a", "b"]), "Runs by name expected"),
    "compare_runs paths": (lambda g: evaluation.compare_runs(QRELS, {"a": "a", "b": "b"}), READS_RUN),
    "fuse_runs": (lambda g: evaluation.fuse_runs(["a.trec", "b.trec"]), READS_RUN),
    "fit_run_weights": (lambda g: evaluation.fit_run_weights([RUN, RUN], "path"), READS_QRELS),
    "fit_hybrid": (lambda g: evaluation.fit_hybrid(["a", "b"], "path"), RETRIEVER),
    "MtebSearch": (lambda g: evaluation.MtebSearch("path"), RETRIEVER),
    "prune_report": (lambda g: evaluation.prune_report("path", (["q"], ROWS), QRELS), "reads them"),
    "write_run": (lambda g: evaluation.write_run("out", "path"), READS_RUN),
    "write_qrels": (lambda g: evaluation.write_qrels("out", "path"), READS_QRELS),
    "evaluate_retrieval": (
        lambda g: evaluation.evaluate_retrieval(g["model"], "path", metrics="path"), LIST.format("metrics")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_to_pass_is_said(given, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, message = CASES[case]
    with pytest.raises(TypeError, match=message):
        call(given)
    assert not list(tmp_path.iterdir())
