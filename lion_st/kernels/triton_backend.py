"""The sparse head on GPUs, in Triton: no logits in memory, no work for padding, no atomics.

float32 is multiplied in TF32 where torch allows that (`torch.set_float32_matmul_precision`), else as three products in
TF32, which keeps float32's accuracy. float64, which is for checks, is left to the blockwise backend.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lion_st.kernels import blockwise, triton_backward
from lion_st.kernels.gradients import Gradients, Inputs, Pooled
from lion_st.kernels.triton_forward import GROUP, finish_kernel, maxima_kernel, schedule_kernel

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

PARTIAL_BYTES = 128 * 2**20  # of maxima of texts that lie in several tiles
CAST_BYTES = 128 * 2**20  # of rows of an LM head of another dtype
ROW_BYTES = 128  # of a row of a step's block
SUPERTILE = 8  # tiles of the vocabulary that stay in the cache while all tokens pass


class Configuration(NamedTuple):
    """How `maxima_kernel` runs."""

    terms: int
    slots: int
    warps: int
    stages: int
    descriptors: bool = False  # TMA, by a program for each multiprocessor that takes one tile after the other

    def block_dim(self, dtype: torch.dtype) -> int:
        """Hidden dimensions of a step."""
        return ROW_BYTES // dtype.itemsize // (2 if dtype == torch.float32 else 1)  # as registers would run out

    @property
    def shared_bytes(self) -> int:
        """Shared memory, at most: the blocks in flight, and what the reduction needs beside them."""
        return self.stages * (self.slots + self.terms) * ROW_BYTES + (200 * self.slots if self.descriptors else 1024)

    def tiles(self, texts: int, tokens: int) -> int:
        """Upper bound on the number of tiles that hold this many texts with tokens."""
        return triton.cdiv(tokens + (GROUP - 1) * min(texts, tokens), self.slots)

    @property
    def logits_per_thread(self) -> int:
        """Registers that hold a tile's logits."""
        return self.terms * self.slots // (32 * self.warps)


# The first that fits is taken. On an H200 it was the fastest of five at hidden sizes 2048 and 4096, with positions and
# without: four stages took up to 9 % more, tiles of 256 slots 6 to 15 %, two small tiles on a multiprocessor 4 to 14 %,
# and the second, which is for GPUs and shapes without TMA, 28 to 52 %.
CONFIGURATIONS = (
    Configuration(256, 128, 8, 3, descriptors=True),
    Configuration(128, 128, 8, 3),
)
INTERPRETED = Configuration(16, 128, 4, 1)  # the interpreter takes its time for every term of a tile


class Schedule(NamedTuple):
    """Where the tokens of each text lie in the tiles."""

    ends: Tensor  # group after the last one of each text [B]
    order: Tensor  # token of each slot [slots]
    group_text: Tensor  # [groups], as are the following
    group_first: Tensor
    group_last: Tensor
    group_start: Tensor

    tiles: int  # upper bound on the number of tiles that hold tokens


def forward(inputs: Inputs, with_positions: bool) -> tuple[Tensor, Tensor]:
    """Pool packed tokens.

    Args:
        inputs: Tokens and LM head; products are summed in float32.
        with_positions: Also return where each maximum is.

    Returns:
        Values [B, V] in float32, and the row of `hidden` that each came from [B, V] in int32: the first of equals, -1
        for a text without tokens. No positions: [0, 0].
    """
    hidden, weight, bias, bounds, scale, softcap = inputs
    if hidden.dtype == torch.float64:
        return blockwise.forward(inputs, with_positions)
    texts, terms = len(bounds) - 1, weight.shape[0]
    values = hidden.new_empty(texts, terms, dtype=torch.float32)
    positions = bounds.new_empty((texts, terms) if with_positions else (0, 0))
    if not hidden.shape[0] or not values.numel():
        return values.zero_(), positions.fill_(-1)
    with _on_device(hidden):
        weight = _rows_contiguous(weight)
        configuration = _configuration(hidden, weight)
        tiles = configuration.tiles(texts, hidden.shape[0])
        step = _slab_terms(tiles, weight, hidden.dtype, with_positions)
        schedule = make_schedule(configuration, bounds, hidden.shape[0], terms, step)
        slots = hidden.index_select(0, schedule.order)
        partial_values = values.new_empty(2 * tiles, step)
        partial_positions = positions.new_empty(partial_values.shape if with_positions else (0, 0))
        for low in range(0, terms, step):
            high = min(terms, low + step)
            results = values, positions, partial_values, partial_positions
            _launch_maxima(configuration, slots, weight[low:high].to(hidden.dtype), results, schedule, low)
            finish_kernel[texts, triton.cdiv(high - low, 1024)](
                *results, schedule.ends, values if bias is None else bias.contiguous(), low, high, terms, step,
                scale, softcap or 1.0, bias is not None, softcap is not None, with_positions,
                configuration.slots // GROUP, 1024,
            )  # fmt: skip
    return values, positions


def backward(grad: Tensor, pooled: Pooled, needs_hidden: bool, needs_weight: bool) -> Gradients:
    """Gradients of `forward` for `hidden` and `weight`, from the gradient of its values [B, V].

    Each active term with a gradient adds one row of `weight` to one row of the gradient of `hidden`, and the reverse.
    The order of additions is fixed.
    """
    if pooled.hidden.dtype == torch.float64:
        return blockwise.backward(grad, pooled, needs_hidden, needs_weight)
    pooled = pooled._replace(weight=_rows_contiguous(pooled.weight))
    with _on_device(pooled.hidden):
        return Gradients(
            triton_backward.hidden_gradient(grad, pooled) if needs_hidden else None,
            triton_backward.weight_gradient(grad, pooled) if needs_weight else None,
        )


def make_schedule(
    configuration: Configuration, bounds: Tensor, tokens: int, terms: int, partial_terms: int
) -> Schedule:
    """Lay texts out in groups of slots, on the device, without waiting for it.

    Args:
        configuration: Whose groups and tiles.
        bounds: Where each text begins, and the end [B + 1].
        tokens: Number of tokens.
        terms: Width of the result.
        partial_terms: Width of the partial maxima.
    """
    texts, group = len(bounds) - 1, GROUP
    tiles = configuration.tiles(texts, tokens)
    ends = bounds.diff().add_(group - 1).floor_divide_(group).cumsum(0, dtype=torch.int32)
    order = bounds.new_empty(tiles * configuration.slots)
    text, first, last = (bounds.new_empty(len(order) // group, dtype=torch.int32) for _ in range(3))
    start = torch.empty_like(text, dtype=torch.int64)
    schedule_kernel[(tiles,)](
        bounds,
        ends,
        order,
        text,
        first,
        last,
        start,
        texts,
        tokens,
        terms,
        partial_terms,
        configuration.slots,
        num_warps=1,
    )
    return Schedule(ends, order, text, first, last, start, tiles)


def _launch_maxima(
    configuration: Configuration,
    slots: Tensor,
    rows: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    schedule: Schedule,
    first_term: int,
) -> None:
    """Run `maxima_kernel` for the terms of some rows of the LM head, of the dtype of the slots."""
    terms, dim = rows.shape
    if interpreted() and slots.dtype == torch.bfloat16:  # which the interpreter cannot multiply
        slots, rows = slots.float(), rows.float()
    block = configuration.block_dim(slots.dtype)
    programs = schedule.tiles * triton.cdiv(terms, configuration.terms)
    hidden_argument: Any = slots
    weight_argument: Any = rows
    if configuration.descriptors:
        hidden_argument = TensorDescriptor.from_tensor(slots, [configuration.slots, block])
        weight_argument = TensorDescriptor.from_tensor(rows, [configuration.terms, block])
        programs = min(programs, _multiprocessors(slots))
    maxima_kernel[(programs,)](
        hidden_argument, weight_argument, *results, *schedule[2:6], schedule.ends, len(schedule.ends), first_term,
        first_term + terms, rows.stride(0), dim, configuration.terms, configuration.slots, block,
        SUPERTILE, results[1].numel() > 0,
        float32_precision(slots), configuration.descriptors,
        num_warps=configuration.warps, num_stages=configuration.stages,
    )  # fmt: skip


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _configuration(hidden: Tensor, weight: Tensor) -> Configuration:
    """The configuration for a model on its GPU: all its batches run the same one."""
    if interpreted():
        return INTERPRETED
    limit = triton.runtime.driver.active.utils.get_device_properties(hidden.device.index)["max_shared_mem"]
    major, _ = torch.cuda.get_device_capability(hidden.device)
    return fitting(limit, major, hidden.element_size(), TensorDescriptor is not None and _is_aligned(hidden, weight))


def fitting(shared_bytes: int, major: int, element_bytes: int, is_aligned: bool) -> Configuration:
    """The first configuration that a GPU can run; the last one runs on all that `dispatch` lets through.

    Args:
        shared_bytes: Shared memory that a program may have.
        major: Of its compute capability.
        element_bytes: Of a hidden state's number.
        is_aligned: Whether TMA can read hidden states and LM head.
    """
    # Compute capability 9 and 10 multiply from shared memory; others, and float32, need registers for the operands.
    few_logits = major not in (9, 10) or element_bytes > 2
    for configuration in CONFIGURATIONS[:-1]:
        is_possible = not configuration.descriptors or (is_aligned and major >= 9)
        has_registers = configuration.logits_per_thread <= 64 or not few_logits
        if is_possible and has_registers and configuration.shared_bytes <= shared_bytes:
            return configuration
    return CONFIGURATIONS[-1]


def _is_aligned(hidden: Tensor, weight: Tensor) -> bool:
    """Whether TMA can read blocks of both: of rows of a step's bytes at least, that begin at multiples of 16 bytes."""
    row = hidden.shape[1] * hidden.element_size()
    cast = weight.dtype != hidden.dtype  # to memory of its own
    strides = row if cast else weight.stride(0) * weight.element_size()
    return row >= ROW_BYTES and row % 16 == 0 and strides % 16 == 0 and (cast or weight.data_ptr() % 16 == 0)


def float32_precision(tensor: Tensor) -> str:
    """How Triton multiplies float32."""
    if torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if tensor.is_cuda else "ieee"


def _slab_terms(tiles: int, weight: Tensor, dtype: torch.dtype, with_positions: bool) -> int:
    """Terms of a launch, in equal parts, whose partial maxima and cast rows of the LM head fit in their limits."""
    terms, dim = weight.shape
    most = PARTIAL_BYTES // (2 * tiles * (8 if with_positions else 4))
    if weight.dtype != dtype:
        most = min(most, CAST_BYTES // (dim * dtype.itemsize))
    return triton.cdiv(triton.cdiv(terms, triton.cdiv(terms, max(256, most))), 256) * 256


def _multiprocessors(tensor: Tensor) -> int:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


def _rows_contiguous(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
