"""The sparse head as one function: hidden states and an LM head in, one weight per text and term out."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import Partial

from lion_st.kernels.dispatch import backend_module, choose_backend
from lion_st.kernels.gradients import Inputs, Pooled, slope
from lion_st.kernels.reference import splade_pool_reference

for message in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are implicitly disabled"):
    warnings.filterwarnings("ignore", message=message)

SLAB_BYTES = 64 * 2**20  # largest dense piece [B, slab] on the way to sparse rows


def splade_pool(
    hidden: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    output: Literal["dense", "sparse"] = "dense",
    k: int | None = None,
    thresholds: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SPLADE max pooling through an LM head: log1p(relu(max_i softcap(scale * h_i . W + bias))) over real tokens i.

    The logits [B, L, V] never exist, neither here nor in the backward pass, and padding costs nothing. Works under
    autocast (products in its dtype, weights cast tile by tile), torch.compile, gradient checkpointing and gradient
    caching; a sharded weight (DTensor) is gathered for the call.

    Args:
        hidden: Last hidden states [B, L, D]; or [1, T, D] or [T, D] of packed texts, with `cu_seqlens`.
        weight: LM head [V, D].
        attention_mask: [B, L], nonzero at real tokens, on any side; None if all are real.
        scale: Factor on the products, above 0; `hidden_size ** -0.25` in the paper.
        bias: [V], added after the scale.
        softcap: Limit c of the logits, c * tanh(logit / c), as in Gemma 2.
        output: `"dense"` for rows [B, V], or `"sparse"` for a CSR tensor [B, V] that never was dense (no gradient).
        k: Sparse output: keep at most this many of the largest terms of each text.
        thresholds: Sparse output: keep values above this, one number or one per term [V]; 0 by default.
        cu_seqlens: Where each packed text begins, and the end [B + 1].

    Returns:
        float32 (float64 of float64 input): dense [B, V], zeros for a text without tokens; or CSR [B, V] with ascending
        terms in each row.

    Raises:
        ValueError: If shapes do not fit, if the scale is not positive, if `k` or `thresholds` is given for dense
            output, or if a weight of sparse output is NaN or infinite. Dense rows keep them; `check_finite` looks for
            them.
        RuntimeError: If the backend that LION_ST_KERNEL names cannot run.

    References:
        Formal et al., SPLADE v2, 2021, equation 6: https://arxiv.org/abs/2109.10086. Zeng et al., Scaling Sparse and
        Dense Retrieval in Decoder-Only LLMs, 2025, section 3.1 (the scale): https://arxiv.org/abs/2502.15526.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> splade_pool(hidden, weight, torch.ones(2, 5), scale=16**-0.25).shape
        torch.Size([2, 100])
    """
    _check_shapes(hidden, weight, attention_mask, bias, cu_seqlens)
    if output not in ("dense", "sparse"):
        raise ValueError(f'output must be "dense" or "sparse", got {output!r}.')
    if output == "dense" and (k is not None or thresholds is not None):
        raise ValueError('k and thresholds are for output="sparse".')
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    if not scale > 0:  # of products the largest would be taken, and not the smallest
        raise ValueError(f"scale must be positive, got {scale!r}: change the sign of hidden instead.")
    weight, bias = _whole(weight), _whole(bias)
    tokens, bounds = _pack(hidden, attention_mask, cu_seqlens)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        tokens = tokens.to(torch.get_autocast_dtype(hidden.device.type))
    if output == "sparse":
        return _sparse_rows(tokens, weight, bias, bounds, scale, softcap, k, thresholds)
    backend = choose_backend(hidden.device)
    if backend == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            return splade_pool_reference(tokens, weight, bounds, scale=scale, bias=bias, softcap=softcap)
    inputs = (tokens, weight, bias)
    trains = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    values, _ = pooled_maxima(tokens, weight, bias, bounds, scale, softcap, trains, backend)
    return values


@torch.library.custom_op("lion_st::pooled_maxima", mutates_args=())
def pooled_maxima(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bounds: Tensor,
    scale: float,
    softcap: float | None,
    with_positions: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`forward` of a backend as an operator: values [B, V], and positions [B, V] or [0, 0]."""
    hidden, weight, bias = hidden.detach().contiguous(), weight.detach(), None if bias is None else bias.detach()
    return backend_module(backend).forward(Inputs(hidden, weight, bias, bounds, scale, softcap), with_positions)


@pooled_maxima.register_fake
def _(hidden, weight, bias, bounds, scale, softcap, with_positions, backend):
    shape = (bounds.shape[0] - 1, weight.shape[0])
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    positions = hidden.new_empty(shape if with_positions else (0, 0), dtype=torch.int32)
    return hidden.new_empty(shape, dtype=dtype), positions


@torch.library.custom_op("lion_st::pooled_maxima_backward", mutates_args=())
def pooled_maxima_backward(
    grad: Tensor,
    values: Tensor,
    positions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bounds: Tensor,
    scale: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`backward` of a backend as an operator: gradients of hidden and weight, empty where not needed."""
    hidden, weight = hidden.detach().contiguous(), weight.detach()
    pooled = Pooled(values.detach(), positions, hidden, weight, bounds, scale, softcap)
    gradients = backend_module(backend).backward(grad.detach(), pooled, needs_hidden, needs_weight)
    return (
        hidden.new_empty(0) if gradients.hidden is None else gradients.hidden,
        weight.new_empty(0) if gradients.weight is None else gradients.weight,
    )


@pooled_maxima_backward.register_fake
def _(grad, values, positions, hidden, weight, bounds, scale, softcap, needs_hidden, needs_weight, backend):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, bounds, scale, softcap, _, backend = inputs
    values, positions = output
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(values, positions, hidden, weight, bounds)
    ctx.settings = scale, softcap, backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    values, positions, hidden, weight, bounds = ctx.saved_tensors
    scale, softcap, backend = ctx.settings
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden = grad_weight = grad_bias = None
    if needs_hidden or needs_weight:
        grad_hidden, grad_weight = pooled_maxima_backward(
            grad, values, positions, hidden, weight, bounds, scale, softcap, needs_hidden, needs_weight, backend
        )
    if needs_bias:
        grad_bias = (grad * slope(values, softcap)).sum(0).to(ctx.bias_dtype)
    return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None, grad_bias, *[None] * 5


pooled_maxima.register_autograd(_backward, setup_context=_save_for_backward)


@torch.no_grad()
def _sparse_rows(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bounds: Tensor,
    scale: float,
    softcap: float | None,
    k: int | None,
    thresholds: Tensor | float | None,
) -> Tensor:
    """CSR rows, a slab of the vocabulary at a time."""
    texts, terms = len(bounds) - 1, weight.shape[0]
    backend = choose_backend(tokens.device)
    slab = min(terms, max(1024, SLAB_BYTES // (4 * max(1, texts)) // 1024 * 1024))
    rows, columns, weights = [], [], []
    for offset in range(0, terms, slab):
        span = slice(offset, offset + slab)
        part = None if bias is None else bias[span]
        if backend == "reference":
            values = splade_pool_reference(tokens, weight[span], bounds, scale=scale, bias=part, softcap=softcap)
        else:
            values, _ = pooled_maxima(tokens, weight[span], part, bounds, scale, softcap, False, backend)
        floor = thresholds[span].to(values) if isinstance(thresholds, Tensor) else (thresholds or 0.0)
        kept = ~(values <= floor)  # NaN stays, to be found below
        if k is not None and k < values.shape[1]:
            kept &= ~(values < values.topk(k, dim=1).values[:, -1:])  # equals all stay until the last cut
        row, column = kept.nonzero(as_tuple=True)
        rows.append(row)
        columns.append(column + offset)
        weights.append(values[row, column])
    row, column, value = (torch.cat(parts) for parts in (rows, columns, weights))
    check_finite(value, row)
    if k is not None:
        row, column, value = _largest(row, column, value, k)
    order = row.argsort(stable=True)  # terms ascend within a slab and from slab to slab
    counts = torch.bincount(row, minlength=texts)
    return torch.sparse_csr_tensor(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        column[order],
        value[order],
        size=(texts, terms),
        check_invariants=False,
    )


def check_finite(values: Tensor, text: Tensor | None = None) -> None:
    """Refuse vectors that hold NaN or infinity; waits for the GPU.

    Args:
        values: Vectors [B, N], or the weights of sparse rows [nnz].
        text: Row of each weight [nnz].

    Raises:
        ValueError: If a value is not a finite number, with the texts that have such values.
    """
    if bool(values.sum().isfinite()):  # in one pass: what is not finite never sums up to what is
        return
    broken = ~values.isfinite()
    rows = (broken.any(1).nonzero()[:, 0] if text is None else text[broken].unique()).tolist()
    if not rows:  # the sum alone overflowed
        return
    named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    raise ValueError(
        f"The vectors of {len(rows)} texts (numbers {named} of the batch) are NaN or infinite, as the model's hidden "
        "states or its LM head are. Look for NaN in its weights; if they are fine, float16 overflowed: load the model "
        "in bfloat16 or float32."
    )


def _largest(row: Tensor, column: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each row, the lower term first among equals; terms ascend in each row."""
    order = value.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    counts = torch.bincount(row)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row[order]]
    kept = order[rank < k].sort().values
    return row[kept], column[kept], value[kept]


def _pack(hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Real tokens [T, D], one text after the other, and where each text begins, and the end [B + 1]."""
    if cu_seqlens is not None:
        return hidden.flatten(0, -2), cu_seqlens.to(torch.int32)
    texts, length, width = hidden.shape
    if attention_mask is None:
        bounds = torch.arange(texts + 1, device=hidden.device, dtype=torch.int32) * length
        return hidden.reshape(-1, width), bounds
    real = attention_mask != 0
    bounds = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    if hidden.dtype == torch.float64 or choose_backend(hidden.device) != "triton":
        return hidden[real], bounds
    # The number of real tokens is the GPU's to know, and asking would stop the host until all before is done: all rows
    # are kept, real ones first.
    order = real.flatten().byte().argsort(descending=True, stable=True)
    return hidden.flatten(0, 1)[order], bounds


def _whole(tensor: Any) -> Any:
    """A sharded parameter gathered, anything else as it is. Its gradient is the mean of all processes'."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def _check_shapes(
    hidden: Tensor, weight: Tensor, attention_mask: Tensor | None, bias: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}: the last dimension of both must be the "
            "hidden size, and weight [V, D]."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}, but weight has {weight.shape[0]} rows: give one value a row.")
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("Give packed texts with cu_seqlens, or padded ones with attention_mask, not both.")
        if hidden.ndim == 3 and hidden.shape[0] != 1:
            raise ValueError(f"Packed hidden states are [1, T, D] or [T, D], got {tuple(hidden.shape)}.")
        return
    if hidden.ndim != 3:
        raise ValueError(f"Padded hidden states are [B, L, D], got {tuple(hidden.shape)}; give cu_seqlens if packed.")
    if attention_mask is not None and attention_mask.shape != hidden.shape[:2]:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, but hidden is {tuple(hidden.shape)}.")
