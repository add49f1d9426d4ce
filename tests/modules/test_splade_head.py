import copy

import pytest
import torch
from peft import LoraConfig
from tiny_models import as_sparse_encoder

import lion_st
from lion_st.modules import SpladeHead


def oracle(model, features, scale):
    """The vectors by way of the backbone's own logits, [B, L, V] and all."""
    with torch.no_grad():
        transformer = model[0].eval()
        mask = features["attention_mask"]
        states = transformer.decoder(input_ids=features["input_ids"], attention_mask=mask).last_hidden_state
        logits = transformer.model.get_output_embeddings()(states * scale)
        if softcap := getattr(transformer.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / softcap) * softcap
        return logits.masked_fill(mask[..., None] == 0, -torch.inf).amax(1).relu().log1p()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_vectors_are_the_pooled_logits_of_the_backbone(tiny_backbone, family, texts, tied, scale):
    model = lion_st.build(tiny_backbone(family, tied), "sparse", scale=scale, device="cpu")
    assert model[1].scale == (scale or 32**-0.25)
    features = model.preprocess(texts)
    expected = oracle(model, features, model[1].scale)
    with torch.no_grad():
        actual = model.eval()(features)["sentence_embedding"]
    assert actual.shape == (len(texts), 320)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})]
)
def test_a_backbone_that_scales_its_logits_keeps_doing_so(tiny_backbone, family, config, texts):
    plain = lion_st.build(tiny_backbone(family, **{name: 1.0 for name in config}), "sparse", device="cpu")
    scaled = lion_st.build(tiny_backbone(family, **config), "sparse", device="cpu")
    ratio = torch.expm1(scaled.encode(texts, convert_to_tensor=True)) / torch.expm1(
        plain.encode(texts, convert_to_tensor=True)
    )
    factor = config.get("logit_scale") or 1 / config["logits_scaling"]
    torch.testing.assert_close(ratio.nanmean(), torch.tensor(factor), rtol=1e-3, atol=1e-4)


def test_a_backbone_with_unknown_logits_is_refused(tiny_backbone, monkeypatch):
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits in a way"):
        lion_st.build(tiny_backbone(), "sparse", device="cpu")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_owns_no_weight_and_follows_the_backbones(tiny_backbone, texts, tied):
    model = lion_st.build(tiny_backbone(tied=tied), "sparse", device="cpu")
    assert not list(model[1].parameters()) and not any(name.startswith("1.") for name in model.state_dict())
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    weight = model[0].model.get_output_embeddings().weight
    assert model[0].lm_head.weight is weight
    clone = copy.deepcopy(model)
    before = model.encode(texts)
    with torch.no_grad():
        clone[0].model.get_output_embeddings().weight.mul_(2)
    assert (model.encode(texts) == before).all()
    assert (clone.encode(texts) != before).any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_reach_the_backbone_and_its_head(tiny_backbone, texts, tied):
    model = lion_st.build(tiny_backbone(tied=tied), "sparse", device="cpu").train()
    model(model.preprocess(texts))["sentence_embedding"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    head = model[0].model.get_output_embeddings().weight
    assert (head.grad != 0).any()


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (False, {"target_modules": ["q_proj", "lm_head"]}),
        (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_an_adapter_on_the_head_is_refused(tiny_backbone, tied, options):
    with pytest.raises(ValueError, match="adapter on the LM head"):
        lion_st.build(tiny_backbone(tied=tied), "sparse", lora=LoraConfig(r=2, **options), device="cpu")


# ---- limits of active terms ----


def active_dims(vectors):
    return (vectors > 0).sum(-1).tolist()


def test_limits_hold_by_task_and_keep_the_largest_terms(tiny_backbone, texts):
    free = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    limited = lion_st.build(
        tiny_backbone(),
        "sparse",
        max_active_dims=30,
        query_max_active_dims=5,
        document_max_active_dims=10,
        device="cpu",
    )
    assert active_dims(limited.encode_query(texts)) == [5] * len(texts)
    assert active_dims(limited.encode_document(texts)) == [10] * len(texts)
    assert active_dims(limited.encode(texts)) == [30] * len(texts)
    every = free.encode_query(texts, convert_to_tensor=True)
    kept = limited.encode_query(texts, convert_to_tensor=True)
    torch.testing.assert_close(kept.sort(descending=True).values[:, :5], every.topk(5).values)


def test_limits_do_not_touch_training(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "sparse", max_active_dims=3, device="cpu").train()
    assert min(active_dims(model(model.preprocess(texts))["sentence_embedding"])) > 3


@pytest.mark.parametrize("as_sparse_encoder", [False, True])
@pytest.mark.parametrize("options", [{}, {"convert_to_tensor": True}, {"max_active_dims": 5}])
def test_a_model_that_yields_nan_encodes_nothing(tiny_backbone, texts, tmp_path, options, as_sparse_encoder):
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save(str(tmp_path))
    model = lion_st.load(tmp_path, as_sparse_encoder=as_sparse_encoder, device="cpu")
    if not as_sparse_encoder:
        options = {name: value for name, value in options.items() if name != "max_active_dims"}
    assert model.encode(texts, **options) is not None
    with torch.no_grad():
        model[0].model.model.norm.weight[3] = torch.nan
    for encode in (model.encode, model.encode_query, model.encode_document):
        with pytest.raises(ValueError, match=r"vectors of 8 texts .* are NaN or infinite"):
            encode(texts, **options)
    for state in (model.train(), model.eval()):  # with gradients, nothing is looked at
        assert state(state.preprocess(texts))["sentence_embedding"].isnan().all()


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "8"])
def test_a_limit_is_a_positive_integer(limit):
    with pytest.raises(ValueError, match="query_max_active_dims must be a positive integer"):
        SpladeHead(query_max_active_dims=limit)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive_and_finite(scale):
    with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
        SpladeHead(scale=scale)


# ---- sparse tensors ----


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_sparse_encoder_shares_weights_and_gives_the_same_rows(tiny_backbone, texts, batch_size):
    model = lion_st.build(tiny_backbone(), "sparse", query_prompt="query: ", device="cpu")
    encoder = as_sparse_encoder(model)
    assert encoder[0] is model[0] and encoder.prompts == model.prompts
    rows = encoder.encode_query(texts, batch_size=batch_size)
    assert rows.is_sparse and rows.shape == (len(texts), 320) and rows.is_coalesced()
    torch.testing.assert_close(rows.to_dense(), model.encode_query(texts, convert_to_tensor=True))
    dense = encoder.encode_query(texts, convert_to_sparse_tensor=False)
    torch.testing.assert_close(rows.to_dense(), dense)
    single = encoder.encode_query(texts[0])
    torch.testing.assert_close(single.to_dense(), dense[0])
    listed = encoder.encode_query(texts, convert_to_tensor=False)
    assert isinstance(listed, list)
    torch.testing.assert_close(listed[1].to_dense(), dense[1])


def test_a_sparse_encoder_limits_active_dims(tiny_backbone, texts):
    encoder = lion_st.build(tiny_backbone(), "sparse", document_max_active_dims=7, as_sparse_encoder=True, device="cpu")
    assert encoder.encode_document(texts)._nnz() == 7 * len(texts)
    assert encoder.encode_document(texts, max_active_dims=2)._nnz() == 2 * len(texts)


def test_a_sparse_encoder_of_no_texts_is_empty(tiny_backbone):
    encoder = lion_st.build(tiny_backbone(), "sparse", as_sparse_encoder=True, device="cpu")
    assert encoder.encode([]).shape[0] == 0
