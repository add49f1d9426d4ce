"""The programs in examples/ run as they stand, with the bundled micro model and small data."""

import ast
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runnable import run
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")  # threads that wait for busy cores cost more than they do
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str, **constants) -> dict:
    file = ROOT / "examples" / f"{name}.py"
    return run(file.read_text(), str(file), constants)


@pytest.fixture(scope="module")
def teacher(micro, tmp_path_factory) -> str:
    """A cross-encoder of the micro model's shape, whose scores mean nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(micro, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(micro).save_pretrained(folder)
    return str(folder)


def test_there_are_six_short_programs_that_need_no_other_file() -> None:
    assert len(EXAMPLES) == 6
    for file in EXAMPLES:
        code = file.read_text()
        tree = ast.parse(code)
        assert len(code.splitlines()) <= 80, file
        assert "Prints" in ast.get_docstring(tree), file
        assert f"python examples/{file.name}" in ast.get_docstring(tree), file
        assert re.search(r"pip install (lion-st\n|'lion-st\[\w+\]'\n)", ast.get_docstring(tree)), file
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree)), file
        private = re.findall(r"lion_st\.\w+\.\w+ import|import _|from \.|import examples", code)
        assert not private, (file, private)


def test_train_on_own_pairs(micro, tuples, tmp_path, capsys) -> None:
    settings = {"MAX_STEPS": 3, "BATCH_SIZE": 4, "LEARNING_RATE": 1e-3}
    names = example("train_on_own_pairs", BACKBONE=micro, PAIRS=tuples, OUTPUT=str(tmp_path), **settings)
    losses = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert names["trainer"].state.global_step == 3 and all(loss > 0 for loss in losses)
    assert (tmp_path / "model" / "modules.json").is_file()
    # Untrained, the micro model finds the passage about lions: a few steps must not break that.
    assert "best: " in (shown := capsys.readouterr().out) and "Lions prey on zebras" in shown


def test_distil_from_a_teacher(micro, teacher, tuples, tmp_path, capsys) -> None:
    settings = {"NEGATIVES": 2, "ROWS": 8, "MAX_STEPS": 2, "BATCH_SIZE": 4, "OUTPUT": str(tmp_path)}
    names = example("distil_from_a_teacher", BACKBONE=micro, TEACHER=teacher, TUPLES=tuples, **settings)
    logged = [entry for entry in names["trainer"].state.log_history if "train_loss" in entry]
    assert names["trainer"].state.global_step == 2 and logged[0]["train_loss"] > 0
    assert names["vector"].shape == (256,)
    assert "what do lions eat" in capsys.readouterr().out
    pairs = [(names["rows"][0]["query"], names["rows"][0][name]) for name in names["documents"]]
    assert names["scored"][0]["label"] == pytest.approx(names["teacher"].predict(pairs).tolist(), abs=1e-4)


def test_index_and_search_a_folder(retriever, test_set, tmp_path, capsys) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "animals.jsonl").write_bytes((Path(test_set) / "corpus.jsonl").read_bytes())
    settings = {"TEXTS": str(texts), "OUTPUT": str(tmp_path / "output")}
    for _ in range(2):  # the second time it goes on from what is there
        example("index_and_search_a_folder", MODEL=retriever, **settings)
        shown = capsys.readouterr().out
        assert "8 documents" in shown
        assert re.search(r"who hunts zebras\n  1\. +[\d.]+  lions  ze \d+%, bras \d+%", shown), shown
        assert re.search(r"where do rivers end\n(  \d\..*\n)*  \d\. +[\d.]+  rivers .*rivers \d+%", shown), shown


def test_hybrid_with_bm25(retriever, test_set, tmp_path, capsys) -> None:
    names = example("hybrid_with_bm25", MODEL=retriever, DEVELOPMENT=test_set, TEST=test_set, OUTPUT=str(tmp_path))
    assert [row["model"] for row in names["rows"]] == ["bm25", "lion", "reciprocal ranks", "convex"]
    assert sum(names["convex"].weights) == pytest.approx(1)
    assert names["rows"][3]["nDCG@10"] >= max(row["nDCG@10"] for row in names["rows"][:2])  # on what fitted it
    assert re.search(r"what do lions eat\n  [\d.]+  lions  Lions prey", capsys.readouterr().out)


def test_evaluate_on_beir(retriever, test_set, tmp_path, capsys) -> None:
    names = example("evaluate_on_beir", MODEL=retriever, DATA=[test_set], OUTPUT=str(tmp_path))
    assert [row["model"] for row in names["rows"]] == ["bm25", "lion-sp"]
    assert all(0.5 < row["nDCG@10"] <= 1 for row in names["rows"])
    assert re.search(r"animals: lion-sp - bm25 = [+-]\d\.\d{3}, p = [01]\.\d{3}\n", capsys.readouterr().out)


def test_publish_and_load(retriever, connected, capsys) -> None:
    example("publish_and_load", MODEL=retriever, REPOSITORY="org/lion-sp-mini")
    shown = capsys.readouterr().out
    assert f"{connected.url}/org/lion-sp-mini" in shown and "v1-sparse-encoder" in shown
    loaded = re.findall(r"^(?:SentenceTransformer|SparseEncoder|lion_st): (.*)$", shown, re.M)
    scores = [ast.literal_eval(row) for row in loaded]
    assert len(scores) == 3
    for (row,) in scores:
        assert row == pytest.approx(scores[0][0], rel=1e-3) and row[0] > row[1]
