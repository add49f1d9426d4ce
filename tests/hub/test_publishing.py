"""Publishing changes a repository in whole commits, and can be taken up again."""

import bz2
import gzip
import io
import json
import pickle
import re
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import lion
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard
from loopback_hub import as_blob
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lion_st
from lion_st.hub import publish, publish_folder, render_card
from lion_st.training import get_recipe, retriever_arguments, train_retriever
from lion_st.wrong_class import BLOCK, TRANSFORMER

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


def at_top(files: dict[str, bytes]) -> dict[str, bytes]:
    """A revision's files as if its transformer lay at the top, as it does in main."""
    moved = {path.removeprefix(f"{TRANSFORMER}/"): content for path, content in files.items()
             if path.startswith(f"{TRANSFORMER}/")}  # fmt: skip
    return {path: content for path, content in files.items() if not path.startswith(f"{TRANSFORMER}/")} | moved


# ---- a model ----


def test_a_sparse_model_is_two_revisions_of_the_same_weights_and_each_version_is_tagged(connected, sparse):
    done = publish(sparse, NAME, license="mit", private=True)
    main, sparse_encoder = connected.files(NAME), connected.files(NAME, "sparse-encoder")
    assert json.loads(main[CONFIG])["model_type"] == "SentenceTransformer"
    assert json.loads(sparse_encoder[CONFIG])["model_type"] == "SparseEncoder"
    moved = at_top(sparse_encoder)
    assert {path for path in moved if main[path] != moved[path]} == {CONFIG, "modules.json"}
    assert {path.split("/")[0] for path in main.keys() - moved.keys()} == {BLOCK}
    assert "SparseEncoder" in json.loads(sparse_encoder["config.json"])["model_type"]
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
        assert before.keys() == after.keys()
        assert at_top(before)["model.safetensors"] != at_top(after)["model.safetensors"]
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


def test_a_dry_run_reaches_for_no_network(sparse, tmp_path, monkeypatch):
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("there is no network")

    lion_st.export(sparse, tmp_path / "runs" / "lion-sp", create_model_card=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for model in (sparse, "runs/lion-sp"):
        done = publish(model, NAME, dry_run=True)
        assert set(done.files) == {"main", "sparse-encoder"} and done.files["main"]["model.safetensors"] > 10_000
        assert done.url is None and not done.commits and "# lion-sp-tiny" in done.card
    assert "# lion-sp" in render_card("runs/lion-sp")
    assert not asked


def test_of_what_lies_beside_a_checkpoint_mteb_results_and_licences_are_published(sparse, tmp_path):
    folder = lion_st.export(sparse, tmp_path / "lion-sp", verify=False)
    result = {
        "task_name": "SciFact",
        "mteb_version": "2.0",
        "dataset_revision": "1",
        "scores": {"test": [{"hf_subset": "default", "ndcg_at_10": 0.5}]},
    }
    beside = {
        "results/org__lion/1/SciFact.json": json.dumps(result),
        "results/org__lion/1/model_meta.json": '{"name": "org/lion"}',
        "results/rows.json": '[{"model": "lion-sp", "dataset": "SciFact", "query_terms": 9}]',
        "results/rows/SciFact.json": '[{"dataset": "SciFact", "run": "/home/somebody/run.trec"}]',
        "results/corpus/manifest.json": '{"texts": "/home/somebody/corpus.jsonl"}',
        "LICENSE.txt": "Yours.",
        "NOTICE": "Built with Llama",
        "USE_POLICY.md": "# Use policy",
        "notes.txt": "mine",
    }
    for path, content in beside.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    done = publish(folder, NAME, dry_run=True)
    published = {path for path in done.files["main"] if path in beside or path.startswith("results/")}
    assert published == set(beside) - {"results/rows/SciFact.json", "results/corpus/manifest.json", "notes.txt"}


def test_of_an_earlier_publication_stale_files_go_and_all_others_stay(connected, sparse):
    theirs = {
        "LICENSE": b"Theirs",
        "images/lion.png": b"png",
        "onnx/model.onnx": b"onnx",
        ".gitattributes": b"*.safetensors filter=lfs\n",
    }
    stale = {
        "model-00001-of-00002.safetensors": b"1",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
        "2_Normalize/config.json": b"{}",
        "results/rows/SciFact.json": b"{}",
        "tokenizer.model": b"x",
    }
    modules = [{"idx": 0, "path": "", "type": "a"}, {"idx": 1, "path": "2_Normalize", "type": "b"}]
    replaced = {"README.md": b"# Old", "modules.json": json.dumps(modules).encode()}
    repository = connected.add(NAME, theirs | stale | replaced)
    done = publish(sparse, NAME, license="mit")
    assert done.deleted == {"sparse-encoder": sorted(stale), "main": sorted(stale)}
    for revision in done.commits:
        files = connected.files(NAME, revision)
        assert theirs.items() <= files.items()
        assert files.keys() - theirs.keys() == done.files[revision].keys()
    assert publish(sparse, NAME, license="mit").deleted == {"sparse-encoder": [], "main": []}
    assert len(repository.commits) == 3


def test_the_command_line_says_what_is_deleted(connected, folder):
    connected.add("org/two-shards", {"old.txt": b"x"})
    command = ("publish", "--folder", folder, "org/two-shards")
    planned = lion(*command, "--dry-run").splitlines()
    assert "Of what is in the repository, all other files would be deleted." in planned
    assert "  deleted of main: old.txt" in lion(*command).splitlines()


# ---- other revisions ----


def test_naming_main_is_publishing_to_main(connected, sparse):
    done = publish(sparse, NAME, license="mit", revision="main")
    assert set(done.commits) == {"sparse-encoder", "main"} and set(done.tags) == {"v1", "v1-sparse-encoder"}
    assert 'revision="sparse-encoder"' in done.card and "--model-revision sparse-encoder" in done.card


def test_the_sparse_encoder_revision_is_never_published_alone(sparse, folder):
    for call in (lambda: publish(sparse, NAME, revision="sparse-encoder", dry_run=True),
                 lambda: publish_folder(folder, NAME, revision="sparse-encoder", dry_run=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"'sparse-encoder' is made of main.*Leave out revision"):
            call()


@pytest.mark.parametrize("place", [{"revision": "try/two"}, {"create_pr": True}])
def test_a_card_without_a_sparse_encoder_revision_beside_it_promises_none(sparse, place):
    done = publish(sparse, NAME, license="mit", dry_run=True, **place)
    assert "revision=" not in done.card and "--model-revision" not in done.card
    assert "made when the model is published to main" in done.card


def test_a_pull_request_is_updated_and_one_without_changes_is_refused(connected, folder):
    connected.add("org/two-shards", {"README.md": b"mine"})
    asked = publish_folder(folder, "org/two-shards", create_pr=True)
    assert asked.deleted == {"refs/pr/1": ["README.md"]}
    (folder / "config.json").write_text('{"second": 2}')
    again = publish_folder(folder, "org/two-shards", revision="refs/pr/1")
    assert set(again.commits) == {"refs/pr/1"}
    assert connected.files("org/two-shards", "refs/pr/1")["config.json"] == b'{"second": 2}'
    assert connected.files("org/two-shards") == {"README.md": b"mine"}
    publish_folder(folder, "org/two-shards")
    with pytest.raises(ValueError, match="holds these files already; there is nothing to ask for"):
        publish_folder(folder, "org/two-shards", create_pr=True)


# ---- all revisions or none ----


@pytest.fixture
def changed(connected, sparse):
    """The repository of a published model, whose weights have changed since."""
    publish(sparse, NAME, license="mit")
    with torch.no_grad():
        sparse[0].model.get_input_embeddings().weight.mul_(1.5)
    return connected.repositories["model", NAME]


def test_a_cut_transfer_of_main_leaves_no_sparse_encoder_revision_behind(connected, sparse):
    connected.cut_transfers_after = 1  # the weights of both; what is left is main's own
    with pytest.raises(OSError, match="No revision is half changed"):
        publish(sparse, NAME, license="mit")
    repository = connected.repositories["model", NAME]
    assert connected.was_cut.is_set() and set(repository.refs) == {"refs/heads/main"}
    assert connected.files(NAME).keys() == {".gitattributes"}
    connected.cut_transfers_after = None
    done = publish(sparse, NAME, license="mit")
    assert set(done.tags) == {"v1", "v1-sparse-encoder"} and len(connected.uploaded) == 2


def model_types(files: dict[str, dict[str, bytes]]) -> dict[str, str]:
    return {revision: json.loads(content[CONFIG])["model_type"] for revision, content in files.items()}


def test_a_commit_to_main_that_fails_leaves_two_whole_checkpoints_and_the_same_call_completes(
    connected, sparse, changed
):
    before = connected.files(NAME)
    connected.failing.add("main")
    with pytest.raises(OSError, match="No revision is half changed; the same call made again goes on"):
        publish(sparse, NAME, license="mit")
    assert connected.files(NAME) == before
    sparse_encoder = connected.files(NAME, "sparse-encoder")
    assert at_top(sparse_encoder).keys() == {path for path in before if not path.startswith(f"{BLOCK}/")}
    assert not [name for name in changed.refs if name.startswith("refs/tags/v2")]
    connected.failing.clear()
    done = publish(sparse, NAME, license="mit")
    assert set(done.tags) == {"v2", "v2-sparse-encoder"}
    main, sparse_encoder = connected.files(NAME), connected.files(NAME, "sparse-encoder")
    weights = at_top(sparse_encoder)["model.safetensors"]
    assert main["model.safetensors"] == weights != before["model.safetensors"]
    assert model_types({"main": main, "sparse-encoder": sparse_encoder}) == {
        "main": "SentenceTransformer",
        "sparse-encoder": "SparseEncoder",
    }


def test_somebody_elses_commit_in_between_is_not_merged(connected, sparse, changed, monkeypatch):
    before, create_commit = dict(changed.refs), HfApi.create_commit

    def overtaken(self, *arguments, revision, **keywords):
        if revision == "main":
            changed.commit("refs/heads/main", {"README.md": as_blob("README.md", b"Theirs")}, "Theirs")
        return create_commit(self, *arguments, revision=revision, **keywords)

    monkeypatch.setattr(HfApi, "create_commit", overtaken)
    with pytest.raises(OSError, match="No revision is half changed"):
        publish(sparse, NAME, license="mit")
    assert connected.files(NAME) == {"README.md": b"Theirs"}
    assert {name for name in changed.refs if changed.refs[name] != before.get(name)} == {
        "refs/heads/main",
        "refs/heads/sparse-encoder",
    }


# ---- who may see and do what ----


def test_private_refuses_a_repository_that_is_public(connected, folder):
    connected.add("org/two-shards", {"README.md": b"mine"})
    with pytest.raises(ValueError, match=r"'org/two-shards' is there and public.*leave out private"):
        publish_folder(folder, "org/two-shards", private=True)
    assert connected.files("org/two-shards") == {"README.md": b"mine"} and not connected.uploaded
    connected.repositories["model", "org/two-shards"].private = True
    publish_folder(folder, "org/two-shards", private=True)
    assert len(connected.uploaded) == 2


def test_names_that_the_hub_would_not_take_are_refused(sparse):
    for name in ("lion", "a/b/c", "org/li on", "org/-"):
        with pytest.raises(ValueError, match="is not a name of a repository"):
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


def test_hidden_files_and_caches_are_left_out(folder):
    hidden = [".env", ".netrc", ".gradio/token", ".streamlit/secrets.toml", "part/.ipynb_checkpoints/a.json"]
    hidden += ["part/.DS_Store", "__pycache__/a.pyc", ".git/config"]
    for path in [*hidden, ".gitattributes", "part/a.txt"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x")
    files = publish_folder(folder, "org/two-shards", dry_run=True).files["main"]
    weights = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert files.keys() == {"config.json", ".gitattributes", "part/a.txt", *weights}


def test_a_folder_with_a_sparse_model_has_its_sparse_encoder_revision_too(connected, sparse, tmp_path):
    folder = lion_st.export(sparse, tmp_path / "models" / "lion-sp-tiny", verify=False)
    done = publish_folder(folder, NAME, tag="v1")
    assert set(done.tags) == {"v1", "v1-sparse-encoder"}
    main, sparse_encoder = connected.files(NAME), connected.files(NAME, "sparse-encoder")
    moved = at_top(sparse_encoder)
    assert {path for path in moved if main[path] != moved[path]} == {CONFIG, "modules.json"}
    assert json.loads(sparse_encoder[CONFIG])["model_type"] == "SparseEncoder"


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


def test_missing_folders_and_unknown_types_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder with files"):
        publish_folder(tmp_path / "nothing", "org/old")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="its type is unknown"):
        publish_folder(tmp_path, "org/old")


class Calls:
    """Unpickling it calls a function."""

    def __reduce__(self):
        return print, ("called",)


def pickled_files() -> dict[str, bytes]:
    """Files that run code when they are loaded, under names that say nothing of it."""
    archive, objects, tape, legacy = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, archive)
    torch.save({"weight": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    np.savez(objects, a=np.array([Calls()], dtype=object))
    with tarfile.open(fileobj=tape, mode="w") as tar:
        content = pickle.dumps(Calls())
        entry = tarfile.TarInfo("inner")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return {
        **{f"protocol-{number}.dat": pickle.dumps(Calls(), number) for number in range(6)},
        "weights.safetensors": archive.getvalue(),
        "legacy.weights": legacy.getvalue(),
        "arrays.npz": objects.getvalue(),
        "archive.tar": tape.getvalue(),
        "model.txt.gz": gzip.compress(pickle.dumps(Calls())),
        "model.bz2": bz2.compress(pickle.dumps([1])),
        "pytorch_model.bin": b"x",
        "MODEL.PKL": b"x",
    }


@pytest.mark.parametrize("name", pickled_files())
def test_pickled_files_are_refused_by_content_and_by_name(folder, name):
    (folder / "part").mkdir()
    (folder / "part" / name).write_bytes(pickled_files()[name])
    with pytest.raises(ValueError, match=rf"^part/{re.escape(name)} may be pickled"):
        publish_folder(folder, "org/old")


SECRET_FILES = {
    "token": b"x",
    "id_rsa": b"x",
    "ID_ED25519": b"x",
    "credentials.json": b"{}",
    "server.pem": b"x",
    "notes.md": b"x" * 1_048_570 + b" hf_" + b"Ab1" * 12,  # across two blocks
    "key.txt": b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n",
    "key.asc": b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n",
    "session.ini": b"PuTTY-User-Key-File-3: ssh-ed25519",
    **{f"{mark}.txt": mark.encode() + b"a1" * 18 for mark in ("api_org_", "gho_", "ghu_", "ghs_", "ghr_")},
    "pat.txt": b"github_pat_" + b"a1" * 11,
    **{f"{mark}.txt": mark.encode() + b"A1" * 8 for mark in ("AKIA", "ASIA")},
    "trace.jsonl": b'{"header": "Bearer ghp_' + b"a1" * 18 + b'"}',
    "model.safetensors": (60).to_bytes(8, "little") + b'{"__metadata__":{"t":"hf_' + b"a" * 30 + b'"}}' + bytes(80),
}


@pytest.mark.parametrize("name", SECRET_FILES)
def test_secrets_are_refused_by_name_and_by_content(folder, name):
    (folder / name).write_bytes(SECRET_FILES[name])
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} (has the name of a file with secrets|holds a)"):
        publish_folder(folder, "org/old", dry_run=True)


def test_links_out_of_the_folder_are_refused_and_links_within_it_are_not(sparse, folder, tmp_path):
    (folder / "again.json").symlink_to("config.json")
    assert publish_folder(folder, "org/old", dry_run=True).files["main"]["again.json"] == 2
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes.txt").write_text("mine")
    for target in ("private/notes.txt", "private", "nowhere"):
        (folder / "link").symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"^link is a link to '{tmp_path}/{target}', out of"):
            publish_folder(folder, "org/old", dry_run=True)
        (folder / "link").unlink()
    checkpoint = lion_st.export(sparse, tmp_path / "lion-sp", verify=False)
    (checkpoint / "LICENSE").symlink_to(tmp_path / "private" / "notes.txt")
    with pytest.raises(ValueError, match="LICENSE is a link out of"):
        publish(checkpoint, NAME, dry_run=True)


def test_text_and_data_that_only_look_like_secrets_or_pickles_go_up(folder):
    harmless = {
        "hello.txt": b"hello. N.",
        "tokens.txt": b"hf_hub_download(repo_id) <hf_token>",
        "README.md": b"Set HF_TOKEN=hf_... and read -----BEGIN PUBLIC KEY-----",
        "rows.npz": b"",
        "corpus.jsonl.gz": gzip.compress(b'{"_id": "1", "text": "cats"}\n'),
        "picture.png": bytes([0x89]) + b"PNG\r\n\x1a\n",
        "secretary.py": b"print(1)",
    }
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    harmless["rows.npz"] = buffer.getvalue()
    for name, content in harmless.items():
        (folder / name).write_bytes(content)
    assert harmless.keys() <= publish_folder(folder, "org/old", dry_run=True).files["main"].keys()


def test_what_goes_up_is_told_before_anything_is_sent(connected, folder):
    told = []

    def look(plan):
        told.append((plan.files, dict(connected.repositories)))

    done = publish_folder(folder, "org/two-shards", announce=look)
    assert told == [(done.files, {})]


# ---- while training ----


def test_push_to_hub_gives_what_save_gives(connected, sparse, tmp_path):
    sparse.push_to_hub("org/pushed")
    files = connected.files("org/pushed")
    sparse.save_pretrained(str(tmp_path / "saved"))
    saved = {str(file.relative_to(tmp_path / "saved")): file for file in (tmp_path / "saved").rglob("*")}
    assert files["model.safetensors"] == saved["model.safetensors"].read_bytes()
    assert files["modules.json"] == saved["modules.json"].read_bytes() and saved["README.md"].is_file()
    assert any(entry["path"] == BLOCK for entry in json.loads(files["modules.json"]))
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


def test_a_run_of_ours_pushes_its_result_and_no_pickle(connected, tiny_backbone, tmp_path):
    rows = [{"query": f"what is {n}", "pos": [f"It is {n}."], "neg": [f"Not {n}.", f"Never {n}."]} for n in range(8)]
    (tmp_path / "tuples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train_retriever(
        *retriever_arguments(
            get_recipe("micro", "sparse", "cl"),
            model=tiny_backbone(),
            train_data=str(tmp_path / "tuples.jsonl"),
            output_dir=str(tmp_path / "run"),
            batch_size=4,
            negatives=2,
            mini_batch_size=None,
            attn_implementation=None,
            max_steps=2,
            save_steps=1,
            use_peft=True,
            bf16=False,
            disable_tqdm=True,
            push_to_hub=True,
            hub_model_id="org/trained",
            hub_private_repo=True,
        )
    )
    files = connected.files("org/trained")
    assert connected.repositories["model", "org/trained"].private
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert any(entry["path"] == BLOCK for entry in json.loads(files["modules.json"]))
    assert not [path for path in files if path.endswith(".bin") or path.startswith(("adapter_", "checkpoint-"))]
    assert "training.json" not in files
    assert lion_st.paradigm_of(lion_st.load("org/trained", device="cpu")) == "sparse"
