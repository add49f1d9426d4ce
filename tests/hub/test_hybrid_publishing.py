"""A hybrid model is one repository: a stock checkpoint for each vector, and one model of both for lion_st."""

import json
import re

import numpy as np
import pytest
import torch
from commands import lion
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer, SparseEncoder

import lion_st
from lion_st.checkpoints import is_exported_pair
from lion_st.data import save_beir
from lion_st.encoding import encode_texts
from lion_st.encoding.fingerprints import model_name, model_revision
from lion_st.hub import publish, publish_folder, render_card
from lion_st.supervision import load_teacher
from lion_st.training.options.arguments import retriever_arguments
from lion_st.training.recipes import get_recipe
from lion_st.training.starting import build_model

NAME = "org/lion-hybrid"


@pytest.fixture(scope="module")
def model(tiny_backbone):
    torch.manual_seed(3)
    settings = dict(query_prompt="q: ", query_length=24, document_length=40, device="cpu")
    found = lion_st.build(tiny_backbone(tied=False), "hybrid", **settings)
    found[1].fusion_weights = (0.25, 0.75)
    return found


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_stock_classes_load_each_vector_of_what_lion_st_loads_as_one(connected, model, texts, tmp_path, capsys):
    done = publish(model, NAME, license="mit")
    assert set(done.tags) == {"v1", "v1-sparse-encoder"}
    repository = connected.repositories["model", NAME]
    # The weights of each, those that folding changes, and the guard's empty ones: once, though two revisions have them.
    assert len(repository.commits) == 3 and len(connected.uploaded) == 4
    assert publish(model, NAME, license="mit").commits == done.commits
    expected = encode_texts(model, texts, "query")
    same(SentenceTransformer(NAME, device="cpu").encode_query(texts), expected.dense)
    stock = SparseEncoder(NAME, revision="sparse-encoder", device="cpu")
    same(stock.encode_query(texts).to_dense().numpy(), expected.sparse.toarray())
    for revision in (None, "v1", done.commits["main"]):
        loaded = lion_st.load(NAME, revision=revision, paradigm="hybrid", device="cpu")
        assert loaded[1].fusion_weights == (0.25, 0.75) and loaded.prompts == model.prompts
        found = encode_texts(loaded, texts, "query")
        same(found.sparse.toarray(), expected.sparse.toarray())
        same(found.dense, expected.dense)
        assert model_name(loaded) == NAME and model_revision(loaded) == done.commits["main"]
    sparse = lion_st.load(NAME, revision="sparse-encoder", as_sparse_encoder=True, device="cpu")
    assert lion_st.paradigm_of(sparse) == "sparse"

    capsys.readouterr()
    for block in re.findall(r"```python\n(.*?)```", done.card, re.DOTALL):
        exec(block, {})
    shown = capsys.readouterr().out
    assert "tensor([[" in shown and "('a', " in shown
    for line in (f"mteb run -m {NAME} -t", "--model-revision sparse-encoder -t", f"lion-st evaluate {NAME} --data"):
        assert line in done.card
    assert "320 terms, sparse and 32 dimensions, dense" in done.card
    assert "fused with the weights 0.25 (sparse) and 0.75 (dense)" in done.card

    documents = {f"d{row}": {"title": "", "text": text} for row, text in enumerate(texts)}
    data = save_beir(tmp_path / "data", documents, {"q": texts[0]}, {"q": {"d0": 1}})
    lion("evaluate", NAME, "--data", data, "--output", tmp_path / "results", "--quiet")
    result = next((tmp_path / "results").rglob("model_meta.json"))
    assert json.loads(result.read_text())["name"] == NAME
    with pytest.raises(ValueError, match="two scores have no common scale"):
        load_teacher(NAME)


def test_an_export_that_is_uploaded_by_hand_opens_by_its_name(connected, model, texts, tmp_path):
    folder = lion_st.export(model, tmp_path / "models" / "pair", create_model_card=False, verify=False)
    HfApi().create_repo(NAME)
    HfApi().upload_folder(repo_id=NAME, folder_path=folder)
    loaded = lion_st.load(NAME, device="cpu")
    same(loaded.encode_document(texts), model.encode_document(texts))
    assert model_revision(loaded) == connected.repositories["model", NAME].refs["refs/heads/main"]
    publish_folder(folder, "org/other")
    assert connected.files("org/other").keys() - {".gitattributes"} == {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    }
    connected.requests.clear()
    arguments, _ = retriever_arguments(get_recipe("micro", "sparse", "cl"), model="org/other", train_data="-")
    for refused in (lambda: build_model(arguments), lambda: load_teacher("org/other")):
        with pytest.raises(ValueError, match=r"two stock checkpoints|two scores have no common scale"):
            refused()
    assert connected.requests and not any("safetensors" in path for _, path in connected.requests)
    same(
        SparseEncoder("org/other", revision="sparse-encoder", device="cpu").encode_document(texts).to_dense(),
        encode_texts(model, texts, "document").sparse.toarray(),
    )


def test_the_hub_is_not_asked_for_files_and_folders_of_this_machine(connected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    for place in ("models/tiny.gguf", "models/none.gguf", "runs/none"):
        assert not is_exported_pair(place)
    arguments, _ = retriever_arguments(get_recipe("micro", "sparse", "cl"), model="models/none.gguf", train_data="-")
    with pytest.raises(FileNotFoundError, match=r"There is no GGUF file 'models/none\.gguf'"):
        build_model(arguments)
    assert connected.requests == []


def test_nothing_of_a_hybrid_model_stays_where_another_one_is_published(connected, model, tiny_backbone):
    publish(model, NAME, license="mit")
    done = publish(lion_st.build(tiny_backbone(), "dense", device="cpu"), NAME, license="mit")
    assert {"hybrid.json", "sparse/modules.json"} <= set(done.deleted["main"])
    assert lion_st.paradigm_of(lion_st.load(NAME, device="cpu")) == "dense"


def test_a_pull_request_has_both_vectors_and_a_card_of_an_unexported_folder_is_refused(model, tmp_path):
    done = publish(model, NAME, license="mit", dry_run=True, create_pr=True)
    assert set(done.files) == {"main"} and {"hybrid.json", "sparse/modules.json", "modules.json"} <= set(
        done.files["main"]
    )
    assert "revision=" not in done.card and "made when the model is published to main" in done.card
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    with pytest.raises(ValueError, match=r"a stock model gives one vector of a text.*what `lion-st export` writes"):
        render_card(tmp_path / "saved")
    lion_st.export(model, tmp_path / "pair", create_model_card=False, verify=False)
    card = render_card(tmp_path / "pair")
    assert 'SentenceTransformer("pair/dense")' in card and 'SparseEncoder("pair/sparse")' in card
    limited = lion_st.load(tmp_path / "pair", device="cpu")
    limited[1].query_max_active_dims = 9
    with pytest.raises(ValueError, match="one limit of active terms"):
        publish(limited, NAME, dry_run=True)
