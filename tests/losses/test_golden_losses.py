"""Values and gradients are those of the paper's released implementation, at one and at two processes."""

import json

import pytest
import torch
import torch.distributed as dist
from golden_objectives import OURS, RELEASED, GoldenEncoder, objective_loss, total, training_batch
from ranks import run_ranks
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from lion_st.losses import FlopsRegularizer

# Float32 through two to four layers; the dense gradients are near 1e4.
VALUE = dict(rtol=2e-6, atol=0)
GRADIENT = 2e-5


def run_objective(case, paradigm, objective, rank, wrap=lambda model: model):
    encoder = GoldenEncoder(case / "model", paradigm).train()
    loss = objective_loss(wrap(encoder), objective, paradigm)
    terms = loss(*training_batch(case, objective, rank))
    value = total(terms)
    value.backward()
    terms = {name: term.item() for name, term in terms.items()} if isinstance(terms, dict) else {}
    return {"total": value.item(), "terms": terms, "gradients": encoder.gradients()}


def two_rank_results(case):
    return {
        (paradigm, objective): run_objective(case, paradigm, objective, dist.get_rank(), DistributedDataParallel)
        for paradigm in ("sparse", "dense")
        for objective in (*RELEASED, *OURS)
    }


@pytest.fixture(scope="module")
def two_ranks(golden_case):
    return run_ranks(2, two_rank_results, golden_case)


def golden_values(case, paradigm, objective, world_size, rank):
    return json.loads((case / f"losses/losses_ws{world_size}_rank{rank}.json").read_text())[f"{paradigm}_{objective}"]


def assert_gradients(actual, case, paradigm, objective, world_size, factor=1.0):
    golden = load_file(case / f"losses/grads_ws{world_size}_{paradigm}_{objective}.safetensors")
    assert set(golden) <= set(actual)
    for name, gradient in golden.items():
        error = (actual[name] - factor * gradient).abs().max() / (factor * gradient).abs().max()
        assert error < GRADIENT, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("objective", ["nce", "nce_stock", "kldiv", "marginmse"])
def test_one_process(golden_case, paradigm, objective):
    actual = run_objective(golden_case, paradigm, objective, rank=0)
    name = objective.removesuffix("_stock")
    golden = golden_values(golden_case, paradigm, name, 1, 0)
    torch.testing.assert_close(actual["total"], golden["total"], **VALUE)
    if paradigm == "sparse":
        regularizers = [actual["terms"][f"{text}_regularizer_loss"] for text in ("query", "document")]
        expected = [0.05 * golden["query_reg"], 0.04 * golden["doc_reg"]]
        torch.testing.assert_close(regularizers, expected, **VALUE)
    assert_gradients(actual["gradients"], golden_case, paradigm, name, 1)


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("objective", RELEASED)
def test_two_processes_with_the_released_scaling(golden_case, two_ranks, paradigm, objective):
    for rank, results in enumerate(two_ranks):
        actual = results[paradigm, objective]
        golden = golden_values(golden_case, paradigm, objective, 2, rank)
        torch.testing.assert_close(actual["total"], golden["total"], **VALUE)
        assert_gradients(actual["gradients"], golden_case, paradigm, objective, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_joint_objective_is_the_mean_of_both_terms(golden_case, two_ranks, rank):
    golden = golden_values(golden_case, "dense", "nce_kldiv", 2, rank)
    expected = {"contrastive_loss": golden["nce"] / 2, "distillation_loss": golden["kldiv"] / 2}
    torch.testing.assert_close(two_ranks[rank]["dense", "nce_kldiv"]["terms"], expected, **VALUE)


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("objective", OURS)
def test_unscaled_gradients_are_the_released_ones_times_the_number_of_ranks(
    golden_case, two_ranks, paradigm, objective
):
    totals = [results[paradigm, objective]["total"] for results in two_ranks]
    golden = golden_values(golden_case, paradigm, "nce", 2, 0)
    torch.testing.assert_close(sum(totals) / 2, golden["total"], **VALUE)
    assert_gradients(two_ranks[0][paradigm, objective]["gradients"], golden_case, paradigm, "nce", 2, factor=2.0)


def test_flops(golden_case):
    golden = json.loads((golden_case.parent / "regularizers.json").read_text())["FLOPS"]
    (matrix,) = load_file(golden_case.parent / "reg_input.safetensors").values()
    torch.testing.assert_close(FlopsRegularizer(None).compute_loss_from_embeddings(matrix).item(), golden, **VALUE)
