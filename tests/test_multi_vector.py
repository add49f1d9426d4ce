"""Multi-vector models: built, saved, exported, encoded, searched and evaluated like the others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import lion
from peft import LoraConfig
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.util import maxsim
from torch.nn.utils.rnn import pad_sequence

import lion_st
from lion_st.data import save_beir
from lion_st.encoding import EncodedCorpus, encode_corpus, encode_texts
from lion_st.encoding.vectors import TokenVectors, to_token_vectors
from lion_st.evaluation.evaluate import evaluate_retrieval
from lion_st.indexes import StorageError, create_index, exact_multi_vector, load_index
from lion_st.modules import MultiVectorHead
from lion_st.retrieval import ModelRetriever, index_corpus
from lion_st.retrieval.search import require_term_weights
from lion_st.training.query_encoders import static_query_encoder, truncated_query_encoder

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def build(backbone: str, **options):
    torch.manual_seed(3)
    lengths = dict(query_length=24, document_length=40)
    return lion_st.build(backbone, "multi_vector", token_dimension=16, device="cpu", **(lengths | options))


@pytest.fixture(scope="module")
def model(tiny_backbone):
    return build(tiny_backbone(), document_prompt="d: ")


def test_a_token_has_its_projected_state_brought_to_length_1(tiny_backbone, family, texts):
    model = build(tiny_backbone(family))
    assert isinstance(model, MultiVectorEncoder) and lion_st.paradigm_of(model) == "multi_vector"
    together = model.encode_document(texts)
    weight = model[1].projection.linear.weight.detach()
    for text, vectors in zip(texts, together, strict=True):
        with torch.no_grad():
            features = model[0](model[0].preprocess([text], task="document"))
        projected = features["token_embeddings"][0] @ weight.T
        torch.testing.assert_close(vectors, projected / projected.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert len({len(vectors) for vectors in together}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_counts_nowhere(dtype):
    head = MultiVectorHead(8, 4).to(dtype).eval()
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    states[0, :2] = 0
    mask, ids = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), torch.ones(2, 4, dtype=torch.long)
    found = head({"token_embeddings": states, "attention_mask": mask, "input_ids": ids})["sentence_embedding"]
    assert found.isfinite().all() and not found[0, :2].any()
    torch.testing.assert_close(found[1].norm(dim=-1), torch.ones(4, dtype=dtype), rtol=2e-3, atol=0)
    states[0, :2] = 9
    noisy = head({"token_embeddings": states, "attention_mask": mask, "input_ids": ids})["token_embeddings"]
    torch.testing.assert_close(noisy, found)
    states[1, 1] = torch.nan
    with torch.no_grad(), pytest.raises(ValueError, match=r"numbers 1 of the batch\) are NaN or infinite"):
        head({"token_embeddings": states, "attention_mask": mask, "input_ids": ids})
    with pytest.raises(ValueError, match="token_dimension must be at least 1, got 0"):
        MultiVectorHead(8, 0)


def test_what_is_exported_and_saved_is_stock(tiny_backbone, texts, tmp_path, stock_vectors):
    models = {
        "full": build(tiny_backbone(), query_prompt="q: ", document_prompt="d: ", add_eos=True),
        "adapter": build(tiny_backbone(), lora=LORA),
    }
    folders = {name: lion_st.export(model, tmp_path / name) for name, model in models.items()}
    models["full"].save_pretrained(str(tmp_path / "saved"))
    folders["saved"] = tmp_path / "saved"
    kinds = [module["type"] for module in json.loads((folders["full"] / "modules.json").read_text())]
    assert not any(kind.startswith("lion_st") for kind in kinds)
    found = stock_vectors([(folder, "MultiVectorEncoder") for folder in folders.values()], texts)
    for name, folder in folders.items():
        live, loaded = models[name.replace("saved", "full")], lion_st.load(folder, device="cpu")
        assert [type(module).__name__ for module in loaded] == ["LionTransformer", "MultiVectorHead"]
        for task in ("query", "document"):
            expected = pad_sequence(getattr(live, f"encode_{task}")(texts), batch_first=True)
            again = pad_sequence(getattr(loaded, f"encode_{task}")(texts), batch_first=True)
            torch.testing.assert_close(again, expected, rtol=0, atol=0 if name != "adapter" else 1e-5)
            stock = found[str(folder), "MultiVectorEncoder", task]
            np.testing.assert_allclose(stock, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_other_classes_refuse_the_checkpoint(model, tmp_path):
    folder = lion_st.export(model, tmp_path / "model", verify=False)
    for stock in (SentenceTransformer, SparseEncoder):
        with pytest.raises(ValueError, match=r"for sentence_transformers\.MultiVectorEncoder alone"):
            stock(str(folder), device="cpu", local_files_only=True)
    with pytest.raises(ValueError, match="needs a sparse model, this one is multi_vector"):
        lion_st.load(folder, as_sparse_encoder=True)
    with pytest.raises(ValueError, match="is a multi_vector model, not dense"):
        lion_st.load(folder, paradigm="dense")


def test_the_projection_of_an_adapters_model_stays_float32_and_comes_back_to_the_bit(tiny_backbone, texts, tmp_path):
    model = build(tiny_backbone(dtype="bfloat16"), lora=LORA)
    weight = model[1].projection.linear.weight
    assert weight.dtype == torch.float32 and weight.requires_grad and model[0].model.dtype == torch.bfloat16
    with torch.no_grad():
        weight.add_(1e-5)  # less than bfloat16 would keep
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = lion_st.load(tmp_path / "adapter", device="cpu")
    assert torch.equal(loaded[1].projection.linear.weight, weight)
    for one, other in zip(model.encode_query(texts), loaded.encode_query(texts), strict=True):
        assert torch.equal(one, other)
    lion_st.export(loaded, tmp_path / "merged")
    with pytest.raises(ValueError, match="is a bare adapter, without the projection"):
        (tmp_path / "adapter" / "modules.json").unlink(missing_ok=True)
        for file in (tmp_path / "adapter" / "0_Transformer").iterdir():
            file.replace(tmp_path / "adapter" / file.name)
        lion_st.load(tmp_path / "adapter", paradigm="multi_vector")


def test_what_multi_vector_models_cannot_do_is_refused_by_name(model, tmp_path):
    refusals = [
        (lambda: lion_st.export(model, tmp_path / "x", "SentenceTransformer"), "'MultiVectorEncoder' alone, not as"),
        (
            lambda: ModelRetriever(model, "seismic"),
            r"not search 'multi_vector' vectors: choose one of \['exact'\]",
        ),
        (lambda: truncated_query_encoder(model, [0]), "are made of sparse and dense models"),
        (lambda: static_query_encoder(model), "this one is multi_vector"),
        (lambda: require_term_weights(create_index("exact", "multi_vector")), "engine 'exact' for multi_vector ones"),
        (lambda: create_index("exact", "multi_vector").add(["a"], np.ones((1, 4))), "holds several vectors of each"),
        (lambda: create_index("exact", "dense").add(["a"], to_token_vectors([np.ones((2, 4))])), "got several"),
        (lambda: to_token_vectors(np.zeros((1, 3, 4))), "Text 0 has no token that counts"),
        (lambda: to_token_vectors([np.full((1, 3), np.nan)]), "NaN or infinity"),
        (lambda: TokenVectors(np.ones((3, 2)), np.array([0, 2])), "offsets from 0 to T"),
        (lambda: create_index("exact", "multi_vector", dtype="int8"), "'float32' or 'float16', got 'int8'"),
    ]
    for refused, message in refusals:
        with pytest.raises((ValueError, TypeError), match=message):
            refused()
    for words, message in (
        ("micro --paradigm dense --token_dimension 64", "--token_dimension is read with --paradigm multi_vector alone"),
        ("micro --paradigm multi_vector --query_encoder static", "--query_encoder is of sparse and dense models"),
        ("llama-3.2-1b --paradigm multi_vector --preset released", "paradigms sparse, dense, not multi_vector"),
    ):
        assert message in lion("train", "--backbone", *words.split(), exit_code=2)


# ---- vectors, shards and the index ----


def ragged(count: int, seed: int, width: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rng.integers(1, 9), width)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("windows", [(512, 32_768), (5, 11)])
def test_the_index_finds_what_stock_maxsim_finds(windows, monkeypatch, tmp_path):
    monkeypatch.setattr(exact_multi_vector, "QUERY_TOKENS", windows[0])
    monkeypatch.setattr(exact_multi_vector, "DOCUMENT_TOKENS", windows[1])
    documents, queries = ragged(60, 0), ragged(7, 1)
    ids = [f"d{row}" for row in range(60)]
    scores = maxsim([torch.from_numpy(one) for one in queries], [torch.from_numpy(one) for one in documents]).numpy()
    index = create_index("exact", "multi_vector")
    index.add(ids[:25], documents[:25])
    index.add(ids[25:], documents[25:])
    best = np.argsort(-scores, axis=1, kind="stable")[:, :10]

    def require_best(index, among=None):
        found = index.search(queries, 10, allowed=among)
        for row, hits in enumerate(found):
            rows = best[row] if among is None else [one for one in np.argsort(-scores[row]) if ids[one] in among][:10]
            assert [one for one, _ in hits] == [ids[one] for one in rows]
            np.testing.assert_allclose([score for _, score in hits], scores[row, rows], rtol=1e-4, atol=1e-5)

    require_best(index)
    require_best(index, {f"d{row}" for row in range(20, 45)})
    index.save(tmp_path / "index")
    require_best(load_index(tmp_path / "index"))
    require_best(load_index(tmp_path / "index", memory_map=True))
    index.delete(ids[:30])
    require_best(index, set(ids[30:]))
    index.compact()
    require_best(index, set(ids[30:]))
    assert index.stats()["documents"] == 30


def test_a_damaged_index_is_refused(tmp_path):
    index = create_index("exact", "multi_vector", dtype="float16")
    index.add(["a", "b"], ragged(2, 0))
    index.save(tmp_path / "index")
    (offsets,) = (tmp_path / "index").rglob("offsets*")
    damaged = bytearray(offsets.read_bytes())
    damaged[-1] ^= 0x7F
    offsets.write_bytes(damaged)
    with pytest.raises(StorageError):
        load_index(tmp_path / "index")


def test_token_vectors_are_taken_by_place_slice_and_mask():
    texts = ragged(5, 0)
    vectors = to_token_vectors(texts)
    for places, expected in (([3, 0], [3, 0]), (slice(1, 4, 2), [1, 3]), (np.arange(5) == 2, [2])):
        for one, row in zip(range(len(expected)), expected, strict=True):
            part = vectors[places]
            np.testing.assert_array_equal(part.values[part.offsets[one] : part.offsets[one + 1]], texts[row])
    assert vectors[:0].shape == (0, 8)


def test_a_corpus_on_disk_and_its_index_hold_what_is_encoded(model, texts, tmp_path):
    rows = [{"id": f"d{row}", "text": f"{text} {row}"} for row, text in enumerate(texts * 3)]
    encode_corpus(model, rows, tmp_path / "corpus", shard_documents=10, show_progress=False)
    ids, stored = EncodedCorpus(tmp_path / "corpus").whole()
    expected = encode_texts(model, [row["text"] for row in rows], "document")
    assert ids == [row["id"] for row in rows]
    np.testing.assert_array_equal(stored.offsets, expected.offsets)
    np.testing.assert_allclose(stored.values, expected.values, atol=1e-5)
    for row, vectors in enumerate(model.encode_document([row["text"] for row in rows])):
        own = stored[[row]].values
        np.testing.assert_allclose(own, vectors.numpy(), atol=1e-5)
    report = index_corpus(tmp_path / "corpus", tmp_path / "index", engine_parameters={"dtype": "float16"})
    assert report.recall["Recall@10"] > 0.95
    with pytest.raises(ValueError, match="encoded by a multi_vector model"):
        index_corpus(tmp_path / "corpus", tmp_path / "pruned", pruning=lion_st.indexes.Pruning(top_terms=4))


def test_evaluation_is_by_exact_maxsim(model, texts, tmp_path):
    folder = save_beir(
        tmp_path / "data",
        {f"d{row}": {"title": "", "text": text} for row, text in enumerate(texts)},
        {f"q{row}": " ".join(text.split()[:3]) for row, text in enumerate(texts)},
        {f"q{row}": {f"d{(row + 1) % len(texts)}": 1} for row in range(len(texts))},
    )
    checkpoint = lion_st.export(model, tmp_path / "model", verify=False)
    lion("evaluate", checkpoint, "--data", folder, "--output", tmp_path / "out", "--quiet")
    stock = MultiVectorEncoder(str(checkpoint), device="cpu")
    scores = stock.similarity(
        stock.encode_query([" ".join(text.split()[:3]) for text in texts]), stock.encode_document(list(texts))
    ).numpy()
    ranks = [int((scores[row] > scores[row, (row + 1) % len(texts)]).sum()) for row in range(len(texts))]
    (row,) = evaluate_retrieval(checkpoint, folder, output_dir=tmp_path / "out")
    assert row["paradigm"] == "multi_vector" and row["engine"] == "exact"
    assert row["nDCG@10"] == pytest.approx(np.mean([1 / np.log2(rank + 2) for rank in ranks]), abs=1e-5)
    (meta,) = Path(tmp_path / "out" / "results").rglob("model_meta.json")
    assert json.loads(meta.read_text())["model_type"] == ["late-interaction"]
