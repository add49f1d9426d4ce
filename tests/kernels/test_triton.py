"""The Triton kernels: in the interpreter where there is no GPU, and compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Case, make_case, pooled, relative_error

from lion_st.kernels import splade_pool
from lion_st.kernels.gradients import Inputs

pytest.importorskip("triton")
from lion_st.kernels import triton_backend, triton_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "mixed lengths": dict(lengths=(13, 1, 7, 5), terms=90),
    "one token": dict(lengths=(1,), terms=70),
    "texts in several tiles": dict(lengths=(3, 290, 9, 120), hidden_size=16, terms=60),
    "texts without tokens": dict(lengths=(0, 6, 0, 0, 3, 0), terms=70),
    "odd sizes": dict(lengths=(5, 8), hidden_size=67, terms=67, padding_side="right"),
    "a bias and a softcap": dict(lengths=(6, 9), with_bias=True, softcap=2.0, terms=40),
}


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """Forces the Triton backend; without a GPU, checks that Triton was imported for its interpreter."""
    monkeypatch.setenv("LION_ST_KERNEL", "triton")
    if DEVICE == "cpu":
        kind = type(triton_backend.maxima_kernel).__name__
        assert kind == "InterpretedFunction", "Triton was imported before TRITON_INTERPRET=1 was set."


@pytest.fixture
def poisoned():
    """New memory holds NaN and the largest integers, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(values: torch.Tensor, case: Case) -> list[torch.Tensor]:
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values.device)
    upstream = upstream * (upstream > -0.5)  # some active terms without a gradient
    return list(torch.autograd.grad(values, case.inputs(), upstream.to(values.dtype)))


def assert_right(case: Case, tolerance: float = 1e-5) -> None:
    true = case.double()
    values, expected = pooled(case), true.expected()
    assert values.dtype == torch.float32
    assert relative_error(values, expected) < tolerance
    for actual, right in zip(gradients(values, case), gradients(expected, true), strict=True):
        assert relative_error(actual, right) < tolerance


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_the_definition(shape, poisoned):
    case = make_case(**shape, device=DEVICE)
    assert_right(case)
    tokens = case.hidden[case.mask.bool()].detach()
    _, positions = triton_backend.forward(Inputs(tokens, case.weight.detach(), case.bias, case.bounds, 1.0, None), True)
    has_tokens = case.bounds.diff() > 0
    inside = (positions >= case.bounds[:-1, None]) & (positions < case.bounds[1:, None])
    assert inside[has_tokens].all() and (positions[~has_tokens] == -1).all()


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_products_are_of_the_dtype_of_the_hidden_states_and_summed_in_float32(dtype, weight_dtype):
    case = make_case((7, 0, 20), hidden_size=40, terms=50, dtype=dtype, device=DEVICE)
    case.weight = torch.randn(50, 40, device=DEVICE, dtype=torch.float32).to(weight_dtype).requires_grad_()
    rounded = Case(case.hidden, case.weight.detach().to(dtype), case.mask, None, case.scale, None).double()
    values, expected = pooled(case), rounded.expected()
    assert relative_error(values, expected) < 1e-6
    of_hidden, of_weight = gradients(values, case)
    right_of_hidden, right_of_weight = gradients(expected, rounded)
    assert (of_hidden.dtype, of_weight.dtype) == (dtype, weight_dtype)
    assert relative_error(of_hidden, right_of_hidden) < 0.01 and relative_error(of_weight, right_of_weight) < 0.01


def case_with_inactive_terms(texts: int, terms: int, active: int) -> Case:
    """Texts of one token, of which only the last `active` terms are ever active."""
    case = make_case((1,) * texts, hidden_size=12, terms=terms, device=DEVICE)
    with torch.no_grad():
        case.weight[:-active] = 0
    return case


def test_terms_that_no_text_activates_have_no_gradient(poisoned, monkeypatch):
    case = case_with_inactive_terms(texts=300, terms=9, active=2)  # more entries than a program adds
    case.hidden.requires_grad_(False)
    pooled(case).sum().backward()
    of_weight = case.weight.grad
    assert not of_weight[:-2].any() and of_weight[-2:].any()
    monkeypatch.setattr(triton_backward, "SHORTEST_PIECE", 4)
    for texts in (1, 9, 40):
        case = case_with_inactive_terms(texts, terms=9, active=1)
        assert_right(case)


def test_the_columns_of_a_program_change_no_bit(monkeypatch):
    case = make_case((9, 3), hidden_size=70, terms=30, device=DEVICE)
    expected = gradients(pooled(case), case)
    for columns in (16, 64):
        monkeypatch.setattr(triton_backward, "program_columns", lambda *_, columns=columns: columns)
        for one, other in zip(gradients(pooled(case), case), expected, strict=True):
            assert torch.equal(one, other)


def test_columns_of_a_table_that_is_read_often_stay_in_the_cache():
    table = torch.empty(128_256, 2048, dtype=torch.bfloat16, device="meta")
    assert triton_backward.program_columns(table, entries=128 * 1283) == 256  # 1 % of 128 texts' terms
    narrow = triton_backward.program_columns(table, entries=128 * 64_128)  # 50 %
    assert narrow * 2 * 128_256 <= triton_backward.CACHE_BYTES and narrow * 2 >= 128
    assert triton_backward.program_columns(table[:9600], entries=10**7) == 256  # hidden states of a batch


def in_eighths(values):
    """Whose products add up exactly in any order; BLAS, as the interpreter has it, may round equal rows apart."""
    return (values.detach() * 8).round() / 8


def test_positions_name_the_first_of_the_largest_logits():
    case = make_case((5, 0, 150), terms=40, device=DEVICE)
    with torch.no_grad():
        tokens, weight = in_eighths(case.hidden[case.mask.bool()]), in_eighths(case.weight)
        tokens[3], tokens[140] = tokens[1], tokens[20]  # ties in every term, in one group of slots and in two tiles
        values, positions = triton_backend.forward(Inputs(tokens, weight, None, case.bounds, 1.0, None), True)
        logits = tokens.double() @ weight.double().T
    expected = torch.stack([logits[:5].argmax(0), torch.full((40,), -1, device=DEVICE), logits[5:].argmax(0) + 5])
    assert torch.equal(positions.long(), expected)
    assert values[0].any() and not values[1].any()


def test_a_nan_is_not_hidden():
    case = make_case((4, 200), hidden_size=16, terms=40, device=DEVICE)
    with torch.no_grad():
        case.hidden[1, 70, 3] = torch.nan
        values = pooled(case)
    assert values[1].isnan().all() and not values[0].isnan().any()
    of_hidden = gradients(pooled(case), case)[0]
    assert of_hidden[1].isnan().any() and not of_hidden[0].isnan().any()
    with pytest.raises(ValueError, match=r"1 texts \(numbers 1 of the batch\) are NaN or infinite"):
        splade_pool(case.hidden, case.weight, case.mask, output="sparse", **case.settings)


def test_small_and_large_logits_keep_their_relative_precision():
    hidden = torch.logspace(-30, 30, 40, dtype=torch.float64)[:, None, None].float().to(DEVICE)
    weight = torch.ones(1, 1, device=DEVICE)
    for softcap in (None, 30.0):
        values = splade_pool(hidden, weight, scale=1.0, softcap=softcap)[:, 0].double()
        logits = hidden[:, 0, 0].double()
        expected = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log1p()
        torch.testing.assert_close(values, expected, rtol=2e-6, atol=0)


def test_slabs_of_the_vocabulary_and_of_the_texts_change_nothing(monkeypatch):
    case = make_case((130, 0, 3), hidden_size=16, terms=260, with_bias=True, device=DEVICE)
    whole = pooled(case)
    expected = [whole, *gradients(whole, case)]
    monkeypatch.setattr(triton_backend, "PARTIAL_BYTES", 0)  # slabs of 256 terms
    monkeypatch.setattr(triton_backward, "SLAB_ENTRIES", 300)  # a text, and 100 terms, at a time
    values = pooled(case)
    for actual, right in zip([values, *gradients(values, case)], expected, strict=True):
        assert torch.equal(actual, right)


def test_an_lm_head_of_another_dtype_is_cast_a_slab_at_a_time(monkeypatch):
    case = make_case((9, 4), hidden_size=16, terms=600, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        weight = torch.randn(600, 16, device=DEVICE)
        expected = splade_pool(case.hidden, weight.half(), case.mask, scale=0.5)
        slabs = []
        launch = triton_backend._launch_maxima
        monkeypatch.setattr(
            triton_backend,
            "_launch_maxima",
            lambda *given: slabs.append((given[2].dtype, len(given[2]))) or launch(*given),
        )
        monkeypatch.setattr(triton_backend, "CAST_BYTES", 256 * 16 * 2)
        assert torch.equal(splade_pool(case.hidden, weight, case.mask, scale=0.5), expected)
    assert slabs == [(torch.float16, 256), (torch.float16, 256), (torch.float16, 88)]


def test_long_sums_are_split_and_merged(monkeypatch):
    monkeypatch.setattr(triton_backward, "SHORTEST_PIECE", 8)
    monkeypatch.setattr(triton_backward, "MOST_PIECES", 10**9)
    case = make_case((1, 7, 3), hidden_size=20, terms=130, device=DEVICE)  # one token owns all active terms of its text
    assert_right(case)
    case = make_case((1,) * 12, hidden_size=20, terms=5, device=DEVICE)  # a term with more texts than a piece
    assert_right(case)


@pytest.mark.skipif(DEVICE == "cuda", reason="On a GPU its own configurations are compared.")
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("slots", [128, 256])
def test_every_form_of_a_tile_gives_the_same_maxima(monkeypatch, slots, descriptors):
    case = make_case((5, 0, 300, 1), hidden_size=80, terms=40, dtype=torch.float16)
    tokens, weight = in_eighths(case.hidden[case.mask.bool()]), in_eighths(case.weight)
    expected = triton_backend.forward(Inputs(tokens, weight, None, case.bounds, 0.5, None), True)
    form = triton_backend.Configuration(32, slots, 4, 3, descriptors)
    monkeypatch.setattr(triton_backend, "INTERPRETED", form)
    for with_positions in (True, False):
        values, positions = triton_backend.forward(Inputs(tokens, weight, None, case.bounds, 0.5, None), with_positions)
        assert torch.equal(values, expected[0])
        assert not with_positions or torch.equal(positions, expected[1])


def test_the_same_inputs_give_the_same_bits():
    case = make_case((20, 3, 8), hidden_size=32, terms=60, device=DEVICE)

    def run():
        values = pooled(case)
        return [values, *gradients(values, case)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_non_contiguous_inputs():
    case = make_case((7, 4), hidden_size=16, terms=64, device=DEVICE)
    expected = pooled(case)
    hidden = case.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    for weight in (case.weight.detach().T.contiguous().T, torch.cat([case.weight, case.weight], 1)[:, :16].detach()):
        assert not hidden.is_contiguous() and not weight.is_contiguous()
        assert torch.equal(splade_pool(hidden, weight, case.mask, **case.settings), expected)


def test_no_texts_and_no_tokens():
    for texts in (0, 3):
        hidden = torch.randn(texts, 2, 8, device=DEVICE, requires_grad=True)
        weight = torch.randn(20, 8, device=DEVICE, requires_grad=True)
        values = splade_pool(hidden, weight, torch.zeros(texts, 2, device=DEVICE), scale=1.0)
        values.sum().backward()
        assert values.shape == (texts, 20) and not values.any()
        assert not hidden.grad.any() and not weight.grad.any()


def test_sparse_rows_are_the_dense_rows():
    case = make_case((6, 0, 9), terms=150, with_bias=True, device=DEVICE)
    rows = splade_pool(case.hidden, case.weight, case.mask, output="sparse", **case.settings)
    assert torch.equal(rows.to_dense(), pooled(case))


# ---- compiled for GPUs ----


@pytest.mark.parametrize(
    ("shared_bytes", "major", "element_bytes", "is_aligned", "place"),
    [
        (232_448, 9, 2, True, 0),  # H100, H200
        (232_448, 10, 2, True, 0),  # B200
        (232_448, 9, 2, False, 1),  # a hidden size that TMA does not read
        (232_448, 9, 4, True, 1),  # float32, which needs registers
        (166_912, 8, 2, True, 1),  # A100
        (101_376, 12, 2, True, 1),  # RTX 50
    ],
)
def test_each_gpu_has_its_configuration(shared_bytes, major, element_bytes, is_aligned, place):
    expected = triton_backend.CONFIGURATIONS[place]
    assert triton_backend.fitting(shared_bytes, major, element_bytes, is_aligned) == expected
    assert expected.shared_bytes <= shared_bytes


def test_the_kernels_compile_within_the_limits_of_gpus():
    """By Triton's compiler and assembler, in a process where Triton is not imported for its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = json.loads(run.stdout)
    assert {kernel["name"] for kernel in kernels} == {
        "schedule_kernel", "maxima_kernel", "finish_kernel", "sum_rows_kernel", "merge_sums_kernel",
        "add_postings_kernel", "dense_pair_scores_kernel", "sparse_pair_scores_kernel",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared_bytes"] <= kernel["expected_shared_bytes"], kernel
        assert kernel["spilled_loads"] == 0, f"{kernel} spills registers"
