"""Everything that is wrong with training data is found, named and counted."""

import json
import tracemalloc
from pathlib import Path

import pytest
from commands import lion
from typer.testing import CliRunner

from lion_st.cli import app
from lion_st.data import load_tuples, quickstart_data, save_beir
from lion_st.data.checking import check_tuples
from lion_st.data.overlap import normalize


def row(number: int, **changes) -> dict:
    return {
        "query": f"what is {number}",
        "pos": [f"It is {number}."],
        "neg": [f"It is not {number}.", f"{number} is a number."],
        "pos_scores": [3.0 + number % 3],
        "neg_scores": [0.5, 1.0],
    } | changes


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def found(report) -> dict[str, int]:
    return {finding.fault: finding.count for finding in report.findings}


def test_sound_data_have_no_findings_and_exit_code_0(tmp_path):
    data = write(tmp_path / "good.jsonl", [row(number) for number in range(30)])
    report = check_tuples(data, negatives=2)
    assert report.findings == [] and report.is_sound
    assert (report.rows, report.queries, report.documents, report.negatives) == (30, 30, 90, (2, 2, 2))
    assert report.teachers == [""]
    shown = lion("data", "check", data, "--negatives", "2")
    assert "30 rows, 30 queries, 90 documents, 2 to 2 negatives" in shown and "nothing found" in shown


def test_every_bad_row_is_counted_by_what_is_wrong_with_it(tmp_path):
    rows = [
        row(0, query=" "),  # even the first
        "{not json",
        row(6),
        row(1, pos=[]),
        row(2, pos_scores=None, neg_scores=None),
        row(3, neg_scores=[0.5]),
        row(4, neg_scores=[0.5, float("nan")]),
        row(5, neg=["", "no"]),
        row(7),
    ]
    report = check_tuples(write(tmp_path / "bad.jsonl", rows))
    counts = {"empty_text": 2, "malformed": 1, "no_positive": 1, "unscored": 1, "score_count": 1, "bad_score": 1}
    assert found(report) == counts and not report.is_sound
    assert report.rows == 2
    places = {finding.fault: finding.places for finding in report.findings}
    assert "bad.jsonl:1 has ' ' in the field 'query'" in places["empty_text"][0]
    assert "bad.jsonl:2 is not JSON" in places["malformed"][0]
    assert "bad.jsonl:6 has 2 teacher scores for 3 documents" in places["score_count"][0]
    with pytest.raises(ValueError, match=r"bad\.jsonl:1 has ' '"):
        load_tuples(tmp_path / "bad.jsonl", negatives=2)


def test_repeats_and_positives_among_negatives_are_warnings(tmp_path):
    rows = [
        row(0, neg=[], neg_scores=[]),
        row(1, neg=[" It is 1. ", "It is not 1."]),
        row(2, neg=["It is not 2.", "It is not 2."]),
        row(3),
        row(3),
        row(4),
        row(4, pos=["Four."], neg=["It is 4.", "It is not 4."]),
    ]
    data = write(tmp_path / "repeats.jsonl", rows)
    report = check_tuples(data)
    assert found(report) == {
        "positive_among_negatives": 1, "repeated_document": 1, "repeated_row": 1, "positive_elsewhere": 1,
        "unequal_lists": 4,
    }  # fmt: skip
    assert report.is_sound
    places = {finding.fault: finding.places for finding in report.findings}
    assert places["positive_among_negatives"][0].endswith("repeats.jsonl:2")
    assert places["repeated_row"][0].endswith(":5") and places["positive_elsewhere"][0].endswith(":7")
    assert found(check_tuples(data, negatives=2))["few_negatives"] == 4
    assert not check_tuples(data, negatives=2).is_sound


@pytest.mark.parametrize(
    ("scores", "faults", "is_sound"),
    [
        (dict(pos_scores=[0.1], neg_scores=[0.5, 0.9]), {"reversed_scores", "positive_below_negative"}, False),
        (dict(pos_scores=[0.6], neg_scores=[0.1, 0.9]), {"positive_below_negative"}, True),
        (dict(pos_scores=[0.0], neg_scores=[0.0, 0.0]), {"constant_scores"}, False),
        (dict(pos=["so", "and so"], pos_scores=[3.0, 0.1], neg_scores=[0.5, 0.9]), set(), True),
    ],
)
def test_scores_that_teach_the_opposite_or_nothing_are_errors(tmp_path, scores, faults, is_sound):
    report = check_tuples(write(tmp_path / "scores.jsonl", [row(number, **scores) for number in range(5)]))
    assert (found(report).keys(), report.is_sound) == (faults, is_sound)
    assert set(found(report).values()) <= {5}


def test_scores_are_reversed_or_constant_if_those_of_most_rows_or_all_are(tmp_path):
    rows = [row(0, pos_scores=[0.0], neg_scores=[0.0, 0.0]), row(1, pos_scores=[0.1]), row(2)]
    assert found(check_tuples(write(tmp_path / "scores.jsonl", rows))) == {"positive_below_negative": 1}


def test_negatives_that_are_positives_elsewhere_are_not_counted_as_left(tmp_path):
    rows = [{"query": "q", "pos": ["a"], "neg": ["b", "c", "a"]}, {"query": "q", "pos": ["b"], "neg": ["c", "d"]}]
    data = write(tmp_path / "two.jsonl", rows)
    with pytest.warns(UserWarning, match="left out 2"), pytest.raises(ValueError, match="1 of 2 rows have too few"):
        load_tuples(data, negatives=2)
    report = check_tuples(data, negatives=2)
    assert found(report) == {
        "few_negatives": 1, "positive_elsewhere": 1, "positive_among_negatives": 1, "unequal_lists": 1,
    }  # fmt: skip
    assert report.negatives[0] == 1


def test_ids_are_looked_up_and_texts_of_all_ids_read(tmp_path):
    (tmp_path / "collection.jsonl").write_text(
        "".join(json.dumps({"id": f"d{n}", "text": "" if n == 4 else f"text {n % 9}"}) + "\n" for n in range(20))
    )
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"id": f"q{n}", "text": f"query {n}"}) + "\n" for n in range(3))
    )
    rows = [
        {"query_id": "q0", "document_ids": ["d0", "d1", "d2"], "scores": [3, 2, 1]},
        {"query_id": "q1", "document_ids": ["d9", "d4", "d99", "d98", "d19"], "scores": [5, 4, 3, 2, 1]},
        {"query_id": "q7", "document_ids": ["d3", "d12", "d18"], "scores": [3, 2, 1]},
    ]
    data = write(tmp_path / "train.jsonl", rows)
    texts = dict(queries=tmp_path / "queries.jsonl", documents=tmp_path / "collection.jsonl")
    report = check_tuples(data, **texts)
    # d0, d9 and d18 are one text, and so are d1 and d19, d3 and d12, which is a negative of its own positive.
    assert found(report) == {
        "missing_id": 3, "empty_text": 1, "same_text": 4, "positive_among_negatives": 1, "unequal_lists": 1,
    } | {"unequal_lists": found(report)["unequal_lists"]}  # fmt: skip
    places = {finding.fault: finding.places for finding in report.findings}
    assert (report.queries, report.documents) == (2, 5)  # texts
    assert "'q7' at" in places["missing_id"][0] and "'d99' at" in places["missing_id"][1]
    assert all(place.endswith("train.jsonl:2") for place in places["missing_id"][1:])
    assert places["empty_text"][0].startswith("'d4' in ")
    (tmp_path / "collection.jsonl").write_text('{"id": "d0", "text": "a"}\n{"id": "d0", "text": "b"}\n')
    assert found(check_tuples(data, **texts)) == {"repeated_id": 1}


def test_evaluation_queries_that_train_are_an_error_also_in_another_spelling(tmp_path):
    collection = save_beir(
        tmp_path / "own",
        {"d1": {"title": "Five", "text": "It is 5."}, "d2": {"text": "Nothing."}},  # found without its title
        {"q1": "what is 3", "q2": "What is  4?", "q3": "where is 1", "q4": "what is 5"},
        {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d2": 1}, "q4": {"d2": 0}},
    )
    data = write(tmp_path / "train.jsonl", [row(number) for number in range(6)])
    report = check_tuples(data, eval_data=[collection])
    assert found(report) == {"evaluation_query": 2, "evaluation_document": 1}
    (finding, document) = report.findings
    assert "train.jsonl:4 is 'q1' of" in finding.places[0] and not finding.places[0].endswith("spaces")
    assert "train.jsonl:5 is 'q2' of" in finding.places[1] and finding.places[1].endswith("punctuation or spaces")
    assert document.severity == "warning"
    result = CliRunner().invoke(app, ["data", "check", str(data), "--eval_data", str(collection), "--json"])
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert printed["is_sound"] is False and printed["findings"][0]["fault"] == "evaluation_query"
    assert printed["lengths"][0]["unit"] == "words"


def test_words_that_differ_in_a_vowel_sign_are_different():
    assert normalize("दिन") != normalize("दीन") and normalize("दिन।") == normalize(" दिन ")


def test_texts_are_normalized_to_case_letters_and_single_spaces():
    assert normalize(" What, is  a LION? ") == normalize("what is a lion") == "what is a lion"
    assert normalize("STRASSE_ﬁve") == normalize("Straße five") == "strasse five"
    assert normalize("?!") == "?!"  # and not the same as every other text without letters


def test_lengths_are_in_the_models_tokens_with_what_is_cut(tiny_backbone, tmp_path):
    rows = [row(number, pos=[" ".join(["lion"] * 10 * number) or "lion"]) for number in range(8)]
    data = write(tmp_path / "long.jsonl", rows)
    options = ["--model", tiny_backbone(), "--document-length", "35", "--json"]
    report = json.loads(lion("data", "check", data, *options))
    documents = report["lengths"][1]
    assert documents["unit"] == "tokens" and documents["limit"] == 35 and documents["longest"] >= 70
    assert sum(documents["histogram"].values()) == documents["sample"] == 24
    assert 4 / 24 <= documents["cut_share"] < 1
    assert "cut_texts" in {finding["fault"] for finding in report["findings"]}


def test_a_folder_of_judgements_is_checked_too(tmp_path):
    folder = save_beir(
        tmp_path / "own", {"d1": {"text": "a"}}, {"q1": "one", "q2": "two"}, {"q1": {"d1": 1}}, split="train"
    )
    with (folder / "qrels" / "train.tsv").open("a") as qrels:
        qrels.write("q2\td7\t1\n")
    report = check_tuples(folder, negatives=0)
    assert found(report) == {"judged_document_missing": 1} and report.is_sound


def test_memory_does_not_grow_with_the_texts(tmp_path):
    peaks = []
    for words in (1, 200):
        data = write(
            tmp_path / f"{words}.jsonl", [row(n, neg=[f"no {n} " * words, f"not {n} " * words]) for n in range(4000)]
        )
        tracemalloc.start()
        check_tuples(data, sample=10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Thousands of rows at a time are held, and 8 MB of texts are not.
    assert peaks[1] - peaks[0] < 12e6


def test_the_quickstart_data_are_sound():
    report = check_tuples(quickstart_data(), split="train[:3000]", negatives=4)
    assert report.is_sound, report.describe()


def test_a_prompt_counts_in_the_lengths(tmp_path):
    source = write(tmp_path / "tuples.jsonl", [{"query": "one two", "positive": "three"}])
    report = check_tuples(source, query_prompt="in front ")
    assert [lengths.longest for lengths in report.lengths] == [4, 1]
