"""What the checks by running found is kept in a checkpoint, and believed only next to what it was found of."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import as_sparse_encoder
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

import lion_st
from lion_st.modules.verdict import VERDICT_FILE

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)


@pytest.fixture
def passes():
    """Each forward pass of a model of transformers, by the model's class."""
    found = []

    def note(module, arguments):
        if isinstance(module, PreTrainedModel):
            found.append(type(module).__name__)

    handle = register_module_forward_pre_hook(note)
    yield found
    handle.remove()


@pytest.fixture
def saved(tiny_backbone, tmp_path):
    """A saved sparse model."""
    path = tmp_path / "saved"
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save(str(path), create_model_card=False)
    return path


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("form", ["saved", "saved with adapter", "SentenceTransformer", "SparseEncoder", "dense"])
def test_loading_runs_nothing_that_building_found(tiny_backbone, tmp_path, passes, texts, form):
    lora = LORA if form == "saved with adapter" else None
    model = lion_st.build(tiny_backbone(), "dense" if form == "dense" else "sparse", lora=lora, device="cpu")
    assert passes
    if form.startswith(("Sentence", "Sparse")):
        lion_st.export(model, tmp_path / "out", form, verify=False, create_model_card=False)
    else:
        model.save(str(tmp_path / "out"), create_model_card=False)
    passes.clear()
    loaded = lion_st.load(tmp_path / "out", device="cpu")
    halved = lion_st.load(tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    if form != "dense":
        lion_st.load(tmp_path / "out", as_sparse_encoder=True, device="cpu")
    assert not passes
    assert loaded[0].runs_packed and halved.dtype == torch.bfloat16
    assert abs(loaded.encode(texts) - model.encode(texts)).max() < 1e-5
    loaded.save(str(tmp_path / "again"), create_model_card=False)
    passes.clear()
    lion_st.load(tmp_path / "again", device="cpu")
    assert not passes


def test_a_model_is_checked_once_in_a_process(tiny_backbone, passes):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    passes.clear()
    as_sparse_encoder(model)
    assert not passes


def test_other_versions_and_another_attention_check_anew(saved, passes):
    lion_st.load(saved, attn_implementation="eager", device="cpu")
    assert passes
    for library in ("lion_st", "transformers"):
        passes.clear()
        before = (saved / VERDICT_FILE).read_text()
        edit(saved / VERDICT_FILE, **{library: "0.0.1"})
        lion_st.load(saved, device="cpu")
        assert len(passes) >= 6
        (saved / VERDICT_FILE).write_text(before)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"found": {"bidirectional": "yes"}}', "\x00"])
def test_a_missing_or_damaged_verdict_is_not_believed(saved, passes, content):
    if content is None:
        (saved / VERDICT_FILE).unlink()
    else:
        (saved / VERDICT_FILE).write_text(content)
    lion_st.load(saved, device="cpu")
    assert len(passes) >= 6


@pytest.mark.parametrize("change", ["configuration", "tokenizer", "weights", "settings"])
def test_a_verdict_next_to_other_files_is_not_believed(saved, passes, change):
    if change == "configuration":
        edit(saved / "config.json", rms_norm_eps=1e-5)
    elif change == "tokenizer":
        edit(saved / "tokenizer_config.json", model_max_length=99)
    elif change == "weights":
        weights = {name: tensor.half() for name, tensor in load_file(saved / "model.safetensors").items()}
        save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    else:
        edit(saved / "sentence_bert_config.json", query_length=7)
    lion_st.load(saved, device="cpu")
    assert len(passes) >= 6


def test_a_verdict_of_one_model_says_nothing_of_a_causal_one(tiny_backbone, saved, tmp_path):
    """GPT-2's positions are absolute: left padding changes its vectors, whatever a copied file says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    config.is_causal = False
    model = GPT2LMHeadModel(config)
    torch.nn.init.normal_(model.transformer.wpe.weight, std=1.0)
    other = shutil.copytree(saved, tmp_path / "other")
    (other / "lion_st.safetensors").unlink()
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"GPT2.*(padded on the left|stays causal)"):
        lion_st.load(other, device="cpu")


def test_an_adapters_verdict_is_bound_to_its_base(tiny_backbone, tmp_path, passes):
    base = shutil.copytree(tiny_backbone(), tmp_path / "base")
    lion_st.build(base, "sparse", lora=LORA, device="cpu").save(str(tmp_path / "adapter"), create_model_card=False)
    moved = base.rename(tmp_path / "moved")
    passes.clear()
    lion_st.load(tmp_path / "adapter", base=moved, device="cpu")
    assert not passes
    edit(moved / "config.json", rms_norm_eps=1e-5)
    model = lion_st.load(tmp_path / "adapter", base=moved, device="cpu")
    assert len(passes) >= 6
    moved.rename(base)  # where nobody looks for it: nothing can be said of it, and the adapter is saved all the same
    model.save(str(tmp_path / "again"), create_model_card=False)
    assert not (tmp_path / "again" / VERDICT_FILE).exists()


def test_a_backbone_that_cannot_run_packed_is_asked_once(tiny_backbone, tmp_path, passes, monkeypatch):
    monkeypatch.setattr("lion_st.modules.lion_transformer.packed_states_are_equal", lambda transformer: False)
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    monkeypatch.undo()
    model.save(str(tmp_path / "out"), create_model_card=False)
    passes.clear()
    assert not lion_st.load(tmp_path / "out", device="cpu")[0].runs_packed
    assert not passes
