"""Value and gradients do not change with the number of processes nor with the mini-batch."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_training import (
    LOSSES,
    REGULARIZERS,
    TinyEncoder,
    TinyTokenEncoder,
    columns_and_labels,
    encoder_of,
    value_and_gradients,
)
from torch.nn.parallel import DistributedDataParallel

from lion_st.losses import CachedContrastiveDistillationLoss, ContrastiveDistillationLoss, FlopsRegularizer, scoring
from lion_st.losses.distillation import Distillation

# Three, because at two a factor of W + W looks like one of W * W.
WORLD_SIZE = 3
EXACT = dict(rtol=1e-12, atol=1e-13)
SINGLE = dict(rtol=1e-4, atol=1e-6)  # MaxSim is float32


def shares_of_the_batch():
    rank, results = dist.get_rank(), {}
    for name, make in LOSSES.items():
        encoder = encoder_of(name)
        loss = make(DistributedDataParallel(encoder))
        results[name] = value_and_gradients(loss, encoder, slice(2 * rank, 2 * rank + 2))
    return (
        results
        | {"reach": gradient_of_other_ranks_losses(), "unequal": unequal_batches()}
        | {"steps": outcomes_of_steps([(3, 3, 3), (4, 4, 4), (4, 3, 4)])}
    )


def gradient_of_other_ranks_losses():
    """Gradient of rank 0's loss alone with respect to this rank's embeddings."""
    columns, labels = columns_and_labels(slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))
    embeddings = [TinyEncoder()(column)["sentence_embedding"].detach().requires_grad_() for column in columns]
    loss = ContrastiveDistillationLoss(None, distillation_weight=0.0).compute_loss_from_embeddings(embeddings, labels)
    (loss["contrastive_loss"] * (dist.get_rank() == 0)).backward()
    return [embedding.grad for embedding in embeddings]


def unequal_batches():
    queries, documents = torch.ones(2 + dist.get_rank(), 4), torch.ones(2 + dist.get_rank(), 4)
    loss = ContrastiveDistillationLoss(None, distillation_weight=0.0)
    try:
        loss.compute_loss_from_embeddings([queries, documents])
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD_SIZE, shares_of_the_batch)


def whole_batch(name):
    encoder = encoder_of(name)
    return value_and_gradients(LOSSES[name](encoder), encoder, slice(None))


@pytest.mark.parametrize("name", LOSSES)
def test_one_process_with_the_whole_batch_equals_three_with_a_third_each(ranks, name):
    value, gradients = whole_batch(name)
    assert all(gradient.abs().max() > 1e-3 for gradient in gradients.values())
    mean = torch.stack([rank[name][0] for rank in ranks]).mean()
    tolerance = SINGLE if name.startswith("multi_vector") else EXACT
    is_single = name in {f"cached {one}" for one in ("sparse", *REGULARIZERS)}  # what cached sparse losses report
    torch.testing.assert_close(mean, value, **(dict(rtol=1e-6, atol=0) if is_single else tolerance))
    for rank in ranks:
        torch.testing.assert_close(rank[name][1], gradients, **tolerance)


def test_gradients_reach_the_documents_of_other_ranks_but_not_their_queries(ranks):
    for rank in (1, 2):
        queries, *documents = ranks[rank]["reach"]
        assert queries.abs().max() == 0
        assert all(column.abs().max() > 1e-3 for column in documents)


def test_unequal_batches_are_refused_on_every_rank(ranks):
    for rank in ranks:
        assert "2 x 1 of 4 dimensions; 3 x 1 of 4 dimensions; 4 x 1" in rank["unequal"]
        assert "dataloader_drop_last" in rank["unequal"]


@pytest.mark.parametrize("limit", [dict(mini_batch_size=1), dict(mini_batch_size=4), dict(mini_batch_num_tokens=7)])
@pytest.mark.parametrize("distillation", get_args(Distillation))
def test_the_cached_loss_equals_the_uncached_one_for_every_mini_batch(limit, distillation):
    settings = dict(distillation=distillation, contrastive_weight=0.3, distillation_weight=0.7)
    plain, cached = TinyEncoder(), TinyEncoder()
    expected = value_and_gradients(ContrastiveDistillationLoss(plain, **settings), plain, slice(None))
    actual = value_and_gradients(CachedContrastiveDistillationLoss(cached, **limit, **settings), cached, slice(None))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("name", ["sparse", "hybrid", "several teachers", *REGULARIZERS])
def test_caching_changes_neither_value_nor_gradients(name):
    (value, gradients), (cached, of_cached) = whole_batch(name), whole_batch(f"cached {name}")
    torch.testing.assert_close(cached, value, rtol=1e-6, atol=0)  # cached sparse losses report single precision
    torch.testing.assert_close(of_cached, gradients, **EXACT)


@pytest.mark.parametrize("limit", [dict(mini_batch_size=1), dict(mini_batch_size=4), dict(mini_batch_num_tokens=7)])
@pytest.mark.parametrize("at_once", [2**26, 40])
def test_the_cached_loss_of_token_vectors_equals_the_uncached_one(limit, at_once, monkeypatch):
    plain, cached = TinyTokenEncoder(), TinyTokenEncoder()
    expected = value_and_gradients(ContrastiveDistillationLoss(plain), plain, slice(None))
    monkeypatch.setattr(scoring, "_TOKEN_PRODUCTS", at_once)
    actual = value_and_gradients(CachedContrastiveDistillationLoss(cached, **limit), cached, slice(None))
    torch.testing.assert_close(actual, expected, **SINGLE)


def test_the_cached_loss_reports_the_terms_of_the_uncached_one():
    encoder = TinyEncoder()
    expected = ContrastiveDistillationLoss(encoder)(*columns_and_labels(slice(None)))
    actual = CachedContrastiveDistillationLoss(encoder, mini_batch_size=2)(*columns_and_labels(slice(None)))
    with torch.no_grad():
        evaluated = CachedContrastiveDistillationLoss(encoder)(*columns_and_labels(slice(None)))
    torch.testing.assert_close({name: term.detach() for name, term in actual.items()}, evaluated, **EXACT)
    torch.testing.assert_close({name: term.detach() for name, term in expected.items()}, evaluated, **EXACT)
    assert list(actual) == ["contrastive_loss", "distillation_loss"]


def test_dropout_is_replayed_in_the_cached_loss():
    encoder = TinyEncoder()
    encoder.terms = torch.nn.Sequential(encoder.terms, torch.nn.Dropout(0.5))
    loss = CachedContrastiveDistillationLoss(encoder, mini_batch_size=6)
    torch.manual_seed(3)
    actual = value_and_gradients(loss, encoder, slice(None))
    encoder.zero_grad()
    torch.manual_seed(3)
    columns, labels = columns_and_labels(slice(None))
    embeddings = [encoder(column)["sentence_embedding"] for column in columns]
    terms = ContrastiveDistillationLoss(encoder).compute_loss_from_embeddings(embeddings, labels)
    expected = torch.stack(list(terms.values())).sum()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    torch.testing.assert_close(actual, (expected.detach(), gradients), **EXACT)


def test_flops_of_the_global_batch_is_not_the_mean_of_the_ranks_flops():
    embeddings = TinyEncoder()(columns_and_labels(slice(None))[0][0])["sentence_embedding"]
    flops = FlopsRegularizer(None).compute_loss_from_embeddings
    assert flops(embeddings) < 0.99 * (flops(embeddings[:3]) + flops(embeddings[3:])) / 2


def outcomes_of_steps(sizes: list[tuple[int, ...]]) -> list[str | None]:
    """What each step raises, where each rank holds its number of queries."""
    outcomes: list[str | None] = []
    loss = ContrastiveDistillationLoss(None)
    for of_each_rank in sizes:
        batch = of_each_rank[dist.get_rank()]
        try:
            loss.compute_loss_from_embeddings([torch.rand(batch, 4) for _ in range(3)], torch.rand(batch, 2))
            outcomes.append(None)
        except ValueError as error:
            outcomes.append(str(error))
    return outcomes


def test_shapes_are_compared_in_each_step_also_by_ranks_whose_own_have_not_changed(ranks):
    for results in ranks:
        assert results["steps"][:-1] == [None, None]
        assert "rank by rank they are: 4 x 2 of 4 dimensions; 3 x 2 of 4" in results["steps"][-1]
