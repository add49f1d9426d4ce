"""Several teachers in the loss and in a run: their terms by definition, agreement, and what is refused."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import log_softmax, softmax
from tiny_runs import tiny_run, write_tuples

from lion_st.errors import UsageError
from lion_st.losses import ContrastiveDistillationLoss, TeacherTerms
from lion_st.losses.distillation import kl_divergence
from lion_st.losses.teachers import agreement
from lion_st.training.options.command_line import parse_retriever_arguments
from lion_st.training.retriever import build_loss, build_model, build_trainer, load_training_tuples, train_retriever

B, T, N = 5, 3, 4
WEIGHTS = [1.0, 0.5, 2.5]

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def batch():
    """Embeddings of queries and of 1 + N columns of documents, and scores of T teachers."""
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(B, 8, generator=generator, dtype=torch.float64) for _ in range(2 + N)]
    return embeddings, 2 * torch.randn(B, T, 1 + N, generator=generator, dtype=torch.float64)


def term(student, teacher, distillation):
    """Of each row, by definition."""
    if distillation == "kl_div":
        p = softmax(teacher, 1)
        return (p * (np.log(p) - log_softmax(student, 1))).sum(1)
    margins = [scores[:, :1] - scores[:, 1:] for scores in (student, teacher)]
    return ((margins[0] - margins[1]) ** 2).mean(1)


@pytest.mark.parametrize("distillation", ["kl_div", "margin_mse"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("by_agreement", [True, False])
def test_the_terms_of_several_teachers_are_those_of_their_definition(batch, distillation, separate, by_agreement):
    embeddings, labels = batch
    loss = ContrastiveDistillationLoss(
        torch.nn.Identity(),
        contrastive_weight=0.0,
        distillation_weight=1.0,
        distillation=distillation,
        teacher_temperature=0.5,
        teachers=TeacherTerms(WEIGHTS, separate, by_agreement),
    )
    found = loss.compute_loss_from_embeddings(embeddings, labels)["distillation_loss"].item()
    queries, *documents = (one.numpy() for one in embeddings)
    student = np.stack([(queries * one).sum(1) for one in documents], 1)
    teachers, weights = labels.numpy() / 0.5, np.array(WEIGHTS) / sum(WEIGHTS)
    if separate:
        rows = sum(weight * term(student, teachers[:, t], distillation) for t, weight in enumerate(weights))
    else:
        rows = term(student, np.tensordot(weights, teachers, (0, 1)), distillation)
    if by_agreement:
        p = softmax(teachers, 2)
        together = np.tensordot(weights, p, (0, 1))
        entropy = [-(q * np.log(q)).sum(-1) for q in (together, p)]
        divergence = entropy[0] - entropy[1] @ weights
        rows = rows * (1 - divergence / -(weights * np.log(weights)).sum())
    assert found == pytest.approx(rows.mean(), rel=1e-5)


def test_agreement_is_1_for_the_same_softmax_and_0_for_nothing_in_common():
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    scores = torch.tensor([[[3.0, 1.0, 0.0], [5.0, 3.0, 2.0]], [[90.0, 0.0, 0.0], [0.0, 90.0, 0.0]]]).double()
    assert agreement(scores, half).tolist() == pytest.approx([1, 0], abs=1e-6)
    drawn = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p, q = softmax(drawn.numpy()[0], 1)
    assert agreement(drawn, half).item() == pytest.approx(1 - jensenshannon(p, q, base=2) ** 2)


@pytest.mark.parametrize("separate", [True, False])
def test_gradients_are_those_of_the_value_and_teachers_that_are_the_same_count_as_one(batch, separate):
    embeddings, labels = batch
    same = labels[:, :1].expand(-1, T, -1)
    several = ContrastiveDistillationLoss(torch.nn.Identity(), teachers=TeacherTerms(WEIGHTS, separate, True))
    alone = ContrastiveDistillationLoss(torch.nn.Identity())
    values = [
        sum(loss.compute_loss_from_embeddings(embeddings, of).values())
        for loss, of in ((several, same), (alone, labels[:, 0]))
    ]
    torch.testing.assert_close(*values)
    terms = TeacherTerms(WEIGHTS, separate, True)
    student = torch.randn(B, 1 + N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: terms(kl_divergence, one, labels), student)


def test_labels_of_another_shape_and_weights_that_are_none_are_refused(batch):
    embeddings, labels = batch
    loss = ContrastiveDistillationLoss(torch.nn.Identity(), teachers=TeacherTerms(WEIGHTS))
    with pytest.raises(ValueError, match=r"\[B, teachers, 1 \+ n\] = \[5, 3, 5\].* got \[5, 5\]"):
        loss.compute_loss_from_embeddings(embeddings, labels[:, 0])
    labels[3, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="teacher score of row 3, document 2 is nan"):
        loss.compute_loss_from_embeddings(embeddings, labels)
    for weights in ([1.0], [1.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="as many positive weights"):
            TeacherTerms(weights)


def named(path):
    """The tuples of `write_tuples` with two named teachers, the second of which has no scale of its own."""
    rows = [json.loads(line) for line in write_tuples(path).read_text().splitlines()]
    for number, row in enumerate(rows):
        first = [*row.pop("pos_scores"), *row.pop("neg_scores")]
        row["scores"] = {"ce": first, "bm25": [50 + 10 * ((number + place) % 3) for place in range(len(first))]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("paradigm", "objective", "settings"),
    [
        ("dense", "cl_kd", {"combine": "separate", "weight_by_agreement": True, "mini_batch_size": 2}),
        ("sparse", "kd", {"combine": "separate"}),
        ("dense", "cl_kd", {"combine": "random", "teacher_normalization": "zscore"}),
    ],
)
def test_a_run_learns_from_several_teachers(tiny_backbone, tmp_path, capsys, paradigm, objective, settings):
    data = named(tmp_path / "a.jsonl")
    arguments, training = tiny_run(
        tiny_backbone(), data, tmp_path / "out", paradigm, objective, teachers=["ce", "bm25:0.5"], **settings
    )
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert "24 rows" in capsys.readouterr().out
    recorded = arguments.settings()
    assert recorded["teachers"] == ["ce", "bm25:0.5"] and recorded["combine"] == settings["combine"]


def test_cached_gradients_are_those_without_caching(tiny_backbone, tmp_path):
    data, gradients = named(tmp_path / "a.jsonl"), []
    for size in (None, 2):
        torch.manual_seed(0)
        arguments, _ = tiny_run(
            tiny_backbone(), data, tmp_path, "dense", "cl_kd", teachers=["ce", "bm25"], combine="separate",
            weight_by_agreement=True, mini_batch_size=size,
        )  # fmt: skip
        model = build_model(arguments, "cpu").eval()
        loss, rows = build_loss(model, arguments), load_training_tuples(arguments, 0)[:4]
        features = [model.preprocess(rows[name]) for name in ("query", "positive", "negative_1", "negative_2")]
        terms = loss(features, torch.tensor(rows["label"]))
        sum(terms.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teachers", "a:0"], "NAME or NAME:WEIGHT, with a weight above 0, got 'a:0'"),
        (["--teachers", "a:much"], "got 'a:much'"),
        (["--teachers", "a", "a:2"], "names 'a' twice"),
        (["--teachers", "a", "b", "--combine", "best"], "--combine"),
        (["--teachers", "a", "--combine", "minmax"], "--combine is read with several --teachers alone"),
        (["--weight_by_agreement", "true"], "--weight_by_agreement is read with several --teachers alone"),
        (["--teachers", "a", "b", "--combine", "random", "--weight_by_agreement", "true"], "takes one of them"),
        (
            ["--teachers", "a", "b", "--weight_by_agreement", "true", "--teacher_normalization", "minmax"],
            "--teacher_normalization minmax has no place",
        ),
        (["--objective", "cl", "--teachers", "a"], r"--teachers is read with a teacher's scores \(another"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        parse_retriever_arguments(["--backbone", "micro", "--train_data", "own.jsonl", *options])


def test_data_with_several_teachers_are_not_trained_on_without_a_choice(tiny_backbone, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), named(tmp_path / "a.jsonl"), tmp_path / "out", "dense")
    with pytest.raises(ValueError, match="scores of the teachers ce, bm25: name those"):
        train_retriever(arguments, training)
    assert arguments.settings()["teachers"] is None and "combine" not in arguments.settings()
