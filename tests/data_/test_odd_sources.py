"""Tuples as sentence-transformers and `datasets` leave them, and ids and texts that are out of the ordinary."""

import json
import re
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from layout_files import write_jsonl

from lion_st.data import load_tuples
from lion_st.data.checking import check_tuples

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def mined():
    """What sentence-transformers mines for pairs of a query and a positive, by output format and name of the latter."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW
    from sentence_transformers.util import mine_hard_negatives

    queries, positives = ["lions hunt", "zebras run"], ["lions hunt at night", "zebras run at day"]
    corpus = ["lions hunt rarely", "zebras run rarely"]
    words = sorted({word for text in (*queries, *positives, *corpus) for word in text.split()})
    model = SentenceTransformer(modules=[BoW(words)], device="cpu")

    def mine(output_format, scored, positive):
        pairs = Dataset.from_dict({"query": queries, positive: positives})
        return mine_hard_negatives(
            pairs, model, corpus=corpus, num_negatives=1, sampling_strategy="top", verbose=False,
            output_format=output_format, output_scores=scored,
        )  # fmt: skip

    return mine


@pytest.mark.parametrize("positive", ["positive", "answer"])  # it keeps the names of the pairs
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_negatives_that_sentence_transformers_mined_are_negatives(mined, tmp_path, output_format, scored, positive):
    if scored and output_format == "labeled-pair":
        pytest.skip("pairs with scores do not say which documents are relevant")
    mined(output_format, scored, positive).to_json(tmp_path / "mined.jsonl")
    tuples = load_tuples(tmp_path / "mined.jsonl", negatives=1, teacher_scores=scored)
    found = {row["query"]: (row["positive"], row["negative_1"]) for row in tuples}
    assert found == {
        "lions hunt": ("lions hunt at night", "lions hunt rarely"),
        "zebras run": ("zebras run at day", "zebras run rarely"),
    }


def test_what_a_label_calls_irrelevant_is_not_trained_on_as_a_positive(tmp_path):
    (tmp_path / "labels.csv").write_text("anchor,positive,label\nq,yes,1\nq,no,0\nr,no,0\n")
    with pytest.warns(UserWarning, match="left out 1 queries without a positive"):
        tuples = load_tuples(tmp_path / "labels.csv", negatives=0)
    assert tuples[:] == {"query": ["q"], "positive": ["yes"]}
    report = check_tuples(tmp_path / "labels.csv", negatives=1)
    assert [(one.fault, one.count) for one in report.findings] == [("none_relevant", 1)] and report.is_sound
    (tmp_path / "labels.csv").write_text("anchor,positive,label\nr,no,0\n")
    assert [one.fault for one in check_tuples(tmp_path / "labels.csv").findings] == ["none_relevant"]


def test_lists_of_positives_and_negatives_are_read_and_a_bare_list_is_refused(tmp_path):
    row = {"query": "q", "positive": ["a"], "negative": ["b", "c"]}
    tuples = load_tuples(write_jsonl(tmp_path / "lists.jsonl", [row]), sampling="first")
    assert tuples[0] == {"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c"}
    row = {"question": "q", "document": "a", "negatives": ["b", "c"], "scores": [3, 2, 1]}
    tuples = load_tuples(write_jsonl(tmp_path / "one.jsonl", [row]), sampling="first", teacher_scores=True)
    assert list(tuples[0].values()) == ["q", "a", "b", "c", [3, 2, 1]]
    letters = write_jsonl(tmp_path / "letters.jsonl", [{"query": "q", "positive": ["a"], "negative": "bc"}])
    with pytest.raises(ValueError, match=r"letters\.jsonl:1 has 'bc' in the field 'negative', where a list belongs"):
        load_tuples(letters)
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"query": "q", "positive": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"bare\.jsonl:1 .* neither labels nor scores, nor a list in 'negative'"):
        load_tuples(bare)


def test_a_label_stays_with_the_document_of_id_0(tmp_path):
    rows = [{"query": "q", "positive": 1, "negative_1": 0, "negative_2": None, "label": [3.0, 2.0, 1.0]}]
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"id": 0, "text": "zero"}, {"id": 1, "text": "one"}])
    tuples = load_tuples(write_jsonl(tmp_path / "a.jsonl", rows), negatives=1, teacher_scores=True, documents=texts)
    assert tuples[0] == {"query": "q", "positive": "one", "negative_1": "zero", "label": [3.0, 2.0]}


@pytest.mark.parametrize(
    ("kind", "ids"),
    [(pa.int64(), [9123456789012345678, -7000000000000000001]), (pa.uint64(), [2**63 + 5, 2**64 - 1])],
)
def test_ids_are_integers_of_any_size(tmp_path, kind, ids):
    texts = pa.table({"id": pa.array(ids, kind), "text": ["one", "two"]})
    pq.write_table(texts, tmp_path / "texts.parquet")
    columns = {name: pa.array([one], kind) for name, one in zip(("positive", "negative"), ids, strict=True)}
    pq.write_table(pa.table({"query": ["q"], **columns}), tmp_path / "tuples.parquet")
    tuples = load_tuples(tmp_path / "tuples.parquet", documents=tmp_path / "texts.parquet")
    assert tuples[0] == {"query": "q", "positive": "one", "negative_1": "two"}


def test_half_a_surrogate_pair_is_named_with_its_row(tmp_path):
    rows = [{"query": "good", "positive": "p"}, {"query": "bad \ud800", "positive": "p"}]
    path = tmp_path / "scraped.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"scraped\.jsonl:2 holds half of a surrogate pair"):
        load_tuples(path)
    (finding,) = check_tuples(path).findings
    assert (finding.fault, finding.count) == ("malformed", 1)


def test_what_save_to_disk_has_written_is_read(tmp_path):
    rows = Dataset.from_dict({"query": ["q"], "positive": ["p"], "negative": ["n"]})
    expected = {"query": "q", "positive": "p", "negative_1": "n"}
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "splits")
    assert load_tuples(tmp_path / "one")[0] == load_tuples(tmp_path / "splits", split="dev")[0] == expected
    with pytest.raises(ValueError, match=re.escape("with the splits ['train', 'dev'], not 'train[:1%]'")):
        load_tuples(tmp_path / "splits", split="train[:1%]")


def test_a_slice_of_a_file_is_taken_or_refused(tmp_path):
    rows = [{"query": f"q{number}", "positive": "p"} for number in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows\.jsonl is a file without splits, and 'train\[:50%\]' was asked for"):
        load_tuples(path, split="train[:50%]")
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert len(load_tuples(tmp_path / "rows.parquet", split="train[:50%]")) == 5


def test_files_that_are_no_table_together_are_said_with_the_reason(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "p"}])
    write_jsonl(tmp_path / "b.jsonl", [{"id": 1, "text": "t"}])
    with pytest.raises(ValueError, match=r"cannot be read as one table: .*column names don.t match\. Name one of them"):
        load_tuples(tmp_path)


@pytest.mark.parametrize("ranks", [(-2, None), (3, 1)])
def test_ranks_out_of_order_are_named(tmp_path, ranks):
    with pytest.raises(ValueError, match=f"ranks are .start, stop. .*, got {ranks[0]} and {ranks[1]}"):
        load_tuples(tmp_path, ranks=ranks)


def test_a_data_set_in_memory_is_refused_with_what_trains_on_it():
    with pytest.raises(TypeError, match=r"A source of tuples expected, got (.|\n)*, a Dataset: .* build_trainer"):
        load_tuples(Dataset.from_dict({"query": ["q"], "positive": ["p"]}))


def test_what_rows_would_not_follow_is_refused(tmp_path):
    rows = [{"query": f"q{number}", "positive": f"p{number}", "negative": "n"} for number in range(4)]
    tuples = load_tuples(write_jsonl(tmp_path / "rows.jsonl", rows))

    def with_prefix(row):
        return {"query": f"prefix {row['query']}"}

    for changed in (tuples.map(with_prefix), tuples.add_column("query", ["q"] * 4), tuples.select_columns(["keys"])):
        with pytest.raises(ValueError, match=r"copy them first, with Dataset\.from_list"):
            changed[0]
    assert tuples.filter(lambda row: row["query"] == "q2").shuffle()[0]["positive"] == "p2"
    assert Dataset.from_list(list(tuples)).map(with_prefix)[1]["query"] == "prefix q1"


SCORED_PAIR = {"query_id": "17", "query": "q", "pid": "3", "passage": "a", "score": 2.5, "label": 1}


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"query": None}, "query"), ({"passage": None}, "passage"), ({"score": None}, "score")],
)
def test_nothing_stands_in_for_a_field_that_is_null(tmp_path, changes, field):
    """An id in the place of its text, or a label in that of a score."""
    rows = [SCORED_PAIR, SCORED_PAIR | {"passage": "b", "score": 1.5} | changes]
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2 has None in the field '{field}'"):
        load_tuples(write_jsonl(tmp_path / "pairs.jsonl", rows), negatives=0)


def test_a_first_row_without_a_label_does_not_make_positives_of_all_others(tmp_path):
    rows = [{"query": "q", "passage": "a", "label": None}, {"query": "q", "passage": "b", "label": 0}]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2 .* label 0, the first row has none"):
        load_tuples(write_jsonl(tmp_path / "pairs.jsonl", rows), negatives=0)


@pytest.mark.parametrize(
    ("field", "grades"), [("corpus-id", [2, 1, 0]), ("passage", [1, 1, -1]), ("passage", [True, True, False])]
)
def test_grades_of_judgements_are_no_teachers_scores(tmp_path, field, grades):
    """Of BEIR's judgements as a table of the Hub, of labels of -1, and of those that are true or false."""
    name, rows = "score" if field == "corpus-id" else "label", zip("abc", grades, strict=True)
    table = [{"query-id": "q", field: document, name: grade} for document, grade in rows]
    texts = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"id": one, "text": f"text {one}"} for one in "abcq"])
        for name in ("queries", "documents")
    }
    tuples = load_tuples(write_jsonl(tmp_path / "qrels.jsonl", table), **texts)
    assert tuples[0]["positive"] in ("text a", "text b")
    assert {key: text for key, text in tuples[0].items() if "negative" in key} == {"negative_1": "text c"}


def test_texts_that_are_null_inside_passages_are_not_the_word_none(tmp_path):
    row = {"query": "q", "positive_passages": [{"title": "T", "text": None}], "negative_passages": []}
    assert load_tuples(write_jsonl(tmp_path / "a.jsonl", [row]))[0] == {"query": "q", "positive": "T"}
    row["positive_passages"] = [{"title": None, "text": None}]
    with pytest.raises(ValueError, match=r"has '' in the field .*positive_passages"):
        load_tuples(write_jsonl(tmp_path / "b.jsonl", [row]))


def test_systems_that_found_nothing_are_null_in_a_table(tmp_path):
    """As `datasets` reads msmarco-hard-negatives, whose rows name different systems."""
    mined = [{"bm25": ["b", "c"], "dense": ["d"]}, {"bm25": ["b"], "dense": None}]
    pq.write_table(pa.table({"qid": ["q", "r"], "pos": [["a"], ["a"]], "neg": mined}), tmp_path / "mined.parquet")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"id": one, "text": f"text {one}"} for one in "abcdqr"])
    options = {"queries": texts, "documents": texts, "sampling": "first", "negatives": 1}
    tuples = load_tuples(tmp_path / "mined.parquet", **options)
    assert [row["negative_1"] for row in tuples] == ["text b", "text b"]


def test_a_single_score_of_several_documents_is_named(tmp_path):
    row = {"query": "q", "positive": "a", "negative_1": "b", "negative_2": "c", "label": 1.5}
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has the teacher scores 1\.5: give a list"):
        load_tuples(write_jsonl(tmp_path / "a.jsonl", [row]))


def test_a_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("query,positive,negative,negative\nq,a,b,c\n")
    with pytest.raises(ValueError, match=r"a\.csv:1 names two columns 'negative'"):
        load_tuples(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_title_beside_a_query_is_left_out_of_tables_too(tmp_path, kind):
    rows = [{"query_id": "q", "title": "T", "text": "what"}]
    queries = tmp_path / f"queries{kind}"
    pq.write_table(pa.Table.from_pylist(rows), queries) if kind == ".parquet" else write_jsonl(queries, rows)
    documents = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": one, "text": one} for one in "ab"])
    tuples = write_jsonl(tmp_path / "t.jsonl", [{"query_id": "q", "positive_id": "a", "negative_id": "b"}])
    assert load_tuples(tuples, queries=queries, documents=documents)[0]["query"] == "what"


@pytest.mark.parametrize(
    ("row", "given"),
    [
        ({"query": "7", "pos": ["3"], "neg": ["5"]}, ("queries", "documents")),
        ({"query_id": "7", "pos": ["3"], "neg": ["5"]}, ("queries", "documents")),
        ({"query": "7", "positive_document_ids": ["3"], "negative_document_ids": ["5"]}, ("queries", "documents")),
        ({"question": "7", "pos_pid": "3", "neg_pids": ["5"]}, ("queries", "documents")),
        ({"query": "what", "pos": ["3"], "neg": ["5"]}, ("documents",)),
    ],
)
def test_ids_whose_texts_are_given_are_not_trained_on_as_texts(tmp_path, row, given):
    texts = {"queries": {"7": "what"}, "documents": {"3": "three", "5": "five"}}
    places = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"id": one, "text": text} for one, text in texts[name].items()])
        for name in given
    }
    tuples = load_tuples(write_jsonl(tmp_path / "tuples.jsonl", [row]), **places)
    assert tuples[0] == {"query": "what", "positive": "three", "negative_1": "five"}


def test_integers_are_never_texts(tmp_path):
    tuples = write_jsonl(tmp_path / "tuples.jsonl", [{"query": 7, "pos": [3], "neg": [5]}])
    with pytest.raises(ValueError, match=r"The queries of .* are ids and their texts are not there"):
        load_tuples(tuples)


@pytest.mark.parametrize(
    ("name", "unread"), [("hotpot_train.jsonl", r"2 .*: msmarco\.jsonl, nq\.jsonl"), ("h.parquet", r"1 .*: h\.parquet")]
)
def test_shards_that_datasets_leaves_out_are_named(tmp_path, name, unread):
    for number, file in enumerate(("msmarco.jsonl", "nq.jsonl", name)):
        row = {"query": f"query {number}", "positive": f"positive {number}"}
        path = tmp_path / "shards" / file
        write_jsonl(path, [row]) if file.endswith("l") else pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.warns(UserWarning, match=f"shards: {unread}"):
        load_tuples(tmp_path / "shards")
    (tmp_path / "shards" / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_tuples(tmp_path / "shards")) == 2
