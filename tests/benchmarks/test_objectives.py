"""The table of objectives, teachers and regularizers."""

import argparse

import pytest


@pytest.fixture(scope="module")
def objectives(import_script):
    return import_script("benchmarks/objectives.py")


def test_every_setting_is_one_that_training_takes_on_the_same_texts(objectives, tmp_path):
    options = argparse.Namespace(steps=5, batch_size=4, negatives=3)
    runs = objectives.runs(["bm25", "sp-mini", "minilm"])
    assert len({(run["group"], run["paradigm"], run["name"]) for run in runs}) == len(runs)
    found = [objectives.arguments_of(run, 1, options, tmp_path / "tuples.jsonl") for run in runs]
    same = ("batch_size", "negatives", "sampling", "query_length", "document_length", "train_data")
    assert len({tuple(str(getattr(arguments, name)) for name in same) for arguments, _ in found}) == 1
    assert {training.seed for _, training in found} == {1} and {training.batch_sampler for _, training in found} == {
        found[0][1].batch_sampler
    }
    teachers = {len(arguments.teachers or ()) for arguments, _ in found}
    assert teachers == {0, 1, 2, 3}
    assert {run["name"] for run, (_, training) in zip(runs, found, strict=True) if training.max_steps != 5} == {
        "untrained",
        "target 32 / 256, 4 x the steps",
        "cl, 4 x the steps",
        "cl_kd, 4 x the steps",
    }


def test_a_row_is_the_mean_over_seeds_beside_half_their_range(objectives, tmp_path):
    rows = [
        {"group": "pruning", "paradigm": "sparse", "name": name, "seed": seed, "nDCG@10": score, "index MB": 1.0 + seed}
        for name, scores in (("top-k 8 / 32", (0.5, 0.7)), ("threshold 0.2", (0.4, 0.4)))
        for seed, score in enumerate(scores)
    ]
    first, second = objectives.means(rows, "pruning", "sparse")
    assert first == {"pruning": "top-k 8 / 32", "nDCG@10": pytest.approx(0.6), "±": pytest.approx(0.1), "index MB": 1.5}
    assert second["±"] == 0
    table = objectives.show(rows, tmp_path)
    assert "**pruning, sparse**" in table and "threshold 0.2" in (tmp_path / "objectives.svg").read_text()
