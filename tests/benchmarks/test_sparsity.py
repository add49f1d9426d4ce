"""The table and the figure of what sparsity costs."""

import argparse

import pytest

from lion_st.data import save_beir


@pytest.fixture(scope="module")
def sparsity(import_script):
    return import_script("benchmarks/sparsity.py")


def test_every_setting_is_one_that_training_takes(sparsity, tmp_path):
    from objectives import arguments_of

    options = argparse.Namespace(steps=5, batch_size=8, negatives=1)
    runs = sparsity.runs()
    assert len({run["name"] for run in runs}) == len(runs) and {run["method"] for run in runs} < set(sparsity.METHODS)
    found = [arguments_of(run, 0, options, tmp_path / "tuples.jsonl")[0] for run in runs]
    assert {(one.batch_size, one.negatives, one.model) for one in found} == {(8, 1, found[0].model)}
    assert {(one.learn_thresholds, one.learn_top_k, one.regularizer) for one in found} >= {
        (False, False, "flops"), (True, False, "flops"), (False, True, "flops"), (True, True, "flops"),
        (False, False, "target"),
    }  # fmt: skip


def test_a_sample_holds_all_relevant_documents(sparsity, tmp_path):
    corpus = {f"d{n}": {"title": "", "text": f"text {n}"} for n in range(30)}
    qrels = {f"q{n}": {f"d{2 * n}": 1, f"d{2 * n + 1}": 0} for n in range(9)}
    save_beir(tmp_path / "set", corpus, {f"q{n}": f"query {n}" for n in range(9)}, qrels)
    documents, queries, judged = sparsity.read_test_set(tmp_path / "set", queries=4, documents=10)
    assert set(queries) == set(judged) and len(queries) == 4 and len(documents) == 10
    assert {f"d{2 * int(name[1:])}" for name in queries} <= set(documents)


def test_a_method_is_a_line_in_each_panel(sparsity, tmp_path):
    rows = [
        {"model": "m", "test set": "t", "method": method, "nDCG@10": 0.1 * n} | dict.fromkeys(sparsity.AXES, 1.0 + n)
        for method in ("flops", "learned top-k")
        for n in (1, 2)
    ]
    sparsity.draw(rows, tmp_path / "figure.svg")
    assert "svg" in (tmp_path / "figure.svg").read_text()[:500]
