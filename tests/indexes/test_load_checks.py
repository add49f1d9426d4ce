"""What FAISS and Milvus read is checked against what was saved, before a search can follow it out of bounds."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from lion_st.encoding.storage import contents_checksum
from lion_st.files import checksum
from lion_st.indexes import StorageError, create_index, load_index
from lion_st.indexes.milvus import MilvusIndex

IDS = [f"d{row}" for row in range(300)]
VECTORS = np.random.default_rng(0).standard_normal((300, 16), dtype=np.float32)


def saved_faiss(path: Path, kind: str = "flat", rows: int = 300, columns: int = 16) -> Path:
    index = create_index("faiss", "dense", kind=kind, code_bytes=8)
    index.add(IDS[:rows], VECTORS[:rows, :columns])
    return index.save(path)


def vectors_of(folder: Path) -> Path:
    (file,) = folder.glob("data-*/vectors.faiss")
    return file


def reseal(folder: Path) -> None:
    """Name the files as they are in the header, as somebody who changes them on purpose would."""
    header = json.loads((folder / "header.json").read_text())
    for name in header["files"]:
        file = folder / header["data"] / name
        header["files"][name] = {"bytes": file.stat().st_size, "xxh3": checksum(file)}
    header["xxh3"] = contents_checksum(header)
    (folder / "header.json").write_text(json.dumps(header))


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("other", [{"rows": 299}, {"columns": 8}, {"kind": "hnsw"}], ids=["count", "dimension", "type"])
def test_a_faiss_file_of_another_index_is_refused(tmp_path, other, memory_map) -> None:
    pytest.importorskip("faiss")
    folder = saved_faiss(tmp_path / "index")
    vectors_of(folder).write_bytes(vectors_of(saved_faiss(tmp_path / "other", **other)).read_bytes())
    with pytest.raises(StorageError, match=r"instead of|does not match its checksum"):
        load_index(folder, memory_map=memory_map)
    reseal(folder)
    with pytest.raises(StorageError, match="do not fit each other"):
        load_index(folder, memory_map=memory_map)


@pytest.mark.parametrize("change", ["links", "entry point"])
def test_a_faiss_graph_that_leads_out_of_its_documents_is_refused(tmp_path, change) -> None:
    faiss = pytest.importorskip("faiss")
    folder = saved_faiss(tmp_path / "index", "hnsw")
    graph = faiss.read_index(str(vectors_of(folder)))
    if change == "links":
        links = faiss.vector_to_array(graph.hnsw.neighbors)
        links[links.argmax()] = 10_000_000
        faiss.copy_array_to_vector(links, graph.hnsw.neighbors)
    else:
        graph.hnsw.entry_point = 300
    faiss.write_index(graph, str(vectors_of(folder)))
    reseal(folder)
    with pytest.raises(StorageError, match=r"do not fit each other|cannot be read"):
        load_index(folder)


@pytest.mark.parametrize("damage", ["cut", "overwritten", "empty"])
def test_a_damaged_faiss_file_is_refused(tmp_path, damage) -> None:
    pytest.importorskip("faiss")
    folder = saved_faiss(tmp_path / "index")
    content = vectors_of(folder).read_bytes()
    vectors_of(folder).write_bytes({"cut": content[:-100], "overwritten": b"\xff" * len(content), "empty": b""}[damage])
    with pytest.raises(StorageError, match=r"instead of|does not match its checksum"):
        load_index(folder)
    reseal(folder)
    with pytest.raises(StorageError, match=r"vectors\.faiss cannot be read: build the index again"):
        load_index(folder)


def test_clusters_of_a_faiss_index_hold_its_documents_alone(tmp_path) -> None:
    faiss = pytest.importorskip("faiss")
    folder = saved_faiss(tmp_path / "index", "ivf_pq")
    lists = faiss.read_index(str(vectors_of(folder)))
    inverted = faiss.extract_index_ivf(lists).invlists
    number = next(one for one in range(lists.nlist) if inverted.list_size(one))
    ids = faiss.rev_swig_ptr(inverted.get_ids(number), inverted.list_size(number)).copy()
    ids[0] = 10_000_000
    codes = inverted.get_codes(number)
    inverted.update_entries(number, 0, len(ids), faiss.swig_ptr(ids), codes)
    faiss.write_index(lists, str(vectors_of(folder)))
    reseal(folder)
    with pytest.raises(StorageError, match="do not fit each other"):
        load_index(folder)


@pytest.mark.parametrize(
    "wrong",
    [{"probes": 0}, {"neighbours": 1}, {"ef_search": -5}, {"clusters": 0}, {"neighbours": "many"}, {"code_bytes": 1.5}],
)
def test_settings_that_no_index_can_have_are_refused_at_once(wrong) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is an integer of at least [12], got"):
        create_index("faiss", "dense", **wrong)
    with pytest.raises(ValueError, match=r"faiss has no setting 'quantization' for dense vectors: choose from kind"):
        create_index("faiss", "dense", quantization="uint8")
    with pytest.raises(ValueError, match=r"exact has no setting 'dtype' for sparse vectors: choose from quantization"):
        create_index("exact", "sparse", dtype="float16")


# ---- Milvus ----


@pytest.fixture
def milvus(tmp_path) -> tuple[Path, str]:
    """The folder of a saved index of 20 documents, and the file of its collection."""
    pytest.importorskip("pymilvus")
    uri = str(tmp_path / "lion.db")
    index = create_index("milvus", "dense", uri=uri)
    index.add(IDS[:20], VECTORS[:20])
    folder = index.save(tmp_path / "saved")
    index.close()
    return folder, uri


def test_milvus_is_asked_for_no_more_than_it_holds(milvus, monkeypatch) -> None:
    index = load_index(milvus[0])
    asked = []
    search = index._client.search

    def watched(*arguments, limit, **options):
        asked.append(limit)
        return search(*arguments, limit=limit, **options)

    monkeypatch.setattr(index._client, "search", watched)
    (hits,) = index.search(VECTORS[:1], k=10**6)
    assert len(hits) == 20 and asked == [20]
    with pytest.raises(TypeError, match="ids, one per document"):
        index.add("d1", VECTORS[:2])
    with pytest.raises(TypeError, match="encode it"):
        index.search(["a text"])
    index.close()


def test_a_milvus_collection_of_another_count_is_refused(milvus) -> None:
    folder, uri = milvus
    grown = create_index("milvus", "dense", uri=uri)
    grown.add(["more"], VECTORS[[20]])
    grown.close()
    with pytest.raises(StorageError, match=r"holds 21 documents and .* was saved with 20"):
        load_index(folder)


@pytest.mark.parametrize("named", [None, "http://elsewhere:19530"])
def test_a_token_goes_to_no_address_that_the_user_did_not_name(milvus, monkeypatch, named) -> None:
    folder, _ = milvus
    header = json.loads((folder / "header.json").read_text())
    header["metadata"]["parameters"]["uri"] = "http://attacker.example:19530"
    (folder / "header.json").write_text(json.dumps(header))
    reseal(folder)
    sent = []

    class Client:
        def __init__(self, uri, token="") -> None:
            sent.append((uri, token))
            raise ConnectionError("nobody is there")

    monkeypatch.setattr("pymilvus.MilvusClient", Client)
    monkeypatch.setenv("MILVUS_TOKEN", "secret")
    if named is not None:
        monkeypatch.setenv("MILVUS_URI", named)
    not_sent = pytest.warns(UserWarning, match=r"MILVUS_TOKEN is not sent to http://attacker\.example")
    with not_sent, pytest.raises(ConnectionError):
        load_index(folder)
    assert sent == [("http://attacker.example:19530", "")]
    monkeypatch.setenv("MILVUS_URI", "http://attacker.example:19530")
    with warnings.catch_warnings(), pytest.raises(ConnectionError):
        warnings.simplefilter("error")
        load_index(folder)
    assert sent[1] == ("http://attacker.example:19530", "secret")
    with pytest.raises(ConnectionError):
        MilvusIndex.load(folder, token="given")
    assert sent[2] == ("http://attacker.example:19530", "given")
