"""Weights are identified by every value they have in memory, models by all that decides on their vectors."""

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import TEXTS

import lion_st
from lion_st.encoding.fingerprints import model_fingerprint, weights_fingerprint


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone, tmp_path_factory):
    model = lion_st.build(tiny_backbone(dtype="bfloat16"), "sparse", device="cpu")
    return lion_st.export(model, tmp_path_factory.mktemp("exported") / "lion", verify=False)


def test_weights_are_told_apart_by_every_value(checkpoint):
    model, same = lion_st.load(checkpoint, device="cpu"), lion_st.load(checkpoint, device="cpu")
    name = weights_fingerprint(model)
    assert weights_fingerprint(same) == name
    with torch.no_grad():
        for tensor in model.parameters():
            before = tensor.flatten()[-1].item()
            tensor.view(-1)[-1] = before + 1
            assert weights_fingerprint(model) != name
            tensor.view(-1)[-1] = before
    assert weights_fingerprint(model) == name
    for tensor in model.parameters():  # as averages of checkpoints are made, which autograd does not see
        tensor.data.copy_(0.9 * tensor.data)
    assert weights_fingerprint(model) != name
    assert weights_fingerprint(lion_st.load(checkpoint, dtype="float32", device="cpu")) != name


def test_training_and_merged_adapters_change_the_name_of_the_weights(tiny_backbone, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = lion_st.build(tiny_backbone(), "dense", lora=lora, device="cpu")
    merged = lion_st.load(lion_st.export(adapted, tmp_path / "merged", verify=False), device="cpu")
    plain = lion_st.build(tiny_backbone(), "dense", device="cpu")
    names = {weights_fingerprint(model) for model in (adapted, merged, plain)}
    assert len(names) == 3
    before = weights_fingerprint(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(plain.preprocess(TEXTS[:2]))["sentence_embedding"].sum().backward()
    optimizer.step()
    assert weights_fingerprint(plain) != before


@pytest.mark.parametrize(
    ("paradigm", "option", "value"),
    [
        ("sparse", "scale", 0.5),
        ("sparse", "activation", "double_log1p"),
        ("sparse", "query_max_active_dims", 3),
        ("sparse", "document_max_active_dims", 3),
        ("sparse", "query_length", 7),
        ("sparse", "document_length", 7),
        ("sparse", "causal", True),
        ("sparse", "document_prompt", "text: "),
        ("sparse", "add_bos", False),
        ("sparse", "add_eos", True),
        ("dense", "pooling", "last_token"),
        ("dense", "normalize", True),
    ],
)
def test_models_are_told_apart_by_how_they_are_built(tiny_backbone, paradigm, option, value):
    plain, same = (lion_st.build(tiny_backbone(), paradigm, device="cpu") for _ in range(2))
    other = lion_st.build(tiny_backbone(), paradigm, device="cpu", **{option: value})
    assert model_fingerprint(plain) == model_fingerprint(same) != model_fingerprint(other)


@pytest.mark.parametrize(
    ("name", "value"), [("truncate_dim", 3), ("default_prompt_name", "document"), ("max_seq_length", 7)]
)
def test_a_model_is_told_apart_by_what_is_set_on_it(tiny_backbone, name, value):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    before = model_fingerprint(model)
    setattr(model, name, value)
    assert model_fingerprint(model) != before


def test_the_modules_in_the_routes_of_a_model_count(tiny_backbone):
    def routed(pooling):
        parts = [Transformer(tiny_backbone()), Pooling(32, pooling)]
        return SentenceTransformer(modules=[Router.for_query_document(parts, parts)], device="cpu")

    mean, same, last = routed("mean"), routed("mean"), routed("lasttoken")
    assert model_fingerprint(mean) == model_fingerprint(same) != model_fingerprint(last)
