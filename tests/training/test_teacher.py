"""What a teacher's scores become, and what is said of them before training."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import tiny_run, write_tuples

from lion_st.data import load_tuples
from lion_st.losses import ContrastiveDistillationLoss
from lion_st.training.options.arguments import retriever_arguments
from lion_st.training.options.command_line import parse_retriever_arguments
from lion_st.training.recipes import get_recipe
from lion_st.training.retriever import build_loss, build_model, build_trainer, load_training_tuples
from lion_st.training.teacher import TeacherArguments, describe_teacher, teacher_statistics

pytestmark = pytest.mark.usefixtures("datasets_cache")


def write_scored(path, scores):
    """A row for each list of scores, the positive's first."""
    rows = [
        {
            "query": f"q{row}",
            "pos": [f"p{row}"],
            "neg": [f"n{row} {place}" for place in range(len(of_row) - 1)],
            "pos_scores": [of_row[0]],
            "neg_scores": list(of_row[1:]),
        }
        for row, of_row in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("normalization", ["zscore", "minmax"])
def test_scores_are_normalized_over_the_whole_list_of_their_query(tmp_path, normalization):
    lists = np.random.default_rng(0).uniform(0, 9, (6, 12))
    path = write_scored(tmp_path / "a.jsonl", lists.tolist())
    rows = load_tuples(path, negatives=3, teacher_scores=True, teacher_normalization=normalization)
    low, high = lists.min(1, keepdims=True), lists.max(1, keepdims=True)
    zscore = (lists - lists.mean(1, keepdims=True)) / lists.std(1, keepdims=True)
    expected = zscore if normalization == "zscore" else (lists - low) / (high - low)
    for number, row in enumerate(rows):
        places = [0, *(1 + int(row[f"negative_{n}"].split()[1]) for n in (1, 2, 3))]
        assert row["label"] == pytest.approx(expected[number, places], abs=1e-6)


def test_equal_scores_have_no_scale_and_two_no_list(tmp_path):
    same = write_scored(tmp_path / "same.jsonl", [[2.0] * 4])
    for normalization in ("zscore", "minmax"):
        options = dict(negatives=3, teacher_scores=True, teacher_normalization=normalization)
        assert load_tuples(same, **options)[0]["label"] == [0.0] * 4
        pairs = write_scored(tmp_path / f"{normalization}.jsonl", [[2.0, 1.0]])
        with pytest.raises(ValueError, match=f"2 teacher scores, .*{normalization}.*Take 'none'"):
            load_tuples(pairs, **options | {"negatives": 1})
    with pytest.raises(ValueError, match="'max': choose one of none, zscore, minmax"):
        load_tuples(same, teacher_scores=True, teacher_normalization="max")


def test_statistics_are_those_of_the_softmax():
    labels = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = teacher_statistics(Dataset.from_dict({"label": labels.tolist()}), temperature=0.5)
    p = np.exp(2 * labels.numpy())
    p /= p.sum(1, keepdims=True)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(1).mean())
    assert found.positive == pytest.approx(p[:, 0].mean())
    assert found.margin == pytest.approx(2 * (labels[:, :1] - labels[:, 1:]).mean().item())


@pytest.mark.parametrize(
    ("scores", "temperature", "objective", "fault"),
    [
        ([1.0] + [0.0] * 16, 1.0, "cl_kd", "nearly flat"),  # what [0, 1] gives: .145 at most
        ([1.0] + [0.3] * 16, 0.2, "cl_kd", None),
        ([30.0] + [0.0] * 16, 1.0, "cl_kd", "nearly one-hot"),
        ([0.9, 0.2], 1.0, "kd", "margins that small"),
        ([0.9, 0.2], 0.05, "kd", None),
        ([900.0, 2.0], 1.0, "kd", "margins that large"),
    ],
)
def test_a_teacher_that_teaches_little_is_said_with_the_option_to_change(scores, temperature, objective, fault):
    found = teacher_statistics(Dataset.from_dict({"label": [scores] * 3}), temperature)
    _, said = describe_teacher(found, objective)
    assert said is None if fault is None else fault in said and "--teacher_temperature" in said


def test_the_flat_teacher_of_scores_between_0_and_1_is_mended_by_the_recipe():
    labels = np.random.default_rng(0).uniform(0, 0.95, (200, 17))
    labels[:, 0] = 1.0
    rows = Dataset.from_dict({"label": labels.tolist()})
    recipe = get_recipe("llama-3.2-1b", "sparse", "cl_kd")
    assert describe_teacher(teacher_statistics(rows), "cl_kd")[1] is not None
    found = teacher_statistics(rows, recipe.teacher_temperature)
    assert describe_teacher(found, "cl_kd")[1] is None and 0.3 < found.positive < 0.9


def test_a_run_prints_and_records_what_its_teacher_teaches(tiny_backbone, tmp_path, capsys, caplog):
    data = write_tuples(tmp_path / "a.jsonl")
    settings = dict(teacher_normalization="minmax", teacher_temperature=100.0)
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "out", "dense", "cl_kd", **settings)
    build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    assert f"Teacher of {data} over 24 rows: its softmax over 3 documents" in capsys.readouterr().out
    assert "nearly flat" in caplog.text and "--teacher_normalization" in caplog.text
    assert {name: arguments.settings()[name] for name in settings} == settings


@pytest.mark.parametrize("paradigm", ["dense", "sparse"])
def test_margins_are_divided_by_the_temperature(tiny_backbone, tmp_path, paradigm):
    """MarginMSE at temperature T is stock MarginMSE of scores that were divided by T."""
    data, values = write_tuples(tmp_path / "a.jsonl"), []
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(2, 8, generator=generator) for _ in range(4)]
    labels = torch.tensor([[5.0, 1.0, 0.5], [4.0, 2.0, 1.5]])
    for temperature in (1.0, 0.25):
        arguments, _ = tiny_run(tiny_backbone(), data, tmp_path, paradigm, "kd", teacher_temperature=temperature)
        loss = build_loss(torch.nn.Identity(), arguments)
        loss = loss.loss if paradigm == "sparse" else loss
        assert isinstance(loss, ContrastiveDistillationLoss) == (temperature != 1.0)
        value = loss.compute_loss_from_embeddings(embeddings, labels * temperature)
        values.append(sum(value.values()).item() if isinstance(value, dict) else value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_what_a_recipe_does_with_its_teacher_is_not_done_with_other_data():
    recipe = get_recipe("llama-3.2-1b", "sparse", "cl_kd")
    assert (recipe.teacher_normalization, recipe.teacher_temperature) == ("minmax", 0.05)
    for data, expected in ((recipe.train_data, ("minmax", 0.05)), ("own.jsonl", ("none", 1.0))):
        options = ["--backbone", "llama-3.2-1b", "--objective", "cl_kd", "--train_data", data]
        parsed, _ = parse_retriever_arguments(options)
        made, _ = retriever_arguments(recipe, train_data=data)
        for arguments in (parsed, made):
            assert (arguments.teacher_normalization, arguments.teacher_temperature) == expected
    made, _ = retriever_arguments(recipe, train_data="own.jsonl", teacher_temperature=2.0)
    assert (made.teacher_normalization, made.teacher_temperature) == ("none", 2.0)


def test_the_entropy_of_a_uniform_teacher_is_its_greatest():
    found = teacher_statistics(Dataset.from_dict({"label": [[0.0] * 17]}))
    assert found.entropy == pytest.approx(math.log(17)) and found.relative_entropy == pytest.approx(1)


def test_teachers_that_are_weighed_by_agreement_are_still_combined_unless_asked_for_apart():
    names = ["a", "b:3"]
    assert TeacherArguments(names).teacher_terms() is None
    for combine, separate in (("zscore", False), ("separate", True)):
        terms = TeacherArguments(names, combine=combine, weight_by_agreement=True).teacher_terms()
        assert (terms.weights, terms.separate, terms.by_agreement) == ([0.25, 0.75], separate, True)
