"""Where a fine-tuning starts: a backbone, an adapter of one, or a retriever of any kind."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from tiny_models import as_sparse_encoder, stirred
from tiny_runs import tiny_run

import lion_st
from lion_st.errors import UsageError
from lion_st.hub import import_released
from lion_st.modules.adapters import save_adapter
from lion_st.training.dry_run import describe_run
from lion_st.training.retriever import train_retriever
from lion_st.training.starting import build_model

PROMPTS = dict(query_prompt="q: ", document_prompt="d: ", query_length=20, document_length=30)


@pytest.fixture(scope="module")
def retrievers(tiny_backbone, tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """A sparse retriever in every form on the disk, and a vector of it."""
    folder = tmp_path_factory.mktemp("retrievers")

    def model(**options):
        return stirred(lion_st.build(tiny_backbone(), "sparse", device="cpu", **PROMPTS, **options), size=0.02)

    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    full, adapted = model(), model(lora=lora)
    full.save_pretrained(str(folder / "saved"))
    as_sparse_encoder(full).save_pretrained(str(folder / "saved for SparseEncoder"))
    adapted.save_pretrained(str(folder / "adapter"))
    lion_st.export(full, folder / "export")
    import_released(folder / "adapter", output=folder / "import")
    made = {"adapter": adapted, "import": adapted}
    return {
        name: (folder / name, made.get(name, full).encode_query("what do lions eat", convert_to_tensor=True))
        for name in ("saved", "saved for SparseEncoder", "adapter", "export", "import")
    }


FORMS = ("saved", "saved for SparseEncoder", "adapter", "export", "import")


@pytest.mark.parametrize(
    ("form", "use_peft"), [*((form, True) for form in FORMS), ("saved", False), ("adapter", False)]
)
def test_training_goes_on_from_a_retriever_in_any_form(retrievers, data, tmp_path, form, use_peft):
    path, vector = retrievers[form]
    settings = dict(max_steps=1, save_steps=1, warmup_steps=0, learning_rate=1e-2 if use_peft else 1e-3)
    arguments, training = tiny_run(str(path), data, tmp_path / "run", use_peft=use_peft, **settings)
    assert {name: getattr(arguments, name) for name in PROMPTS} == PROMPTS
    assert '"query_length": 20' in describe_run(arguments, training)
    before = build_model(arguments, "cpu", tmp_path / "run").encode_query("what do lions eat").to_dense()
    torch.testing.assert_close(before, vector, rtol=0, atol=1e-5)
    folder = train_retriever(arguments, training)
    stock = SentenceTransformer(str(folder), device="cpu")
    assert stock.prompts == {"query": "q: ", "document": "d: "} and stock[0].query_length == 20
    after = stock.encode_query("what do lions eat", convert_to_tensor=True)
    assert 1e-4 < (after - vector).abs().max() < 0.5
    # What the trainer wrote on the way is the same model, so that an interrupted run goes on with it.
    checkpoint = lion_st.load(tmp_path / "run" / "checkpoint-1", device="cpu")
    assert abs(checkpoint.encode_query("what do lions eat") - after.numpy()).max() < 1e-5


def test_an_adapter_is_trained_on_if_asked(retrievers, data, tmp_path):
    path, vector = retrievers["adapter"]
    arguments, training = tiny_run(str(path), data, tmp_path / "run", use_peft=True, train_adapter=True, max_steps=1)
    model = build_model(arguments, "cpu")
    torch.testing.assert_close(model.encode_query("what do lions eat").to_dense(), vector, rtol=0, atol=1e-5)
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad} == {2}
    train_retriever(arguments, training)
    assert not (tmp_path / "run" / "start").exists()
    arguments, _ = tiny_run(str(retrievers["export"][0]), data, tmp_path / "x", use_peft=True, train_adapter=True)
    with pytest.raises(ValueError, match=r"--train_adapter trains .* has none"):
        build_model(arguments, "cpu")


def test_a_bare_adapter_is_merged_for_a_new_one(tiny_backbone, retrievers, data, tmp_path):
    model = lion_st.load(retrievers["adapter"][0], device="cpu")
    (tmp_path / "mntp").mkdir()
    save_adapter(model[0].model, tmp_path / "mntp")
    model[0].processor.save_pretrained(tmp_path / "mntp")
    settings = dict(use_peft=True, max_steps=1, **PROMPTS)
    arguments, training = tiny_run(str(tmp_path / "mntp"), data, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=r"is an adapter.*merge_backbone"):
        build_model(arguments, "cpu")
    before = build_model(arguments, "cpu", tmp_path / "run").encode_query("what do lions eat").to_dense()
    torch.testing.assert_close(before, retrievers["adapter"][1], rtol=0, atol=1e-5)
    folder = train_retriever(arguments, training)
    assert (folder / "start" / "config.json").is_file()
    assert SentenceTransformer(str(folder), device="cpu").encode("lion").shape == (320,)


def test_lengths_and_prompts_may_change_and_nothing_else(retrievers, data, tmp_path):
    path = str(retrievers["export"][0])
    arguments, _ = tiny_run(path, data, tmp_path / "run", query_length=9, query_prompt="ask: ")
    model = build_model(arguments, "cpu")
    assert (model[0].query_length, model[0].document_length) == (9, 30)
    assert model.prompts == {"query": "ask: ", "document": "d: "}
    arguments, _ = tiny_run(path, data, tmp_path / "run", add_eos=True, scale=2.0)
    with pytest.raises(ValueError, match=r"is a retriever, whose own settings .*leave out --add_eos, --scale"):
        build_model(arguments, "cpu")
    arguments, _ = tiny_run(path, data, tmp_path / "run", "dense", "cl")
    with pytest.raises(ValueError, match="is a sparse model, not dense"):
        build_model(arguments, "cpu")


def test_a_prompt_of_passages_is_that_of_documents(tiny_backbone, data, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    model.prompts = {"query": "q: ", "passage": "p: "}
    model.save_pretrained(str(tmp_path / "saved"))
    arguments, _ = tiny_run(str(tmp_path / "saved"), data, tmp_path / "run")
    assert (arguments.query_prompt, arguments.document_prompt) == ("q: ", "p: ")
    text = "Lions sleep."
    expected, vector = model.encode_document(text), build_model(arguments, "cpu").encode_document(text).to_dense()
    assert abs(vector.numpy() - expected).max() < 1e-5


def test_a_dry_run_counts_the_layers_that_a_retriever_keeps(tiny_backbone, data, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = lion_st.build(tiny_backbone(), "sparse", layers=[1], lora=lora, device="cpu")
    model.save_pretrained(str(tmp_path / "adapter"))
    lion_st.export(model, tmp_path / "export")
    adapter, merged = (
        describe_run(*tiny_run(str(tmp_path / form), data, tmp_path / "run")) for form in ("adapter", "export")
    )
    assert adapter[adapter.index("Parameters:") :] == merged[merged.index("Parameters:") :]


def test_a_backbone_is_made_what_the_options_say(tiny_backbone, data, tmp_path):
    options = dict(causal=True, add_eos=True, pooling="last_token", normalize=True)
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "run", "dense", "cl", max_steps=1, **options)
    stock = SentenceTransformer(str(train_retriever(arguments, training)), device="cpu")
    assert abs(stock.encode("lion") @ stock.encode("lion") - 1) < 1e-5
    assert stock.tokenizer("lion")["input_ids"][-1] == stock.tokenizer.eos_token_id
    assert stock[0].model.config.is_causal is True
    settings = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
    assert {name: settings[name] for name in options} == options


def test_limits_of_terms_are_kept_in_the_result_and_trained_on(tiny_backbone, data, tmp_path):
    limits = dict(max_steps=1, save_steps=1, query_max_active_dims=3, document_max_active_dims=6)
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "run", use_peft=True, **limits)
    folder = train_retriever(arguments, training)
    texts = ["lions do this and that on day 3", "zebras rest"]
    for source in (folder, folder / "checkpoint-1"):
        model = lion_st.load(source, as_sparse_encoder=True, device="cpu")
        assert model.encode_query(texts)._nnz() == 3 * 2 and model.encode_document(texts)._nnz() == 6 * 2
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(folder), device="cpu")
    arguments, _ = tiny_run(str(folder / "checkpoint-1"), data, tmp_path / "on", use_peft=True, query_max_active_dims=4)
    model = build_model(arguments, "cpu", tmp_path / "on")
    assert model.encode_query(texts)._nnz() == 4 * 2 and model.encode_document(texts)._nnz() == 6 * 2
    with pytest.raises(UsageError, match="--query_max_active_dims is read with --paradigm sparse"):
        tiny_run(tiny_backbone(), data, tmp_path / "dense", "dense", query_max_active_dims=3)
