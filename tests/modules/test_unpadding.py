"""Leaving padding out of the backbone's work changes no vector and no gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

import lion_st
from lion_st.modules import LionTransformer, unpadding

PACKING = ("llama", "qwen3")


def features_of(model, texts):
    features = model.preprocess(texts)
    assert not features["attention_mask"].all()
    return features


def padded_twin(model):
    """Makes the model compute its padding again, with stock attention."""
    model[0].runs_packed = False
    model[0].model.set_attn_implementation("sdpa")
    return model


@pytest.fixture
def decoder_calls(monkeypatch):
    """Shapes of the ids that backbones are given."""
    shapes = []
    original = unpadding.packed_states

    def recorded(decoder, input_ids, attention_mask):
        shapes.append((1, int(attention_mask.sum())))
        return original(decoder, input_ids, attention_mask)

    monkeypatch.setattr(unpadding, "packed_states", recorded)
    return shapes


@pytest.mark.parametrize("family", PACKING)
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_vectors_and_gradients_are_those_of_padded_texts(tiny_backbone, texts, family, paradigm, decoder_calls):
    model = lion_st.build(tiny_backbone(family), paradigm, device="cpu").train()
    assert model[0].runs_packed
    decoder_calls.clear()

    def run():
        model.zero_grad()
        features = features_of(model, texts)
        vectors = model(features)["sentence_embedding"]
        vectors.square().sum().backward()
        return vectors.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    vectors, gradients = run()
    assert decoder_calls == [(1, int(model.preprocess(texts)["attention_mask"].sum()))]
    padded_twin(model)
    expected, expected_gradients = run()
    assert len(decoder_calls) == 1
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gradient_checkpointing_recomputes_the_same(tiny_backbone, texts):
    def gradients(checkpointing):
        model = lion_st.build(tiny_backbone(), "sparse", device="cpu").train()
        if checkpointing:
            model[0].model.gradient_checkpointing_enable({"use_reentrant": False})
        model(features_of(model, texts))["sentence_embedding"].sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, actual = gradients(False), gradients(True)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_padding_on_either_side_is_left_out(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu").eval()
    left = features_of(model, texts)
    lengths = left["attention_mask"].sum(1)
    right = {name: torch.zeros_like(left[name]) for name in ("input_ids", "attention_mask")}
    for row, length in enumerate(lengths):
        for name in right:
            right[name][row, :length] = left[name][row, -length:]
    with torch.no_grad():
        torch.testing.assert_close(
            model(right)["sentence_embedding"], model(left)["sentence_embedding"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_features_that_come_packed_give_the_vectors_of_padded_ones(tiny_backbone, texts, paradigm):
    """What sentence-transformers makes of texts for FlashAttention: one row, and where each text begins."""
    model = lion_st.build(tiny_backbone(), paradigm, device="cpu").eval()
    padded = features_of(model, texts)
    lengths = padded["attention_mask"].sum(1)
    bounds = pad(lengths.cumsum(0), (1, 0)).int()
    packed = {
        "input_ids": padded["input_ids"][padded["attention_mask"].bool()][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "seq_idx": torch.repeat_interleave(torch.arange(len(texts)), lengths)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    with torch.no_grad():
        actual, expected = model(packed)["sentence_embedding"], model(padded)["sentence_embedding"]
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mistral", "do not attend to whole texts"), ("gemma3_text", "do not attend to whole texts")],
)
def test_windowed_attention_keeps_its_padding_and_says_why(tiny_backbone, texts, family, reason, caplog):
    with caplog.at_level("INFO", logger="lion_st"):
        model = lion_st.build(tiny_backbone(family), "dense", device="cpu")
    assert not model[0].runs_packed and reason in caplog.text
    transformer = LionTransformer(tiny_backbone(family), unpad_inputs=True)
    with pytest.raises(ValueError, match=f"unpad_inputs=True, but .*{reason}"):
        transformer.on_model_ready(None)


def test_padding_is_computed_where_asked(tiny_backbone, texts, decoder_calls):
    transformer = LionTransformer(tiny_backbone(), unpad_inputs=False)
    transformer.on_model_ready(None)
    transformer(transformer.preprocess(texts))
    assert not transformer.runs_packed and not decoder_calls


def test_the_attention_function_is_not_saved(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    model.save_pretrained(str(tmp_path))
    assert unpadding.NAME not in (tmp_path / "config.json").read_text()


def varlen_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """Attends as torch's function of this signature does, which knows neither scales nor fewer heads of keys."""
    assert query.shape == key.shape == value.shape
    return _attend(query, key, value, cu_seq_q, query.shape[-1] ** -0.5, is_causal)


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape == key.shape == value.shape
    return _attend(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def varlen_of_torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    return _attend(query, key, value, cu_seq_q, scale, window_size == (-1, 0))


def _attend(query, key, value, bounds, scale, causal):
    texts = zip(
        *(states.transpose(0, 1).split(bounds.diff().tolist(), 1) for states in (query, key, value)), strict=True
    )
    attended = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        for q, k, v in texts
    ]
    return torch.cat(attended, 1).transpose(0, 1)


@pytest.mark.parametrize("function", [varlen_of_torch_2_10, varlen_of_torch_2_11, varlen_of_torch_2_13])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_every_release_of_variable_length_attention_is_called_alike(function, causal, scaling):
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 3, 10, 11], dtype=torch.int32)
    query, key, value = (
        torch.randn(11, heads, 8, dtype=torch.float64, generator=generator, requires_grad=True) for heads in (6, 2, 2)
    )
    found = unpadding.call_varlen_attn(function, query, key, value, bounds, 7, causal, scaling)
    expected = _attend(query, key, value, bounds, scaling, causal)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(found, (query, key, value), upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (query, key, value), upstream))
