"""A base of 4 bits below an adapter: what is quantized, and that no other weights are saved than those trained on."""

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import lion_st
from lion_st.modules.adapters import load_adapter_weights
from lion_st.modules.quantization import is_four_bit
from lion_st.training.cost import FOUR_BIT_BYTES, TrainingCost
from lion_st.training.recipes import BackboneShape

needs_bitsandbytes = pytest.mark.skipif("not __import__('importlib').util.find_spec('bitsandbytes')")
SHAPE = dict(hidden_size=64, intermediate_size=128, head_dim=16)  # constants are of 64 weights


def make_model(backbone: str, paradigm: str, four_bits: bool = True, **lora):
    settings = dict(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    config = LoraConfig(**(settings | lora))
    model = lion_st.build(backbone, paradigm, lora=config, load_in_4bit=four_bits, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def vectors(model, texts) -> torch.Tensor:
    return model.encode_document(texts, convert_to_tensor=True)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@needs_bitsandbytes
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_linear_layers_of_the_decoder_alone_are_quantized(tiny_backbone, texts, paradigm):
    backbone = tiny_backbone(tied=False, **SHAPE)
    model, whole = make_model(backbone, paradigm), make_model(backbone, paradigm, four_bits=False)
    quantized = [name for name, module in model.named_modules() if is_four_bit(module)]
    assert len([name for name in quantized if "_proj" in name]) == len(quantized) > 0
    kept = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if parameter.is_floating_point() and "lora_" not in name:  # LM head, embeddings and norms
            assert torch.equal(parameter, kept[name]), name
    head = [name for name, parameter in model.named_parameters() if "lm_head" in name and parameter.is_floating_point()]
    assert bool(head) == (paradigm == "sparse")
    found = vectors(model, texts)
    assert 0 < relative(found, vectors(whole, texts)) < 1
    model.train()(model.preprocess(texts))["sentence_embedding"].sum().backward()
    assert torch.equal(vectors(model, texts), found)  # encoding rounds nothing further


@needs_bitsandbytes
@pytest.mark.parametrize(("paradigm", "lora"), [("sparse", {}), ("dense", {"use_dora": True})])
def test_what_is_saved_is_what_was_trained(tiny_backbone, texts, tmp_path, paradigm, lora):
    model = make_model(tiny_backbone(**SHAPE), paradigm, **lora)
    expected = vectors(model, texts)
    exported = lion_st.export(model, tmp_path / "exported", create_model_card=False)
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    stock = SentenceTransformer(str(exported), device="cpu")
    torch.testing.assert_close(vectors(stock, texts), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(vectors(model, texts), expected)

    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder, create_model_card=False)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.equal(vectors(lion_st.load(folder, device="cpu", load_in_4bit=True), texts), expected)
    unrounded = vectors(lion_st.load(folder, device="cpu"), texts)
    whole = make_model(tiny_backbone(**SHAPE), paradigm, four_bits=False, **lora)
    load_adapter_weights(whole[0].model, folder)
    assert torch.equal(unrounded, vectors(whole, texts))
    assert relative(unrounded, expected) > 1e-3


@needs_bitsandbytes
def test_what_four_bits_cannot_be_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match=r"load_in_4bit holds weights that do not train: give lora="):
        lion_st.build(tiny_backbone(), "dense", load_in_4bit=True)
    with pytest.raises(ValueError, match="load_in_4bit would round what merge_adapter merges"):
        lion_st.load(tmp_path, load_in_4bit=True, merge_adapter=True)
    shutil.copytree(tiny_backbone(), tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized already"):
        make_model(str(tmp_path / "quantized"), "dense")


def test_a_missing_package_is_named_with_the_line_that_installs_it(tiny_backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"This needs bitsandbytes .*pip install 'lion-st\[quantized\]'"):
        make_model(tiny_backbone(), "dense")


@needs_bitsandbytes
def test_the_estimate_of_the_weights_is_what_they_take(tiny_backbone):
    model = make_model(tiny_backbone(dtype="bfloat16", **SHAPE), "sparse", target_modules="all-linear")
    held = 0
    for module in model.modules():
        if is_four_bit(module):
            state = module.weight.quant_state
            held += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    held += sum(p.nbytes for p in model.parameters() if p.is_floating_point())
    cost = TrainingCost(BackboneShape.from_config(model[0].config), has_head=True, lora_r=4, load_in_4bit=True)
    parts = cost.memory(1, 1)
    assert parts["weights"] == pytest.approx(held, rel=0.05)
    assert parts["layer of 4 bits at work"] == 2 * 64 * 128
    whole = TrainingCost(cost.shape, has_head=True, lora_r=4).memory(1, 1)
    assert whole["weights"] - parts["weights"] == pytest.approx((2 - FOUR_BIT_BYTES) * cost.linear_parameters)
