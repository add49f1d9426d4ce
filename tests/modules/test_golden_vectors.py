"""The vectors are those of the paper's released implementation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lion_st

BATCHES = ("mixed_left", "mixed_right", "nopad", "single", "one_token", "mult8_left")
# Right values agree to 2e-6; the nearest wrong variant in reps.json is 8e-3 away.
TOLERANCE = 1e-5


def vectors(model, case, batch):
    inputs = load_file(case / "inputs.safetensors")
    features = {name: inputs[f"{batch}.{name}"] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model.eval()(features)["sentence_embedding"].float()


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("written_by", ["transformers 4", "transformers 5"])
def test_vectors_are_golden_for_every_padding(golden_case, golden_backbone, tmp_path, paradigm, written_by):
    backbone = shutil.copytree(golden_backbone, tmp_path / "backbone")
    if written_by == "transformers 5":
        shutil.copy(golden_case / "config_transformers5.json", backbone / "config.json")
    model = lion_st.build(backbone, paradigm, device="cpu")
    golden = load_file(golden_case / "reps.safetensors")
    compared = [batch for batch in BATCHES if f"{batch}.{paradigm}" in golden]
    assert len(compared) >= 5
    for batch in compared:
        torch.testing.assert_close(
            vectors(model, golden_case, batch), golden[f"{batch}.{paradigm}"], rtol=0, atol=TOLERANCE
        )


def test_right_padding_gives_the_dense_vectors_of_left_padding(golden_case, golden_backbone):
    model = lion_st.build(golden_backbone, "dense", device="cpu")
    golden = load_file(golden_case / "reps.safetensors")
    actual = vectors(model, golden_case, "mixed_right")
    torch.testing.assert_close(actual, golden["mixed_left.dense"], rtol=0, atol=TOLERANCE)


def test_bfloat16_vectors_are_as_near_to_float32_as_the_golden_ones(golden_case, golden_backbone):
    model = lion_st.build(golden_backbone, "sparse", dtype="bfloat16", device="cpu")
    golden = load_file(golden_case / "reps.safetensors")
    rounding = json.loads((golden_case / "reps.json").read_text())["bf16_vs_fp32_sparse_max_abs_diff"]
    actual = vectors(model, golden_case, "mixed_left")
    # CPUs round sums of bfloat16 in orders of their own.
    assert (actual - golden["mixed_left.sparse"]).abs().max() <= 1.6 * rounding
    assert (actual - golden["mixed_left.sparse_bf16"]).abs().max() <= 1.6 * rounding


@pytest.mark.parametrize("merge_adapter", [False, True])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_adapters_in_the_released_layout_give_golden_vectors(golden_case, golden_backbone, paradigm, merge_adapter):
    model = lion_st.load(
        golden_case / f"lora_{paradigm}",
        paradigm=paradigm,
        base=golden_backbone,
        merge_adapter=merge_adapter,
        device="cpu",
    )
    golden = load_file(golden_case / "lora_reps.safetensors")
    state = "merged" if merge_adapter else "unmerged"
    for batch in ("mixed_left", "nopad"):
        actual = vectors(model, golden_case, batch)
        torch.testing.assert_close(actual, golden[f"{paradigm}.{batch}.{state}"], rtol=0, atol=TOLERANCE)


def test_a_causal_backbone_would_not_pass(golden_case, golden_backbone):
    model = lion_st.build(golden_backbone, "sparse", device="cpu")
    model[0].config.is_causal = True
    golden = load_file(golden_case / "reps.safetensors")
    assert (vectors(model, golden_case, "mixed_left") - golden["mixed_left.sparse"]).abs().max() > 0.5
