"""Regularizers are their formulas, the same at any number of processes, and the target one reaches its number."""

import math

import pytest
import torch
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from tiny_training import TinyEncoder, columns_and_labels

from lion_st.losses import (
    ContrastiveDistillationLoss,
    DfFlopsRegularizer,
    FlopsRegularizer,
    IdfFlopsRegularizer,
    L1Regularizer,
    TargetRegularizer,
    term_idf,
)

ROWS = [[1.0, 0.0, 0.5, 0.0], [3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [2.0, 6.0, 0.0, 0.0]]


def rows(dtype=torch.float64):
    return torch.tensor(ROWS, dtype=dtype, requires_grad=True)


def test_l1():
    value = L1Regularizer(None).compute_loss_from_embeddings(rows())
    assert value.item() == pytest.approx(sum(map(sum, ROWS)) / 4)


@pytest.mark.parametrize("columns", [1, 2])
def test_df_flops(columns):
    alpha, beta = 0.3, 2.0
    expected = 0.0
    for term in range(4):
        share = sum(row[term] != 0 for row in ROWS) / 4
        # ln 2 / ln alpha is the exponent at which alpha becomes 2
        weight = 0.0 if not share else 1 / (1 + (share ** (math.log(2) / math.log(alpha)) - 1) ** beta)
        for block in (ROWS,) if columns == 1 else (ROWS[:2], ROWS[2:]):
            expected += (weight * sum(row[term] for row in block) / len(block)) ** 2 / columns
    regularizer = DfFlopsRegularizer(None, alpha, beta, columns=columns)
    assert regularizer.compute_loss_from_embeddings(rows()).item() == pytest.approx(expected)
    if columns == 1:  # the weights have no gradient
        weights, matrix = regularizer.term_weights(rows()), rows()
        (gradient,) = torch.autograd.grad(regularizer.compute_loss_from_embeddings(matrix), matrix)
        torch.testing.assert_close(gradient, (2 * weights**2 * rows().mean(0) / 4).expand(4, 4))
    flops = FlopsRegularizer(None, columns=columns).compute_loss_from_embeddings(rows())
    assert regularizer.last.item() == pytest.approx(flops.item())  # what is logged


def test_a_term_has_half_the_weight_at_alpha_none_in_no_document_and_all_in_all():
    shares = torch.zeros(10, 3)
    shares[:3, 1] = 1.0
    shares[:, 2] = 1.0
    weights = DfFlopsRegularizer(None, alpha=0.3, beta=10.0).term_weights(shares)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))


def test_idf_flops():
    idf = term_idf([[0, 0, 1], [0, 2], [0]], documents=3, terms=4)
    by_hand = [1 + math.log(4 / (count + 1)) for count in (3, 1, 1, 0)]
    assert idf.tolist() == pytest.approx(by_hand)
    regularizer = IdfFlopsRegularizer(None, idf)
    means = [sum(row[term] for row in ROWS) / 4 for term in range(4)]
    expected = sum((max(by_hand) / by_hand[term] * means[term]) ** 2 for term in range(4))
    assert regularizer.compute_loss_from_embeddings(rows()).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="needs idf for 4 terms, it has none"):
        IdfFlopsRegularizer(None).compute_loss_from_embeddings(rows())
    with pytest.raises(ValueError, match=r"positive, the smallest is 0\.0"):
        IdfFlopsRegularizer(None, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    "regularizer",
    [
        L1Regularizer(None),
        FlopsRegularizer(None, columns=2),
        DfFlopsRegularizer(None, alpha=0.4),
        IdfFlopsRegularizer(None, torch.tensor([1.0, 1.5, 2.0, 4.0])),
    ],
    ids=lambda one: type(one).__name__,
)
def test_gradients_are_those_of_finite_differences(regularizer):
    drawn = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    kept = torch.tensor(ROWS) > 0  # the shares of documents do not change
    assert torch.autograd.gradcheck(
        lambda weights: regularizer.compute_loss_from_embeddings(weights * kept), drawn.requires_grad_()
    )


def test_a_target_stays_finite_where_all_vectors_are_empty():
    regularizer = TargetRegularizer(None, 5.0, multiplier=1e4)
    empty = torch.zeros(4, 10, requires_grad=True)
    value = regularizer.compute_loss_from_embeddings(empty.relu())
    (gradient,) = torch.autograd.grad(value, empty)
    assert value == 0 and torch.equal(gradient, torch.zeros(4, 10))


@pytest.mark.parametrize("gather", [False, True])
def test_what_a_target_follows_is_of_all_ranks(monkeypatch, gather):
    monkeypatch.setattr("lion_st.losses.regularizers.mean_across_ranks", lambda value: value + 2)
    regularizer = TargetRegularizer(None, 5.0, gather_across_devices=gather)
    regularizer.compute_loss_from_embeddings(rows())
    assert regularizer.get_state()["start"] == pytest.approx(6 / 4 + 2)


def test_target():
    flops = FlopsRegularizer(None).compute_loss_from_embeddings(rows()).item()
    active, target = 6 / 4, 1.0
    regularizer = TargetRegularizer(None, target, steps=4, rate=0.1, gain=2.0, multiplier=0.5)
    multiplier = 0.5
    for batch in range(6):
        progress = min(1, (batch + 1) / 4)
        error = math.log(active / (active ** (1 - progress) * target**progress))
        matrix = rows()
        value = regularizer.compute_loss_from_embeddings(matrix)
        assert value.item() == pytest.approx(multiplier * math.exp(2.0 * error))
        (gradient,) = torch.autograd.grad(value, matrix)
        expected = 2 * multiplier * math.exp(2.0 * error) / flops * rows().mean(0) / 4
        torch.testing.assert_close(gradient, expected.expand(4, 4).detach())
        multiplier *= math.exp(0.1 * error)
        assert regularizer.multiplier.item() == pytest.approx(multiplier)
    before = regularizer.get_state()
    regularizer.compute_loss_from_embeddings(rows().detach())  # an evaluation changes nothing
    assert regularizer.get_state() == before
    again = TargetRegularizer(None, target, steps=4, rate=0.1, gain=2.0)
    again.set_state(before)
    assert again.compute_loss_from_embeddings(rows()) == regularizer.compute_loss_from_embeddings(rows())
    assert again.get_state() == regularizer.get_state()
    many = TargetRegularizer(None, target=0.01, steps=1, multiplier=0.5)
    assert many.compute_loss_from_embeddings(rows()).item() == pytest.approx(0.5 * math.exp(3))
    assert many.multiplier.item() == pytest.approx(0.5 * math.exp(many.rate))
    few = TargetRegularizer(None, target=1e6, steps=1, multiplier=0.5, bounds=(0.4, 0.6))
    assert few.compute_loss_from_embeddings(rows()).item() == pytest.approx(0.5 * math.exp(-3))
    assert few.multiplier.item() == 0.4
    few.compute_loss_from_embeddings(torch.ones(4, 4, requires_grad=True))
    assert few.get_state()["mean"] == pytest.approx(0.9 * active + 0.1 * 4)
    few = TargetRegularizer(None, target=1e6, steps=1, multiplier=0.5)
    few.compute_loss_from_embeddings(rows())
    assert few.multiplier.item() == pytest.approx(0.5 * math.exp(-few.rate))
    empty = TargetRegularizer(None, target=5.0)
    assert empty.compute_loss_from_embeddings(torch.zeros(3, 4, requires_grad=True)).item() == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DfFlopsRegularizer(None, alpha=1.0), "alpha is a share of documents .* got 1.0"),
        (lambda: DfFlopsRegularizer(None, beta=0.0), "beta must be .* got 0.0"),
        (lambda: TargetRegularizer(None, target=0.0), "target must be .* got 0.0"),
        (lambda: TargetRegularizer(None, target=9.0, steps=0), "steps must be .* got 0"),
        (lambda: TargetRegularizer(None, target=9.0, multiplier=1e5), "bounds must .* 100000.0"),
        (lambda: TargetRegularizer(None, target=9.0, bounds=(0.0, 1.0)), r"bounds must .* got \(0.0, 1.0\)"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("weight", [0.1, 1.0])
@pytest.mark.parametrize("target", [4.0, 7.0])
def test_the_target_is_reached_and_held(target, weight):
    encoder = TinyEncoder()
    loss = SpladeLoss(
        encoder,
        ContrastiveDistillationLoss(encoder, scale=5.0),
        document_regularizer_weight=weight,
        document_regularizer=TargetRegularizer(encoder, target, steps=60),
        use_document_regularizer_only=True,
    )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-3)
    columns, labels = columns_and_labels(slice(None))
    active = []
    for _ in range(150):
        optimizer.zero_grad()
        torch.stack(list(loss(columns, labels).values())).sum().backward()
        optimizer.step()
        with torch.no_grad():
            texts = torch.cat([encoder(column)["sentence_embedding"] for column in columns])
        active.append((texts > 0).sum(1).float().mean().item())
    assert active[0] > 10
    assert active[80:] == pytest.approx([target] * 70, rel=0.15)
    assert sum(active[110:]) / 40 == pytest.approx(target, rel=0.1)
