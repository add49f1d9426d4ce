"""Tuples with the scores of several teachers: reading them, combining them by rule, and what is refused."""

import json

import numpy as np
import pytest
from scipy.stats import rankdata

from lion_st.data import load_tuples, set_epoch

DOCUMENTS = 8

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def scores() -> np.ndarray:
    """Of three teachers on scales of their own, [teachers, rows, documents], with equal scores among them."""
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(3, 6, DOCUMENTS)) * [[[1.0]], [[20.0]], [[0.1]]] + [[[0.0]], [[-5.0]], [[3.0]]]
    drawn[1] = drawn[1].round(-1)
    return drawn.astype(np.float32)


def write(path, scores, names="abc", change=None):
    rows = [
        {
            "query": f"q{row}",
            "pos": [f"p{row}"],
            "neg": [f"n{row} {place}" for place in range(1, DOCUMENTS)],
            "scores": {name: of_teacher[row].tolist() for name, of_teacher in zip(names, scores, strict=False)},
        }
        for row in range(scores.shape[1])
    ]
    if change is not None:
        change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(path, **options):
    rows = load_tuples(path, negatives=3, teacher_scores=True, **options)
    places = [[0, *(int(row[f"negative_{n}"].split()[1]) for n in (1, 2, 3))] for row in rows]
    return np.array([row["label"] for row in rows]), np.array(places)


def expected(scores, rule, weights):
    """Each rule by its definition, over all documents of a row: [rows, documents]."""
    if rule == "zscore":
        scores = (scores - scores.mean(2, keepdims=True)) / scores.std(2, keepdims=True)
    elif rule == "minmax":
        low, high = scores.min(2, keepdims=True), scores.max(2, keepdims=True)
        scores = (scores - low) / (high - low)
    elif rule == "reciprocal_rank":
        scores = 1 / (60 + rankdata(-scores, method="min", axis=2))
    return np.tensordot(np.array(weights) / sum(weights), scores.astype(np.float64), 1)


@pytest.mark.parametrize("rule", ["weighted", "zscore", "minmax", "reciprocal_rank"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 4.0)])
def test_a_rule_combines_as_it_is_defined(tmp_path, scores, rule, weights):
    path = write(tmp_path / "a.jsonl", scores)
    found, places = labels(path, teachers=dict(zip("abc", weights, strict=True)), combine=rule)
    combined = expected(scores, rule, weights)
    np.testing.assert_allclose(found, np.take_along_axis(combined, places, 1), rtol=1e-5, atol=1e-6)
    # What was combined can be normalized like one teacher's scores, over all documents of the query.
    found, places = labels(path, teachers=dict(zip("abc", weights, strict=True)), combine=rule,
                           teacher_normalization="minmax")  # fmt: skip
    low, high = combined.min(1, keepdims=True), combined.max(1, keepdims=True)
    scaled = (combined - low) / (high - low)
    np.testing.assert_allclose(found, np.take_along_axis(scaled, places, 1), rtol=1e-4, atol=1e-5)


def test_one_teacher_at_random_is_that_of_its_row_and_epoch(tmp_path, scores):
    path = write(tmp_path / "a.jsonl", scores)
    options = dict(negatives=3, teacher_scores=True, sampling="first", teachers={"a": 1, "b": 3}, combine="random")
    tuples, again = load_tuples(path, **options), load_tuples(path, **options)
    chosen = []
    for epoch in range(40):
        for one in (tuples, again):
            set_epoch(one, epoch)
        found = np.array([row["label"] for row in tuples])
        assert found.tolist() == [row["label"] for row in again]
        of_a, of_b = ((found == of_teacher[:, :4]).all(1) for of_teacher in scores[:2])
        assert (of_a ^ of_b).all()
        chosen.append(of_b)
    assert 0.65 < np.mean(chosen) < 0.85 and np.ptp(np.mean(chosen, 1)) > 0  # each row for itself


def test_teachers_stay_apart_for_losses_of_their_own(tmp_path, scores):
    path = write(tmp_path / "a.jsonl", scores)
    found, places = labels(path, teachers=["c", "a"], combine="separate")
    for place, of_teacher in enumerate((scores[2], scores[0])):
        np.testing.assert_allclose(found[:, place], np.take_along_axis(of_teacher, places, 1), rtol=1e-6)
    found, places = labels(path, teachers=["c", "a"], combine="minmax", teachers_apart=True)
    for place, of_teacher in enumerate((scores[2], scores[0])):
        alone = expected(of_teacher[None], "minmax", [1.0])
        np.testing.assert_allclose(found[:, place], np.take_along_axis(alone, places, 1), atol=1e-5)


def test_one_teacher_of_several_is_read_as_if_it_were_alone(tmp_path, scores):
    several, alone = write(tmp_path / "several.jsonl", scores), write(tmp_path / "alone.jsonl", scores[1:2], "b")
    for options in ({}, {"teacher_normalization": "zscore"}, {"absolute_margin": 1.0, "drop_short": True}):
        one, two = (labels(path, **options | named) for path, named in ((several, {"teachers": ["b"]}), (alone, {})))
        np.testing.assert_array_equal(one[0], two[0])
    assert "label" not in load_tuples(several, negatives=3)[0]


def passages(ids, values, **more):
    return [{"docid": one, "title": "", "text": one} | more | value for one, value in zip(ids, values, strict=True)]


def write_passages(path, values):
    rows = [
        {
            "query_id": "1",
            "query": "q",
            "positive_passages": passages(["p", "q"], values[:2]),
            "negative_passages": passages(["m", "n"], values[2:]),
        }
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_inside_passages_are_read(tmp_path):
    one = write_passages(tmp_path / "one.jsonl", [{"score": value} for value in (4.0, 3.5, 2.0, 1.0)])
    row = load_tuples(one, sampling="first", teacher_scores=True)[0]
    assert row == {"query": "q", "positive": "p", "negative_1": "m", "negative_2": "n", "label": [4.0, 2.0, 1.0]}
    two = write_passages(
        tmp_path / "two.jsonl", [{"scores": {"a": value, "b": -value}} for value in (4.0, 3.5, 2.0, 1.0)]
    )
    assert load_tuples(two, sampling="first", teacher_scores=True, teachers=["b"])[0]["label"] == [-4.0, -2.0, -1.0]
    lacking = write_passages(tmp_path / "lacking.jsonl", [{"score": 4.0}, {"score": 3.5}, {}, {"score": 1.0}])
    with pytest.raises(ValueError, match=r"lacking\.jsonl:1 has the teacher score None"):
        load_tuples(lacking)
    lists = {"qid": 1, "pos": [7], "neg": [8, 9], "pos.score": [0.9], "neg.score": [0.4, 0.1]}
    (tmp_path / "lists.jsonl").write_text(json.dumps(lists) + "\n")
    for name, ids in (("corpus", (7, 8, 9)), ("queries", (1,))):
        lines = [json.dumps({"id": one, "text": f"text {one}"}) + "\n" for one in ids]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    texts = {"queries": tmp_path / "queries.jsonl", "documents": tmp_path / "corpus.jsonl"}
    row = load_tuples(tmp_path / "lists.jsonl", sampling="first", teacher_scores=True, **texts)[0]
    assert row["label"] == pytest.approx([0.9, 0.4, 0.1]) and row["negative_2"] == "text 9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3]["scores"].pop("b"), r"a\.jsonl:4 has no teacher scores of the teacher 'b', other rows"),
        (lambda rows: rows[3].pop("scores"), r"a\.jsonl:4 has no teacher scores of the teacher 'a', other rows"),
        (lambda rows: rows[2]["scores"].update(b=None), r"a\.jsonl:3 has no scores of the teacher 'b': score it with"),
        (lambda rows: rows[2]["scores"]["c"].pop(), r"a\.jsonl:3 has 7 teacher scores of the teacher 'c' for 8 doc"),
        (
            lambda rows: rows[1]["scores"]["a"].__setitem__(4, float("nan")),
            r"a\.jsonl:2 has the teacher score nan of the teacher 'a' in the field 'scores': score it again or remove",
        ),
    ],
)
def test_scores_that_are_wrong_are_named_with_teacher_and_row(tmp_path, scores, change, message):
    with pytest.raises(ValueError, match=message):
        load_tuples(write(tmp_path / "a.jsonl", scores, change=change))


def test_teachers_and_rules_that_are_not_there_are_refused_with_those_that_are(tmp_path, scores):
    path = write(tmp_path / "a.jsonl", scores)
    for options, message in (
        ({}, "has the scores of the teachers a, b, c: name those to learn from"),
        ({"teachers": ["a", "x"]}, "no scores of the teacher 'x'; it has those of a, b, c"),
        ({"teachers": {"a": 1, "b": 0}}, "weight of the teacher 'b' is a finite number above 0, got 0"),
        ({"teachers": {"a": float("nan")}}, "above 0, got nan"),
        ({"teachers": ["a", "b"], "combine": "best"}, "combine is 'best': choose one of weighted, zscore, minmax"),
        ({"teachers": ["a", "b"], "combine": "random", "teachers_apart": True}, "leave one out"),
        ({"teachers": ["a", "b"], "absolute_margin": 1.0}, "Margins are those of one teacher's scores.* a, b: name"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tuples(path, teacher_scores=True, **options)
    with pytest.raises(TypeError, match="teachers are a list of names"):
        load_tuples(path, teacher_scores=True, teachers="a")
    short = write(
        tmp_path / "short.jsonl",
        scores[:, :, :2],
        change=lambda rows: [row["neg"].__delitem__(slice(1, None)) for row in rows],
    )
    with pytest.raises(ValueError, match=r"2 teacher scores, of which combine='zscore' .* Take 'weighted'"):
        load_tuples(short, teacher_scores=True, teachers=["a", "b"])
    unnamed = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0], "neg_scores": [0.5]}
    (tmp_path / "unnamed.jsonl").write_text(json.dumps(unnamed) + "\n")
    with pytest.raises(ValueError, match="no scores of the teacher 'a'; its scores are of one teacher without a name"):
        load_tuples(tmp_path / "unnamed.jsonl", teacher_scores=True, teachers=["a"])
