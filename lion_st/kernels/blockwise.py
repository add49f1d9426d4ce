"""The sparse head in tiles of the vocabulary: on any device, with a fast path for CPUs.

Only one tile of logits [T, tile] exists at a time; of it, one value and one position are kept per text and term. The
maximum commutes with log1p and relu, so the backward pass needs one row of W per active term, never [T, V]. On a CPU
with instructions for bfloat16, most products of float32 are screened in those, see `lion_st.kernels.screening`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lion_st.kernels.gradients import Gradients, Inputs, Pooled, activate, slope

MIN_TILE = 256  # terms; narrower products do not fill the matrix units
MAX_TILE = 8192
CPU_TOKENS = 4096  # tokens a pass over W; beyond this W's traffic is small beside the products
ACCELERATOR_BYTES = 256 * 2**20  # logits of one tile on a device other than the CPU


def forward(inputs: Inputs, with_positions: bool) -> tuple[Tensor, Tensor]:
    """Pool packed tokens.

    Args:
        inputs: Tokens and LM head.
        with_positions: Also return where each maximum is.

    Returns:
        Values [B, V] in float32 (float64 of float64), and the row of `hidden` that each came from [B, V] in int32:
        the first of equals, -1 for a text without tokens and perhaps for terms that are not active. No positions:
        [0, 0].
    """
    hidden, weight, bias, bounds, scale, softcap = inputs
    texts, terms = len(bounds) - 1, weight.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    values = hidden.new_empty(texts, terms, dtype=dtype)
    positions = bounds.new_full((texts, terms) if with_positions else (0, 0), -1)
    if hidden.is_cpu:
        _maxima_on_cpu(hidden, weight, bounds, values, positions, _floors(weight, bias, scale))
    else:
        _maxima(hidden, weight, bounds, values, positions)
    return activate(values, scale, bias, softcap), positions


def backward(grad: Tensor, pooled: Pooled, needs_hidden: bool, needs_weight: bool) -> Gradients:
    """Gradients of `forward` for `hidden` and `weight`, from the gradient of its values [B, V].

    Each active term with a gradient adds one row of `weight` to one row of the gradient of `hidden`, and the reverse.
    The order of additions is fixed.
    """
    hidden, weight = pooled.hidden, pooled.weight
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    grad_hidden = torch.zeros_like(hidden, dtype=accumulate) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    scatter = _scatter_on_cpu if hidden.is_cpu else _scatter
    scatter(grad, pooled, grad_hidden, grad_weight)
    return Gradients(None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight)


def tile_terms(tokens: int, hidden: Tensor) -> int:
    """Terms of a tile whose logits stay in the last-level cache, a multiple of 64."""
    budget = cache_bytes() if hidden.is_cpu else ACCELERATOR_BYTES
    terms = budget // max(1, tokens * hidden.element_size())
    return max(MIN_TILE, min(MAX_TILE, terms // 64 * 64))


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """Half of the CPU's last-level cache, and 8 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(2**20, max(sizes) // 2) if sizes else 8 * 2**20


def _passes(bounds: Tensor, most_tokens: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut texts into runs of about `most_tokens`: first and last text, first and last token of each run."""
    edges = bounds.tolist()
    first = 0
    for text in range(1, len(edges)):
        if text == len(edges) - 1 or edges[text + 1] - edges[first] > most_tokens:
            yield first, text, edges[first], edges[text]
            first = text


def _floors(weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Product from which on each term may be active [V]."""
    if bias is None:
        return weight.new_zeros(len(weight), dtype=torch.float32)
    floors = bias.float() / -scale
    return floors - floors.abs() * 2**-20  # below what rounding makes of it


def _maxima_on_cpu(
    hidden: Tensor, weight: Tensor, bounds: Tensor, values: Tensor, positions: Tensor, floors: Tensor
) -> None:
    from lion_st.kernels import cpu, screening

    for first, last, start, end in _passes(bounds, CPU_TOKENS):
        tokens, edges = hidden[start:end], bounds[first : last + 1]
        results = values[first:last], positions[first:last]
        screen = None
        if screening.can_screen(tokens, edges):
            screen = screening.Screen(tokens, edges, floors)
        tile = tile_terms(end - start, hidden)
        buffer = tokens.new_empty(len(tokens) * tile)
        for offset in range(0, weight.shape[0], tile):
            rows = weight[offset : offset + tile].to(hidden.dtype)
            if screen is not None and screen.write_maxima(rows, *results, offset, buffer):
                continue
            logits = buffer[: len(tokens) * len(rows)].view(len(tokens), len(rows))
            torch.mm(tokens, rows.T, out=logits)
            cpu.segment_max(logits, edges, *results, offset)


def _scatter_on_cpu(grad: Tensor, pooled: Pooled, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
    from lion_st.kernels import cpu

    values, positions, hidden, weight, _, scale, softcap = pooled
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).contiguous()
    step = len(weight) if weight.dtype == wide.dtype else MAX_TILE
    for offset in range(0, len(weight), step):
        rows = weight[offset : offset + step].to(wide.dtype).contiguous()
        rows_grad = None if grad_weight is None else grad_weight[offset : offset + step]
        sums = rows_grad
        if rows_grad is not None and rows_grad.dtype != rows.dtype:
            sums = torch.zeros_like(rows)
        cpu.scatter_gradients(grad, values, positions, wide, rows, offset, scale, softcap or 0.0, grad_hidden, sums)
        if rows_grad is not None and sums is not None and sums is not rows_grad:
            rows_grad.copy_(sums)


def _maxima(hidden: Tensor, weight: Tensor, bounds: Tensor, values: Tensor, positions: Tensor) -> None:
    texts = len(bounds) - 1
    owner = torch.repeat_interleave(bounds.diff().long())  # text of each token [T]
    token = torch.arange(len(hidden), device=hidden.device, dtype=torch.int32)[:, None]
    tile = tile_terms(len(hidden), hidden)
    for offset in range(0, weight.shape[0], tile):
        rows = weight[offset : offset + tile].to(hidden.dtype)
        logits = (hidden @ rows.T).to(values.dtype)  # [T, tile]
        index = owner[:, None].expand_as(logits)
        maxima = logits.new_full((texts, len(rows)), -torch.inf).scatter_reduce(0, index, logits, "amax")
        values[:, offset : offset + tile] = maxima
        if positions.numel():
            losers = torch.where((logits == maxima[owner]) | logits.isnan(), token, len(hidden))
            winners = losers.new_full(maxima.shape, len(hidden)).scatter_reduce(0, index, losers, "amin")
            positions[:, offset : offset + tile] = winners.where(winners < len(hidden), -1)


def _scatter(grad: Tensor, pooled: Pooled, grad_hidden: Tensor | None, grad_weight: Tensor | None) -> None:
    values, positions, hidden, weight, _, scale, softcap = pooled
    # A token belongs to one text, so a tile's pairs (token, term) are distinct: writing them needs no atomics, and the
    # sums are left to matrix products over the tile's active terms alone.
    tile = tile_terms(len(hidden), hidden)
    for offset in range(0, weight.shape[0], tile):
        span = slice(offset, offset + tile)
        coefficients = grad[:, span] * slope(values[:, span], softcap) * scale
        coefficients.masked_fill_(positions[:, span] < 0, 0)
        active = coefficients.any(0).nonzero()[:, 0]
        coefficients = coefficients[:, active]
        text, term = coefficients.nonzero(as_tuple=True)
        pairs = hidden.new_zeros(len(hidden), len(active), dtype=values.dtype)
        pairs[positions[:, span][:, active][text, term].long(), term] = coefficients[text, term]
        rows = weight[span][active].to(values.dtype)
        if grad_hidden is not None:
            grad_hidden += pairs @ rows
        if grad_weight is not None:
            grad_weight[active + offset] = (pairs.T @ hidden.to(values.dtype)).to(weight.dtype)
