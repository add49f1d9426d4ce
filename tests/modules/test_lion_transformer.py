import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, GPT2Config, T5Config

import lion_st
from lion_st.modules import LionTransformer


def edited_copy(source, folder, **config) -> Path:
    path = shutil.copytree(source, folder)
    settings = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


def hidden_states(transformer, **features):
    with torch.no_grad():
        return transformer.eval()(features)["token_embeddings"]


def test_every_token_sees_every_other(tiny_backbone, family):
    transformer = LionTransformer(tiny_backbone(family))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    reference = hidden_states(transformer, input_ids=ids)
    for position in range(5):
        changed = ids.clone()
        changed[0, position] = 20
        difference = (hidden_states(transformer, input_ids=changed) - reference).abs().amax(-1)[0]
        assert (difference > 1e-4).all()


def test_states_are_the_last_hidden_ones_whether_or_not_there_is_a_head(tiny_backbone, family):
    path = tiny_backbone(family, tied=False)
    with_head = LionTransformer(path, transformer_task="text-generation")
    without = LionTransformer(path, transformer_task="feature-extraction")
    ids = torch.tensor([[5, 6, 7]])
    states = hidden_states(without, input_ids=ids)
    assert states.shape == (1, 3, 32)
    torch.testing.assert_close(hidden_states(with_head, input_ids=ids), states)


def test_padding_changes_nothing(tiny_backbone, family, texts):
    transformer = LionTransformer(tiny_backbone(family)).eval()
    batch = transformer.preprocess(texts)
    assert (batch["attention_mask"][:, -1] == 1).all()
    together = hidden_states(transformer, **batch)
    for row, text in enumerate(texts):
        alone = hidden_states(transformer, **transformer.preprocess([text]))[0]
        torch.testing.assert_close(together[row, -alone.shape[0] :], alone, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_stays_causal_is_refused(tiny_backbone, monkeypatch):
    import transformers.masking_utils as masks
    from transformers.models.llama import modeling_llama

    def causal_mask(config, *args, **kwargs):
        config.is_causal = True
        try:
            return masks.create_causal_mask(config, *args, **kwargs)
        finally:
            config.is_causal = False

    monkeypatch.setattr(modeling_llama, "create_causal_mask", causal_mask)
    transformer = LionTransformer(tiny_backbone("llama"))
    original = transformer.model.forward.__func__

    def forward(self, *args, **kwargs):
        return original(self, *args, **(kwargs | {"is_causal": True}))

    monkeypatch.setattr(type(transformer.model), "forward", forward)
    with pytest.raises(ValueError, match="LlamaModel stays causal"):
        transformer.verify_bidirectional()


@pytest.mark.parametrize(
    ("factor", "said"), [(0.0, "LlamaModel passes nothing from one token"), (float("nan"), "LlamaModel computes NaN")]
)
def test_attention_that_writes_nothing_or_no_numbers_is_not_called_causal(tiny_backbone, factor, said):
    transformer = LionTransformer(tiny_backbone("llama"))
    with torch.no_grad():
        for layer in transformer.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
    with pytest.raises(ValueError, match=said):
        transformer.verify_bidirectional()


def test_absolute_positions_are_refused(tmp_path, tiny_backbone):
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    )
    torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_backbone()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPT2.*(padded on the left|stays causal)"):
        lion_st.build(tmp_path, "dense", device="cpu")


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=["bert", "t5"])
def test_encoders_are_refused_before_weights_are_read(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model_type '{config.model_type}'.*decoder-only"):
        LionTransformer(str(tmp_path))


# ---- tokenizer contract ----


def test_texts_are_cut_to_the_length_of_their_task(tiny_backbone):
    transformer = LionTransformer(tiny_backbone(), query_length=8, document_length=16)
    long_text = "lion " * 20_000
    lengths = {
        task: transformer.preprocess([long_text], task=task)["input_ids"].shape for task in ("query", "document")
    }
    assert lengths == {"query": (1, 8), "document": (1, 16)}
    assert transformer.preprocess([long_text])["input_ids"].shape == (1, 16)
    assert transformer.preprocess([long_text], task="query")["input_ids"][0, 0] == transformer.tokenizer.bos_token_id


def test_a_tokenizer_that_leaves_out_its_bos_needs_a_decision(tiny_backbone, tmp_path):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'<s>' \(id 0\).*add_bos=True.*add_bos=False"):
        LionTransformer(str(path))
    added = LionTransformer(str(path), add_bos=True).preprocess(["a lion"])["input_ids"]
    assert added.tolist() == tokenizer(["a lion"])["input_ids"]
    left_out = LionTransformer(str(path), add_bos=False).preprocess(["a lion"])["input_ids"]
    assert left_out.tolist() == [tokenizer("a lion")["input_ids"][1:]]


def test_an_added_bos_is_saved(tiny_backbone, tmp_path):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone")
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (path / "tokenizer.json").write_text(json.dumps(settings))
    model = lion_st.build(path, "dense", add_bos=True, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    reloaded = lion_st.load(tmp_path / "saved", device="cpu")
    assert reloaded.preprocess(["a lion"])["input_ids"].tolist() == model.preprocess(["a lion"])["input_ids"].tolist()


def test_a_family_without_bos_is_taken_as_it_is(tiny_backbone):
    transformer = LionTransformer(tiny_backbone("qwen3"))
    assert transformer.tokenizer.bos_token is None
    assert transformer.preprocess(["lion"])["attention_mask"].all()


def test_padding_is_eos_where_there_is_none(tiny_backbone, tmp_path, texts):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    transformer = LionTransformer(str(path))
    assert transformer.tokenizer.pad_token == transformer.tokenizer.eos_token == "</s>"
    assert transformer.preprocess(texts)["input_ids"][0, 0] == transformer.tokenizer.eos_token_id


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tiny_backbone, tmp_path):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"321 tokens.*embeddings for 320"):
        LionTransformer(str(path))


# ---- weights that do not fit ----


def test_weights_of_another_shape_are_refused(tiny_backbone, tmp_path):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone", intermediate_size=48)
    with pytest.raises(ValueError, match="do not match its configuration"):
        LionTransformer(str(path))


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_or_unexpected_weights_are_refused(tiny_backbone, tmp_path, change):
    path = edited_copy(tiny_backbone(), tmp_path / "backbone")
    weights = load_file(path / "model.safetensors")
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    else:
        weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 {change} \(first: (model\.)?layers\.\d\.mlp\.up_proj\.weight"):
        LionTransformer(str(path))


def test_a_sparse_model_of_a_backbone_without_its_untied_head_is_refused(tiny_backbone, tmp_path):
    path = edited_copy(tiny_backbone(tied=False), tmp_path / "backbone")
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        lion_st.build(path, "sparse", device="cpu")
    assert lion_st.build(path, "dense", device="cpu").encode("a lion").shape == (32,)


# ---- texts ----


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("", ValueError, "Text 1 is ''"),
        (" \n\t", ValueError, r"Text 1 is ' \\n\\t'"),
        (None, TypeError, "Text 1 is None, a NoneType"),
        (3.5, TypeError, "Text 1 is 3.5, a float"),
        (("a", "pair"), TypeError, r"Text 1 is \('a', 'pair'\), a tuple"),
        ("\ud800", ValueError, "not valid Unicode"),
    ],
)
def test_a_text_that_cannot_be_encoded_is_named(tiny_backbone, bad, error, message):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    for encode in (model.encode_query, model.encode_document, model.preprocess):
        with pytest.raises(error, match=message):
            encode(["a much longer text than the second one", bad])


def test_a_text_of_100k_characters_is_cut(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    assert model.encode_document("lion! " * 17_000).shape == (32,)
