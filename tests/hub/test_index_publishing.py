"""An index or an encoded corpus is published as a data set, and opened by that name with all its checksums."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import lion
from huggingface_hub import DatasetCard, constants

import lion_st
from lion_st.data.fields import Fields
from lion_st.demo.collection import Collection
from lion_st.demo.explorer import Explorer
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.hub import publish_index
from lion_st.indexes import StorageError, create_index, load_index
from lion_st.retrieval import index_corpus

NAME = "org/lions-index"
VECTORS = "org/lions-vectors"
QUERY = "what do lions eat?"


@pytest.fixture(scope="module")
def made(tiny_backbone, tmp_path_factory) -> Path:
    """A folder with a checkpoint, `model`, what it encoded, `vectors`, and an index of that, `index`."""
    folder = tmp_path_factory.mktemp("made")
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    lion_st.export(model, folder / "model", verify=False)
    lines = [json.dumps({"_id": f"d{row}", "text": f"lion number {row} eats zebras"}) for row in range(30)]
    (folder / "private.jsonl").write_text("\n".join([*lines, "{a broken secret"]))
    encode_corpus(lion_st.load(folder / "model"), folder / "private.jsonl", folder / "vectors", show_progress=False)
    index_corpus(folder / "vectors", folder / "index", sample=0)
    return folder


def test_a_published_index_is_found_by_name_and_searched_like_the_local_one(connected, made, tmp_path, monkeypatch):
    (made / "index" / "notes.txt").write_text("mine")
    shown = lion("publish-index", made / "index", NAME, "--license", "mit", "--model", "org/lion-sp", "--private")
    assert "notes.txt" not in shown and shown.splitlines()[-1] == f"{connected.url}/datasets/{NAME}"
    files = connected.files(NAME, kind="dataset")
    assert connected.repositories["dataset", NAME].private
    assert {path.split("/")[0].split("-")[0] for path in files} == {
        ".gitattributes",
        "README.md",
        "header.json",
        "data",
    }

    local, loaded = load_index(made / "index"), load_index(NAME, revision="v1", memory_map=True)
    assert loaded.source == local.source and loaded.stats() == local.stats()
    _, queries = EncodedCorpus(made / "vectors").whole()
    assert loaded.search(queries, 5) == local.search(queries, 5)
    card = DatasetCard(files["README.md"].decode())
    assert card.data.license == "mit" and "text-retrieval" in card.data.task_categories
    for said in (local.source["weights_xxh3"], "| Texts | 30 documents |", "`exact`", f'load_index("{NAME}"',
                 f'lion-st search org/lion-sp {NAME} "'):  # fmt: skip
        assert said in card.text

    found = lion("search", made / "model", NAME, QUERY, "-k", 3)
    assert found == lion("search", made / "model", made / "index", QUERY, "-k", 3) and found.count("\n") == 3
    # A folder of that name comes first.
    monkeypatch.chdir(tmp_path)
    other = create_index("exact", "dense")
    other.add(["only"], np.ones((1, 2), dtype=np.float32))
    other.save(NAME)
    assert load_index(NAME).ids == ["only"]
    with pytest.raises(ValueError, match="which alone has revisions"):
        load_index(NAME, revision="v1")


def test_an_encoded_corpus_is_published_without_the_records_that_it_skipped(connected, made, tmp_path):
    done = publish_index(made / "vectors", VECTORS, license="mit")
    assert done.tags.keys() == {"v1"} and "# lions-vectors" in done.card
    files = connected.files(VECTORS, kind="dataset")
    assert b"private.jsonl" in (made / "vectors" / "manifest.json").read_bytes()
    assert not any(word in content for content in files.values() for word in (b"private.jsonl", b"a broken secret"))
    (ids, vectors), (own_ids, own) = EncodedCorpus(VECTORS).whole(), EncodedCorpus(made / "vectors").whole()
    for source, name in ((VECTORS, "theirs"), (made / "vectors", "ours")):
        lion("convert-index", source, tmp_path / name, "--to", "ciff")
    files = [(tmp_path / name / "index.ciff").read_bytes() for name in ("theirs", "ours")]
    assert files[0] == files[1]
    assert ids == own_ids and (vectors != own).nnz == 0
    lion("index", VECTORS, tmp_path / "index", "--revision", "v1")
    assert len(load_index(tmp_path / "index")) == 30
    with pytest.raises(StorageError, match=f"'{VECTORS}' on the Hub has no header.json"):
        load_index(VECTORS)


def test_a_version_is_one_commit_without_the_files_of_the_earlier_one(connected, made, tmp_path):
    publish_index(made / "index", NAME, license="mit")
    index_corpus(made / "vectors", tmp_path / "second", engine_parameters={"quantization": "uint8"}, sample=0)
    done = publish_index(tmp_path / "second", NAME, license="mit")
    assert done.tags.keys() == {"v2"} and any(path.startswith("data-") for path in done.deleted["main"])
    assert load_index(NAME).quantization == "uint8" and load_index(NAME, revision="v1").quantization is None


def test_a_damaged_download_is_refused_and_an_offline_one_comes_from_the_cache(connected, made, monkeypatch):
    for name, folder in ((NAME, "index"), (VECTORS, "vectors")):
        publish_index(made / folder, name, license="mit")
    load_index(NAME)
    list(EncodedCorpus(VECTORS))
    connected.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_index(NAME)) == len(EncodedCorpus(VECTORS)) == 30
    with pytest.raises(FileNotFoundError, match="'org/never-seen' is neither a folder here nor a data set on the Hub"):
        load_index("org/never-seen")

    cache = Path(constants.HF_HUB_CACHE)
    for file in (*cache.rglob("values.npy"), *cache.rglob("shard-000000.safetensors")):
        blob = file.resolve()
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    for name, read in ((NAME, load_index), (VECTORS, lambda name: list(EncodedCorpus(name)))):
        with pytest.raises(StorageError, match=rf"does not match its checksum.*`hf cache rm dataset/{name}`"):
            read(name)


def test_a_dry_run_says_what_would_go_up_and_reaches_for_no_network(connected, made):
    shown = lion("publish-index", made / "index", NAME, "--dry-run")
    assert "  header.json" in shown and "  README.md" in shown and "# lions-index" in shown
    assert not connected.requests and not connected.repositories
    assert "--license" in lion("publish-index", made / "index", NAME, exit_code=2)
    with pytest.raises(ValueError, match="No licence is known for 'org/lions-index'"):
        publish_index(made / "index", NAME)
    assert not connected.requests


def test_what_is_not_there_is_said_with_both_places(connected, made):
    for command in (("search", made / "model", "org/nothing", QUERY), ("index", "org/nothing", made / "new")):
        shown = lion(*command, exit_code=1)
        assert "'org/nothing' is neither a folder here nor a data set on the Hub" in shown
    connected.add(NAME, made / "index", kind="dataset")
    with pytest.raises(FileNotFoundError, match="with the revision 'v7'"):
        load_index(NAME, revision="v7")
    requests = len(connected.requests)
    for name in ("runs/gone", "org/a/b", "org--lions"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such folder, nor is that a name on the Hub"):
            load_index(name)
        assert "not a name on the Hub" in lion("search", made / "model", name, QUERY, exit_code=1)
    with pytest.raises(FileNotFoundError, match="'org/a--b' is neither a folder here nor a data set"):
        load_index("org/a--b")
    assert len(connected.requests) == requests


def test_a_server_searches_the_commit_that_it_found_when_it_was_started(connected, made, monkeypatch):
    for package in ("uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from lion_st.serving import Service

    assert "'org/nothing' is neither a folder" in lion("serve", made / "model", "--index", "org/nothing", exit_code=1)
    publish_index(made / "index", NAME, license="mit")
    started = []
    monkeypatch.setattr("lion_st.serving.launch._serve_here", lambda settings, *_: started.append(settings))
    lion("serve", made / "model", "--index", NAME, "--index-revision", "v1", "--port", 0)
    (settings,) = started
    commit = connected.repositories["dataset", NAME].resolve("v1")
    assert Path(settings.index).name == commit and settings.index_revision is None
    service = Service(lion_st.load(made / "model"), settings)
    try:
        assert len(service.live.index) == 30 and not service.live.reload()
    finally:
        service.close()


def test_the_card_names_the_commit_of_a_model_of_the_hub(tmp_path):
    index = create_index("exact", "sparse", quantization="uint8")
    index.add(["d1"], np.eye(1, 8, dtype=np.float32))
    index.source = {"model": "org/lion-sp", "revision": "c0ffee", "weights_xxh3": "feed"}
    folder = index.save(tmp_path / "index")
    card = publish_index(folder, NAME, dry_run=True).card
    for said in ("[org/lion-sp](https://huggingface.co/org/lion-sp) at `c0ffee`",
                 'load("org/lion-sp", revision="c0ffee")',
                 f'search org/lion-sp {NAME} "what do lions eat?" --revision c0ffee', "`feed`", "| Size | 0.0 MB |",
                 "`exact` (quantization='uint8')"):  # fmt: skip
        assert said in card
    assert "c0ffee" not in publish_index(folder, NAME, model="org/published", dry_run=True).card


@pytest.mark.parametrize("engine", ["milvus", "seismic"])
def test_engines_whose_files_are_not_for_other_machines_are_refused_at_both_ends(connected, tmp_path, engine):
    pytest.importorskip({"milvus": "pymilvus"}.get(engine, engine))
    parameters = {"uri": str(tmp_path / "lions.db")} if engine == "milvus" else {}
    index = create_index(engine, "sparse", **parameters)
    index.add(["d1", "d2"], np.eye(2, 8, dtype=np.float32))
    index.source = {"model": "org/lion-sp", "revision": "1"}
    folder = index.save(tmp_path / "index")
    reason = f"is an index of the engine '{engine}'.*Publish the encoded corpus"
    with pytest.raises(StorageError, match=reason):
        publish_index(folder, NAME, license="mit", dry_run=True)
    connected.add(NAME, folder, kind="dataset")  # by somebody else
    with pytest.raises(StorageError, match=reason):
        load_index(NAME)


def test_what_cannot_be_searched_by_others_is_not_published(made, tmp_path):
    index = create_index("exact", "sparse")
    index.add(["d1"], np.eye(1, 8, dtype=np.float32))
    with pytest.raises(StorageError, match="does not say which model"):
        publish_index(index.save(tmp_path / "index"), NAME, dry_run=True)
    with pytest.raises(StorageError, match="neither an index nor an encoded corpus"):
        publish_index(made, NAME, dry_run=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        publish_index(tmp_path / "gone", NAME, dry_run=True)
    (made / "index" / "token.txt").write_text("hf_")
    with pytest.raises(ValueError, match=r"token\.txt has the name of a file with secrets"):
        publish_index(made / "index", NAME, dry_run=True)
    (made / "index" / "token.txt").unlink()


def test_the_page_searches_a_published_index(connected, made):
    publish_index(made / "index", NAME, license="mit")
    documents = {f"d{row}": Fields(f"d{row}", "", f"lion number {row} eats zebras") for row in range(30)}
    collection = Collection("lions", documents)
    model = lion_st.load(made / "model")
    published = Explorer(model, collection, index=NAME, index_revision="v1")
    local = Explorer(model, collection, index=made / "index")
    (one, _), (other, _) = published.answer(QUERY).rankings, local.answer(QUERY).rankings
    assert [(hit.document, hit.score) for hit in one.hits] == [(hit.document, hit.score) for hit in other.hits]
    for arguments, complaint, code in (
        (["--index", NAME, "--encoded", made / "vectors"], "leave one out", 2),
        (["--index-revision", "v1"], "give its name as --index", 2),
        (["--index", made / "nowhere"], "nowhere", 1),
    ):
        assert complaint in " ".join(lion("demo", made / "model", *arguments, exit_code=code).split())


def test_the_card_says_how_many_terms_of_a_text_are_kept(made, tmp_path):
    assert "Terms of a text" not in publish_index(made / "vectors", VECTORS, dry_run=True).card
    model = lion_st.load(made / "model", device="cpu")
    model[1].document_max_active_dims = 7
    encode_corpus(model, [{"id": "a", "text": "a lion"}], tmp_path / "few", show_progress=False)
    assert "| Terms of a text | the 7 heaviest |" in publish_index(tmp_path / "few", VECTORS, dry_run=True).card
