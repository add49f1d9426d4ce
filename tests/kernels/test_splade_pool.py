import numpy as np
import pytest
import torch
from oracle import make_case, relative_error
from torch.utils.checkpoint import checkpoint

from lion_st.kernels import blockwise, choose_backend, cpu, screening, splade_pool, splade_pool_reference
from lion_st.kernels.gradients import Inputs

SHAPES = {
    "mixed lengths": dict(lengths=(13, 1, 7, 5)),
    "one text": dict(lengths=(9,)),
    "one token": dict(lengths=(1, 1, 1)),
    "all but one token padded": dict(lengths=(40, 1)),
    "a text without tokens": dict(lengths=(6, 0, 3)),
    "right padding": dict(lengths=(4, 11, 2), padding_side="right"),
    "odd sizes": dict(lengths=(5, 8), hidden_size=7, terms=67),
    "several tiles": dict(lengths=(17, 30), terms=9000, hidden_size=8),
    "a bias": dict(lengths=(6, 9), with_bias=True),
    "a softcap": dict(lengths=(6, 9), with_bias=True, softcap=2.0),
}


@pytest.fixture(params=["blockwise on CPU", "screened on CPU", "blockwise on any device"])
def backend(request, monkeypatch):
    """All forms of the blockwise backend: numba's, with products of float32 screened or not, and torch's alone."""
    monkeypatch.setenv("LION_ST_KERNEL", "blockwise")
    is_screened = request.param == "screened on CPU"
    monkeypatch.setattr(screening, "can_screen", lambda tokens, _: is_screened and tokens.dtype == torch.float32)
    monkeypatch.setattr(screening, "MAX_SHARE", 1.0)
    if request.param == "blockwise on any device":
        monkeypatch.setattr(blockwise, "_maxima_on_cpu", lambda *given: blockwise._maxima(*given[:5]))
        monkeypatch.setattr(blockwise, "_scatter_on_cpu", blockwise._scatter)
    return request.param


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_values_and_gradients_are_those_of_the_definition(backend, shape, dtype, tolerance):
    case = make_case(**shape, dtype=dtype)
    true = case.double()
    values = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    expected = true.expected()
    assert values.dtype == torch.float32
    assert relative_error(values, expected) < tolerance

    # Where bfloat16 makes two tokens equal, either may win: the gradients are compared in float32 alone.
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(values, case.inputs(), upstream)
    assert [gradient.dtype for gradient in gradients] == [dtype] * len(gradients)
    if dtype == torch.float32:
        for gradient, right in zip(gradients, torch.autograd.grad(expected, true.inputs(), upstream), strict=True):
            assert relative_error(gradient, right) < tolerance


def test_positions_name_the_first_of_the_largest_logits(backend):
    case = make_case((5, 9), terms=50)
    with torch.no_grad():
        tokens = case.hidden[case.mask.bool()].contiguous()
        tokens[3] = tokens[1]  # a tie in every term
        values, positions = blockwise.forward(Inputs(tokens, case.weight.detach(), None, case.bounds, 1.0, None), True)
        logits = tokens.double() @ case.weight.double().T
    expected = torch.stack([logits[:5].argmax(0), logits[5:].argmax(0) + 5])
    is_active = values > 0
    assert 3 not in positions and is_active.sum() > 50
    assert torch.equal(positions.long()[is_active], expected[is_active])


def test_gradcheck(backend):
    case = make_case((4, 2), hidden_size=5, terms=11, dtype=torch.float64, with_bias=True, softcap=3.0)

    def pooled(hidden, weight, bias):
        return splade_pool(hidden, weight, case.mask, scale=0.7, bias=bias, softcap=3.0)

    assert torch.autograd.gradcheck(pooled, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_trains_gets_a_gradient(backend, trained):
    case = make_case((6, 3), with_bias=True)
    full = torch.autograd.grad(splade_pool(case.hidden, case.weight, case.mask, **case.settings).sum(), case.inputs())
    for name in ("hidden", "weight", "bias"):
        getattr(case, name).requires_grad_(name == trained)
    splade_pool(case.hidden, case.weight, case.mask, **case.settings).sum().backward()
    grads = {name: getattr(case, name).grad for name in ("hidden", "weight", "bias")}
    assert [name for name, grad in grads.items() if grad is not None] == [trained]
    torch.testing.assert_close(grads[trained], full[["hidden", "weight", "bias"].index(trained)])


def test_a_row_without_active_terms_is_zero_and_has_no_gradient(backend):
    case = make_case((4, 4), with_bias=True)
    with torch.no_grad():
        case.bias.fill_(-1000.0)
    values = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    values.sum().backward()
    assert not values.any() and not case.hidden.grad.any() and not case.weight.grad.any()


def test_texts_of_any_length_and_number(backend, monkeypatch):
    case = make_case((3000, 1, 2500, 40), hidden_size=4, terms=70)
    whole = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    assert relative_error(whole, case.double().expected()) < 1e-5
    monkeypatch.setattr(blockwise, "CPU_TOKENS", 100)
    torch.testing.assert_close(splade_pool(case.hidden, case.weight, case.mask, **case.settings), whole)


def test_a_bfloat16_text_longer_than_a_short_integer(backend):
    case = make_case((40_000, 2), hidden_size=2, terms=5, dtype=torch.bfloat16)
    with torch.no_grad():
        case.hidden[0, 39_000] = 100 * case.weight[3].sign()
    splade_pool(case.hidden, case.weight, case.mask, scale=1.0)[0, 3].backward()
    assert case.hidden.grad[0].any(-1).nonzero().tolist() == [[39_000]]


def test_no_texts(backend):
    values = splade_pool(torch.randn(0, 3, 8), torch.randn(20, 8), torch.ones(0, 3), scale=1.0)
    assert values.shape == (0, 20)
    rows = splade_pool(torch.randn(0, 3, 8), torch.randn(20, 8), torch.ones(0, 3), scale=1.0, output="sparse")
    assert rows.shape == (0, 20)


def test_non_contiguous_inputs(backend):
    case = make_case((7, 4), hidden_size=16, terms=64)
    hidden = case.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
    weight = case.weight.detach().T.contiguous().T
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    values = splade_pool(hidden, weight, case.mask, **case.settings)
    torch.testing.assert_close(values, splade_pool(case.hidden, case.weight, case.mask, **case.settings))


def test_packed_texts_are_padded_texts_without_the_padding(backend):
    case = make_case((7, 0, 4))
    packed = case.hidden[case.mask.bool()]
    expected = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    for tokens in (packed, packed[None]):
        values = splade_pool(tokens, case.weight, cu_seqlens=case.bounds, **case.settings)
        assert torch.equal(values, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_is_not_hidden(backend, dtype):
    case = make_case((4, 6), dtype=dtype)
    with torch.no_grad():
        case.hidden[1, -2, 0] = -torch.nan
        values = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    assert values[1].isnan().all() and not values[0].isnan().any()
    splade_pool(case.hidden, case.weight, case.mask, **case.settings).sum().backward()
    assert case.hidden.grad[1].isnan().any() and not case.hidden.grad[0].isnan().any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("limits", [{}, {"k": 3}, {"k": 3, "thresholds": 0.1}, {"thresholds": torch.ones(300)}])
def test_sparse_rows_are_finite_or_refused(backend, limits, broken, monkeypatch):
    case = make_case((4, 0, 6, 5))
    with torch.no_grad():
        case.hidden[2:, -2] = broken
    for name in ("blockwise", "reference"):
        monkeypatch.setenv("LION_ST_KERNEL", name)
        with pytest.raises(ValueError, match=r"2 texts \(numbers 2, 3 of the batch\) are NaN or infinite"):
            splade_pool(case.hidden, case.weight, case.mask, output="sparse", **limits, **case.settings)


def test_the_same_inputs_give_the_same_bits(backend):
    case = make_case((50, 33, 8), hidden_size=64, terms=2000)

    def run():
        values = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
        return [values, *torch.autograd.grad(values.square().sum(), case.inputs())]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


# ---- screening ----


@pytest.fixture
def screened(monkeypatch):
    """`screened(case)`: values of float32 with every tile screened, and how many products were computed again."""
    monkeypatch.setenv("LION_ST_KERNEL", "blockwise")

    def values(case, share=1.0):
        monkeypatch.setattr(screening, "can_screen", lambda *_: True)
        monkeypatch.setattr(screening, "MAX_SHARE", share)
        return splade_pool(case.hidden, case.weight, case.mask, **case.settings).detach()

    return values


def plain(case, monkeypatch):
    monkeypatch.setattr(screening, "can_screen", lambda *_: False)
    return splade_pool(case.hidden, case.weight, case.mask, **case.settings).detach()


def test_screening_sees_through_ties_of_bfloat16(screened):
    """Tokens that differ by less than bfloat16 can say, and maxima as close to zero, on both sides."""
    case = make_case((30, 50), hidden_size=64, terms=4000)
    with torch.no_grad():
        case.hidden.copy_(case.hidden[:, -1:] * (1 + 1e-4 * torch.randn(2, 50, 1)))
        token = case.hidden[0, -1]
        products = torch.linspace(-1e-2, 1e-2, 200)
        case.weight[:200] += torch.outer(products - case.weight[:200] @ token, token / token.dot(token))
    values, expected = screened(case), case.double().expected()
    assert relative_error(values, expected) < 1e-6
    assert 90 < (values[0, :200] > 0).sum() < 110
    assert ((values > 0) == (expected > 0)).float().mean() > 0.999


def test_a_nan_or_infinity_is_not_screened_away(screened, monkeypatch):
    case = make_case((6, 9), hidden_size=16, terms=40)
    with torch.no_grad():
        case.hidden[0, 5, 3] = torch.nan
        case.weight[7, 2] = torch.inf
    values, expected = screened(case), plain(case, monkeypatch)
    assert values[0].isnan().all() and torch.equal(values.isnan(), expected.isnan())
    torch.testing.assert_close(values, expected, equal_nan=True)


def test_what_is_not_worth_screening_is_computed_whole(screened, monkeypatch):
    case = make_case((30, 50), hidden_size=64, terms=4000)
    monkeypatch.setattr(blockwise, "MAX_TILE", 256)
    written = []
    original = screening.Screen.write_maxima
    monkeypatch.setattr(
        screening.Screen, "write_maxima", lambda *given: written.append(original(*given)) or written[-1]
    )
    values = screened(case, share=0.0)
    assert torch.equal(values, plain(case, monkeypatch)) and written == [False] * 16
    torch.testing.assert_close(screened(case), values)
    assert written[16:] == [True] * 16


def test_screening_is_left_to_where_it_pays(monkeypatch):
    monkeypatch.setattr(screening, "multiplies_bfloat16", lambda: True)
    tokens, bounds = torch.randn(1024, 256), torch.tensor([0, 1000, 1024])
    assert screening.can_screen(tokens, bounds)
    assert not screening.can_screen(tokens[:100], torch.tensor([0, 100]))
    assert not screening.can_screen(tokens[:, :64], bounds) and not screening.can_screen(tokens.bfloat16(), bounds)
    monkeypatch.setattr(screening, "multiplies_bfloat16", lambda: False)
    assert not screening.can_screen(tokens, bounds)


# ---- sparse rows ----


def test_sparse_rows_are_the_dense_rows(backend, monkeypatch):
    monkeypatch.setattr("lion_st.kernels.pool.SLAB_BYTES", 4 * 3 * 1024)  # slabs of 1024 terms
    case = make_case((6, 0, 9), terms=2500, with_bias=True)
    rows = splade_pool(case.hidden, case.weight, case.mask, output="sparse", **case.settings)
    dense = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    assert rows.layout == torch.sparse_csr and rows.dtype == torch.float32 and not rows.requires_grad
    torch.testing.assert_close(rows.to_dense(), dense)
    assert rows.values().all()
    for start, end in zip(rows.crow_indices()[:-1], rows.crow_indices()[1:], strict=True):
        assert (rows.col_indices()[start:end].diff() > 0).all()


def test_the_k_largest_terms_of_each_row(backend):
    case = make_case((6, 0, 9), terms=500)
    dense = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    rows = splade_pool(case.hidden, case.weight, case.mask, output="sparse", k=20, **case.settings)
    assert rows.crow_indices().diff().tolist() == [20, 0, 20]
    assert relative_error(rows.to_dense().topk(20).values[::2], dense.topk(20).values[::2]) < 1e-6
    assert ((rows.to_dense() == 0) | (rows.to_dense() == dense)).all()


def test_of_equal_terms_at_the_limit_the_lower_ones_stay(backend, monkeypatch):
    monkeypatch.setattr("lion_st.kernels.pool.SLAB_BYTES", 4 * 2 * 1024)  # slabs of 1024 terms
    weight = torch.ones(3000, 4)
    weight[[5, 1500]] = 2
    rows = splade_pool(torch.ones(2, 3, 4), weight, scale=1.0, output="sparse", k=6)
    assert rows.col_indices().tolist() == 2 * [0, 1, 2, 3, 5, 1500]


def test_thresholds_one_or_one_per_term(backend):
    case = make_case((6, 9), terms=500)
    dense = splade_pool(case.hidden, case.weight, case.mask, **case.settings).detach()
    each = torch.linspace(0, 3, 500)
    for threshold in (0.5, each):
        rows = splade_pool(case.hidden, case.weight, case.mask, output="sparse", thresholds=threshold, **case.settings)
        torch.testing.assert_close(rows.to_dense(), dense.where(dense > threshold, 0))


# ---- inside the ways models are run ----


def test_autocast_computes_in_its_dtype_and_casts_no_weight_whole(backend, monkeypatch):
    case = make_case((6, 9), hidden_size=32, terms=20_000)
    widths = []
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        result = original(tensor, *args, **kwargs)
        if result.dtype == torch.bfloat16 and tensor.dtype == torch.float32:
            widths.append(tensor.shape[0])
        return result

    monkeypatch.setattr(torch.Tensor, "to", to)
    with torch.autocast("cpu", torch.bfloat16):
        values = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    assert 0 < max(widths) < 20_000
    assert 1e-4 < relative_error(values, case.double().expected()) < 0.02
    values.sum().backward()
    assert case.hidden.grad.dtype == case.weight.grad.dtype == torch.float32


def test_gradient_checkpointing(backend):
    case = make_case((6, 9))

    def pooled(hidden, weight):
        return splade_pool(hidden * 2, weight, case.mask, scale=1.0)

    expected = torch.autograd.grad(pooled(case.hidden, case.weight).sum(), (case.hidden, case.weight))
    checkpointed = checkpoint(pooled, case.hidden, case.weight, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(checkpointed.sum(), (case.hidden, case.weight)), expected, strict=True):
        assert torch.equal(one, other)


def test_torch_compile_without_graph_breaks():
    case = make_case((6, 9))

    def pooled(hidden, weight):
        return splade_pool(hidden * 2, weight, case.mask, scale=1.0).square()

    # What the compiler captures is what is of interest, not the C++ it would make of the two products.
    compiled = torch.compile(pooled, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        values = compiled(case.hidden, case.weight)
    expected = pooled(case.hidden, case.weight)
    torch.testing.assert_close(values, expected)
    for one, other in zip(
        torch.autograd.grad(values.sum(), (case.hidden, case.weight)),
        torch.autograd.grad(expected.sum(), (case.hidden, case.weight)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_operators_pass_torchs_own_checks():
    case = make_case((5, 3), hidden_size=8, terms=40, with_bias=True)
    tokens = case.hidden.detach()[case.mask.bool()].requires_grad_()
    torch.library.opcheck(
        torch.ops.lion_st.pooled_maxima,
        (tokens, case.weight, case.bias, case.bounds, 0.5, None, True, "blockwise"),
    )


# ---- choice of backend and bad input ----


def test_the_reference_can_be_forced_and_agrees(monkeypatch):
    case = make_case((6, 9), with_bias=True)
    fast = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    monkeypatch.setenv("LION_ST_KERNEL", "reference")
    slow = splade_pool(case.hidden, case.weight, case.mask, **case.settings)
    torch.testing.assert_close(slow, fast)
    rows = splade_pool(case.hidden, case.weight, case.mask, output="sparse", **case.settings)
    torch.testing.assert_close(rows.to_dense(), fast)


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("LION_ST_KERNEL", "cuda")
    with pytest.raises(ValueError, match=r"LION_ST_KERNEL is 'cuda': set it to one of reference, blockwise, triton"):
        splade_pool(torch.randn(1, 2, 4), torch.randn(9, 4), scale=1.0)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setenv("LION_ST_KERNEL", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"'triton', which cannot run here: .*'cpu', and triton needs a GPU"):
        splade_pool(torch.randn(1, 2, 4), torch.randn(9, 4), scale=1.0)


def test_the_choice_is_said_once(monkeypatch, caplog):
    from lion_st.kernels import dispatch

    monkeypatch.delenv("LION_ST_KERNEL", raising=False)
    dispatch._choose.cache_clear()
    with caplog.at_level("INFO", logger="lion_st.kernels"):
        for _ in range(3):
            splade_pool(torch.randn(1, 2, 4), torch.randn(9, 4), scale=1.0)
    assert [record.message for record in caplog.records] == ["Sparse head on cpu: blockwise, the fastest there."]


def test_a_gpu_of_amd_has_the_backend_that_runs_there(monkeypatch, caplog):
    pytest.importorskip("triton")
    from lion_st.kernels import dispatch

    monkeypatch.delenv("LION_ST_KERNEL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    dispatch._choose.cache_clear()
    with caplog.at_level("WARNING", logger="lion_st.kernels"):
        assert choose_backend(torch.device("cuda")) == "blockwise"
    assert "slower than triton: the kernels are made for NVIDIA's GPUs" in caplog.text
    dispatch._choose.cache_clear()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.randn(9, 5)}, r"hidden is \(1, 2, 4\) and weight \(9, 5\)"),
        ({"bias": torch.randn(8)}, r"bias is \(8,\), but weight has 9 rows"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask is \(1, 3\)"),
        ({"hidden": torch.randn(2, 4)}, r"Padded hidden states are \[B, L, D\], got \(2, 4\)"),
        ({"hidden": torch.randn(2, 3, 4), "cu_seqlens": torch.tensor([0, 6])}, r"Packed .* got \(2, 3, 4\)"),
        ({"output": "csr"}, "output must be .* got 'csr'"),
        ({"k": 5}, 'k and thresholds are for output="sparse"'),
        ({"k": 0, "output": "sparse"}, "k must be at least 1, got 0"),
        ({"scale": -1.0}, r"scale must be positive, got -1\.0"),
    ],
)
def test_bad_input_is_named(changes, message):
    inputs = {"hidden": torch.randn(1, 2, 4), "weight": torch.randn(9, 4), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        splade_pool(**(inputs | changes))


def test_nothing_as_large_as_all_logits_is_allocated():
    """16 texts of 128 tokens and 60,000 terms: the logits alone take 491 MB."""

    def largest_allocation(pool):
        hidden, weight = torch.randn(16, 128, 8, requires_grad=True), torch.randn(60_000, 8, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            pool(hidden, weight).sum().backward()
        return max(event.cpu_memory_usage for event in profile.events())

    bounds = torch.arange(17, dtype=torch.int32) * 128
    eager = largest_allocation(lambda h, w: splade_pool_reference(h.flatten(0, 1), w, bounds, scale=1.0))
    assert eager >= 16 * 128 * 60_000 * 4
    assert largest_allocation(lambda h, w: splade_pool(h, w, scale=1.0)) < eager / 8


def test_kernels_write_to_memory_that_numpy_gives_as_read_only(monkeypatch):
    """As numpy before 2.1 and older torch give it."""
    by_dlpack = np.from_dlpack

    def read_only(tensor):
        array = by_dlpack(tensor)
        array.flags.writeable = False
        return array

    monkeypatch.setattr(np, "from_dlpack", read_only)
    tensor = torch.zeros(3, 4)[:, 1:3]
    array = cpu._array(tensor)
    array[1] = [5, 6]
    assert tensor.tolist() == [[0, 0], [5, 6], [0, 0]]
    assert cpu._array(torch.empty(0, 4)).shape == (0, 4)
