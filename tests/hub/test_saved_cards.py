"""What model.save, export and push_to_hub say of a model beside its weights."""

import pytest

import lion_st


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone()


def card(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("as_sparse_encoder", [False, True])
@pytest.mark.parametrize("model_type", ["SentenceTransformer", "SparseEncoder"])
def test_a_sparse_export_s_card_loads_it_with_the_class_it_was_written_for(
    backbone, tmp_path, as_sparse_encoder, model_type
):
    model = lion_st.build(backbone, "sparse", as_sparse_encoder=as_sparse_encoder, device="cpu")
    lion_st.export(model, tmp_path / "model", model_type=model_type)
    other = {"SentenceTransformer": "SparseEncoder", "SparseEncoder": "SentenceTransformer"}[model_type]
    text = card(tmp_path / "model")
    assert f"import {model_type}" in text and f"import {other}" not in text
    assert f"{model_type}(" in text and f"= {other}(" not in text
    assert "dense vector space" not in text and "**Output Dimensionality:** 320" in text  # its terms


def test_a_saved_sparse_model_is_not_called_dense(backbone, tmp_path):
    lion_st.build(backbone, "sparse", device="cpu").save(str(tmp_path / "model"))
    assert "320-dimensional sparse vector space" in card(tmp_path / "model")


def test_a_dense_model_s_card_stays_as_it_is(backbone, tmp_path):
    lion_st.build(backbone, "dense", device="cpu").save(str(tmp_path / "model"))
    assert "32-dimensional dense vector space" in card(tmp_path / "model")


def test_an_adapter_of_a_local_base_is_not_pushed(backbone):
    from peft import LoraConfig

    model = lion_st.build(backbone, "dense", lora=LoraConfig(r=2, target_modules=["q_proj"]), device="cpu")
    with pytest.raises(ValueError, match=r"which nobody else has\. Push what lion_st\.export writes"):
        model.push_to_hub("org/adapter")
