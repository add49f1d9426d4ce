"""What only a GPU can show: the compiled kernels, at sizes and in the surroundings of training."""

import pytest
import torch
from oracle import Case, make_case, pooled, relative_error
from torch.utils.checkpoint import checkpoint

from lion_st.kernels import choose_backend, splade_pool
from lion_st.kernels.gradients import Inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU.")
LENGTHS = (1, 130, 75, 0, 12, 300, 64, 8)


def gradients(values: torch.Tensor, case: Case) -> list[torch.Tensor]:
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    return list(torch.autograd.grad(values, case.inputs(), upstream))


def test_triton_is_the_choice_on_a_gpu(monkeypatch):
    monkeypatch.delenv("LION_ST_KERNEL", raising=False)
    assert choose_backend(torch.device("cuda")) == "triton"


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("hidden_size", [256, 100, 2048])
def test_float32_agrees_with_the_definition_in_float64(hidden_size, with_bias):
    case = make_case(LENGTHS, hidden_size, 5000, with_bias=with_bias, softcap=20.0, device="cuda")
    true = case.double()
    values, expected = pooled(case), true.expected()
    assert relative_error(values, expected) < 1e-5
    for actual, right in zip(gradients(values, case), gradients(expected, true), strict=True):
        assert relative_error(actual, right) < 1e-4


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype, weight_dtype):
    case = make_case(LENGTHS, 1024, 3000, dtype=dtype, device="cuda")
    case.weight = case.weight.detach().to(weight_dtype).requires_grad_()
    true = case.double()
    assert relative_error(pooled(case), true.expected()) < 1e-5


def test_every_configuration_gives_the_same_bits():
    from lion_st.kernels import triton_backend

    case = make_case(LENGTHS, 512, 3000, dtype=torch.bfloat16, device="cuda")
    tokens = case.hidden[case.mask.bool()].detach()
    fastest, plain = triton_backend.CONFIGURATIONS
    if triton_backend._configuration(tokens, case.weight) != fastest:
        pytest.skip("This GPU runs one configuration.")
    results = []
    for configuration in (fastest, plain):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_backend, "CONFIGURATIONS", (configuration,))
            results.append(triton_backend.forward(Inputs(tokens, case.weight, None, case.bounds, 0.5, None), True))
    (values, positions), others = results
    assert torch.equal(values, others[0]) and torch.equal(positions, others[1])


def test_the_columns_of_a_program_change_no_bit_of_the_gradients(monkeypatch):
    from lion_st.kernels import triton_backward

    case = make_case(LENGTHS, 512, 3000, dtype=torch.bfloat16, device="cuda")
    values = pooled(case)
    upstream = torch.randn(values.shape, device="cuda")
    results = []
    for columns in (256, 128, 64, 32):
        monkeypatch.setattr(triton_backward, "program_columns", lambda *_, columns=columns: columns)
        results.append(torch.autograd.grad(values, (case.hidden, case.weight), upstream, retain_graph=True))
    for of_hidden, of_weight in results[1:]:
        assert torch.equal(of_hidden, results[0][0]) and torch.equal(of_weight, results[0][1])


@pytest.mark.parametrize("texts", [3, 300])
def test_everything_that_is_returned_was_written(texts):
    """New memory holds NaN; some terms are active in no text, and 300 texts are more than one program adds."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        case = make_case((1, 0, 140) * (texts // 3), 64, 700, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            case.weight[7:90] = 0
        true = case.double()
        values, expected = pooled(case), true.expected()
        of_hidden, of_weight = gradients(values, case)
        right_of_hidden, right_of_weight = gradients(expected, true)
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(values, expected) < 1e-5
    assert not of_weight[7:90].any()
    assert relative_error(of_hidden, right_of_hidden) < 0.01 and relative_error(of_weight, right_of_weight) < 0.01


def test_a_nan_raises_when_encoding_and_reaches_the_gradients():
    case = make_case(LENGTHS, 128, 2000, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        case.hidden[1, -3, 0] = torch.nan
        with pytest.raises(ValueError, match=r"1 texts \(numbers 1 of the batch\) are NaN or infinite"):
            splade_pool(case.hidden, case.weight, case.mask, output="sparse", **case.settings)
    of_hidden = gradients(pooled(case), case)[0]
    assert of_hidden[1].isnan().any() and not of_hidden[0].isnan().any()


def test_the_same_inputs_give_the_same_bits():
    case = make_case(LENGTHS * 4, 256, 20_000, dtype=torch.bfloat16, device="cuda")

    def run():
        values = pooled(case)
        return [values, *gradients(values, case)]

    first = run()
    assert all(torch.equal(one, other) for _ in range(3) for one, other in zip(run(), first, strict=True))


def test_rows_beyond_two_to_the_31_elements():
    terms = 131_072
    texts = 2**31 // terms + 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("The values and positions of 2**31 pairs and their partial maxima need 40 GiB.")
    hidden = torch.randn(texts, 1, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(terms, 16, device="cuda", dtype=torch.bfloat16)
    values = splade_pool(hidden, weight, scale=0.5)
    last = splade_pool(hidden[-1:].detach(), weight, scale=0.5)
    assert torch.equal(values[-1:], last)
    values[-1].sum().backward()
    assert hidden.grad[-1].any() and not hidden.grad[:-1].any()


def test_no_logits_are_allocated():
    texts, length, terms = 32, 128, 50_000
    hidden = torch.randn(texts, length, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(terms, 256, device="cuda", dtype=torch.bfloat16)
    splade_pool(hidden, weight, scale=0.25).sum().backward()  # tunes
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    splade_pool(hidden, weight, scale=0.25).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < texts * length * terms * 2


def test_autocast_computes_in_its_dtype():
    case = make_case(LENGTHS, 256, 3000, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        values = pooled(case)
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.mask, None, case.scale, None).double()
    assert relative_error(values, rounded.expected()) < 1e-5
    values.sum().backward()
    assert case.hidden.grad.dtype == case.weight.grad.dtype == torch.float32


def test_gradient_checkpointing():
    case = make_case(LENGTHS, 128, 2000, device="cuda")

    def head(hidden, weight):
        return splade_pool(hidden * 2, weight, case.mask, scale=0.3)

    expected = torch.autograd.grad(head(case.hidden, case.weight).sum(), (case.hidden, case.weight))
    values = checkpoint(head, case.hidden, case.weight, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(values.sum(), (case.hidden, case.weight)), expected, strict=True):
        assert torch.equal(one, other)


def test_torch_compile_without_graph_breaks():
    case = make_case(LENGTHS, 128, 2000, device="cuda")
    bounds, tokens = case.bounds, case.hidden.detach()[case.mask.bool()].requires_grad_()

    def head(tokens, weight):
        return splade_pool(tokens * 2, weight, cu_seqlens=bounds, scale=0.3).square()

    values, expected = torch.compile(head, fullgraph=True)(tokens, case.weight), head(tokens, case.weight)
    torch.testing.assert_close(values, expected)
    inputs = (tokens, case.weight)
    for one, other in zip(
        torch.autograd.grad(values.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_captured_graph_replays():
    case = make_case(LENGTHS, 128, 2000, dtype=torch.bfloat16, device="cuda")
    bounds, tokens = case.bounds, case.hidden.detach()[case.mask.bool()]
    with torch.no_grad():
        expected = splade_pool(tokens, case.weight, cu_seqlens=bounds, scale=0.3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            values = splade_pool(tokens, case.weight, cu_seqlens=bounds, scale=0.3)
        tokens.neg_()
        graph.replay()
        negated = splade_pool(tokens, case.weight, cu_seqlens=bounds, scale=0.3)
    assert torch.equal(values, negated) and not torch.equal(values, expected)


def test_gradient_caching_gives_the_gradients_of_the_whole_batch():
    """The two passes of GradCache: vectors of mini-batches without a graph, then each again with its gradient."""
    case = make_case(LENGTHS, 128, 2000, device="cuda")

    def loss(values):
        return (values @ values.T).tanh().sum()

    (expected,) = torch.autograd.grad(loss(pooled(case)), (case.hidden,))
    batches = [slice(0, 3), slice(3, 8)]

    def part(batch):
        return splade_pool(case.hidden[batch], case.weight, case.mask[batch], **case.settings)

    with torch.no_grad():
        vectors = torch.cat([part(batch) for batch in batches])
    vectors.requires_grad_()
    (upstream,) = torch.autograd.grad(loss(vectors), (vectors,))
    for batch in batches:
        part(batch).backward(upstream[batch])
    torch.testing.assert_close(case.hidden.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_weight_sharded_by_fsdp(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(2000, 64))

        def forward(self, hidden):
            return splade_pool(hidden, self.weight, scale=0.4)

    torch.manual_seed(0)
    head = Head().cuda()
    hidden = torch.randn(4, 20, 64, device="cuda")
    expected = head(hidden)
    (right,) = torch.autograd.grad(expected.sum(), (head.weight,))
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(head, mesh=init_device_mesh("cuda", (1,)))
        values = head(hidden)
        assert torch.equal(values, expected)
        values.sum().backward()
        assert torch.equal(head.weight.grad.full_tensor(), right)
    finally:
        distributed.destroy_process_group()


def test_a_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("There is one GPU.")
    case = make_case(LENGTHS, 64, 500, device="cuda:1")
    assert relative_error(pooled(case), case.double().expected()) < 1e-5
