"""What only a GPU can show of leaving padding out: torch's own variable-length attention."""

import pytest
import torch
from torch.nn.functional import pad

import lion_st
from lion_st.modules import unpadding

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
LENGTHS = torch.tensor([1, 130, 7, 64, 33])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_values_and_gradients_of_grouped_heads_are_those_of_sdpa(dtype, causal, scaling, groups):
    assert unpadding.varlen_attn is not None
    bounds = pad(LENGTHS.cumsum(0), (1, 0)).int().cuda()
    generator = torch.Generator().manual_seed(0)
    tokens = int(LENGTHS.sum())
    states = [
        torch.randn(tokens, heads, 64, generator=generator).to("cuda", dtype).requires_grad_()
        for heads in (8, groups, groups)
    ]
    upstream = torch.randn(tokens, 8, 64, generator=generator).cuda()
    found = unpadding.call_varlen_attn(
        unpadding.varlen_attn, *states, bounds, int(LENGTHS.max()), causal=causal, scaling=scaling
    )
    exact = [one.detach().float().requires_grad_() for one in states]
    query, key, value = (one.transpose(0, 1)[None] for one in exact)
    expected = unpadding.attend_text_by_text(query, key, value, bounds, causal, scaling)[0]
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()
    gradients = torch.autograd.grad(found, states, upstream.to(dtype))
    for one, right in zip(gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert (one.float() - right).abs().max() < 0.03 * right.abs().max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_a_model_runs_packed_and_gives_the_vectors_of_padded_texts(tiny_backbone, texts, family, paradigm, dtype):
    model = lion_st.build(tiny_backbone(family, dtype=dtype), paradigm, device="cuda").eval()
    assert model[0].runs_packed and unpadding.why_not_here(model[0].model) is None
    features = {name: value.cuda() for name, value in model.preprocess(texts).items() if torch.is_tensor(value)}
    assert not features["attention_mask"].all()
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0]["token_embeddings"].shape)))
    with torch.no_grad():
        found = model(features)["sentence_embedding"].float()
        model[0].runs_packed = False
        model[0].model.set_attn_implementation("sdpa")
        expected = model(features)["sentence_embedding"].float()
    assert [shape[0] for shape in seen] == [1, len(texts)]
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_float32_weights_run_packed_under_autocast_and_train(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "sparse", device="cuda").train()
    assert unpadding.why_not(model[0].model) is not None  # float32 alone has no such attention
    with torch.autocast("cuda", torch.bfloat16):
        assert unpadding.why_not_here(model[0].model) is None
        features = {name: value.cuda() for name, value in model.preprocess(texts).items() if torch.is_tensor(value)}
        model(features)["sentence_embedding"].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_where_it_cannot_run_padding_is_computed_with_one_warning(tiny_backbone, texts, monkeypatch, caplog):
    def fails(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(unpadding, "varlen_attn", fails)
    with caplog.at_level("WARNING", logger="lion_st"):
        model = lion_st.build(tiny_backbone(dtype="bfloat16"), "dense", device="cuda")
        assert torch.isfinite(torch.as_tensor(model.encode(texts))).all()
        assert torch.isfinite(torch.as_tensor(model.encode(texts))).all()
    assert caplog.text.count("no kernel image is available") == 1
