import dataclasses
import gzip
import inspect
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny_models import TEXTS

import lion_st
from lion_st.data.records import BadRecord, Record, read_corpus, read_topics
from lion_st.encoding import (
    EncodedCorpus,
    encode_corpus,
    encode_corpus_on_ray,
    encode_texts,
    model_fingerprint,
    to_csr,
)
from lion_st.encoding.batches import BatchEncoder, EncodedTexts
from lion_st.encoding.options import EncodingOptions
from lion_st.encoding.shards import write_shard
from lion_st.files import lock_folder
from lion_st.indexes import StorageError, create_index
from lion_st.retrieval import ModelRetriever, search_texts

DOCUMENTS = [" ".join([TEXTS[number % len(TEXTS)], str(number)] * (1 + number % 5)) for number in range(60)]


def write_jsonl(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [{"_id": f"d{number}", "text": text} for number, text in enumerate(DOCUMENTS)]
    return write_jsonl(tmp_path / "corpus.jsonl", rows)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_texts_get_the_vectors_that_sentence_transformers_gives_them(paradigm, sparse_model, dense_model) -> None:
    model = sparse_model if paradigm == "sparse" else dense_model
    vectors = encode_texts(model, DOCUMENTS[:20], "document", tokens_per_batch=200)
    expected = model.encode_document(DOCUMENTS[:20], convert_to_numpy=True)
    found = vectors.toarray() if paradigm == "sparse" else vectors
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not np.allclose(found, model.encode_query(DOCUMENTS[:20], convert_to_numpy=True))  # cut at 32 tokens


def test_vectors_are_truncated_as_the_checkpoint_says(tmp_path, sparse_model, dense_model) -> None:
    folder = lion_st.export(dense_model, tmp_path / "whole", verify=False, create_model_card=False)
    stock = SentenceTransformer(str(folder), truncate_dim=16)
    stock.save(str(tmp_path / "short"), create_model_card=False)
    whole, short = lion_st.load(folder), lion_st.load(tmp_path / "short")
    for model in (short, stock):
        vectors = encode_texts(model, DOCUMENTS[:4], "document")
        np.testing.assert_allclose(vectors, stock.encode_document(DOCUMENTS[:4]), atol=1e-5)
        assert vectors.shape == (4, 16)
    assert model_fingerprint(short) != model_fingerprint(whole)
    with sparse_model.truncate_embeddings(16), pytest.raises(ValueError, match="truncate_dim=16 would keep the first"):
        encode_texts(sparse_model, DOCUMENTS[:4], "document")


def test_threads_encode_with_limits_of_their_own(dense_model) -> None:
    """One model, many threads, a length for each call: nothing of a call is set on the model."""
    lengths = [4, 9, 16, 30]
    expected = {length: encode_texts(dense_model, DOCUMENTS[:8], "document", max_tokens=length) for length in lengths}
    before = (dense_model[0].query_length, dense_model[0].document_length, dense_model.max_seq_length)
    with ThreadPoolExecutor(4) as threads:
        jobs = [
            (length, threads.submit(encode_texts, dense_model, DOCUMENTS[:8], "document", max_tokens=length))
            for length in lengths * 6
        ]
        for length, job in jobs:
            np.testing.assert_allclose(job.result(), expected[length], atol=1e-6)
    assert (dense_model[0].query_length, dense_model[0].document_length, dense_model.max_seq_length) == before
    with pytest.raises(ValueError, match="max_tokens is at least 1, got 0"):
        encode_texts(dense_model, DOCUMENTS[:8], "document", max_tokens=0)


def test_sparse_rows_never_become_dense(sparse_model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = type(sparse_model).forward

    def watched(self, *args, **kwargs):
        features = forward(self, *args, **kwargs)
        seen.append(features["sentence_embedding"].layout)
        return features

    monkeypatch.setattr(type(sparse_model), "forward", watched)
    encode_texts(sparse_model, DOCUMENTS[:5], "document")
    assert seen == [torch.sparse_csr]


@pytest.mark.parametrize("bad", ["", "  \n", None, 7])
def test_texts_that_cannot_be_encoded_are_named(sparse_model, bad) -> None:
    with pytest.raises(ValueError, match="position 1"):
        encode_texts(sparse_model, ["good", bad], "query")


@pytest.mark.parametrize("paradigm, dtype", [("sparse", "float32"), ("sparse", "float16"), ("dense", "float16")])
def test_a_corpus_is_encoded_into_shards_in_its_own_order(tmp_path, corpus, sparse_model, dense_model, paradigm, dtype):
    model = sparse_model if paradigm == "sparse" else dense_model
    output = encode_corpus(model, corpus, tmp_path / "out", dtype=dtype, shard_documents=25, show_progress=False)
    encoded = EncodedCorpus(output)
    shards = list(encoded)
    assert [len(ids) for ids, _ in shards] == [25, 25, 10]
    assert [one for ids, _ in shards for one in ids] == [f"d{number}" for number in range(60)]
    whole = encode_texts(model, DOCUMENTS, "document")
    parts = [vectors.toarray() if paradigm == "sparse" else vectors for _, vectors in shards]
    expected = whole.toarray() if paradigm == "sparse" else whole
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5 if dtype == "float32" else 5e-3)
    assert len(encoded) == 60
    assert encoded.manifest["truncated"] == sum(len(model.tokenizer(text)["input_ids"]) > 48 for text in DOCUMENTS)
    assert encoded.manifest["settings"]["paradigm"] == paradigm


def test_numbers_that_float16_cannot_hold_are_refused_where_they_are_encoded(tmp_path) -> None:
    large = EncodedTexts(np.full((1, 2), 7e4, dtype=np.float32), 1, 0)
    with pytest.raises(ValueError, match=r"float16 ends at 65,504, and a vector has 70000: use dtype='float32'"):
        write_shard(tmp_path, 0, [Record("a", "text")], large, "float16")
    assert not list(tmp_path.iterdir())


def test_a_second_run_continues_and_changes_no_byte(tmp_path, corpus, sparse_model) -> None:
    whole = encode_corpus(sparse_model, corpus, tmp_path / "whole", shard_documents=7, show_progress=False)
    part = encode_corpus(sparse_model, corpus, tmp_path / "part", shard_documents=7, show_progress=False)
    for number in (0, 3, 8):
        (part / f"shard-{number:06d}.safetensors").unlink()
    (part / "manifest.json").unlink()
    (part / "shard-000003.99.tmp").write_bytes(b"half")
    kept = (part / "shard-000001.safetensors").stat().st_mtime_ns
    with pytest.raises(StorageError, match="has not finished"):
        EncodedCorpus(part)
    encode_corpus(sparse_model, corpus, part, shard_documents=7, show_progress=False)
    assert shard_bytes(part) == shard_bytes(whole)
    assert (part / "manifest.json").read_text() == (whole / "manifest.json").read_text()
    assert (part / "shard-000001.safetensors").stat().st_mtime_ns == kept
    assert not list(part.glob("*.tmp"))


def test_a_changed_model_corpus_or_setting_is_refused_and_named(tmp_path, corpus, tiny_backbone, sparse_model) -> None:
    output = encode_corpus(sparse_model, corpus, tmp_path / "out", shard_documents=20, show_progress=False)
    with pytest.raises(StorageError, match="shard_documents was 20, is 10"):
        encode_corpus(sparse_model, corpus, output, shard_documents=10, show_progress=False)
    other = lion_st.build(tiny_backbone(), "sparse", query_length=32, document_length=40)
    with pytest.raises(StorageError, match="max_tokens was 48, is 40"):
        encode_corpus(other, corpus, output, shard_documents=20, show_progress=False)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    with pytest.raises(StorageError, match="model_xxh3 was"):
        encode_corpus(other, corpus, output, shard_documents=20, show_progress=False)
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:30], lines[30].replace("d30", "d30b"), *lines[31:]]) + "\n")
    with pytest.raises(StorageError, match=r"shard-000001.*corpus changed"):
        encode_corpus(sparse_model, corpus, output, shard_documents=20, show_progress=False)
    corpus.write_text("\n".join(lines[:20]) + "\n")
    with pytest.raises(StorageError, match="beyond the end of the corpus"):
        encode_corpus(sparse_model, corpus, output, shard_documents=20, show_progress=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        encode_corpus(sparse_model, corpus, foreign, show_progress=False)


def test_a_checkpoint_that_was_moved_goes_on_with_its_encoding(tmp_path, corpus, sparse_model) -> None:
    place = lion_st.export(sparse_model, tmp_path / "here", verify=False, create_model_card=False)
    output = encode_corpus(lion_st.load(place), corpus, tmp_path / "out", shard_documents=20, show_progress=False)
    before = shard_bytes(output)
    for name in ("manifest.json", "shard-000001.safetensors"):
        (output / name).unlink()
    moved = lion_st.load(place.rename(tmp_path / "there"))
    encode_corpus(moved, corpus, output, shard_documents=20, show_progress=False)
    assert shard_bytes(output) == before
    assert EncodedCorpus(output).manifest["settings"]["model"] == "there"


def test_a_damaged_shard_is_refused(tmp_path, corpus, sparse_model) -> None:
    output = encode_corpus(sparse_model, corpus, tmp_path / "out", shard_documents=30, show_progress=False)
    shard = output / "shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="checksum"):
        list(EncodedCorpus(output))
    shard.write_bytes(bytes(content[:-40]))
    with pytest.raises(StorageError, match="truncated"):
        list(EncodedCorpus(output, verify=False))


def test_bad_records_are_skipped_counted_and_named(tmp_path, sparse_model) -> None:
    rows = [
        {"_id": "a", "title": "A title", "text": "and a text"},
        "{broken",
        {"_id": "b", "text": "   "},
        {"text": "no id"},
        {"_id": "c", "text": 5},
        ["a", "list"],
        {"_id": "a", "text": "again"},
        {"_id": "d", "title": "only a title"},
        {"_id": 12, "text": "word " * 30_000},
    ]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows)
    manifest = EncodedCorpus(encode_corpus(sparse_model, corpus, tmp_path / "out", show_progress=False)).manifest
    assert manifest["documents"] == 3
    assert manifest["skipped"] == {"duplicate id": 1, "empty": 1, "malformed": 4}
    broken, blank = manifest["skipped_examples"][:2]
    assert broken.startswith(f"malformed: {corpus}:2 is ")
    assert blank == f"empty: {corpus}:3 has the id 'b' and no text."
    assert manifest["truncated"] == 1
    with pytest.raises(ValueError, match=r"malformed.*corpus\.jsonl:2"):
        encode_corpus(sparse_model, corpus, tmp_path / "strict", on_bad_record="raise", show_progress=False)
    with pytest.raises(
        ValueError, match=r"of type list has no usable record; .* The first: empty: record 1 has the id"
    ):
        encode_corpus(sparse_model, [{"id": "x", "text": ""}] * 999, tmp_path / "none", show_progress=False)
    with pytest.raises(ValueError, match=r"of type DataFrame has no usable record.*record 1 is 'id', not a mapping"):
        encode_corpus(sparse_model, pd.DataFrame({"id": ["x"]}), tmp_path / "frame", show_progress=False)
    with pytest.raises(ValueError, match=r"record 1 has no text among its fields \['id'\]: accepted are text, "):
        encode_corpus(sparse_model, [{"id": "x"}], tmp_path / "fields", show_progress=False)


def test_a_duplicate_in_a_later_shard_is_noticed(tmp_path, sparse_model) -> None:
    rows = [{"id": f"d{number % 10}", "text": f"text {number}"} for number in range(25)] + [{"id": "new", "text": "x"}]
    output = encode_corpus(sparse_model, rows, tmp_path / "out", shard_documents=4, show_progress=False)
    assert EncodedCorpus(output).manifest["skipped"] == {"duplicate id": 15}
    assert len(EncodedCorpus(output)) == 11


def test_every_kind_of_corpus_gives_the_same_records(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"_id": f"d{number}", "title": "T", "text": f"text {number}"} for number in range(5)]
    expected = [Record(f"d{number}", f"T text {number}") for number in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    beir = tmp_path / "beir"
    beir.mkdir()
    (beir / "corpus.jsonl").write_text(lines)
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "not a document"}\n')
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "a.tsv").write_text("id\ttext\ttitle\n" + "".join(f"d{n}\ttext {n}\tT\n" for n in range(5)))
    parts = tmp_path / "parts"
    parts.mkdir()
    for start in (0, 3):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[start : start + 3]), parts / f"{start}.parquet")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    as_beir = {row["_id"]: {"title": "T", "text": row["text"]} for row in rows}
    for source in (
        beir,
        tmp_path / "a.jsonl.gz",
        tmp_path / "a.tsv",
        "-",
        rows,
        as_beir,
        {one.id: one.text for one in expected},
    ):
        assert list(read_corpus(source)) == expected
    assert list(read_corpus(parts))[:5] == expected
    for line in ("d1", "d1\ttext\ttitle", "d1\turl\ttitle\ttext"):
        (tmp_path / "bad.tsv").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=r"bad\.tsv:1 is .* of \d columns: .* two columns, id and text"):
            list(read_corpus(tmp_path / "bad.tsv"))
    (tmp_path / "bad.tsv").write_text("d1\ttext\nd2\nd3\tmore\n")
    first, bad, last = read_corpus(tmp_path / "bad.tsv")
    assert (first, last) == (Record("d1", "text"), Record("d3", "more"))
    assert bad == BadRecord("malformed", f"{tmp_path}/bad.tsv:2 is 'd2': a line must be id, a tab, text.")
    with pytest.raises(FileNotFoundError, match="missing"):
        list(read_corpus(tmp_path / "missing.jsonl"))
    (tmp_path / "a.docx").write_text("")
    with pytest.raises(ValueError, match=r"a\.docx"):
        list(read_corpus(tmp_path / "a.docx"))


def test_a_data_set_with_one_split_is_read_whatever_that_is_called(tmp_path) -> None:
    """As those of BEIR on the Hub, whose texts are in the splits corpus and queries."""
    for name in ("corpus", "queries"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"_id": name[0], "text": f"a {name}"}])
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: {name}\n    path: {name}.jsonl\n"
        for name in ("corpus", "queries")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    assert list(read_corpus(f"{tmp_path}:corpus")) == [Record("c", "a corpus")]
    assert read_topics(f"{tmp_path}:queries") == {"q": "a queries"}
    with pytest.raises(ValueError, match=r"has the splits \['corpus'\], not 'dev'"):
        list(read_corpus(f"{tmp_path}:corpus", "dev"))


def test_what_is_not_a_text_is_malformed_and_never_a_crash(tmp_path) -> None:
    lines = [
        b'{"_id": "a", "text": "good"}',
        b'{"_id": "b", "text": "bad \xff byte"}',
        b'{"_id": "c", "text": "half a pair \\ud83d"}',
        b"[" * 100_000,
        b'{"_id": "d", "text": "\xc3\xa9t\xc3\xa9"}',
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b"\n".join(lines))
    first, *bad, last = read_corpus(corpus)
    assert (first, last) == (Record("a", "good"), Record("d", "été"))
    assert [one.reason for one in bad] == ["malformed"] * 3
    for number, what, one in zip((2, 3, 4), ("not UTF-8", "surrogate", "not JSON"), bad, strict=True):
        assert f"corpus.jsonl:{number} " in one.message and what in one.message


def test_a_truncated_archive_is_an_error_and_not_the_end_of_the_corpus(tmp_path) -> None:
    whole = gzip.compress("".join(f'{{"_id": "{n}", "text": "text {n * n}"}}\n' for n in range(500)).encode())
    (tmp_path / "corpus.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz ends early or is damaged"):
        list(read_corpus(tmp_path))


def test_a_text_file_is_a_document_a_line_unless_there_are_tables(tmp_path, caplog) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"first line of {name}\n\nsecond line\n")
    assert list(read_corpus(tmp_path)) == [
        Record("a.txt:1", "first line of a.txt"),
        Record("a.txt:3", "second line"),
        Record("b.txt:1", "first line of b.txt"),
        Record("b.txt:3", "second line"),
    ]
    assert "a.txt: one document a line, with the ids a.txt:1" in caplog.text
    (tmp_path / "table.tsv").write_text("1\ttext\n")
    assert list(read_corpus(tmp_path)) == [Record("1", "text")]


def test_records_that_cannot_be_pickled_are_read_like_any_other() -> None:
    class Text(str):
        def __reduce__(self):
            raise TypeError("not to be pickled")

    records = list(read_corpus([{"id": Text("a"), "text": Text("lions")}, {"id": lambda: 0, "text": "no id"}]))
    assert records[0] == Record("a", "lions") and records[1].message.startswith("record 2 has <function")
    assert pickle.loads(pickle.dumps(records)) == records


def test_numbers_of_numpy_are_settings_like_any_other(tmp_path, sparse_model, corpus) -> None:
    options = dict(max_tokens=np.int64(9), shard_documents=np.int64(40), tokens_per_batch=np.int32(99))
    output = encode_corpus(sparse_model, corpus, tmp_path / "out", show_progress=False, **options)
    assert EncodedCorpus(output).manifest["settings"]["max_tokens"] == 9
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        encode_corpus(sparse_model, corpus, tmp_path / "other", max_tokens=9.0)


def test_several_processes_share_the_shards(tmp_path, corpus, sparse_model, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = encode_corpus(sparse_model, corpus, tmp_path / "alone", shard_documents=9, show_progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        shared = encode_corpus(sparse_model, corpus, tmp_path / "shared", shard_documents=9, show_progress=False)
        if rank == "1":
            assert sorted(shard_bytes(shared)) == [f"shard-{number:06d}.safetensors" for number in (1, 3, 5)]
            assert not (shared / "manifest.json").exists()
    assert shard_bytes(shared) == shard_bytes(alone)
    assert (shared / "manifest.json").read_text() == (alone / "manifest.json").read_text()


@pytest.mark.usefixtures("forkable")
def test_twenty_random_kills_leave_no_trace(tmp_path, sparse_model) -> None:
    """SIGKILL at random moments, then one run to the end: the bytes of an undisturbed run."""
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS[:30])]
    )

    def run(output: Path) -> None:
        encode_corpus(sparse_model, corpus, output, shard_documents=2, tokens_per_batch=64, show_progress=False)

    started = time.monotonic()
    run(tmp_path / "whole")
    duration = time.monotonic() - started
    fork = multiprocessing.get_context("fork")
    randomness = random.Random(0)
    kills = 0
    while kills < 20:
        process = fork.Process(target=run, args=(tmp_path / "killed",))
        process.start()
        time.sleep(randomness.uniform(0, duration / 6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (tmp_path / "killed" / "manifest.json").exists():  # it was done: start a new corpus folder's worth of kills
            for shard in randomness.sample(sorted((tmp_path / "killed").glob("shard-*")), 8):
                shard.unlink()
            (tmp_path / "killed" / "manifest.json").unlink()
        kills += process.exitcode == -signal.SIGKILL
    run(tmp_path / "killed")
    assert shard_bytes(tmp_path / "killed") == shard_bytes(tmp_path / "whole")
    assert (tmp_path / "killed" / "manifest.json").read_text() == (tmp_path / "whole" / "manifest.json").read_text()
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )


def test_a_damaged_shard_is_encoded_again_and_never_given_a_checksum(tmp_path, sparse_model, corpus) -> None:
    folder = encode_corpus(sparse_model, corpus, tmp_path / "encoded", shard_documents=20, show_progress=False)
    whole = shard_bytes(folder)
    shard = folder / "shard-000001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-9] ^= 0x40
    shard.write_bytes(damaged)
    with pytest.raises(StorageError, match="checksum"):
        list(EncodedCorpus(folder))
    with pytest.warns(UserWarning, match="damaged and is encoded again"):
        encode_corpus(sparse_model, corpus, folder, shard_documents=20, show_progress=False)
    assert shard_bytes(folder) == whole
    assert len(list(EncodedCorpus(folder))) == 3


def test_texts_without_terms_are_counted_and_warned_of(tmp_path, sparse_model, corpus, monkeypatch) -> None:
    collect = BatchEncoder.collect

    def without_some(*arguments: object) -> object:
        encoded = collect(*arguments)
        rows = encoded.vectors.tolil()
        rows[:7] = 0
        return encoded._replace(vectors=to_csr(rows))

    monkeypatch.setattr(BatchEncoder, "collect", without_some)
    with pytest.warns(UserWarning, match="7 of 60 texts have no term"):
        folder = encode_corpus(sparse_model, corpus, tmp_path / "encoded", show_progress=False)
    assert EncodedCorpus(folder).manifest["without_terms"] == 7


def test_a_second_encoding_into_a_folder_waits_for_the_first(tmp_path, sparse_model, corpus) -> None:
    with ThreadPoolExecutor(1) as thread:
        with lock_folder(tmp_path / "encoded"):
            second = thread.submit(encode_corpus, sparse_model, corpus, tmp_path / "encoded", show_progress=False)
            time.sleep(0.1)
            assert not (tmp_path / "encoded" / "settings.json").exists()
        assert second.result() == tmp_path / "encoded"
    assert len(EncodedCorpus(tmp_path / "encoded")) == 60


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest | {"documents": 7},
        lambda manifest: manifest | {"shards": [manifest["shards"][0] | {"file": "../other"}]},
        lambda manifest: manifest | {"shards": [3]},
        lambda manifest: {},
    ],
)
def test_a_damaged_manifest_is_one_error(tmp_path, sparse_model, corpus, change) -> None:
    folder = encode_corpus(sparse_model, corpus, tmp_path / "encoded", show_progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        EncodedCorpus(folder)


def test_a_missing_folder_is_called_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        EncodedCorpus(tmp_path / "encoded")


def test_one_string_in_place_of_texts_is_a_type_error(sparse_model) -> None:
    index = create_index("exact", "sparse")
    with pytest.raises(TypeError, match="list of texts"):
        encode_texts(sparse_model, "lions", "query")
    with pytest.raises(TypeError, match="list of queries"):
        search_texts(sparse_model, index, "lions")
    with pytest.raises(TypeError, match="list of queries"):
        ModelRetriever(sparse_model).search("lions")


@pytest.mark.parametrize("kind", [np.array, lambda texts: pd.Series(texts, index=[2, 0, 1]), iter])
def test_texts_of_any_container_are_encoded_in_their_order(dense_model, kind) -> None:
    expected = encode_texts(dense_model, DOCUMENTS[:3], "document")
    assert (encode_texts(dense_model, kind(DOCUMENTS[:3]), "document") == expected).all()
    with pytest.raises(ValueError, match="task is 'query' or 'document', got 'passage'"):
        encode_texts(dense_model, DOCUMENTS[:3], "passage")


def test_one_machine_and_a_cluster_take_the_same_options(tmp_path) -> None:
    """`encode_corpus_on_ray` hands its options to `EncodingOptions`, whose defaults `encode_corpus` repeats."""
    of_one_machine = inspect.signature(encode_corpus).parameters
    options = {field.name: (field.type, field.default) for field in dataclasses.fields(EncodingOptions)}
    assert options == {name: (of_one_machine[name].annotation, of_one_machine[name].default) for name in options}
    assert of_one_machine.keys() - options.keys() == {"model", "corpus", "output", "show_progress"}
    for name, wrong in (("task", "passage"), ("dtype", "int8"), ("on_bad_record", "drop"), ("shard_documents", 0)):
        with pytest.raises(ValueError, match=f"{name} is .*, got {wrong!r}"):
            encode_corpus_on_ray("no/model", [], tmp_path, **{name: wrong})
