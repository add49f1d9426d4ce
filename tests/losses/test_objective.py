"""The terms are the paper's formulas, and wrong input is refused with its value and a remedy."""

import math
from typing import get_args

import pytest
import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sparse_encoder.losses import FlopsLoss, SpladeLoss

from lion_st.losses import (
    CachedContrastiveDistillationLoss,
    ContrastiveDistillationLoss,
    FlopsRegularizer,
    dot_scores,
    pairwise_dot_scores,
    scoring,
)
from lion_st.losses.distillation import Distillation, faulty_grades, ranknet
from lion_st.losses.teachers import TeacherTerms

BATCH, NEGATIVES, WIDTH = 3, 2, 5


@pytest.fixture
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2 + NEGATIVES)]


@pytest.fixture
def labels():
    return torch.tensor([[4.0, 1.0, 2.0], [0.5, 3.0, -1.0], [2.0, 2.0, 0.0]])


def terms(embeddings, labels=None, **settings):
    return ContrastiveDistillationLoss(None, **settings).compute_loss_from_embeddings(embeddings, labels)


def scores_by_hand(embeddings, scale=1.0):
    """s(q_i, d_jk) as nested lists: query, query of the candidate, column of the candidate."""
    queries, *columns = [column.tolist() for column in embeddings]
    dot = lambda a, b: scale * sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    return [[[dot(query, column[j]) for column in columns] for j in range(len(queries))] for query in queries]


def max_sim_by_hand(queries, documents):
    """Queries and documents as lists of token vectors: the sum over query tokens of the best inner product."""
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    return [[sum(max(dot(q, d) for d in document) for q in query) for document in documents] for query in queries]


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def test_contrastive_term(embeddings, labels):
    scores = scores_by_hand(embeddings, scale=0.7)
    expected = 0.0
    for i, candidates in enumerate(scores):
        everything = [score for own in candidates for score in own]
        expected -= math.log(math.exp(candidates[i][0]) / sum(map(math.exp, everything))) / BATCH
    actual = terms(embeddings, labels, scale=0.7, contrastive_weight=0.25)
    assert actual["contrastive_loss"].item() == pytest.approx(0.25 * expected, rel=1e-12)


def test_kl_term(embeddings, labels):
    scores = scores_by_hand(embeddings, scale=0.7)
    expected = 0.0
    for i, row in enumerate(labels.tolist()):
        student, teacher = softmax(scores[i][i]), softmax([score / 3.0 for score in row])
        expected += sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True)) / BATCH
    actual = terms(embeddings, labels, scale=0.7, teacher_temperature=3.0, distillation_weight=2.0)
    assert actual["distillation_loss"].item() == pytest.approx(2.0 * expected, rel=1e-12)


def test_margin_mse_term(embeddings, labels):
    scores = scores_by_hand(embeddings, scale=0.7)
    errors = [
        ((scores[i][i][0] - scores[i][i][j]) - (row[0] - row[j])) ** 2
        for i, row in enumerate(labels.tolist())
        for j in range(1, 1 + NEGATIVES)
    ]
    actual = terms(embeddings, labels, scale=0.7, distillation="margin_mse", distillation_weight=1.0)
    assert actual["distillation_loss"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_margin_mse_and_kl_together(embeddings, labels):
    settings = dict(scale=0.7, teacher_temperature=2.0, contrastive_weight=0.0, distillation_weight=1.0)
    parts = [terms(embeddings, labels, distillation=name, **settings) for name in ("kl_div", "margin_mse")]
    both = terms(embeddings, labels, distillation="margin_mse_kl", margin_mse_weight=0.2, **settings)
    expected = parts[0]["distillation_loss"] + 0.2 * parts[1]["distillation_loss"]
    torch.testing.assert_close(both, {"distillation_loss": expected})


def test_listwise_term(embeddings):
    grades = torch.tensor([[3.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    scores, expected = scores_by_hand(embeddings, scale=0.7), 0.0
    for i, row in enumerate(grades.tolist()):
        shares = softmax(scores[i][i])
        expected -= sum(y / sum(row) * math.log(share) for y, share in zip(row, shares, strict=True)) / BATCH
    settings = dict(scale=0.7, distillation="listwise", contrastive_weight=0.0, distillation_weight=1.0)
    assert terms(embeddings, grades, **settings)["distillation_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert terms(embeddings, 10 * grades, **settings)["distillation_loss"].item() == pytest.approx(expected, rel=1e-12)


def test_ranknet_term(embeddings):
    teacher = torch.tensor([[4.0, 1.0, 2.0], [0.5, 3.0, 3.0], [1.0, 1.0, 1.0]])  # some tied, all tied
    scores, expected = scores_by_hand(embeddings, scale=0.7), 0.0
    for i, row in enumerate(teacher.tolist()):
        own, pairs = scores[i][i], [(j, k) for j in range(3) for k in range(3) if row[j] > row[k]]
        losses = [math.log(1 + math.exp(own[k] - own[j])) for j, k in pairs]
        expected += sum(losses) / max(1, len(losses)) / BATCH
    settings = dict(scale=0.7, distillation="ranknet", contrastive_weight=0.0, distillation_weight=1.0)
    assert terms(embeddings, teacher, **settings)["distillation_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert terms(embeddings, teacher**3, **settings)["distillation_loss"].item() == pytest.approx(expected, rel=1e-12)
    assert ranknet(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.log(2))  # a single pair


@pytest.mark.parametrize("distillation", get_args(Distillation))
def test_gradients_are_those_of_finite_differences(embeddings, distillation):
    labels = torch.tensor([[3.0, 0.5, 1.0], [0.0, 2.0, 0.7], [1.0, 0.2, 0.1]], dtype=torch.float64)

    def total(*columns):
        loss = terms(list(columns), labels, distillation=distillation, contrastive_weight=0.3, distillation_weight=0.7)
        return loss["contrastive_loss"] + loss["distillation_loss"]

    assert torch.autograd.gradcheck(total, [column.requires_grad_() for column in embeddings])


@pytest.mark.parametrize(
    ("row", "message"), [([0.0, 0.0, 0.0], "row 1 has no grade above 0"), ([1.0, -2.0, 0.0], "row 1 has a grade of -2")]
)
def test_labels_that_are_not_grades(embeddings, row, message):
    grades = torch.tensor([[1.0, 0.0, 0.0], row, [1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=f"{message}.*minmax"):
        terms(embeddings, grades, distillation="listwise")


def test_the_grades_of_each_teacher_are_looked_at():
    sound = [[1.0, 0.0], [0.0, 2.0]]
    assert faulty_grades(torch.tensor([sound, sound])) is None
    assert faulty_grades(torch.tensor([sound, [[1.0, 0.0], [3.0, -1.0]]])) == (1, "a grade of -1")
    assert faulty_grades(torch.tensor([sound, [[1.0, 0.0], [0.0, 0.0]]])) == (1, "no grade above 0")


def test_a_term_without_weight_is_left_out(embeddings, labels):
    assert list(terms(embeddings, distillation_weight=0.0)) == ["contrastive_loss"]
    assert list(terms(embeddings, labels, contrastive_weight=0.0)) == ["distillation_loss"]


def test_a_perfect_student_has_no_kl_divergence():
    queries, documents = torch.eye(2), [torch.tensor([[3.0, 9.0], [9.0, 1.0]]), torch.tensor([[1.0, 9.0], [9.0, 2.0]])]
    loss = terms([queries, *documents], torch.tensor([[3.0, 1.0], [1.0, 2.0]]))
    assert loss["distillation_loss"].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("columns", [1, 2])
def test_flops(columns):
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 0.0], [0.0, 6.0]])
    by_hand = {1: 1.0**2 + 2.0**2, 2: ((2.0**2 + 1.0**2) + 3.0**2) / 2}
    assert FlopsRegularizer(None, columns=columns).compute_loss_from_embeddings(rows).item() == by_hand[columns]


@pytest.mark.parametrize("threshold", [None, 1])
def test_flops_of_one_process_is_stock(embeddings, threshold):
    rows = torch.cat(embeddings).relu().requires_grad_()
    ours = FlopsRegularizer(None, threshold=threshold).compute_loss_from_embeddings(rows)
    stock = FlopsLoss(None, threshold=threshold).compute_loss_from_embeddings(rows)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(torch.autograd.grad(ours, rows), torch.autograd.grad(stock, rows))


def test_flops_is_summed_in_float32():
    # In bfloat16 a sum of 1 stops growing at 256.
    rows = torch.ones(1024, 3, dtype=torch.bfloat16, requires_grad=True)
    flops = FlopsRegularizer(None).compute_loss_from_embeddings(rows)
    assert flops.dtype == torch.float32
    assert flops.item() == 3.0


@pytest.mark.parametrize("block", [2**24, 7])
def test_scores_and_their_gradients(monkeypatch, embeddings, block):
    monkeypatch.setattr(scoring, "_BLOCK", block)
    queries, *columns = [column.requires_grad_() for column in embeddings]
    torch.testing.assert_close(dot_scores(queries, columns[0], scale=2.0), 2.0 * queries @ columns[0].T)
    torch.testing.assert_close(scoring.scores_of_columns(queries[:2], columns), queries[:2] @ torch.cat(columns).T)
    score = lambda queries, *columns: scoring.scores_of_columns(queries, columns)  # noqa: E731
    assert torch.autograd.gradcheck(score, (queries, *columns))
    assert torch.autograd.gradcheck(pairwise_dot_scores, (queries, columns[1]))


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_of_bfloat16_rows_are_float32(autocast):
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.rand(4, 1000, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores, pairs = dot_scores(queries, documents), pairwise_dot_scores(queries, documents)
        rounded = queries @ documents.T
        (scores.diagonal() / 3).sum().backward()
    exact = queries.detach().double() @ documents.detach().double().T
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(pairs.double(), exact.diagonal(), rtol=1e-6, atol=0)
    assert (rounded - exact).abs().max() > 0.1
    assert torch.equal(queries.grad, (documents.detach().float() / 3).bfloat16())
    assert torch.equal(documents.grad, (queries.detach().float() / 3).bfloat16())


def test_scores_keep_no_copy_of_the_embeddings_for_the_backward():
    queries, documents = (torch.rand(4, 1000).bfloat16().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dot_scores(queries, documents)
    addresses = {queries.data_ptr(), documents.data_ptr()}
    assert all(tensor.data_ptr() in addresses or tensor.numel() <= 16 for tensor in kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(contrastive_weight=-0.5), "contrastive_weight must be .* at least 0, got -0.5"),
        (dict(distillation_weight=math.nan), "distillation_weight must be .* got nan"),
        (dict(contrastive_weight=0.0, distillation_weight=0.0), "both 0"),
        (dict(scale=0.0), "scale must be .* above 0, got 0.0"),
        (dict(teacher_temperature=math.inf), "teacher_temperature must be .* got inf"),
        (dict(distillation="ranknet", teacher_temperature=2.0), "teacher_temperature=2.0 changes nothing of .*ranknet"),
        (dict(margin_mse_weight=-1.0), "margin_mse_weight must be .* got -1.0"),
        (dict(distillation="mse"), r"distillation must be one of .*kl_div.*, got 'mse'"),
        (dict(gather_across_devices=False, released_scaling=True), "needs gather_across_devices=True"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveDistillationLoss(None, **settings)


@pytest.mark.parametrize("settings", [dict(mini_batch_size=0), dict(mini_batch_num_tokens=0)])
def test_mini_batches_of_nothing(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least 1, got 0"):
        CachedContrastiveDistillationLoss(None, **settings)


def test_flops_settings_out_of_range():
    with pytest.raises(ValueError, match="needs gather_across_devices=True"):
        FlopsRegularizer(None, gather_across_devices=False, released_scaling=True)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        FlopsRegularizer(None, columns=0)
    with pytest.raises(ValueError, match="4 rows do not divide into columns=3"):
        FlopsRegularizer(None, columns=3).compute_loss_from_embeddings(torch.ones(4, 2))


def test_labels_that_are_missing(embeddings):
    with pytest.raises(ValueError, match=r'"label" with 3 scores a row .*distillation_weight=0'):
        terms(embeddings)


@pytest.mark.parametrize("width", [2, 4])
def test_labels_of_the_wrong_width(embeddings, width):
    with pytest.raises(ValueError, match=rf"\[B, 1 \+ n\] = \[3, 3\].* got \[3, {width}\]"):
        terms(embeddings, torch.zeros(BATCH, width))


def test_margins_in_place_of_scores(embeddings):
    with pytest.raises(ValueError, match=r"got \[3\]"):
        terms(embeddings, torch.zeros(BATCH), distillation="margin_mse")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_teacher_scores_that_are_not_finite(embeddings, labels, value):
    loss = ContrastiveDistillationLoss(None)
    loss.compute_loss_from_embeddings(embeddings, labels)  # a later batch is looked at too
    labels[1, 2] = value
    with pytest.raises(ValueError, match=rf"row 1, document 2 is {value}.* drop the row"):
        loss.compute_loss_from_embeddings(embeddings, labels)
    assert terms(embeddings, labels, distillation_weight=0.0)["contrastive_loss"].isfinite()


def test_too_few_columns(embeddings, labels):
    with pytest.raises(ValueError, match=r"at least 3 text columns \(query, positive, negative_1, ...\), got 2"):
        terms(embeddings[:2], labels[:, :1])
    with pytest.raises(ValueError, match=r"at least 2 text columns \(query, positive\), got 1"):
        terms(embeddings[:1], distillation_weight=0.0)
    assert terms(embeddings[:2], distillation_weight=0.0)["contrastive_loss"].isfinite()


def test_ragged_columns(embeddings, labels):
    embeddings[2] = embeddings[2][:2]
    with pytest.raises(ValueError, match=r"one shape for all columns.*\(2, 5\).*same number of negatives"):
        terms(embeddings, labels)


def test_model_card_settings():
    loss = CachedContrastiveDistillationLoss(None, scale=100.0, mini_batch_size=8)
    assert loss.get_config_dict() == {
        "contrastive_weight": 0.5,
        "distillation_weight": 0.5,
        "distillation": "kl_div",
        "scale": 100.0,
        "teacher_temperature": 1.0,
        "gather_across_devices": True,
        "released_scaling": False,
        "mini_batch_size": 8,
        "mini_batch_num_tokens": None,
    }
    assert "2502.15526" in loss.citation and "2101.06983" in loss.citation
    several = ContrastiveDistillationLoss(None, distillation="margin_mse_kl", teachers=TeacherTerms([1.0, 3.0]))
    assert several.get_config_dict()["margin_mse_weight"] == 0.05
    assert several.get_config_dict()["teachers"]["weights"] == [0.25, 0.75]
    splade = SpladeLoss(None, ContrastiveDistillationLoss(None), 0.04, 0.05, FlopsRegularizer(None, threshold=100))
    assert splade.get_config_dict()["document_regularizer_threshold"] == 100


def test_the_joint_objective_of_token_vectors_is_that_of_their_maxsim():
    """Against the definition token by token, with texts of different lengths and products that are all negative."""
    generator = torch.Generator().manual_seed(0)
    columns, ragged = [], []
    for longest in (3, 4, 2, 5):
        lengths = [1 + (row + longest) % longest for row in range(BATCH)]
        texts = [-torch.rand(length, WIDTH, generator=generator, dtype=torch.float64) - 0.1 for length in lengths]
        columns.append(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side="left"))
        ragged.append([text.tolist() for text in texts])
    columns[0] = -columns[0]
    queries = [[[-x for x in token] for token in query] for query in ragged[0]]
    labels = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    scores = [max_sim_by_hand(queries, documents) for documents in ragged[1:]]  # column, query, document
    assert all(score < 0 for column in scores for row in column for score in row)
    contrastive = distillation = 0.0
    for i in range(BATCH):
        everything = [0.5 * score for column in scores for score in column[i]]
        own = [0.5 * column[i][i] for column in scores]
        contrastive -= math.log(math.exp(own[0]) / sum(map(math.exp, everything))) / BATCH
        teacher = softmax(labels[i].tolist())
        pairs = zip(teacher, softmax(own), strict=True)
        distillation += sum(t * math.log(t / s) for t, s in pairs) / BATCH
    actual = terms(columns, labels, scale=0.5)
    assert actual["contrastive_loss"].item() == pytest.approx(0.5 * contrastive, rel=1e-5)
    assert actual["distillation_loss"].item() == pytest.approx(0.5 * distillation, rel=1e-4)


def test_token_vectors_of_other_widths_or_batches_are_refused():
    tokens = [torch.rand(3, 2, 4), torch.rand(3, 5, 4)]
    assert torch.isfinite(terms(tokens, distillation_weight=0.0)["contrastive_loss"])
    for wrong in (torch.rand(3, 5, 6), torch.rand(2, 5, 4), torch.rand(3, 4)):
        with pytest.raises(ValueError, match=r"needs embeddings \[B, D\] or \[B, L, D\] of one shape for all columns"):
            terms([tokens[0], wrong], distillation_weight=0.0)


def test_a_multi_vector_encoder_of_stock_modules_is_refused(tiny_backbone):
    modules = [Transformer(tiny_backbone()), MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    model = MultiVectorEncoder(modules=modules, device="cpu")
    for kind in (ContrastiveDistillationLoss, CachedContrastiveDistillationLoss):
        with pytest.raises(TypeError, match=r"MultiVectorEncoder of stock modules .* read it with lion_st.load"):
            kind(model)
