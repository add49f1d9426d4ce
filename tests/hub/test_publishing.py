"""Publishing changes a repository in whole commits, and can be taken up again."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lion_st
from lion_st.guard import GUARD
from lion_st.hub import publish, publish_folder, render_card

NAME = "org/lion-sp-tiny"
CONFIG = "config_sentence_transformers.json"


@pytest.fixture
def sparse(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse", device="cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in two shards, of which only their size matters."""
    folder = tmp_path / "models" / "two-shards"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(100_000))
    (folder / "model-00002-of-00002.safetensors").write_bytes(bytes(300_000))
    return folder


# ---- a model ----


def test_a_sparse_model_is_two_revisions_of_the_same_weights_and_each_version_is_tagged(connected, sparse):
    done = publish(sparse, NAME, license="mit", private=True)
    main, twin = connected.files(NAME), connected.files(NAME, "sparse-encoder")
    assert json.loads(main[CONFIG])["model_type"] == "SentenceTransformer"
    assert json.loads(twin[CONFIG])["model_type"] == "SparseEncoder"
    assert {path for path in twin if main[path] != twin[path]} == {CONFIG, "modules.json"}
    assert {path.split("/")[0] for path in main.keys() - twin.keys()} == {GUARD}
    assert done.files["main"] == {path: len(content) for path, content in main.items() if path != ".gitattributes"}
    assert done.card == main["README.md"].decode() and ModelCard(done.card).data.license == "mit"
    assert done.url == f"{connected.url}/{NAME}"
    repository = connected.repositories["model", NAME]
    assert repository.private
    assert repository.resolve("v1") == done.commits["main"] == repository.refs["refs/heads/main"]
    assert repository.resolve("v1-sparse-encoder") == done.commits["sparse-encoder"]
    # The repository's own first commit, and one for each form; the weights and the guard's empty ones went over once.
    assert len(repository.commits) == 3 and len(connected.uploaded) == 2

    again = publish(sparse, NAME, license="mit")
    assert again.commits == done.commits and again.tags == done.tags
    assert len(repository.commits) == 3 and len(connected.uploaded) == 2

    with torch.no_grad():
        sparse[0].model.get_input_embeddings().weight.mul_(1.5)
    second = publish(sparse, NAME, license="mit")
    assert set(second.tags) == {"v2", "v2-sparse-encoder"} and len(repository.commits) == 5
    for revision in ("", "-sparse-encoder"):
        before, after = (connected.files(NAME, f"v{version}{revision}") for version in (1, 2))
        assert before.keys() == after.keys() and before["model.safetensors"] != after["model.safetensors"]
        assert before[CONFIG] == after[CONFIG]


def test_a_dense_model_needs_main_alone_and_takes_its_bases_licence(connected, tiny_backbone):
    connected.add("org/base", {"README.md": b"---\nlicense: apache-2.0\nlanguage: en\n---\n"})
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    done = publish(model, "org/lion-ds-tiny", base_model="org/base", tag="first")
    assert set(done.commits) == {"main"} and set(done.tags) == {"first"}
    assert set(connected.repositories["model", "org/lion-ds-tiny"].refs) == {"refs/heads/main", "refs/tags/first"}
    card = ModelCard(connected.files("org/lion-ds-tiny")["README.md"].decode()).data
    assert (card.license, card.base_model, card.language) == ("apache-2.0", "org/base", ["en"])
    again = ModelCard(render_card("org/lion-ds-tiny", offline=False)).data
    assert (again.license, again.base_model, again.language) == ("apache-2.0", "org/base", ["en"])


def test_without_a_licence_nothing_is_published(connected, sparse):
    with pytest.raises(ValueError, match="No licence is known for 'org/lion-sp-tiny'"):
        publish(sparse, NAME)
    assert not connected.repositories


def test_a_dry_run_reaches_for_no_network(sparse, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the network was reached for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    done = publish(sparse, NAME, dry_run=True)
    assert set(done.files) == {"main", "sparse-encoder"} and done.files["main"]["model.safetensors"] > 10_000
    assert done.url is None and not done.commits and "# lion-sp-tiny" in done.card


def test_names_that_the_hub_would_not_take_are_refused(sparse):
    for name in ("lion", "a/b/c", "org/li on", "org/-"):
        with pytest.raises(ValueError, match="is no name for a repository"):
            publish(sparse, name, dry_run=True)
    with pytest.raises(ValueError, match="pull request goes to main"):
        publish(sparse, NAME, create_pr=True, tag="v1")


# ---- a folder as it is, and what goes wrong ----


def test_a_folder_is_published_as_it_is(connected, tmp_path):
    folder = tmp_path / "datasets" / "toy"
    (folder / "part").mkdir(parents=True)
    (folder / "README.md").write_text("# Toy")
    (folder / "part" / "a.parquet").write_bytes(b"PAR1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    connected.add("org/toy", {"README.md": b"old", "gone.txt": b"x", ".gitattributes": b"a"}, kind="dataset")
    done = publish_folder(folder, "org/toy", tag="v1")
    files = connected.files("org/toy", "v1", kind="dataset")
    assert files == {"README.md": b"# Toy", "part/a.parquet": b"PAR1", ".gitattributes": b"a"}
    assert done.url == f"{connected.url}/datasets/org/toy"
    assert HfApi().dataset_info("org/toy").sha == done.commits["main"]


def test_a_folder_with_a_sparse_model_has_its_twin_too(connected, sparse, tmp_path):
    folder = lion_st.export(sparse, tmp_path / "models" / "lion-sp-tiny", verify=False)
    done = publish_folder(folder, NAME, tag="v1")
    assert set(done.tags) == {"v1", "v1-sparse-encoder"}
    main, twin = connected.files(NAME), connected.files(NAME, "sparse-encoder")
    assert {path for path in twin if main[path] != twin[path]} == {CONFIG, "modules.json"}
    assert json.loads(twin[CONFIG])["model_type"] == "SparseEncoder"


def test_a_cut_upload_leaves_main_as_it_was_and_a_second_one_completes(connected, folder):
    before = connected.add("org/two-shards", {"config.json": b"before"}).refs.copy()
    connected.cut_uploads_after = 200_000
    with pytest.raises(OSError, match="No revision is half changed; the same call made again goes on from here"):
        publish_folder(folder, "org/two-shards")
    assert connected.was_cut.is_set()
    assert connected.repositories["model", "org/two-shards"].refs == before
    assert connected.files("org/two-shards") == {"config.json": b"before"}
    assert len(connected.uploaded) == 1
    connected.cut_uploads_after = None
    publish_folder(folder, "org/two-shards")
    assert len(connected.uploaded) == 2  # only the missing one
    assert connected.files("org/two-shards").keys() == {path.name for path in folder.iterdir()}


def test_a_pull_request_or_another_branch_leaves_main_alone(connected, folder):
    connected.add("org/two-shards", {"README.md": b"mine"})
    asked = publish_folder(folder, "org/two-shards", create_pr=True)
    assert asked.url == f"{connected.url}/org/two-shards/discussions/1"
    branched = publish_folder(folder, "org/two-shards", revision="try/two")
    assert connected.files("org/two-shards") == {"README.md": b"mine"}
    assert connected.files("org/two-shards", "refs/pr/1") == connected.files("org/two-shards", "try/two")
    assert branched.commits.keys() == {"try/two"} and not branched.tags


@pytest.mark.parametrize("token, reason", [("hf_wrong", "Invalid credentials"), ("hf_other", "may not create")])
def test_a_token_that_may_not_write_is_refused(connected, folder, token, reason):
    with pytest.raises(PermissionError, match=f"does not let this token write to 'org/two-shards'.*{reason}"):
        publish_folder(folder, "org/two-shards", token=token)
    assert not connected.repositories


def test_a_taken_tag_is_refused_before_anything_changes(connected, folder):
    for tag in ("first", "second"):
        (folder / "config.json").write_text(f'"{tag}"')
        publish_folder(folder, "org/two-shards", tag=tag)
    before = dict(connected.repositories["model", "org/two-shards"].refs)
    with pytest.raises(ValueError, match="'first' of 'org/two-shards' marks an earlier commit"):
        publish_folder(folder, "org/two-shards", tag="first")
    assert connected.repositories["model", "org/two-shards"].refs == before


def test_pickled_files_and_unknown_types_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with files"):
        publish_folder(tmp_path / "nothing", "org/old")
    with pytest.raises(ValueError, match="its type is unknown"):
        publish_folder(tmp_path, "org/old")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"pytorch_model.bin may be pickled"):
        publish_folder(folder, "org/old")


# ---- while training ----


def test_push_to_hub_gives_what_save_gives(connected, sparse, tmp_path):
    sparse.push_to_hub("org/pushed")
    files = connected.files("org/pushed")
    sparse.save_pretrained(str(tmp_path / "saved"))
    saved = {str(file.relative_to(tmp_path / "saved")): file for file in (tmp_path / "saved").rglob("*")}
    assert files["model.safetensors"] == saved["model.safetensors"].read_bytes()
    assert files["modules.json"] == saved["modules.json"].read_bytes() and saved["README.md"].is_file()
    assert not [path for path in files if path.endswith(".bin")]
    loaded = lion_st.load("org/pushed", device="cpu")
    assert abs(loaded.encode("a lion") - sparse.encode("a lion")).max() < 1e-6


def test_the_trainer_pushes_checkpoints(connected, tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        push_to_hub=True,
        hub_model_id="org/trained",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        report_to="none",
        use_cpu=True,
    )
    pairs = Dataset.from_dict({"query": texts[:4], "answer": texts[4:]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
    files = connected.files("org/trained")
    assert {"checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors", "model.safetensors"} <= files.keys()
    assert abs(lion_st.load("org/trained", device="cpu").encode(texts) - model.encode(texts)).max() < 1e-5
