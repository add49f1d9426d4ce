"""Sampling, margins and lookups of training tuples, and what bad input says."""

import json
import tracemalloc

import pytest
from layout_files import TUPLES, read_sample, write_card, write_jsonl, write_parquet, write_tsv

from lion_st.data import load_tuples, quickstart_data, quickstart_test_sets, set_epoch
from lion_st.data.lookup import TextLookup, TextTable

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def sample():
    return read_sample()


@pytest.fixture
def scored(tmp_path, sample):
    """A writer of the authors' scored layout: rows are changed by a function before they are written."""

    def write(change=lambda rows: None):
        rows = [
            {"query": sample.queries[query], "docids": list(ids), "scores": list(scores)}
            for query, ids, scores in sample.tuples
        ]
        change(rows)
        return write_jsonl(tmp_path / "scored.jsonl", rows), write_tsv(tmp_path / "collection.tsv", sample.documents)

    return write


def test_negatives_are_drawn_anew_each_epoch_and_alike_in_every_run(scored, sample):
    path, collection = scored()

    def draw(epoch, seed=0):
        tuples = load_tuples(path, documents=collection, negatives=2, teacher_scores=True, seed=seed)
        set_epoch(tuples, epoch)
        return tuples[:]

    assert draw(0) == draw(0)
    assert draw(0)["negative_1"] != draw(1)["negative_1"]
    assert draw(0)["negative_1"] != draw(0, seed=1)["negative_1"]
    assert draw(0)["positive"] == draw(1)["positive"]
    assert {draw(epoch)["negative_1"][0] for epoch in range(20)} == set(sample.texts(0)[2:])  # any of all four


def test_a_row_reads_the_same_whatever_batch_it_is_in(scored):
    path, collection = scored()
    tuples = load_tuples(path, documents=collection, negatives=3, teacher_scores=True)
    shuffled = tuples.shuffle(seed=3)
    by_query = {row["query"]: row for row in tuples}
    assert [by_query[row["query"]] for row in shuffled] == list(shuffled)


def test_labels_follow_their_documents(scored, sample):
    path, collection = scored()
    tuples = load_tuples(path, documents=collection, negatives=4, teacher_scores=True)
    for row in range(TUPLES):
        texts = list(tuples[row].values())[1:-1]
        expected = dict(zip(sample.texts(row)[1:], sample.tuples[row][2], strict=True))
        assert tuples[row]["label"] == pytest.approx([expected[text] for text in texts], abs=1e-5)


def test_one_of_several_positives_is_drawn(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "lions", "pos": ["one", "two", "three"], "neg": ["x", "y"]}])
    tuples = load_tuples(path, negatives=1)
    drawn = set()
    for epoch in range(30):
        set_epoch(tuples, epoch)
        drawn.add(tuples[0]["positive"])
    assert drawn == {"one", "two", "three"}
    assert load_tuples(path, negatives=1, sampling="first")[0]["positive"] == "one"


def test_ranks_and_margins_choose_among_the_negatives(scored, sample):
    path, collection = scored()
    tuples = load_tuples(path, documents=collection, negatives=2, ranks=(1, 3), sampling="first")
    assert list(tuples[0].values())[2:] == sample.texts(0)[3:5]
    for name, margin in (("absolute_margin", 4.0), ("relative_margin", 0.3)):
        kept = load_tuples(
            path, documents=collection, negatives=1, teacher_scores=True, drop_short=True, **{name: margin}
        )
        expected = [
            query
            for query, _, (positive, *others) in sample.tuples
            if min(others) <= positive - (margin if name == "absolute_margin" else margin * positive)
        ]
        assert 0 < len(kept) == len(expected)
        for row in kept:
            positive, negative = row["label"]
            assert negative <= positive - (margin if name == "absolute_margin" else margin * positive) + 1e-5


def test_margins_are_below_the_lowest_positive_and_by_the_size_of_its_score(tmp_path):
    row = {"query": "q", "pos": ["a", "b"], "pos_scores": [4.0, -2.0], "neg": ["c", "d"], "neg_scores": [-2.5, -3.0]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    assert load_tuples(path, negatives=1, sampling="first", relative_margin=0.5)[0]["negative_1"] == "d"
    with pytest.raises(ValueError, match="has 1 negatives to choose from, 2 are needed"):
        load_tuples(path, negatives=2, relative_margin=0.5)


def test_a_data_loader_with_workers_reads_the_same_rows(scored):
    from torch.utils.data import DataLoader

    path, collection = scored()
    tuples = load_tuples(path, documents=collection, negatives=4, teacher_scores=True)
    loader = DataLoader(tuples, batch_size=5, num_workers=1, collate_fn=list)
    assert [row for batch in loader for row in batch] == list(tuples)


def test_the_trainer_of_sentence_transformers_reads_tuples(scored, tmp_path):
    import torch
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import DistillKLDivLoss
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    path, collection = scored()
    tuples = load_tuples(path, documents=collection, negatives=4, teacher_scores=True)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        per_device_train_batch_size=4,
        batch_sampler="no_duplicates",
        report_to="none",
        use_cpu=True,
    )
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=tuples, loss=DistillKLDivLoss(model))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["label"].shape == (4, 5) and batch["label"].dtype == torch.float32
    features, labels = trainer.collect_features(batch)
    assert len(features) == 6 and labels is batch["label"]


def test_ids_that_are_no_numbers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "pos_pid": "D07", "neg_pids": ["x#1"]}])
    collection = write_tsv(tmp_path / "c.tsv", {"x#1": "a tiger", "D07": "a lion", "D7": "a puma"})
    assert load_tuples(path, documents=collection)[0] == {"query": "q", "positive": "a lion", "negative_1": "a tiger"}


@pytest.mark.parametrize("missing", ["8", "007", "-7", "99999999999999999999999", "x"])
def test_a_lookup_of_numbers_knows_its_ids_only(missing):
    from datasets import Dataset

    table = Dataset.from_dict({"pid": ["9", "7"], "passage": ["nine", "seven"]})
    lookup = TextLookup(TextTable(table, "the collection"))
    assert lookup.table.read(lookup.rows(["7", "9", "7"])) == ["seven", "nine", "seven"]
    with pytest.raises(ValueError, match=f"'{missing}' is not among the 2 of the collection"):
        lookup.rows(["7", missing])


@pytest.mark.parametrize("name", ["{}", "D{}"])
def test_a_lookup_takes_a_few_bytes_a_text_however_long_an_id_is(name):
    from datasets import Dataset

    ids = [name.format(number) for number in range(20_000)]
    ids[7] *= 18 if name == "{}" else 2000
    table = TextTable(Dataset.from_dict({"pid": ids, "passage": ids}), "the collection")
    tracemalloc.start()
    lookup = TextLookup(table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(ids) and lookup.rows([ids[9], ids[7]]).tolist() == [9, 7]


@pytest.mark.parametrize("ids", [[-7, 7], ["007", "7"]])
def test_ids_with_a_sign_or_leading_zeros_are_found_as_they_are(ids):
    from datasets import Dataset

    lookup = TextLookup(TextTable(Dataset.from_dict({"pid": ids, "passage": ["a", "b"]}), "the collection"))
    assert lookup.rows(list(map(str, ids))).tolist() == [0, 1]


def test_titles_stand_before_documents_alone_and_a_null_is_none():
    from datasets import Dataset

    table = Dataset.from_dict({"pid": ["1", "2"], "title": [None, "Cats"], "text": ["a lion", "a tiger"]})
    documents = TextTable(table, "the collection")
    assert documents.read([0, 1]) == ["a lion", "Cats a tiger"]
    assert (
        documents.read_unchecked([1], with_title=False) == TextTable(table, "queries", "query").read([1]) == ["a tiger"]
    )


def texts_of(sample, folder):
    """Files of the sample's texts, as options of `load_tuples`."""
    return {
        "queries": write_tsv(folder / "queries.tsv", sample.queries),
        "documents": write_tsv(folder / "collection.tsv", sample.documents),
    }


def spoil(column, value, row=4):
    def change(rows):
        rows[row][column] = value

    return change


BAD_ROWS = [
    (
        spoil("scores", [1.0, float("nan"), 0.5, 0.2, 0.1]),
        r"scored\.jsonl:5 has the teacher score nan in the field 'scores'",
    ),
    (spoil("scores", [1.0, None, 0.5, 0.2, 0.1]), r"scored\.jsonl:5 has the teacher score None"),
    (spoil("scores", [1.0, "2", 0.5, 0.2, 0.1]), r"scored\.jsonl:5 has the teacher score '2'"),
    (spoil("scores", [1.0, 0.5]), r"scored\.jsonl:5 has 2 teacher scores for 5 documents"),
    (spoil("scores", None), r"scored\.jsonl:5 is not a row of the layout .*; |scored\.jsonl:5 has no teacher scores"),
    (spoil("query", ""), r"scored\.jsonl:5 has '' in the field 'query', where a query or document belongs"),
    (spoil("query", None), r"scored\.jsonl:5 has None in the field 'query'"),
    (spoil("query", ["a"]), r"scored\.jsonl:5 has \['a'\] in the field 'query'"),
    (spoil("docids", []), r"scored\.jsonl:5 has no positive document"),
    (spoil("docids", ["7", "12345678", "38", "69", "100"]), r"id '12345678' is not among the \d+ of .*collection\.tsv"),
    (
        lambda rows: [rows[6].update(docids=rows[6]["docids"][:3], scores=rows[6]["scores"][:3])],
        r"Row 6 .* has 2 negatives .* 4 are needed \(1 of 12 rows",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_the_remedy(scored, change, message):
    path, collection = scored(change)
    with pytest.raises(ValueError, match=message):
        load_tuples(path, documents=collection, teacher_scores=True)


def test_positives_of_other_rows_of_a_query_are_not_its_negatives(tmp_path):
    """Also under another id with the same text; other queries keep them."""
    texts = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "two"}
    rows = [
        ("q", "1", ["2", "3", "4"]),
        ("q", "2", ["4", "3", "1"]),
        ("other", "3", ["1", "2"]),
        ("q", "4", ["5", "3"]),
    ]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"question": query, "pos_pid": positive, "neg_pids": list(others), "pos_score": 9.0}
            | {"neg_scores": [float(other) for other in others]}
            for query, positive, others in rows
        ],
    )
    collection = write_tsv(tmp_path / "c.tsv", texts)
    with pytest.warns(UserWarning, match="left out 5 negatives that are positives of their own query"):
        tuples = load_tuples(path, documents=collection, negatives=1, teacher_scores=True, sampling="first")
    read = [(row["query"], row["positive"], row["negative_1"], row["label"]) for row in tuples]
    assert read == [
        ("q", "one", "three", [9.0, 3.0]),
        ("q", "two", "three", [9.0, 3.0]),
        ("other", "three", "one", [9.0, 1.0]),
        ("q", "four", "three", [9.0, 3.0]),
    ]


def test_both_positives_of_a_row_are_negatives_in_no_other_row_of_their_query(tmp_path):
    rows = [{"query": "q", "pos": ["one", "one ", "two"], "neg": ["x"]}]
    rows.append({"query": "q", "pos": ["one"], "neg": ["two", "y"]})
    with pytest.warns(UserWarning, match="left out 1 negatives"):
        tuples = load_tuples(write_jsonl(tmp_path / "a.jsonl", rows), negatives=1)
    assert tuples[:]["negative_1"] == ["x", "y"]


def test_data_without_negatives_are_said_with_both_ways_to_train(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"]}])
    with pytest.raises(ValueError, match=r"no negatives, 4 are needed: .*--objective cl --negatives 0, or mine some"):
        load_tuples(path, negatives=4)
    assert load_tuples(path, negatives=0)[0] == {"query": "q", "positive": "p"}


def test_short_rows_are_dropped_on_request(scored):
    def shorten(rows):
        rows[6].update(docids=rows[6]["docids"][:3], scores=rows[6]["scores"][:3])

    path, collection = scored(shorten)
    with pytest.warns(UserWarning, match=r"left out 1 of \d+ rows, which have fewer than 4 negatives to choose from"):
        kept = load_tuples(path, documents=collection, negatives=4, drop_short=True)
    assert len(kept) == TUPLES - 1
    with pytest.raises(ValueError, match="has 4 negatives to choose from, 5 are needed"):
        load_tuples(path, documents=collection, negatives=5, drop_short=True)


def test_a_bad_row_of_a_parquet_table_is_named(tmp_path, sample):
    query, documents, scores = map(list, zip(*sample.tuples, strict=True))
    scores[2] = [float("nan"), *scores[2][1:]]
    write_parquet(tmp_path / "train.parquet", query_id=query, document_ids=documents, scores=scores)
    with pytest.raises(ValueError, match=r"Row 2 of .*train\.parquet has the teacher score nan"):
        load_tuples(tmp_path / "train.parquet", **texts_of(sample, tmp_path), teacher_scores=True)


def test_a_malformed_line_is_named(tmp_path, scored):
    path, collection = scored()
    path.write_text(path.read_text() + '{"query": "half a\n')
    with pytest.raises(ValueError, match=r"scored\.jsonl:13 is not JSON .*half a"):
        load_tuples(path, documents=collection)
    path, collection = scored()
    collection.write_text(collection.read_text() + "no tab here\n")
    with pytest.raises(ValueError, match=r"collection\.tsv:\d+ is 'no tab here': a line must be id, a tab, text"):
        load_tuples(path, documents=collection)


def test_a_changed_file_is_read_again(scored):
    path, collection = scored()
    assert len(load_tuples(path, documents=collection)) == TUPLES
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert len(load_tuples(path, documents=collection)) == 3


def test_a_repeated_id_is_named(scored, sample):
    path, collection = scored()
    first = next(iter(sample.documents))
    collection.write_text(collection.read_text() + f"{first}\tagain\n")
    with pytest.raises(ValueError, match=rf"has the id '{first}' in rows 0 and {len(sample.documents)}"):
        load_tuples(path, documents=collection)


def test_an_empty_text_is_named(scored, sample):
    first = next(iter(sample.documents))
    path, collection = scored()
    write_tsv(collection, sample.documents | {first: "  "})
    with pytest.raises(ValueError, match=rf"The text of '{first}' .* is ''"):
        load_tuples(path, documents=collection)[:]


def test_missing_texts_name_the_option(scored, tmp_path, sample):
    path, _ = scored()
    with pytest.raises(
        ValueError, match=r"The documents of .*scored\.jsonl are ids .* documents=FILE, FOLDER or DATA SET"
    ):
        load_tuples(path)
    query, documents, scores = zip(*sample.tuples, strict=True)
    write_parquet(tmp_path / "set" / "train.parquet", query_id=query, document_ids=documents, scores=scores)
    write_card(tmp_path / "set", {"default": "train.parquet"})
    with pytest.raises(ValueError, match=r"The queries of .* are ids .*queries=FILE"):
        load_tuples(tmp_path / "set")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all is not a file or folder"),
        ({"source": "train.jsonl"}, FileNotFoundError, "nor the name of a Hub data set"),
        ({"source": "{folder}/notes.md"}, ValueError, r"Cannot read .*notes\.md: give \.jsonl"),
        ({"source": "{folder}/unknown.jsonl"}, ValueError, r"\['left', 'right'\] fit no layout .* pos_pid"),
        ({"source": "{folder}/pairs.jsonl", "negatives": -1}, ValueError, "negatives is -1"),
        ({"source": "{folder}/pairs.jsonl", "negatives": 2}, ValueError, "has no negatives, 2 are needed"),
        ({"source": "{folder}/pairs.jsonl", "sampling": "best"}, ValueError, "sampling is 'best'"),
        ({"source": "{folder}/pairs.jsonl", "relative_margin": 0.1}, ValueError, "has no teacher scores"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "unknown.jsonl").write_text(json.dumps({"left": 1, "right": 2}) + "\n")
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a", "positive": "b"}])
    arguments = arguments | {"source": arguments["source"].format(folder=tmp_path)}
    with pytest.raises(error, match=message):
        load_tuples(**arguments)


def test_epochs_belong_to_tuples():
    from datasets import Dataset

    with pytest.raises(ValueError, match="do not come from load_tuples"):
        set_epoch(Dataset.from_dict({"query": ["a"]}), 1)


def test_quickstart_data_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_ST_QUICKSTART", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"there is no train\.parquet"):
        quickstart_data()
    (tmp_path / "train.parquet").touch()
    assert quickstart_data() == tmp_path


def test_quickstart_test_sets_are_written_once(tmp_path):
    folders = quickstart_test_sets(tmp_path)
    assert {name: path.name for name, path in folders.items()} == {"squad_dev": "squad_dev", "scifact": "scifact"}
    before = (folders["scifact"] / "corpus.jsonl").stat().st_mtime_ns
    assert quickstart_test_sets(tmp_path) == folders
    assert (folders["scifact"] / "corpus.jsonl").stat().st_mtime_ns == before
