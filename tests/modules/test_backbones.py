"""Backbones of fewer layers, and those that lie in GGUF files."""

import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, ModernBertDecoderConfig

import lion_st
from lion_st.modules.backbones import choose_layers, keep_layers
from lion_st.training.contract import backbone_config

TEXTS = ["what is a lion", "Lions live in groups called prides."]


@pytest.fixture
def deep(tiny_backbone):
    return tiny_backbone(num_hidden_layers=4)


def truncated(folder, kept, path):
    """The backbone with layers taken out by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize(("choice", "kept"), [({"num_layers": 2}, [0, 1]), ({"layers": [0, 3]}, [0, 3])])
def test_vectors_are_those_of_the_truncated_model(deep, tmp_path, stock_vectors, paradigm, choice, kept):
    model = lion_st.build(deep, paradigm, device="cpu", **choice)
    expected = lion_st.build(truncated(deep, kept, tmp_path / "cut"), paradigm, device="cpu").encode_document(TEXTS)
    assert (model.encode_document(TEXTS) == expected).all()
    assert model[0].model.config.num_hidden_layers == len(kept)
    model.save(str(tmp_path / "saved"))
    assert (lion_st.load(tmp_path / "saved", device="cpu").encode_document(TEXTS) == expected).all()
    lion_st.export(model, tmp_path / "exported", create_model_card=False)
    stock = stock_vectors([(tmp_path / "exported", "SentenceTransformer")], TEXTS)
    found = torch.from_numpy(stock[str(tmp_path / "exported"), "SentenceTransformer", "document"])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_an_adapter_knows_the_layers_of_its_base(deep, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = lion_st.build(deep, "dense", layers=[1, 2], lora=lora, device="cpu")
    model.save(str(tmp_path / "adapter"))
    loaded = lion_st.load(tmp_path / "adapter", device="cpu")
    assert loaded[0].model.config.num_hidden_layers == 2
    assert (loaded.encode_document(TEXTS) == model.encode_document(TEXTS)).all()


def test_lists_of_a_value_for_each_layer_are_cut_too(tiny_backbone):
    model = lion_st.build(tiny_backbone("gemma2"), "sparse", layers=[1], device="cpu")
    assert model[0].model.config.layer_types == ["full_attention"]


def test_layers_that_a_configuration_numbers_are_not_taken_out(deep):
    model = AutoModelForCausalLM.from_pretrained(deep)
    model.config.mlp_only_layers = [3]
    with pytest.raises(ValueError, match="numbers layers in its mlp_only_layers"):
        keep_layers(model, [0, 3])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_layers": 5}, "num_layers is 5: the backbone has 4 layers"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"layers": [0, 4]}, r"layers is \[0, 4\]: name at least one of the backbone's 4 layers, 0 to 3"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": [2, 1]}, "ascending order"),
        ({"layers": [1, 1]}, "each layer once"),
        ({"layers": [0], "num_layers": 1}, "not both"),
    ],
)
def test_a_wrong_choice_is_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(4, **choice)


def test_all_layers_are_no_choice():
    assert choose_layers(4) is choose_layers(4, num_layers=4) is choose_layers(4, layers=[0, 1, 2, 3]) is None


# ---- architectures that name their parts in ways of their own ----


def test_a_dense_model_leaves_out_an_lm_head_of_any_name(tiny_backbone):
    backbone = tiny_backbone("gpt_neox", tied=False)  # Pythia, whose files call it embed_out
    assert any(name.startswith("embed_out.") for name in load_file(f"{backbone}/model.safetensors"))
    states = AutoModelForCausalLM.from_pretrained(backbone).gpt_neox.state_dict()
    dense = lion_st.build(backbone, "dense", device="cpu")[0].model.state_dict()
    assert states.keys() == dense.keys() and all((states[name] == dense[name]).all() for name in states)


@pytest.mark.parametrize("paradigm", ["sparse", "hybrid"])
def test_an_lm_head_with_a_bias_is_read_trained_and_exported_with_it(tiny_backbone, tmp_path, paradigm):
    model = lion_st.build(tiny_backbone("phi", tied=False), paradigm, scale=0.5, device="cpu")  # Phi-2's kind
    causal_lm = model[0].model
    bias = causal_lm.lm_head.bias
    features = model.preprocess(TEXTS, task="document")
    with torch.no_grad():
        mask = features["attention_mask"]
        logits = (causal_lm(input_ids=features["input_ids"], attention_mask=mask).logits - bias) * 0.5 + bias
    logits[mask == 0] = -torch.inf
    expected = logits.amax(dim=1).relu().log1p()
    found = torch.from_numpy(model.encode_document(TEXTS))[:, : len(bias)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model.train()
    model(features)["sentence_embedding"].sum().backward()
    assert bias.grad.abs().max() > 0
    lion_st.export(model, tmp_path / "exported")  # compares the vectors
    model.save_pretrained(str(tmp_path / "saved"))
    again = lion_st.load(tmp_path / "saved", device="cpu").encode_document(TEXTS)
    assert (again == model.encode_document(TEXTS)).all()


def test_the_scale_is_folded_into_a_final_norm_of_another_name(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone("lfm2"), "sparse", device="cpu")
    assert model[0].final_norm is model[0].model.model.embedding_norm
    lion_st.export(model, tmp_path / "exported", create_model_card=False)  # compares the vectors


def test_a_sparse_model_that_could_not_be_saved_is_not_built(tiny_backbone):
    with pytest.raises(ValueError, match=r"OlmoForCausalLM has no final norm .* build the model with scale=1\.0"):
        lion_st.build(tiny_backbone("olmo"), "sparse", device="cpu")
    assert lion_st.build(tiny_backbone("olmo"), "sparse", scale=1.0, device="cpu").encode(TEXTS).shape == (2, 320)


def test_an_lm_head_is_never_taken_for_the_decoder(tmp_path):
    config = ModernBertDecoderConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=2, eos_token_id=1, bos_token_id=0, cls_token_id=0, sep_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="makes its logits in a way the sparse head does not know"):
        lion_st.build(tmp_path, "sparse", scale=1.0, device="cpu")
    assert lion_st.build(tmp_path, "dense", device="cpu").encode(TEXTS).shape == (2, 32)


# ---- GGUF ----


def write_gguf(folder, path, packed=False) -> str:
    """A Llama as llama.cpp's converter writes it, in float32 or with its matrices in 8 bits."""
    gguf = pytest.importorskip("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens += ["<|endoftext|>"] * (config.vocab_size - len(tokens))  # which the tokenizer would add behind the others
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in [*tokenizer.all_special_tokens, "<|endoftext|>"] else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def interleaved(weight, heads):  # llama.cpp keeps the two halves of rotary embeddings side by side
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {"token_embd": weights["model.embed_tokens.weight"], "output_norm": weights["model.norm.weight"]}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            tensors[f"blk.{layer}.{theirs}"] = weights[f"model.layers.{layer}.{ours}.weight"]
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            weight = weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            tensors[f"blk.{layer}.attn_{name}"] = interleaved(weight, heads)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if packed and tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def roomy(tiny_backbone):
    """With one row of the embeddings to spare."""
    return tiny_backbone(num_hidden_layers=4, vocab_size=321)


def test_a_gguf_file_is_the_model_that_it_was_made_of(roomy, tmp_path):
    file = write_gguf(roomy, tmp_path / "tiny.gguf")
    model = lion_st.build(file, "sparse", add_bos=True, dtype=torch.float32, device="cpu", num_layers=3)
    expected = lion_st.build(roomy, "sparse", dtype=torch.float32, device="cpu", num_layers=3).encode_document(TEXTS)
    torch.testing.assert_close(torch.from_numpy(model.encode_document(TEXTS)), torch.from_numpy(expected))
    model.save(str(tmp_path / "saved"))
    assert (lion_st.load(tmp_path / "saved", device="cpu").encode_document(TEXTS) == model.encode_document(TEXTS)).all()


def test_the_shape_in_a_gguf_file_is_read_without_weights(roomy, tmp_path):
    config = backbone_config(write_gguf(roomy, tmp_path / "tiny.gguf"))
    assert (config.num_hidden_layers, config.vocab_size) == (4, 321)


def test_weights_of_a_gguf_file_are_unpacked(tiny_backbone, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = tiny_backbone(hidden_size=64, vocab_size=321)
    model = lion_st.build(write_gguf(folder, tmp_path / "tiny.gguf", packed=True), "sparse", add_bos=True, device="cpu")
    assert "packed" not in caplog.text  # what transformers says of layers that stay packed
    assert {type(layer) for layer in model.modules() if "Linear" in type(layer).__name__} == {torch.nn.Linear}
    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in model[0].model.state_dict().items():
        torch.testing.assert_close(weight.float(), original[name], atol=5e-3, rtol=1e-2)


def test_an_adapter_finds_its_gguf_file_again(roomy, tmp_path):
    from peft import LoraConfig

    file = write_gguf(roomy, tmp_path / "tiny.gguf")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = lion_st.build(file, "dense", add_bos=True, lora=lora, device="cpu")
    assert model[0].model.dtype == torch.bfloat16
    model.save(str(tmp_path / "adapter"))
    loaded = lion_st.load(tmp_path / "adapter", device="cpu")
    assert (loaded.encode_document(TEXTS) == model.encode_document(TEXTS)).all()


def test_what_is_wrong_with_a_gguf_file_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"There is no GGUF file '.*missing\.gguf'"):
        lion_st.build(tmp_path / "missing.gguf", "sparse")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.gguf' is not a GGUF file"):
        lion_st.build(tmp_path / "text.gguf", "sparse")
    (tmp_path / "some.gguf").write_bytes(b"GGUF....")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'lion-st\[gguf\]'"):
        lion_st.build(tmp_path / "some.gguf", "sparse")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(tmp_path / "clip.gguf"), "clip")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"transformers cannot read the GGUF file '.*clip\.gguf'"):
        lion_st.build(tmp_path / "clip.gguf", "sparse")
