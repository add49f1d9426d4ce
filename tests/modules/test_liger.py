"""Liger's kernels replace functions of the decoder layers alone, and leave nothing behind."""

import sys
from types import MethodType

import pytest
import torch
from peft import LoraConfig
from transformers.models.llama import modeling_llama

import lion_st
from lion_st.modules.liger import liger_kernels

needs_liger = pytest.mark.skipif("not __import__('importlib').util.find_spec('liger_kernel')")


def make_model(backbone: str, paradigm: str, device: str = "cpu", dtype: torch.dtype | str = "auto"):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear")
    return lion_st.build(backbone, paradigm, lora=lora, device=device, dtype=dtype)


def sources(model) -> set[str]:
    """Packages whose forward passes the modules run."""
    return {module.forward.__func__.__module__.partition(".")[0] for module in model.modules()}


@needs_liger
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_kernels_are_bound_within_the_block_and_gone_after_it(tiny_backbone, texts, paradigm):
    model = make_model(tiny_backbone(), paradigm)
    backbone, before = model[0].model, dict(vars(modeling_llama))
    vectors = model.encode_document(texts, convert_to_tensor=True)
    backbone.forward = MethodType(lambda self, **_: "own", backbone)  # as masked next-token prediction has it
    with liger_kernels(backbone):
        layer = model[0].decoder.layers[0]
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp, model[0].decoder.norm):
            assert part.forward.__func__.__module__.startswith("liger_kernel."), part
        assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel.")
        assert backbone.forward() == "own"
        head = backbone.get_output_embeddings()
        assert head is None or head.forward.__func__ is torch.nn.Linear.forward
        assert sources(make_model(tiny_backbone("qwen3"), paradigm)).isdisjoint({"liger_kernel"})
        assert modeling_llama.LlamaRMSNorm is before["LlamaRMSNorm"] and modeling_llama.LlamaMLP is before["LlamaMLP"]
    del backbone.forward
    assert "liger_kernel" not in sources(model[0].decoder)
    assert all(value is before[name] for name, value in vars(modeling_llama).items())
    assert torch.equal(model.encode_document(texts, convert_to_tensor=True), vectors)


@needs_liger
def test_kernels_can_be_left_out_and_unknown_architectures_are_refused(tiny_backbone):
    model = make_model(tiny_backbone(), "dense")
    with liger_kernels(model[0].model, rope=False, swiglu=False):
        layer = model[0].decoder.layers[0]
        assert layer.mlp.forward.__func__.__module__.startswith("transformers.")
        assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("transformers.")
    model[0].model.config.model_type = "novel"
    with pytest.raises(ValueError, match="Liger has no kernels for 'novel': leave out use_liger_kernel"):
        liger_kernels(model[0].model).__enter__()


def test_a_missing_package_is_named_with_the_line_that_installs_it(tiny_backbone, monkeypatch):
    for name in ("liger_kernel", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'lion-st\[liger\]'"):
        liger_kernels(make_model(tiny_backbone(), "dense")[0].model).__enter__()


@needs_liger
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels run on GPUs")
def test_gradients_are_those_of_other_layers(tiny_backbone, texts):
    model = make_model(tiny_backbone(), "sparse", device="cuda", dtype=torch.float32).train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        features = {name: value.cuda() for name, value in model.preprocess(texts).items() if torch.is_tensor(value)}
        model(features)["sentence_embedding"].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with liger_kernels(model[0].model):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
