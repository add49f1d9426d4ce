"""The cache of joined tuples: made once, by one of many processes, renewed when something changes, small and lazy."""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from layout_files import TUPLES, read_sample, write_jsonl, write_tsv

from lion_st.data import joining, load_tuples, set_epoch
from lion_st.data.cache import cached_table
from lion_st.data.lookup import TextTable, text_keys_of
from lion_st.data.tuples import TupleReader

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def sample():
    return read_sample()


@pytest.fixture
def files(tmp_path, sample):
    """Options of `load_tuples`: the sample as ids of queries and documents."""
    rows = [{"query_id": query, "document_ids": ids, "scores": scores} for query, ids, scores in sample.tuples]
    return {
        "source": write_jsonl(tmp_path / "train.jsonl", rows),
        "queries": write_tsv(tmp_path / "queries.tsv", sample.queries),
        "documents": write_tsv(tmp_path / "documents.tsv", sample.documents),
        "teacher_scores": True,
    }


def text_keys(tuples, rows):
    table = tuples.with_format("arrow").select_columns([name for name in tuples.column_names if name != "documents"])
    return tuples.format["format_kwargs"]["transform"].keys(table[rows])


def fail(*args, **kwargs):
    raise AssertionError("was called")


def test_a_second_start_checks_no_row_and_reads_no_text_and_no_id(files, monkeypatch):
    first = load_tuples(**files)[:]
    monkeypatch.setattr("lion_st.data.tables._tuples", fail)
    monkeypatch.setattr(joining, "_write", fail)
    monkeypatch.setattr("lion_st.data.lookup._id_keys", fail)
    with monkeypatch.context() as patch:
        patch.setattr(TextTable, "read", fail)
        again = load_tuples(**files)
    assert again[:] == first
    # Other options read the same table.
    assert len(load_tuples(**files | {"negatives": 2, "seed": 3})[:]) == 5


def test_a_changed_source_or_text_is_joined_anew(files, sample):
    before = load_tuples(**files, sampling="first")[0]
    documents = dict(sample.documents)
    positive = sample.tuples[0][1][0]
    documents[positive] += " And more."
    write_tsv(files["documents"], documents)
    after = load_tuples(**files, sampling="first")[0]
    assert after == before | {"positive": before["positive"] + " And more."}
    write_tsv(files["documents"], dict(reversed(documents.items())))  # ids in other rows
    assert load_tuples(**files, sampling="first")[0] == after
    lines = files["source"].read_text().splitlines(keepends=True)
    files["source"].write_text("".join(lines[1:]))
    assert len(load_tuples(**files)) == TUPLES - 1
    files["source"].write_text(lines[0].replace(positive, "12345678"))
    with pytest.raises(ValueError, match="id '12345678' is not among"):
        load_tuples(**files)


def test_another_version_of_the_library_joins_anew(files, monkeypatch):
    load_tuples(**files)
    monkeypatch.setattr("lion_st.__version__", "9.9")
    monkeypatch.setattr(joining, "_write", fail)
    with pytest.raises(AssertionError, match="was called"):
        load_tuples(**files)


def test_nothing_is_kept_of_a_source_with_an_error(files, tmp_path):
    good = files["source"].read_text()
    files["source"].write_text(good + "{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train\.jsonl:13 is not JSON"):
            load_tuples(**files)
    assert not [path for path in (tmp_path / "datasets-cache" / "lion_st").iterdir() if path.suffix != ".lock"]
    files["source"].write_text(good)
    assert len(load_tuples(**files)) == TUPLES


def test_what_was_left_out_is_said_at_every_start(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": "lion", "neg": ["lion", "x", "x "]}])
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 2 negatives that are positives of their own query or repeat"):
            assert load_tuples(path)[0] == {"query": "q", "positive": "lion", "negative_1": "x"}


def write_slowly(path: Path) -> dict[str, int]:
    """Make a table, and say in a file of its own that this process did."""
    time.sleep(0.3)
    (path.parents[2] / f"made-by-{os.getpid()}").touch()
    joining._write_batches(path, iter(Dataset.from_dict({"a": [1, 2, 3]}).with_format("arrow")[:].to_batches()))
    return {"made": os.getpid()}


def ask(cache: Path) -> tuple[int, list[int]]:
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    table, facts = cached_table("test", {"of": "all"}, write_slowly)
    return facts["made"], table["a"][:]


def test_of_many_processes_one_makes_the_table_and_the_others_wait_for_it(tmp_path, forkable):
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        answers = list(pool.map(ask, [tmp_path] * 3))
    assert len(list(tmp_path.glob("**/made-by-*"))) == 1
    assert len({made for made, _ in answers}) == 1
    assert all(values == [1, 2, 3] for _, values in answers)


def test_text_keys_are_those_of_the_texts_that_are_drawn(files, monkeypatch):
    monkeypatch.setattr("lion_st.data.lookup.TEXTS_AT_ONCE", 5)
    for options in ({"negatives": 4}, {"negatives": 2}, {"negatives": 2, "ranks": (1, 3)}, {"sampling": "first"},
                    {"negatives": 1, "absolute_margin": 0.5, "drop_short": True}):  # fmt: skip
        tuples = load_tuples(**files | options)
        for epoch in (0, 1):
            set_epoch(tuples, epoch)
            rows = [3, 0, 5]
            read = [[row[name] for name in row if name != "label"] for row in map(tuples.__getitem__, rows)]
            with monkeypatch.context() as patch:
                patch.setattr(TextTable, "read", fail)
                keys = text_keys(tuples, rows)
            assert keys.dtype == np.int64 and keys.shape == (3, len(read[0]))
            for row, texts in zip(keys, read, strict=True):
                expected = text_keys_of(texts)
                assert row[:2].tolist() == expected[:2].tolist()
                assert sorted(row[2:]) == sorted(expected[2:])


def test_text_keys_of_layouts_with_texts_and_of_selections(tmp_path):
    rows = [{"query": f"q{n}", "pos": [f"p{n}", f"r{n}"], "neg": ["x", f"y{n}", " q1 "]} for n in range(4)]
    tuples = load_tuples(write_jsonl(tmp_path / "a.jsonl", rows), negatives=3).select([2, 1])
    keys = text_keys(tuples, [0, 1])
    assert keys[0, 0] == text_keys_of(["q2"])[0] and keys[1, 0] in keys[0, 2:]
    assert [tuples[row]["positive"] for row in (0, 1)] == [
        {int(text_keys_of([text])[0]): text for text in (f"p{n}", f"r{n}")}[int(keys[row, 1])]
        for row, n in ((0, 2), (1, 1))
    ]


def test_margins_count_as_they_choose(files):
    reader = dict(negatives=1, teacher_scores=True, drop_short=True)
    for margins in ({"absolute_margin": 2.0}, {"relative_margin": 0.4}, {"absolute_margin": 1.0, "ranks": (1, 3)}):
        tuples = load_tuples(**files | reader | margins)
        transform: TupleReader = tuples.format["format_kwargs"]["transform"]
        everything = load_tuples(**files | {"negatives": 0})
        raw = everything.with_format(None)[:]
        pools = [
            transform._pool(positives, len(documents) - positives, scores)
            for positives, documents, scores in zip(
                raw["positives"], raw["documents"], raw["teacher_scores"], strict=True
            )
        ]
        assert len(tuples) == sum(len(pool) > 0 for pool in pools) < len(pools)
        counts = transform._counts(everything.with_format("arrow")[:])
        assert counts.tolist() == list(map(len, pools))


def test_skipped_batches_are_not_read(files, monkeypatch):
    """As when a run resumes: what it had seen costs no more than the sampler's numbers."""
    from accelerate.data_loader import skip_first_batches
    from torch.utils.data import DataLoader

    tuples = load_tuples(**files)
    loader = DataLoader(tuples, batch_size=2, collate_fn=list)
    rest = list(loader)[4:]
    texts, read = [], TextTable.read
    monkeypatch.setattr(TextTable, "read", lambda self, rows: texts.append(len(rows)) or read(self, rows))
    assert list(skip_first_batches(loader, 4)) == rest
    assert sum(texts) == sum(len(batch) * (len(batch[0]) - 1) for batch in rest)


def test_the_joined_table_holds_integers_that_are_mapped_and_not_loaded(files):
    tuples = load_tuples(**files)
    types = {name: str(feature) for name, feature in tuples.features.items()}
    assert "int64" in types["documents"] and "int64" in types["keys"]
    assert all(Path(file["filename"]).name == "table.arrow" for file in tuples.cache_files)
    reader = tuples.format["format_kwargs"]["transform"]
    arrays = [value for value in vars(reader.documents).values() if isinstance(value, np.ndarray | list | dict)]
    assert not arrays, "held in memory by each process"
    assert sys.getsizeof(reader) < 1000
