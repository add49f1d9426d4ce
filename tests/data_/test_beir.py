"""Reading and writing test collections in BEIR layout."""

import pytest

from lion_st.data import load_beir, quickstart_test_sets, save_beir

CORPUS = {"d1": {"title": "", "text": "lions"}, "d2": {"title": "Cats", "text": "tigers"}}
QUERIES = {"q1": "a big cat?"}
QRELS = {"q1": {"d1": 1, "d2": 2}}


@pytest.fixture
def folder(tmp_path):
    return save_beir(tmp_path / "set", CORPUS, QUERIES, QRELS)


def test_the_bundled_test_sets_read_as_they_are_known(tmp_path):
    sizes = {}
    for name, path in quickstart_test_sets(tmp_path).items():
        corpus, queries, qrels = load_beir(path)
        sizes[name] = (len(corpus), len(queries), sum(map(len, qrels.values())))
    assert sizes == {"squad_dev": (2067, 10570, 10570), "scifact": (5183, 300, 339)}


def test_a_saved_collection_is_not_overwritten(folder):
    with pytest.raises(FileExistsError, match=r"corpus\.jsonl' exists"):
        save_beir(folder, CORPUS, QUERIES, QRELS)


def test_a_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_beir(tmp_path / "set", CORPUS, {"q1": object()}, QRELS)
    assert [path for path in (tmp_path / "set").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("corpus.jsonl", '{"_id": "d1", "text": "again"}', r"corpus\.jsonl:3 repeats the id 'd1'"),
        (
            "corpus.jsonl",
            '{"_id": 3.5, "text": "a"}',
            r"corpus\.jsonl:3 has 3\.5 in the field '_id': an id is a string",
        ),
        ("corpus.jsonl", '{"_id": "a\\tb", "text": "a"}', r"corpus\.jsonl:3 has the id 'a\\tb': .* no tabs"),
        (
            "corpus.jsonl",
            '{"_id": "d3"}',
            r"corpus\.jsonl:3 has no text among its fields \['_id'\]: accepted are text, ",
        ),
        ("corpus.jsonl", '{"_id": "d3", "text": 5}', r"corpus\.jsonl:3 has 5 in the field 'text': a text is a string"),
        ("corpus.jsonl", "[1]", r"corpus\.jsonl:3 is '\[1\]': every line must be a JSON object"),
        ("queries.jsonl", "{", r"queries\.jsonl:2 is not JSON"),
        ("qrels/test.tsv", "q9\td1\t1", r"test\.tsv:4 judges the unknown query 'q9'"),
        ("qrels/test.tsv", "q1\td1\t2", r"test\.tsv:4 judges document 'd1' of query 'q1' as 2, an earlier line as 1"),
        ("qrels/test.tsv", "q1 d1 1", r"test\.tsv:4 is 'q1 d1 1', of 1 columns: judgements are"),
        ("qrels/test.tsv", "q1\td1\tyes", r"test\.tsv:4 has the grade 'yes', which is not a number"),
        ("qrels/test.tsv", "q1\td1\tnan", r"test\.tsv:4 has the grade 'nan', which is not a finite number"),
        ("qrels/test.tsv", "q1\td1\t0.5", r"test\.tsv:4 has the grade '0\.5': grades are whole numbers"),
    ],
)
def test_a_bad_line_is_named(folder, file, line, message):
    with (folder / file).open("a") as out:
        out.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_beir(folder)


def test_a_judged_query_without_a_text_is_refused(folder):
    save_beir(folder, CORPUS, QUERIES | {"q2": " "}, QRELS, overwrite=True)
    assert load_beir(folder)[1]["q2"] == " "
    save_beir(folder, CORPUS, QUERIES | {"q2": " "}, QRELS | {"q2": {"d1": 1}}, overwrite=True)
    with pytest.raises(ValueError, match=r"queries\.jsonl has no text for the judged query 'q2': fill it in or remove"):
        load_beir(folder)


def test_a_missing_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"dev\.tsv does not exist; splits with judgements: \['test'\]"):
        load_beir(folder, split="dev")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"queries\.jsonl does not exist"):
        load_beir(folder)
