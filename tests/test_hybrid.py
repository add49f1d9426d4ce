"""Hybrid models: both vectors of one pass, saved, exported, encoded, searched and evaluated as one model."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import lion
from peft import LoraConfig
from sentence_transformers import SentenceTransformer

import lion_st
from lion_st.data import save_beir
from lion_st.encoding import EncodedCorpus, encode_corpus, encode_texts
from lion_st.encoding.fingerprints import model_name
from lion_st.encoding.vectors import HybridVectors, to_hybrid
from lion_st.evaluation import evaluate_retrieval, fit_fusion, fit_hybrid, fuse_runs, read_run
from lion_st.exporting import single_models
from lion_st.indexes import Pruning, StorageError, create_index, load_index
from lion_st.modules import HybridHead
from lion_st.retrieval import HybridRetriever, ModelRetriever, index_corpus, search_texts
from lion_st.retrieval.search import exact_hits, require_term_weights
from lion_st.supervision import load_teacher
from lion_st.training.query_encoders import static_query_encoder, truncated_query_encoder

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
LENGTHS = {"query_length": 24, "document_length": 40, "device": "cpu"}


def build(backbone: str, paradigm: str = "hybrid", **options):
    torch.manual_seed(3)
    return lion_st.build(backbone, paradigm, **(LENGTHS | options))


@pytest.fixture(scope="module")
def model(tiny_backbone):
    return build(tiny_backbone(), document_prompt="d: ")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A checkpoint of the model with weights of its scores."""
    folder = tmp_path_factory.mktemp("hybrid") / "saved"
    model[1].fusion_weights = (0.4, 0.6)
    model.save_pretrained(str(folder))
    model[1].fusion_weights = None
    return folder


@pytest.fixture
def documents(texts):
    return {f"d{row}": f"{text} {row}" for row, text in enumerate(texts * 3)}


@pytest.fixture
def collection(texts, documents, tmp_path):
    queries = {f"q{row}": " ".join(text.split()[:4]) for row, text in enumerate(texts)}
    judged = {f"q{row}": {f"d{row + 8}": 1, f"d{(row + 3) % 8}": 1} for row in range(len(texts))}
    return save_beir(
        tmp_path / "data", {key: {"title": "", "text": text} for key, text in documents.items()}, queries, judged
    )


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"pooling": "mean"}, {"pooling": "last_token"}])
def test_one_pass_gives_the_vectors_of_both_models(tiny_backbone, texts, options):
    own = {"lora": LORA, "add_eos": True}
    hybrid = build(tiny_backbone(tied=False), **own, **options)
    sparse, dense = (build(tiny_backbone(tied=False), kind, **own) for kind in ("sparse", "dense"))
    dense[1] = type(dense[1])(32, options.get("pooling", "mean_normalized"), options.get("normalize", False))
    passes = []
    handle = hybrid[0].decoder.register_forward_hook(lambda *_: passes.append(1))
    for task in ("query", "document"):
        del passes[:]
        found = encode_texts(hybrid, texts, task)
        assert passes == [1] and found.shape == (len(texts), 320 + 32)
        assert (found.sparse != encode_texts(sparse, texts, task)).nnz == 0
        np.testing.assert_array_equal(found.dense, encode_texts(dense, texts, task))
        rows = getattr(hybrid, f"encode_{task}")(texts)
        np.testing.assert_array_equal(rows, np.hstack([found.sparse.toarray(), found.dense]))
    handle.remove()
    assert isinstance(hybrid, SentenceTransformer) and lion_st.paradigm_of(hybrid) == "hybrid"


def test_every_family_has_both(tiny_backbone, family, texts):
    hybrid = build(tiny_backbone(family))
    sparse, dense = single_models(hybrid)
    found = encode_texts(hybrid, texts, "document")
    np.testing.assert_array_equal(found.sparse.toarray(), sparse.encode_document(texts).to_dense().numpy())
    np.testing.assert_array_equal(found.dense, dense.encode_document(texts))


def test_what_is_saved_and_exported_comes_back_and_stock_loads_both_folders(
    tiny_backbone, texts, tmp_path, stock_vectors
):
    options = dict(query_prompt="q: ", document_prompt="d: ", activation="double_log1p", pooling="mean")
    models = {
        "full": build(tiny_backbone(tied=False), **options),
        "adapter": build(tiny_backbone(tied=False), **options, lora=LORA),
    }
    jobs = []
    for name, live in models.items():
        live[1].fusion_weights = [0.25, 0.75]
        expected = live.encode_document(texts)
        live.save_pretrained(str(tmp_path / f"{name}-saved"))
        lion_st.export(live, tmp_path / name)
        lion_st.export(live, tmp_path / f"{name}-one", with_limits=True)
        for folder in (f"{name}-saved", name, f"{name}-one"):
            loaded = lion_st.load(tmp_path / folder, paradigm="hybrid", device="cpu")
            assert loaded[1].fusion_weights == (0.25, 0.75) and loaded.prompts == live.prompts
            atol = 0 if name == "full" or "saved" in folder else 1e-5
            np.testing.assert_allclose(loaded.encode_document(texts), expected, rtol=0, atol=atol)
        jobs += [(tmp_path / name / "sparse", "SparseEncoder"), (tmp_path / name / "dense", "SentenceTransformer")]
    weights = [path for path in (tmp_path / "full-saved").rglob("model*.safetensors") if path.parent.name[0] != "2"]
    assert len(weights) == 1  # the backbone once
    for folder, _ in jobs:
        kinds = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
        assert not any(kind.startswith("lion_st") for kind in kinds)
    found = stock_vectors(jobs, texts)
    for folder, kind in jobs:
        for task in ("query", "document"):
            both = encode_texts(models[folder.parent.name], texts, task)
            own = both.sparse.toarray() if kind == "SparseEncoder" else both.dense
            np.testing.assert_allclose(found[str(folder), kind, task], own, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'lion_st\.modules\.hybrid_head\.HybridHead'.*not part of Sentence Transf"):
        SentenceTransformer(str(tmp_path / "full-saved"), device="cpu", local_files_only=True)
    assert 'lion_st.load("' in (tmp_path / "full-saved" / "README.md").read_text()
    assert model_name(lion_st.load(tmp_path / "full", device="cpu")) == "full"
    with pytest.raises(ValueError, match="is a saved retriever, not a backbone"):
        build(str(tmp_path / "full"))
    with pytest.raises(FileExistsError):
        lion_st.export(models["full"], tmp_path / "full")
    lion_st.export(models["full"], tmp_path / "full", overwrite=True, create_model_card=False, verify=False)
    settings = json.loads((tmp_path / "full" / "hybrid.json").read_text())
    for changed, said in (({"lateness": 3}, "lateness"), ({"fusion_weights": [0, 0]}, "not both 0")):
        (tmp_path / "full" / "hybrid.json").write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match=rf"full' has a hybrid\.json that this version cannot read \(.*{said}"):
            lion_st.load(tmp_path / "full")
    (tmp_path / "full" / "hybrid.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a whole export of a hybrid model: hybrid\.json lacks settings"):
        lion_st.load(tmp_path / "full")
    (tmp_path / "full" / "hybrid.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has a damaged hybrid\.json \(it holds a list\)"):
        lion_st.load(tmp_path / "full")


def test_searches_find_what_two_models_find_fused(saved, texts, documents, tmp_path):
    model = lion_st.load(saved, device="cpu")
    parts = [ModelRetriever(part) for part in single_models(model)]
    for weights in (None, (0.4, 0.6)):
        model[1].fusion_weights = weights
        fused = HybridRetriever(parts, weights)
        fused.index(documents)
        expected = fused.search(texts, 7)
        retriever = ModelRetriever(model)
        retriever.index(documents)
        assert retriever.search([*texts, " "], 7) == [*expected, []]
        assert retriever.rerank(texts[:1], [["d3", "d5"]])[0] != []
    figures = retriever.figures()
    assert figures["document_terms"] > 0 and figures["query_terms"] > 0 and figures["index_bytes"] > 0
    # A corpus on disk, an index of it, and what is in the queries or in the index of the weights.
    rows = [{"id": key, "text": text} for key, text in documents.items()]
    encode_corpus(model, rows, tmp_path / "corpus", shard_documents=10, show_progress=False)
    encode_corpus(
        model, [{"id": text, "text": text} for text in texts], tmp_path / "queries", task="query", show_progress=False
    )
    assert EncodedCorpus(tmp_path / "corpus").paradigm == "hybrid"
    report = index_corpus(tmp_path / "corpus", tmp_path / "index")
    assert report.recall == {}
    index = load_index(tmp_path / "index")
    results = search_texts(model, index, texts, 7)
    assert [(one.document, one.score) for one in results] == [hit for hits in expected for hit in hits]
    _, stored = EncodedCorpus(tmp_path / "queries").whole()
    assert load_index(tmp_path / "index", memory_map=True).search(stored, 7) == expected
    own = create_index("exact", "hybrid", weights=[0.4, 0.6])
    ids, vectors = EncodedCorpus(tmp_path / "corpus").whole()
    own.add(ids[:20], vectors[:20])
    own.add(ids[20:], (vectors.sparse[20:], vectors.dense[20:]))
    for found, hits in zip(own.search((stored.sparse, stored.dense), 7), expected, strict=True):
        # Products of other blocks may round otherwise, and so order texts that are equal.
        assert [score for _, score in found] == pytest.approx([score for _, score in hits], rel=1e-6)
    own.delete(["d0", "d9"])
    own.save(tmp_path / "own")
    assert len(load_index(tmp_path / "own")) == len(documents) - 2
    create_index("exact", "hybrid", weights=np.ones(2, np.float32)).save(tmp_path / "numpy")
    assert load_index(tmp_path / "numpy").weights == [1.0, 1.0]
    gpu = create_index("torch", "hybrid", weights=[0.4, 0.6], device="cpu")
    gpu.add(ids, vectors)
    found = gpu.search(stored, 7)
    assert [[one for one, _ in row] for row in found] == [[one for one, _ in row] for row in expected]


def test_milvus_searches_both_of_one_model(saved, texts, documents, tmp_path):
    pytest.importorskip("milvus_lite")
    model = lion_st.load(saved, device="cpu")
    refusal = r"fusion weights \(0\.4, 0\.6\).*Milvus takes an arctangent"
    with pytest.raises(ValueError, match=refusal):
        ModelRetriever(model, "milvus")  # before anything is encoded
    rows = [{"id": key, "text": text} for key, text in documents.items()]
    encode_corpus(model, rows, tmp_path / "corpus", show_progress=False)
    command = ("index", tmp_path / "corpus", tmp_path / "index", "--engine", "milvus", "--quiet")
    assert re.search(refusal, lion(*command, exit_code=1))
    assert not (tmp_path / "index").exists()
    lion(*command, "--set", "weights=[0.5,0.5]", "--overwrite")
    model[1].fusion_weights = None
    retriever = ModelRetriever(model, "milvus")
    retriever.index(documents)
    with pytest.raises(ValueError, match=refusal):  # a query encoder may have weights that the documents' has not
        retriever.documents.search(replace(encode_texts(model, texts[:1], "query"), weights=(0.4, 0.6)), 3)
    exact = ModelRetriever(model)
    exact.index(documents)
    expected = [dict(hits) for hits in exact.search(texts, len(documents))]
    for hits, by_ranks in zip(retriever.search(texts, 5), expected, strict=True):
        assert len(hits) == 5 and hits[0][1] == pytest.approx(max(by_ranks.values()), abs=1e-4)


def test_evaluation_is_that_of_two_runs_fused_with_the_weights_that_were_fitted(saved, collection, tmp_path):
    model = lion_st.load(saved, device="cpu")
    parts = [ModelRetriever(part, name=name) for part, name in zip(single_models(model), "sd", strict=True)]
    expected = fit_hybrid(parts, collection, split="test").weights
    lion("export", saved, tmp_path / "out", "--dev", collection, "--dev-split", "test", "--quiet")
    fitted = lion_st.load(tmp_path / "out", device="cpu")
    assert list(fitted[1].fusion_weights) == expected != [0.4, 0.6]
    shown = lion("evaluate", tmp_path / "out", "--data", collection, "--output", tmp_path / "r", "--quiet")
    assert "out" in shown
    (row,) = evaluate_retrieval(tmp_path / "out", collection, output_dir=tmp_path / "r")
    assert row["paradigm"] == "hybrid" and row["engine"] == "exact" and row["document_terms"] > 0
    runs = [read_run(evaluate_retrieval(part, collection, output_dir=tmp_path / part.name)[0]["run"]) for part in parts]
    by_hand, found = fuse_runs(runs, expected), read_run(row["run"])
    assert by_hand.keys() == found.keys()
    for query, hits in by_hand.items():
        assert found[query] == pytest.approx(hits, abs=1e-5)
    fitted[1].fusion_weights = None
    (other,) = evaluate_retrieval(fitted, collection, output_dir=tmp_path / "r", name="out")
    assert other["run"] != row["run"]  # other weights are another result


def test_what_hybrid_models_cannot_do_is_refused_by_name(model, saved, tmp_path):
    index = create_index("exact", "hybrid")
    index.add(["a"], (np.ones((1, 3), np.float32), np.ones((1, 2), np.float32)))
    sparse = np.ones((1, 4), np.float32)
    query = HybridVectors(to_hybrid((sparse, sparse)).sparse, sparse)

    def set_weights(*weights):
        model[1].fusion_weights = weights

    def learned(model):
        model[1].learn_thresholds()
        try:
            lion_st.export(model, tmp_path / "x")
        finally:
            model[1].thresholds = None

    pair = lion_st.export(model, tmp_path / "pair", verify=False, create_model_card=False)
    refusals = [
        (lambda: lion_st.export(model, tmp_path / "x", "SparseEncoder"), "leave out model_type='SparseEncoder'"),
        (lambda: learned(model), "learned thresholds have no place in a stock checkpoint"),
        (lambda: lion_st.load(saved, as_sparse_encoder=True), "needs a sparse model, this one is hybrid"),
        (lambda: lion_st.load(saved, paradigm="dense"), "is a hybrid model, not dense"),
        (lambda: set_weights(0.0, 0.0), r"not both 0; got \(0\.0, 0\.0\)"),
        (lambda: set_weights(1.0), "two finite numbers"),
        (lambda: set_weights(float("nan"), 1.0), "two finite numbers"),
        (lambda: set_weights("1", True), "two finite numbers"),
        (lambda: HybridHead(8, fusion_weights=0.5), r"two finite numbers.*got 0\.5"),
        (lambda: model.encode(["a"], truncate_dim=8), "truncate_dim=8 would keep the first terms"),
        (lambda: ModelRetriever(model, "seismic"), r"not search 'hybrid' vectors.*\['exact', 'torch', 'milvus'\]"),
        (lambda: truncated_query_encoder(model, [0]), "this one is hybrid: take one of the two folders"),
        (lambda: static_query_encoder(model), "sparse model, this one is hybrid"),
        (lambda: load_teacher(str(saved)), "two scores have no common scale: give one of the two folders"),
        (lambda: load_teacher(str(pair)), "two scores have no common scale: give one of the two folders"),
        (lambda: require_term_weights(index), "engine 'exact' for hybrid ones"),
        (lambda: exact_hits([(["a"], query)], query, 1), "do not compare"),
        (lambda: create_index("exact", "hybrid", weights=[1.0]), "one finite weight >= 0 for each of the 2"),
        (lambda: create_index("exact", "hybrid", candidates=0), "candidates is an integer of at least 1, got 0"),
        (lambda: index.search(query), "dimensions and got vectors of 4"),
        (lambda: index.add(["b"], query), "has 3 terms and got vectors of 4"),
        (lambda: index.add(["b"], sparse), "holds a sparse and a dense vector of each text"),
        (lambda: index.search(("text", "text")), "got the text 'text': encode it"),
        (lambda: create_index("exact", "dense").add(["b"], query), "use paradigm='hybrid'"),
        (lambda: HybridVectors(query.sparse, np.ones((2, 3))), "one sparse and one dense vector, got 1 and 2"),
        (lambda: fit_fusion(single_models(model)[0], tmp_path), "fit_fusion takes a hybrid model, this one is sparse"),
    ]
    for refused, message in refusals:
        with pytest.raises((ValueError, TypeError, AttributeError), match=f"(?s){message}"):
            refused()
    assert len(index) == 1 and index.search((np.ones((1, 3)), np.ones((1, 2))))[0][0][0] == "a"
    refused = lion("export", tmp_path / "none", tmp_path / "y", "--dev", "nowhere", exit_code=1)
    assert "none" in refused and not (tmp_path / "y").exists()
    rows = [{"id": "a", "text": "lions"}]
    encode_corpus(model, rows, tmp_path / "corpus", show_progress=False)
    with pytest.raises(ValueError, match="encoded by a hybrid model"):
        index_corpus(tmp_path / "corpus", tmp_path / "pruned", pruning=Pruning(top_terms=4))
    index.save(tmp_path / "index")
    (data,) = (tmp_path / "index").glob("data-*")
    shutil.rmtree(data / "dense")
    with pytest.raises(StorageError, match="dense"):
        load_index(tmp_path / "index")
