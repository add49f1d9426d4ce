import json
import os

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer, SparseEncoder
from tiny_models import FAMILIES, stirred

import lion_st
from lion_st.hub import merge_backbone
from lion_st.modules.adapters import save_adapter

TEXTS = [
    "What is the capital of France?",
    "lion",
    "A sparse retriever expands a query with terms that the query does not contain, and an index keeps them " * 3,
]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


# (family, tied embeddings, LoRA, dtype)
VARIANTS = [(family, True, False, "float32") for family in FAMILIES]
VARIANTS += [("llama", False, True, "float32"), ("gemma2", True, True, "float32")]
VARIANTS += [("qwen3", True, True, "bfloat16"), ("gemma2", True, False, "bfloat16")]


@pytest.fixture(scope="module")
def exported(tiny_backbone, stock_vectors, tmp_path_factory):
    """Vectors of live models, and of their exports in a process without lion_st, by (path, class, task)."""
    folder = tmp_path_factory.mktemp("exported")
    live, jobs = {}, []
    for family, tied, with_lora, dtype in VARIANTS:
        for paradigm in ("sparse", "dense"):
            torch.manual_seed(7)  # of the adapter, whatever test ran before
            model = lion_st.build(
                tiny_backbone(family, tied, dtype=dtype),
                paradigm,
                lora=LORA if with_lora else None,
                query_prompt="query: ",
                query_length=10,
                document_length=40,
                device="cpu",
            )
            before = {name: tensor.clone() for name, tensor in stirred(model).state_dict().items()}
            kind = "SparseEncoder" if with_lora and paradigm == "sparse" else "SentenceTransformer"
            path = folder / f"{family}-{tied}-{with_lora}-{dtype}-{paradigm}"
            lion_st.export(model, path, kind, verify=False)
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            jobs.append((path, kind))
            for task in ("query", "document"):
                live[str(path), kind, task] = dtype, getattr(model, f"encode_{task}")(TEXTS)
    return live, stock_vectors(jobs, TEXTS)


def test_a_stock_process_gives_the_live_vectors(exported):
    live, stock = exported
    assert live.keys() == stock.keys() and len(live) == 4 * len(VARIANTS)
    for key, (dtype, vectors) in live.items():
        difference = abs(vectors - stock[key]).max()
        # bfloat16 keeps 8 bits, and merging and folding round weights that the live model keeps apart.
        tolerance = 1e-5 if dtype == "float32" else 0.04 * abs(vectors).max()
        assert difference < tolerance, (key, difference)


@pytest.mark.parametrize("kind", ["SentenceTransformer", "SparseEncoder"])
def test_an_exported_checkpoint_loads_with_the_fast_modules(tiny_backbone, texts, tmp_path, kind):
    model = stirred(lion_st.build(tiny_backbone(), "sparse", lora=LORA, query_prompt="q: ", device="cpu"))
    lion_st.export(model, tmp_path / "out", kind)
    for as_sparse_encoder in (False, True):
        loaded = lion_st.load(tmp_path / "out", as_sparse_encoder=as_sparse_encoder, device="cpu")
        assert type(loaded[1]).__name__ == "SpladeHead" and loaded[1].scale == 1.0
        vectors = loaded.encode_query(texts, convert_to_tensor=True)
        expected = model.encode_query(texts, convert_to_tensor=True)
        torch.testing.assert_close(vectors.to_dense(), expected, rtol=0, atol=1e-5)


def test_a_sparse_checkpoint_saved_for_dense_rows_refuses_sparse_encoder(tiny_backbone, texts, tmp_path):
    model = stirred(lion_st.build(tiny_backbone(), "sparse", device="cpu"))
    model.save(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="Cannot determine the embedding dimension"):
        SparseEncoder(str(tmp_path / "saved"), device="cpu")
    stock = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(stock.encode(texts) - model.encode(texts)).max() < 1e-5
    loaded = lion_st.load(tmp_path / "saved", device="cpu")
    assert len(loaded) == 2 and loaded[1].scale == model[1].scale
    assert (loaded.encode(texts) == model.encode(texts)).all()
    as_rows = lion_st.load(tmp_path / "saved", as_sparse_encoder=True, device="cpu")
    as_rows.save(str(tmp_path / "tensors"))
    SparseEncoder(str(tmp_path / "tensors"), device="cpu")


def test_an_exported_checkpoint_names_no_module_of_ours_and_holds_no_pickle(tiny_backbone, tmp_path):
    path = lion_st.export(lion_st.build(tiny_backbone(), "sparse", device="cpu"), tmp_path / "out")
    assert path == tmp_path / "out"
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".py")) for name in files)
    assert "lion_st.safetensors" not in files
    kinds = [entry["type"] for entry in json.loads((path / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    settings = json.loads((path / "config.json").read_text())
    assert settings["is_causal"] is False
    assert (path.stat().st_mode & 0o777) == (0o777 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_checkpoint_exports_without_being_loaded_by_hand(tiny_backbone, texts, tmp_path):
    model = stirred(lion_st.build(tiny_backbone(), "dense", lora=LORA, device="cpu"))
    model.save_pretrained(str(tmp_path / "trained"))
    path = lion_st.export(tmp_path / "trained", tmp_path / "out")
    stock = SentenceTransformer(str(path), device="cpu")
    assert abs(stock.encode(texts) - model.encode(texts)).max() < 1e-5


def test_a_scale_that_is_not_a_power_of_two_is_folded_in_float32(tiny_backbone, tmp_path):
    """hidden_size ** -0.25 is 0.42 for 32 and would be rounded to 8 bits."""
    model = lion_st.build(tiny_backbone(dtype="bfloat16"), "sparse", device="cpu")
    lion_st.export(model, tmp_path / "rounded")
    saved = load_file(tmp_path / "rounded" / "model.safetensors")
    assert saved["model.norm.weight"].dtype == torch.float32
    torch.testing.assert_close(saved["model.norm.weight"], model[0].final_norm.weight.float() * 32**-0.25)
    assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16
    exact = lion_st.build(tiny_backbone(dtype="bfloat16"), "sparse", scale=0.25, device="cpu")
    lion_st.export(exact, tmp_path / "exact")
    saved = load_file(tmp_path / "exact" / "model.safetensors")
    assert saved["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(saved["model.norm.weight"], exact[0].final_norm.weight * 0.25)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_bfloat16_export_is_as_near_to_float32_as_the_live_model(tiny_backbone, texts, tmp_path, with_lora):
    backbone = tiny_backbone(dtype="bfloat16")
    model = stirred(lion_st.build(backbone, "sparse", lora=LORA if with_lora else None, device="cpu"))
    model.save_pretrained(str(tmp_path / "trained"))
    exact = lion_st.load(tmp_path / "trained", dtype=torch.float32, device="cpu").encode(texts)
    path = lion_st.export(model, tmp_path / "out")
    exported = SentenceTransformer(str(path), device="cpu").encode(texts)
    live_error, export_error = abs(model.encode(texts) - exact).max(), abs(exported - exact).max()
    assert live_error > 0 and export_error < 2 * live_error
    if not with_lora:
        widened = SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32})
        assert abs(widened.encode(texts) - exact).max() < 1e-5


def test_a_checkpoint_that_stock_trained_on_is_not_read_with_the_norm_of_before(tiny_backbone, texts, tmp_path):
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save(str(tmp_path), create_model_card=False)
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    with torch.no_grad():
        stock[0].model.model.norm.weight.mul_(1.01)
    stock.save(str(tmp_path), create_model_card=False)
    with pytest.raises(ValueError, match=r"lion_st\.safetensors' is of other weights than those beside it"):
        lion_st.load(tmp_path, device="cpu")
    (tmp_path / "lion_st.safetensors").unlink()
    assert abs(lion_st.load(tmp_path, device="cpu").encode(texts) - stock.encode(texts)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
def test_large_states_are_compared_by_their_size(tiny_backbone, texts, tmp_path, pooling):
    model = lion_st.build(tiny_backbone(), "dense", pooling=pooling, device="cpu")
    with torch.no_grad():
        model[0].final_norm.weight.mul_(500)  # as of Qwen2, whose states reach hundreds
    lion_st.export(model, tmp_path / "out", create_model_card=False)
    assert abs(model.encode(texts)).max() > 100


def test_gemmas_norm_is_folded_around_one(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone("gemma2"), "sparse", device="cpu")
    lion_st.export(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(1 + saved, (1 + model[0].final_norm.weight) * 32**-0.25)


def test_large_weights_are_sharded(tiny_backbone, texts, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    original = PreTrainedModel.save_pretrained

    def small_shards(self, path, max_shard_size, **kwargs):
        assert max_shard_size == "5GB"
        return original(self, path, max_shard_size="20KB", **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", small_shards)
    path = lion_st.export(model, tmp_path / "out")
    assert (path / "model.safetensors.index.json").is_file()
    assert abs(lion_st.load(path, device="cpu").encode(texts) - model.encode(texts)).max() < 1e-5


# ---- limits of active terms ----


def test_one_limit_is_exported_for_the_sparse_encoder_alone(tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", max_active_dims=6, device="cpu")
    lion_st.export(model, tmp_path / "out", "SparseEncoder")
    stock = SparseEncoder(str(tmp_path / "out"), device="cpu")
    assert stock.encode(texts)._nnz() == 6 * len(texts)
    assert (lion_st.load(tmp_path / "out", device="cpu").encode(texts) > 0).sum() == 6 * len(texts)
    with pytest.raises(ValueError, match=r"max_active_dims=6.*SparseEncoder"):
        lion_st.export(model, tmp_path / "other")
    same = lion_st.build(tiny_backbone(), "sparse", query_max_active_dims=6, document_max_active_dims=6, device="cpu")
    lion_st.export(same, tmp_path / "same", "SparseEncoder")
    stock = SparseEncoder(str(tmp_path / "same"), device="cpu")
    assert stock.encode_query(texts)._nnz() == stock.encode_document(texts)._nnz() == 6 * len(texts)
    by_task = lion_st.build(tiny_backbone(), "sparse", query_max_active_dims=6, device="cpu")
    with pytest.raises(ValueError, match="one for queries and another for documents"):
        lion_st.export(by_task, tmp_path / "other", "SparseEncoder")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("model_type", ["SentenceTransformer", "SparseEncoder"])
def test_limits_that_stock_does_not_have_are_exported_on_request_for_lion_st_alone(
    tiny_backbone, texts, tmp_path, model_type
):
    model = stirred(lion_st.build(tiny_backbone(), "sparse", lora=LORA, document_max_active_dims=5, device="cpu"))
    lion_st.export(model, tmp_path / "out", model_type, with_limits=True)
    loaded = lion_st.load(tmp_path / "out", device="cpu")
    assert (loaded[1].query_max_active_dims, loaded[1].document_max_active_dims) == (None, 5)
    with pytest.raises(ValueError, match=r"A card says how to load .*limit.*lion-st export.*--all-terms"):
        lion_st.hub.render_card(tmp_path / "out", offline=True)
    for encode in ("encode_query", "encode_document"):
        assert abs(getattr(loaded, encode)(texts) - getattr(model, encode)(texts)).max() < 1e-5
    with pytest.raises(ValueError, match="trust_remote_code"):
        (SparseEncoder if model_type == "SparseEncoder" else SentenceTransformer)(str(tmp_path / "out"), device="cpu")


# ---- what is there already, and what goes wrong ----


def test_a_limit_of_the_sparse_encoder_itself_is_saved_and_exported(tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", query_max_active_dims=9, as_sparse_encoder=True, device="cpu")
    model.max_active_dims = 7
    expected = model.encode_query(texts).to_dense()
    assert (expected > 0).sum(1).tolist() == [7] * len(texts)
    model.save(str(tmp_path / "saved"), create_model_card=False)
    lion_st.export(model, tmp_path / "out", "SparseEncoder", create_model_card=False)
    for folder in ("saved", "out"):
        for found in (
            lion_st.load(tmp_path / folder, as_sparse_encoder=True, device="cpu"),
            SparseEncoder(str(tmp_path / folder), device="cpu"),
        ):
            torch.testing.assert_close(found.encode_query(texts).to_dense(), expected, rtol=1e-5, atol=1e-5)
    assert (model.max_active_dims, model[1].max_active_dims, model[1].query_max_active_dims) == (7, None, 9)
    with pytest.raises(ValueError, match=r"a stock SentenceTransformer has no limit of active terms .*=7"):
        lion_st.export(model, tmp_path / "dense rows")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_folder_is_kept_unless_told_otherwise(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    lion_st.export(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    dense = lion_st.build(tiny_backbone(), "dense", device="cpu")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lion_st.export(dense, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    lion_st.export(dense, tmp_path / "out", overwrite=True)
    assert lion_st.paradigm_of(lion_st.load(tmp_path / "out", device="cpu")) == "dense"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_a_checkpoint_is_never_replaced(tiny_backbone, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a checkpoint"):
        lion_st.export(lion_st.build(tiny_backbone(), "dense", device="cpu"), tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the size of files, which needs POSIX")
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tiny_backbone, tmp_path):
    import resource
    import signal

    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    lion_st.export(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError, match=r"export to .* failed"):
            lion_st.export(stirred(model), tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vectors_that_differ_are_never_published(tiny_backbone, tmp_path, monkeypatch):
    from lion_st.modules import folding

    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    monkeypatch.setattr(folding, "scaled_norm", lambda norm, scale: dict(norm.named_parameters()))
    with pytest.raises(ValueError, match="vectors differ from the live model's"):
        lion_st.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_stock_reads_as_far_as_lengths_that_were_changed(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "dense", query_length=4, document_length=6, device="cpu")
    model[0].document_length = 20
    long = "lions hunt at night in the tall grass of the plains and sleep in the shade"
    stock = SentenceTransformer(str(lion_st.export(model, tmp_path / "out")), device="cpu")
    assert stock.max_seq_length == 20
    assert stock.encode_document([long]) == pytest.approx(model.encode_document([long]), abs=1e-5)


def test_models_that_stock_cannot_express_are_refused(tiny_backbone, tmp_path):
    dense = lion_st.build(tiny_backbone(), "dense", device="cpu")
    with pytest.raises(ValueError, match="model_type must be"):
        lion_st.export(dense, tmp_path / "out", "CrossEncoder")
    with pytest.raises(ValueError, match="dense model exports as"):
        lion_st.export(dense, tmp_path / "out", "SparseEncoder")
    dense.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"Transformer \+ Normalize \+ Pooling"):
        lion_st.export(SentenceTransformer(str(tmp_path / "saved"), device="cpu"), tmp_path / "out")


# ---- backbones ----


def test_a_merged_adapter_is_a_backbone_to_build_on(tiny_backbone, texts, tmp_path):
    adapted = stirred(lion_st.build(tiny_backbone(), "sparse", lora=LORA, device="cpu"))
    (tmp_path / "adapter").mkdir()
    save_adapter(adapted[0].model, tmp_path / "adapter")
    adapted[0].processor.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_backbone"):
        lion_st.build(tmp_path / "adapter", "sparse", lora=LORA, device="cpu")
    backbone = merge_backbone(tmp_path / "adapter", tmp_path / "backbone")
    for start in (backbone, tmp_path / "adapter"):
        model = lion_st.build(start, "sparse", device="cpu")
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert abs(model.encode(texts) - adapted.encode(texts)).max() < 1e-5
    assert lion_st.build(backbone, "dense", lora=LORA, device="cpu").encode("lion").shape == (32,)
    with pytest.raises(ValueError, match="is not an adapter"):
        merge_backbone(tiny_backbone(), tmp_path / "other")
