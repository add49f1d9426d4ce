"""A checkpoint loads in the class of sentence-transformers that it was made for, and fails in every other."""

import json
import subprocess
import sys

import pytest
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SparseEncoder
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

import lion_st
from lion_st.hub import publish
from lion_st.wrong_class import TRANSFORMER

LOAD = """
import json, sys, sentence_transformers
answers = []
for path, name in json.loads(sys.argv[1]):
    try:
        model = getattr(sentence_transformers, name)(path, device="cpu", local_files_only=True)
        answers.append(f"loaded {model.get_embedding_dimension()}")
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
assert "lion_st" not in sys.modules
print("ANSWER" + json.dumps(answers))
"""


def test_stock_classes_load_their_own_form_and_refuse_all_others(tiny_backbone, tmp_path):
    for paradigm in ("sparse", "dense"):
        model = lion_st.build(tiny_backbone(), paradigm, device="cpu")
        model.save(str(tmp_path / f"{paradigm}-saved"), create_model_card=False)
        lion_st.export(model, tmp_path / paradigm, verify=False, create_model_card=False)
    sparse = lion_st.build(tiny_backbone(), "sparse", as_sparse_encoder=True, device="cpu")
    sparse.save(str(tmp_path / "encoder-saved"), create_model_card=False)
    lion_st.export(sparse, tmp_path / "encoder", "SparseEncoder", verify=False, create_model_card=False)
    lora = LoraConfig(r=4, target_modules="all-linear")
    adapted = lion_st.build(tiny_backbone(), "sparse", lora=lora, as_sparse_encoder=True, device="cpu")
    adapted.save(str(tmp_path / "adapter"), create_model_card=False)
    wrong = "Cannot determine the embedding dimension"
    own_class = "for sentence_transformers.SparseEncoder alone"
    expected = {
        ("sparse", "SentenceTransformer"): "loaded 320",
        ("sparse", "SparseEncoder"): wrong,
        ("sparse-saved", "SparseEncoder"): wrong,
        ("dense", "SentenceTransformer"): "loaded 32",
        ("dense-saved", "SentenceTransformer"): "loaded 32",
        ("dense", "SparseEncoder"): wrong,
        ("dense-saved", "SparseEncoder"): wrong,
        ("encoder", "SparseEncoder"): "loaded 320",
        ("encoder-saved", "SparseEncoder"): "loaded 320",
        ("encoder", "SentenceTransformer"): own_class,
        ("encoder-saved", "SentenceTransformer"): own_class,
        ("adapter", "SentenceTransformer"): own_class,
        ("adapter", "SparseEncoder"): "trust_remote_code",
    }
    jobs = json.dumps([(str(tmp_path / form), name) for form, name in expected])
    done = subprocess.run([sys.executable, "-c", LOAD, jobs], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.rpartition("ANSWER")[2])
    for (job, answer), found in zip(expected.items(), answers, strict=True):
        assert answer in found, (job, found)
    # What stock refuses here for being an adapter, lion_st loads, and a folder written over has one form alone.
    assert isinstance(lion_st.load(tmp_path / "adapter", as_sparse_encoder=True, device="cpu"), SparseEncoder)
    sparse.save(str(tmp_path / "sparse-saved"), create_model_card=False)
    assert not (tmp_path / "sparse-saved" / "model.safetensors").exists()
    SparseEncoder(str(tmp_path / "sparse-saved"), device="cpu")
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    model.save(str(tmp_path / "sparse-saved"), create_model_card=False)
    assert not (tmp_path / "sparse-saved" / TRANSFORMER / "model.safetensors").exists()
    SentenceTransformer(str(tmp_path / "sparse-saved"), device="cpu")


def test_both_revisions_of_a_repository_load_without_running_anything(connected, tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    publish(model, "org/lion-sp-tiny", license="mit")
    passes = []
    handle = register_module_forward_pre_hook(
        lambda module, _: passes.append(module) if isinstance(module, PreTrainedModel) else None
    )
    try:
        main = lion_st.load("org/lion-sp-tiny", device="cpu")
        encoder = lion_st.load("org/lion-sp-tiny", revision="sparse-encoder", as_sparse_encoder=True, device="cpu")
    finally:
        handle.remove()
    assert not passes
    assert abs(main.encode(texts) - encoder.encode(texts).to_dense().numpy()).max() < 1e-6


def test_a_sparse_model_does_not_cut_its_vocabulary(tiny_backbone, texts):
    sparse, dense = (lion_st.build(tiny_backbone(), paradigm, device="cpu") for paradigm in ("sparse", "dense"))
    with pytest.raises(ValueError, match=r"truncate_dim=8 would keep the first terms.*max_active_dims"):
        sparse.encode(texts, truncate_dim=8)
    with sparse.truncate_embeddings(8), pytest.raises(ValueError, match="truncate_dim=8"):
        sparse.encode_query(texts)
    assert dense.encode(texts, truncate_dim=8).shape == (len(texts), 8)
