"""Leaving padding out of the backbone's work changes no vector and no gradient."""

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MultipleNegativesRankingLoss,
)
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
    """Shapes of the ids that backbones are given packed."""
    shapes = []
    original = unpadding.packed

    def recorded(features):
        found = original(features)
        shapes.append(tuple(found["input_ids"].shape))
        return found

    monkeypatch.setattr(unpadding, "packed", recorded)
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_as_an_operation_of_a_graph_is_what_autograd_makes_of_it(causal, scaling, groups):
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(1, 13, heads, 8, generator=generator).transpose(1, 2).requires_grad_()
        for heads in (6, groups, groups)
    ]
    further = (torch.tensor([0, 4, 5, 13], dtype=torch.int32), causal, scaling)
    upstream = torch.randn(1, 13, 6, 8, generator=generator)
    expected, found = (
        function(*states, *further) for function in (unpadding.attend_text_by_text, unpadding._as_one_operation)
    )
    assert torch.equal(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, states, upstream), torch.autograd.grad(expected, states, upstream)
    )
    torch.library.opcheck(unpadding._as_one_operation, (*states, *further))
    torch.library.opcheck(
        unpadding._gradients_as_one_operation, (upstream, *(one.detach() for one in states), *further)
    )


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


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_states_go_packed_from_the_backbone_to_the_head(tiny_backbone, texts, paradigm):
    model = lion_st.build(tiny_backbone(), paradigm, device="cpu").eval()
    features = features_of(model, texts)
    given = dict(features)
    tokens = int(features["attention_mask"].sum())
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]["token_embeddings"].shape))
    with torch.no_grad():
        vectors = model(features)["sentence_embedding"]
        expected = model(features, packed_states=False)["sentence_embedding"]
    assert seen == [(1, tokens, 32), (*features["attention_mask"].shape, 32)]
    assert features.keys() == given.keys()
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_losses_of_all_layers_are_those_of_stock_modules(tiny_backbone, texts, tmp_path, family):
    model = lion_st.build(tiny_backbone(family), "dense", device="cpu")
    lion_st.export(model, tmp_path / "stock", create_model_card=False, verify=False)
    *modules, _ = SentenceTransformer(str(tmp_path / "stock"), device="cpu")  # the last one keeps SparseEncoder away
    found = []
    for one in (model, SentenceTransformer(modules=modules, device="cpu")):
        ranking = MultipleNegativesRankingLoss(one)
        for loss in (
            AdaptiveLayerLoss(one, ranking, -1),
            Matryoshka2dLoss(one, ranking, [32, 8], n_layers_per_step=-1, n_dims_per_step=-1),
        ):
            one.zero_grad()
            value = loss([one.preprocess(texts[:4]), one.preprocess(texts[4:])], None)
            value.backward()
            found.append((value, one[0].model.get_input_embeddings().weight.grad.clone()))
    for own, stock in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(own, stock)


def test_states_that_are_asked_for_come_text_by_text(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "dense", pooling="mean", device="cpu")
    states = model.encode(texts, output_value="token_embeddings")
    everything = model.encode(texts, output_value=None)
    assert [len(one) for one in states] == [len(model.tokenizer(text)["input_ids"]) for text in texts]  # no padding
    padded_twin(model)
    padded = model.encode(texts, output_value="token_embeddings")
    for text, found, expected in zip(texts, states, padded, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, model.encode(text, output_value="token_embeddings"), rtol=1e-4, atol=1e-5)
    vectors = model.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(torch.stack([one["sentence_embedding"] for one in everything]), vectors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_every_dtype_gives_the_vectors_of_stock_modules(tiny_backbone, texts, tmp_path, paradigm, dtype):
    model = lion_st.build(tiny_backbone(dtype=dtype), paradigm, device="cpu")
    model.save_pretrained(str(tmp_path))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    expected = stock.encode(texts, convert_to_tensor=True).float()
    rounding = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-5}[dtype] * expected.abs().max()
    for packs in (True, False):
        model[0].runs_packed = packs
        found = model.encode(texts, convert_to_tensor=True).float()
        assert (found - expected).abs().max() < rounding
        features = model(features_of(model, texts), packed_states=False)  # zeros at padding
        assert features["sentence_embedding"].isfinite().all()


def test_an_adapter_on_a_float16_backbone_has_finite_gradients(tiny_backbone, texts):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    for packed_states in (True, False):
        model = lion_st.build(tiny_backbone(dtype="float16"), "dense", lora=adapter, device="cpu").train()
        vectors = model(features_of(model, texts), packed_states=packed_states)["sentence_embedding"].float()
        (vectors @ vectors.T).logsumexp(1).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)


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


def varlen_that_fails(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nC++ stack")


def varlen_that_is_wrong(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return query * 1.0


def varlen_without_gradients(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return _attend(query, key, value, cu_seq_q, None, is_causal).detach()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (varlen_that_fails, "only supports Ampere GPUs or newer."),
        (varlen_that_is_wrong, "differs from torch's own attention"),
        (varlen_without_gradients, "does not require grad"),
    ],
)
def test_attention_that_cannot_run_packed_is_found_and_named_once(function, reason, caplog):
    shape = (function, torch.device("cpu"), torch.float32, 4, 2, 8)
    with torch.inference_mode(), caplog.at_level("WARNING", logger="lion_st"):
        failures = [unpadding.varlen_failure(*shape) for _ in range(2)]
    assert reason in failures[0] and failures[0] == failures[1]
    assert caplog.text.count(reason) == 1 and "C++" not in caplog.text


@pytest.mark.parametrize("function", [varlen_of_torch_2_10, varlen_of_torch_2_11, varlen_of_torch_2_13])
def test_attention_of_every_release_passes_the_trial(function, caplog):
    assert unpadding.varlen_failure(function, torch.device("cpu"), torch.float32, 6, 2, 8) is None
    assert not caplog.text
