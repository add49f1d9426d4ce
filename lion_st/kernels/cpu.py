"""Numba kernels of the blockwise backend.

They use the OpenMP runtime that torch has loaded, so that both share one pool of threads. Any number of threads may
call them at once. A process that was forked from one that called them has no such pool, and runs them on one thread.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from lion_st.kernels.compiling import Parallel, compiled

PRODUCT_ERROR = 2**-8 * 1.05  # share of a product that rounding it to bfloat16 changes at most, and some rest
COLUMNS = 256  # terms that one thread reduces at a time; their running maxima stay in its first-level cache


def segment_max(logits: Tensor, bounds: Tensor, values: Tensor, positions: Tensor, offset: int) -> None:
    """Write each text's largest logit and its token to `values` and `positions` [B, V], from column `offset` on.

    Args:
        logits: [T, tile] in float32, float64, bfloat16 or float16.
        bounds: Where each text begins, and the end [B + 1], int32, counted from the first token of `hidden`.
        values: [B, V] in float32, or float64 for float64 logits.
        positions: [B, V] in int32, or empty.
        offset: Term of the first column.
    """
    kernel = _segment_max
    if logits.dtype == torch.bfloat16 and int(bounds.diff().max()) < 2**15:
        kernel, logits = _segment_max_bfloat16, logits.view(torch.int16)
    elif logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    _run(kernel, _array(logits), _array(bounds), _array(values), _array(positions), offset)


def refine_maxima(
    products: Tensor,
    tokens: Tensor,
    rows: Tensor,
    bounds: Tensor,
    values: Tensor,
    positions: Tensor,
    offset: int,
    floors: Tensor,
    errors: Tensor,
    norms: Tensor,
    limit: int,
) -> bool:
    """Replace maxima of rounded products by those of float32, from column `offset` on.

    Args:
        products: Rounded products [T, tile] in bfloat16.
        tokens: [T, D], float32.
        rows: [tile, D], float32.
        bounds: Where each text begins, and the end [B + 1], int32, counted from the first token of `hidden`.
        values: Maxima of `products` [B, V], float32; replaced, by -inf where the maximum is below its floor.
        positions: Written [B, V], int32, -1 below the floor; or empty.
        offset: Term of the first row.
        floors: Product from which on each term is active [tile].
        errors: Error of each term's products for a token of norm 1 [tile].
        norms: Norm of each text's longest token [B].
        limit: Most products that may be computed again.

    Returns:
        Whether all was replaced; if not, too many products would have to be computed again, and nothing was.
    """
    arrays = map(_array, (products.view(torch.int16), tokens, rows, bounds, values, positions))
    return bool(_run(_refine_maxima, *arrays, offset, *map(_array, (floors, errors, norms)), limit))


def scatter_gradients(
    grad: Tensor,
    values: Tensor,
    positions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    offset: int,
    scale: float,
    softcap: float,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Add each active term's share to the gradients of its token and its row of the LM head.

    Args:
        grad: [B, V].
        values: [B, V].
        positions: [B, V], int32.
        hidden: [T, D], float32 or float64.
        weight: Rows of the LM head from term `offset` on, of hidden's dtype.
        offset: Term of the first row.
        scale: Factor on the products.
        softcap: Limit of the logits, 0 for none.
        grad_hidden: [T, D], added to; None to leave out.
        grad_weight: As `weight`, added to; None to leave out.
    """
    nothing = np.empty((0, 0), dtype=_array(hidden).dtype)
    _run(
        _scatter_gradients,
        *map(_array, (grad.contiguous(), values, positions, hidden, weight)),
        offset,
        scale,
        softcap,
        *(nothing if gradient is None else _array(gradient) for gradient in (grad_hidden, grad_weight)),
        torch.get_num_threads(),
    )


class _Memory:
    """A tensor's memory as numpy reads it."""

    def __init__(self, tensor: Tensor, like: np.ndarray) -> None:
        self.tensor = tensor  # kept as long as the array that has this as its base
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": like.dtype.str,
            "shape": like.shape,
            "strides": like.strides,
        }


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory. Unlike `Tensor.numpy()` this leaves its storage resizable, which sharded weights need."""
    array = np.from_dlpack(tensor)
    if array.flags.writeable or not array.size:
        return array
    return np.asarray(_Memory(tensor, array))  # older numpy or torch


_launching = threading.Lock()
_launched = False  # numba's threads, by this process or the one that it was forked from
_forked = False  # from a process that had launched them


def _run(kernel: Parallel, *arguments: Any) -> Any:
    """Run a kernel on as many threads as torch has, and leave torch as many: numba's first launch would raise them."""
    global _launched
    if _forked:
        return kernel.serial(*arguments)
    if _launched and numba.threading_layer() != "workqueue":
        return _run_on_threads(kernel, *arguments)
    with _launching:  # the layer that numba falls back to ends the process if two threads launch at once
        result = _run_on_threads(kernel, *arguments)
        _launched = True
    return result


def _run_on_threads(kernel: Parallel, *arguments: Any) -> Any:
    threads = torch.get_num_threads()
    available: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(threads, available)))
    try:
        return kernel.parallel(*arguments)
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _after_fork() -> None:
    # The threads stayed in the parent. OpenMP would wait for them for ever, in numba's kernels as in torch's.
    global _forked
    if _launched or _launching.locked():
        _forked = True
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@Parallel
def _segment_max(logits, bounds, values, positions, offset):
    terms = logits.shape[1]
    first = bounds[0]
    for block in prange((terms + COLUMNS - 1) // COLUMNS):
        low = block * COLUMNS
        high = min(terms, low + COLUMNS)
        best = np.empty(high - low, dtype=logits.dtype)
        place = np.empty(high - low, dtype=np.int32)
        for text in range(bounds.size - 1):
            best[:] = -np.inf
            place[:] = -1
            for token in range(bounds[text], bounds[text + 1]):
                row = logits[token - first, low:high]
                for column in range(high - low):
                    # The second test keeps a NaN, which then stays: nothing is larger.
                    wins = (row[column] > best[column]) | (row[column] != row[column])
                    best[column] = row[column] if wins else best[column]
                    place[column] = token if wins else place[column]
            values[text, offset + low : offset + high] = best
            if positions.size:
                positions[text, offset + low : offset + high] = place


@Parallel
def _segment_max_bfloat16(bits, bounds, values, positions, offset):
    terms = bits.shape[1]
    first = bounds[0]
    for block in prange((terms + COLUMNS - 1) // COLUMNS):
        low = block * COLUMNS
        high = min(terms, low + COLUMNS)
        best = np.empty(high - low, dtype=np.int16)
        place = np.empty(high - low, dtype=np.int16)
        wide = np.empty(high - low, dtype=np.int32)
        for text in range(bounds.size - 1):
            best[:] = -32768
            place[:] = -1
            for token in range(bounds[text + 1] - bounds[text]):
                row = bits[bounds[text] + token - first, low:high]
                for column in range(high - low):
                    # Flipping the magnitude bits of negative numbers makes the order of the bits that of the numbers;
                    # a NaN becomes the largest.
                    bit = row[column]
                    key = np.int16(bit ^ ((bit >> 15) & 0x7FFF)) if (bit & 0x7FFF) <= 0x7F80 else np.int16(0x7FFF)
                    wins = key > best[column]
                    best[column] = key if wins else best[column]
                    place[column] = np.int16(token) if wins else place[column]
            for column in range(high - low):
                key = best[column]
                wide[column] = np.int32(np.int16(key ^ ((key >> 15) & 0x7FFF))) << 16
            if bounds[text + 1] == bounds[text]:
                values[text, offset + low : offset + high] = -np.inf
            else:
                values[text, offset + low : offset + high] = wide.view(np.float32)
            if positions.size:
                for column in range(high - low):
                    inside = place[column]
                    positions[text, offset + low + column] = bounds[text] + inside if inside >= 0 else -1


@compiled(fastmath={"reassoc", "contract"})
def _dot(one, other):
    total = np.float32(0)
    for place in range(one.size):
        total += one[place] * other[place]
    return total


@compiled()
def _mark_candidates(bits, largest, error, floor, wide, marks):
    """Mark the products that can be the largest, given the rounded ones and their maximum, and count them.

    None can if all are below the floor. NaN always can.
    """
    reach = abs(largest) * PRODUCT_ERROR + error
    if largest + reach < floor:
        return 0
    least = largest - reach
    products = wide.view(np.float32)
    for token in range(bits.size):
        wide[token] = np.int32(bits[token]) << 16
    count = 0
    for token in range(bits.size):
        marks[token] = not (products[token] + abs(products[token]) * PRODUCT_ERROR + error < least)
        count += marks[token]
    return count


@compiled()
def _largest_product(tokens, row, marks):
    """The largest product of a row with the marked tokens, and the first token that has it."""
    best, place = np.float32(-np.inf), -1
    for token in range(len(tokens)):
        if marks[token]:
            product = _dot(tokens[token], row)
            if product > best or product != product:
                best, place = product, token
    return best, place


@Parallel
def _refine_maxima(bits, tokens, rows, bounds, values, positions, offset, floors, errors, norms, limit):
    terms = bits.shape[1]
    first = bounds[0]
    blocks = (terms + COLUMNS - 1) // COLUMNS
    longest = np.max(np.diff(bounds))
    counts = np.zeros(blocks, dtype=np.int64)
    for counted in (False, True):
        if counts.sum() > limit:
            return False
        for block in prange(blocks):
            wide, marks = np.empty(longest, dtype=np.int32), np.empty(longest, dtype=np.bool_)
            for text in range(bounds.size - 1):
                low, high = bounds[text] - first, bounds[text + 1] - first
                for column in range(block * COLUMNS, min(terms, (block + 1) * COLUMNS)):
                    largest, error = values[text, offset + column], errors[column] * norms[text]
                    count = _mark_candidates(bits[low:high, column], largest, error, floors[column], wide, marks)
                    if not counted:
                        counts[block] += count
                        continue
                    best, place = np.float32(-np.inf), -1
                    if count:
                        best, place = _largest_product(tokens[low:high], rows[column], marks)
                    values[text, offset + column] = best
                    if positions.size:
                        positions[text, offset + column] = bounds[text] + place if place >= 0 else -1
    return True


@Parallel
def _scatter_gradients(
    grad, values, positions, hidden, weight, offset, scale, softcap, grad_hidden, grad_weight, threads
):
    texts = values.shape[0]
    width = hidden.shape[1]
    # Every thread has its own columns of all gradients: no two write to the same place, and the order is fixed.
    chunk = max(32, (width + threads - 1) // threads)
    for part in prange((width + chunk - 1) // chunk):
        low = part * chunk
        high = min(width, low + chunk)
        share = np.empty(1, dtype=hidden.dtype)
        for term in range(weight.shape[0]):
            for text in range(texts):
                value = values[text, offset + term]
                upstream = grad[text, offset + term]
                token = positions[text, offset + term]
                if token >= 0 and not value <= 0 and upstream != 0:  # NaN passes
                    factor = upstream * np.exp(-value) * scale
                    if softcap > 0:
                        factor *= 1 - (np.expm1(value) / softcap) ** 2
                    share[0] = factor
                    one = share[0]
                    if grad_hidden.size:
                        for column in range(low, high):
                            grad_hidden[token, column] += one * weight[term, column]
                    if grad_weight.size:
                        for column in range(low, high):
                            grad_weight[term, column] += one * hidden[token, column]
