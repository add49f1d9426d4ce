"""Decoder layers that torch.compile takes give the same vectors and gradients, also where a pass is repeated."""

import pytest
import torch
from peft import LoraConfig
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import lion_st
from lion_st.modules import unpadding
from lion_st.modules.compilation import compile_layers, decoder_layers, release_layers


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model(backbone: str, packed: bool, recomputed: bool):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["q_proj", "down_proj"])
    model = lion_st.build(backbone, "sparse", lora=lora, as_sparse_encoder=True, device="cpu").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    if not packed:
        model[0].runs_packed = False
        model[0].model.set_attn_implementation("sdpa")
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def cached_gradients(model, texts) -> dict[str, torch.Tensor]:
    """Of a loss with gradient caching, which embeds every text once without gradients and once with."""
    loss = CachedSpladeLoss(
        model,
        lion_st.ContrastiveDistillationLoss(model),
        query_regularizer_weight=0.05,
        document_regularizer_weight=0.04,
        mini_batch_size=4,
    )
    columns = [model.preprocess(list(part)) for part in (texts[:4], texts[4:], texts[2:6])]
    torch.manual_seed(1)
    model.zero_grad()
    sum(loss(columns, torch.randn(4, 2)).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize(("packed", "recomputed"), [(True, False), (False, True)])
def test_gradients_are_those_of_uncompiled_layers(tiny_backbone, texts, packed, recomputed):
    model = make_model(tiny_backbone(num_hidden_layers=1), packed, recomputed)
    expected = cached_gradients(model, texts)
    names = list(model.state_dict())
    compile_layers(model[0].model, backend="aot_eager")
    assert_equal(cached_gradients(model, texts), expected)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    # Other lengths of text and other numbers of texts need no other code.
    cached_gradients(model, [f"{text} And so on, {text}" for text in reversed(texts)])
    assert counters["stats"]["unique_graphs"] == graphs
    # A layer is one graph: without gradients, and with those of its weights; packed, of one text and of several.
    assert graphs <= (4 if packed else 2) and not counters["graph_break"]
    assert list(model.state_dict()) == names
    release_layers(model[0].model)
    counters.clear()
    assert_equal(cached_gradients(model, texts), expected)
    assert not counters["stats"]


def test_dropout_of_inductor_is_the_same_in_both_passes(tiny_backbone, texts):
    model = make_model(tiny_backbone(num_hidden_layers=1), packed=True, recomputed=True)
    expected = cached_gradients(model, texts)
    compile_layers(model[0].model)
    assert_equal(cached_gradients(model, texts), expected)
    assert counters["stats"]["unique_graphs"] > 0


def test_attention_of_a_gpu_over_packed_texts_is_part_of_the_graph():
    if unpadding.varlen_attn is None:
        pytest.skip(f"torch {torch.__version__} has no variable-length attention")

    class Attention(torch.nn.Module):
        def forward(self, query, key, value, bounds, longest):
            return unpadding.call_varlen_attn(
                unpadding.varlen_attn, query, key, value, bounds, longest, causal=False, scaling=0.125
            )

    with FakeTensorMode():
        query, key, value = (torch.empty(108, heads, 64, dtype=torch.bfloat16) for heads in (32, 8, 8))
        inputs = (query, key, value, torch.empty(4, dtype=torch.int32), 70)
        sizes = (*({0: Dim.DYNAMIC} for _ in range(4)), Dim.DYNAMIC)
        exported = torch.export.export(Attention(), inputs, dynamic_shapes=sizes, strict=True)
    assert "torch_attn._varlen_attn" in str(exported.graph)


def test_layers_are_found_below_an_adapter_and_missing_ones_are_said(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", lora=LoraConfig(target_modules=["q_proj"]), device="cpu")
    assert decoder_layers(model[0].model) == list(model[0].decoder.layers)
    model[0].model._no_split_modules = None
    with pytest.raises(ValueError, match=r"does not say which of its modules are its layers"):
        compile_layers(model[0].model)
