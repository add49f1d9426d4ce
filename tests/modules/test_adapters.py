"""Adapters of every shape that PEFT makes: on norms, on embeddings, by `get_peft_model`, and several of them."""

from functools import partial

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer
from tiny_models import stirred

import lion_st


def lora(**options) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"]} | options))


moved = partial(stirred, size=0.2)


def saved(model, folder):
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize(
    ("paradigm", "options"),
    [
        ("sparse", {"modules_to_save": ["norm", "input_layernorm"]}),
        ("sparse", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("dense", {"trainable_token_indices": [65, 66]}),
    ],
    ids=["norms", "embeddings", "tokens"],
)
def test_what_is_trained_beside_linear_layers_comes_back_and_is_merged(
    tiny_backbone, texts, tmp_path, paradigm, options
):
    backbone = tiny_backbone(tied=False)
    model = moved(lion_st.build(backbone, paradigm, lora=lora(**options), device="cpu"))
    expected = model.encode_document(texts)
    assert abs(expected - lion_st.build(backbone, paradigm, device="cpu").encode_document(texts)).max() > 0.05
    saved(model, tmp_path / "adapter")
    assert (lion_st.load(tmp_path / "adapter", device="cpu").encode_document(texts) == expected).all()
    merged = lion_st.load(tmp_path / "adapter", merge_adapter=True, device="cpu")
    saved(merged, tmp_path / "merged")
    lion_st.export(model, tmp_path / "exported", create_model_card=False)
    for found in (
        merged,
        lion_st.load(tmp_path / "merged", device="cpu"),
        SentenceTransformer(str(tmp_path / "exported"), device="cpu"),
    ):
        assert abs(found.encode_document(texts) - expected).max() < 1e-5


def test_an_adapter_of_get_peft_model_is_one_of_ours(tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    model[0].model = get_peft_model(model[0].model, lora())
    expected = moved(model).encode(texts)
    loaded = lion_st.load(saved(model, tmp_path / "adapter"), device="cpu")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (loaded.encode(texts) == expected).all()
    with pytest.raises(ValueError, match="PROMPT_TUNING puts virtual tokens in front of texts"):
        loaded[0].model = get_peft_model(
            lion_st.build(tiny_backbone(), "sparse", device="cpu")[0].model,
            PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        )


def test_of_several_adapters_the_one_that_runs_is_saved(tiny_backbone, texts, tmp_path):
    folders = [
        saved(moved(lion_st.build(tiny_backbone(), "dense", lora=lora(), device="cpu"), seed), tmp_path / str(seed))
        for seed in (3, 4)
    ]
    first, second = (lion_st.load(folder, device="cpu").encode(texts) for folder in folders)
    model = lion_st.load(folders[0], device="cpu")
    model.load_adapter(str(folders[1]), adapter_name="other")
    assert (model.encode(texts) == second).all() and abs(first - second).max() > 0.05
    assert (lion_st.load(saved(model, tmp_path / "both"), device="cpu").encode(texts) == second).all()
    for module in model[0].model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"runs the adapters \['default', 'other'\], and a checkpoint holds one"):
        saved(model, tmp_path / "two")


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tokens_that_were_added_to_an_adapters_base_come_back(tiny_backbone, tmp_path, paradigm, tied):
    model = lion_st.build(tiny_backbone(tied=tied), paradigm, lora=lora(), device="cpu")
    model.tokenizer.add_tokens(["[Q]", "[D]"])
    model[0].model.resize_token_embeddings(len(model.tokenizer))
    texts = ["[Q] what do lions eat", "[D] Lions prey on zebras."]
    expected = moved(model).encode(texts)
    loaded = lion_st.load(saved(model, tmp_path / "adapter"), device="cpu")
    assert (loaded.encode(texts) == expected).all() and loaded[0].model.config.vocab_size == 322
    again = lion_st.load(saved(loaded, tmp_path / "again"), device="cpu")
    assert (again.encode(texts) == expected).all()
    lion_st.export(loaded, tmp_path / "exported", create_model_card=False)  # compares the vectors
