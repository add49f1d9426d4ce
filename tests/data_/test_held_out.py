"""What is held out of the training data trains in no way."""

import json
from pathlib import Path

import pytest

from lion_st.data import load_tuples, save_beir
from lion_st.data.held_out import hold_out
from lion_st.data.overlap import normalize


def write(path: Path, name: str, rows: int = 40) -> Path:
    """Tuples whose negatives are positives of other rows, and of the other file's."""
    lines = [
        {
            "query": f"query {row // 2}",  # each in two rows
            "positive": f"Answer {row}.",
            "negative_1": f"Answer {(7 * row + 3) % rows}." if row % 4 == 0 else f"{name} {row}",
            "negative_2": f" {name} {row} other",
        }
        for row in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def texts_of(tuples) -> set[str]:
    return {text.strip() for row in tuples for column, text in row.items() if column != "label"}


def test_no_query_and_no_positive_that_is_held_out_trains_in_any_source(tmp_path):
    sources = {name: load_tuples(write(tmp_path / f"{name}.jsonl", name), negatives=2) for name in ("a", "b")}
    training, held = hold_out(sources, 0.1)
    assert 2 <= len(held.queries) <= 4 and held.left_out > 0
    trained = texts_of(training["a"]) | texts_of(training["b"])
    positives = {held.corpus[key] for keys in held.relevant.values() for key in keys}
    assert not trained & {*held.queries.values(), *positives}
    # Both rows of a held-out query are in it, with as many negatives as a row has.
    for key, query in held.queries.items():
        number = int(query.split()[1])
        assert {held.corpus[one] for one in held.relevant[key]} == {
            f"Answer {2 * number}.",
            f"Answer {2 * number + 1}.",
        }
    assert len(held.corpus) > len(positives)
    rows = sum(map(len, sources.values()))
    left = sum(map(len, training.values()))
    own = sum(row["query"] in held.queries.values() for tuples in sources.values() for row in tuples)
    assert left == rows - own - held.left_out > rows / 2


def test_each_source_has_held_out_queries_and_all_positives_of_a_row_count(tmp_path):
    sources = {}
    for name in ("a", "b"):
        rows = [
            {
                "query": f"{name} {n}",
                "pos": [f"{name} p{n}", f"{name} r{n}"],
                "neg": [f"{name} r{(n + 1) % 9}", f"n{n}"],
            }
            for n in range(9)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = load_tuples(tmp_path / f"{name}.jsonl", negatives=1)
    _, held = hold_out(sources, 0.01)
    assert sorted(query[0] for query in held.queries.values()) == ["a", "b"]
    for key, query in held.queries.items():
        name, number = query.split()
        assert {held.corpus[one] for one in held.relevant[key]} == {f"{name} p{number}", f"{name} r{number}"}
    assert len(held.corpus) == 2 * (2 + 1)  # with as many negatives as are drawn
    assert held.left_out == 2  # the rows whose negative is the second positive of the held-out one


def test_the_choice_depends_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", "a")
    backwards = tmp_path / "b.jsonl"
    backwards.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    held = [set(hold_out({"x": load_tuples(one, negatives=2)}, 0.2)[1].queries.values()) for one in (path, backwards)]
    assert held[0] == held[1]
    assert set(hold_out({"x": load_tuples(path, negatives=2)}, 0.2, seed=1)[1].queries.values()) != held[0]


def test_copies_in_another_case_or_punctuation_are_held_out_too(tmp_path):
    spellings = [(f"What is {n}?", f"It is {n}.", f"what  is {n}", f"IT IS: {n}") for n in range(20)]
    lines = [{"query": a, "positive": b} for a, b, *_ in spellings]
    lines += [{"query": c, "positive": f"other {n}"} for n, (*_, c, _) in enumerate(spellings)]
    lines += [{"query": f"another {n}", "positive": d} for n, (*_, d) in enumerate(spellings)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, held = hold_out({"a": load_tuples(tmp_path / "a.jsonl", negatives=0)}, 0.1)
    trained = set(map(normalize, texts_of(training["a"])))
    positives = [held.corpus[key] for keys in held.relevant.values() for key in keys]
    assert len(held.queries) == 4 and held.left_out
    assert trained.isdisjoint(map(normalize, [*held.queries.values(), *positives]))


def test_documents_known_by_id_are_compared_by_their_texts(tmp_path):
    corpus = {f"d{n}": {"title": "", "text": f"Text {n % 10}"} for n in range(20)}  # each text under two ids
    queries = {f"q{n}": f"query {n}" for n in range(20)}
    folder = save_beir(tmp_path / "own", corpus, queries, {f"q{n}": {f"d{n}": 1} for n in range(20)}, split="train")
    training, held = hold_out({"own": load_tuples(folder, negatives=0)}, 0.1)
    assert len(held.queries) == 2 and held.left_out in (1, 2)
    assert not texts_of(training["own"]) & {*held.corpus.values(), *held.queries.values()}
    assert len(training["own"]) == 20 - 2 - held.left_out


def test_a_share_that_leaves_nothing_is_refused(tmp_path):
    tuples = load_tuples(write(tmp_path / "a.jsonl", "a"), negatives=2)
    with pytest.raises(ValueError, match=r"share of 0\.99 leaves no row of x .* Give a smaller share"):
        hold_out({"x": tuples}, 0.99)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        hold_out({"x": tuples}, 1.0)
    with pytest.raises(ValueError, match="x does not come from load_tuples"):
        hold_out({"x": tuples.with_format(None)}, 0.1)
