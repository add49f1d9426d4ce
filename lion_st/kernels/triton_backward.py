"""The sparse head's backward pass on GPUs: active terms sorted by token, and rows of the LM head summed in segments.

Each active term adds one row of the LM head, times a coefficient, to the gradient of one token, and one hidden state to
the gradient of one row. Both are sums of table rows over sorted segments, done by one kernel without atomics: one
program owns a stretch of the sum and adds in the order of the entries, so that results do not depend on the schedule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_st.kernels.gradients import Pooled, slope

SLAB_ENTRIES = 2**24  # entries of [B, V] that are sorted at a time
SHORTEST_PIECE = 256  # entries that one program adds; more where there are many
MOST_PIECES = 4096  # of split segments, each of which holds a row of partial sums
COLUMNS = 256  # that a program sums
CACHE_BYTES = 20 * 2**20  # of a table's columns that stay in a GPU's cache while all programs read them


@triton.jit
def sum_rows_kernel(
    table, row, coefficient, starts, piece_segment, piece_first, split_first, sums, partial_sums, pieces, piece_length,
    stride, DIM: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums of table rows over segments of entries, each entry times its coefficient.

    Args:
        table: [rows, DIM], of which each row is contiguous.
        row: Row of each entry [entries].
        coefficient: Factor of each entry [entries].
        starts: First entry of each segment, and the end [segments + 1].
        piece_segment: Segment of each piece, if some segments are split.
        piece_first: First piece of each segment, and the end [segments + 1].
        split_first: Row of `partial_sums` for a segment's first piece [segments].
        sums: Written for segments of one piece [segments, DIM].
        partial_sums: Written for the others, a row a piece [..., DIM].
        pieces: Pointer to the number of pieces.
        piece_length: Entries of a piece.
        stride: Elements from one row of the table to the next.
        DIM: Columns.
        BLOCK: Columns of a program.
        SPLIT: Segments may have several pieces or none; else each has one.
    """
    piece = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    total = piece + 1
    if SPLIT:
        total = tl.load(pieces)
    if piece < total:
        segment = piece
        begin = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
        target = sums + segment.to(tl.int64) * DIM + column
        if SPLIT:
            segment = tl.load(piece_segment + piece)
            first = tl.load(piece_first + segment)
            is_whole = tl.load(piece_first + segment + 1) - first == 1
            begin = tl.load(starts + segment) + (piece - first) * piece_length
            end = tl.minimum(begin + piece_length, tl.load(starts + segment + 1))
            target = sums + segment.to(tl.int64) * DIM + column
            partial_row = tl.load(split_first + segment) + piece - first
        total_sum = tl.zeros((BLOCK,), tl.float32)
        for start in range(begin, end, 8):  # 8 rows on their way at a time, added in the order of the entries
            for ahead in tl.static_range(8):
                entry = tl.minimum(start + ahead, end - 1)
                source = tl.load(row + entry).to(tl.int64) * stride
                factor = tl.load(coefficient + entry)
                values = tl.load(
                    table + source + column, mask=column < tl.where(start + ahead < end, DIM, 0), other=0.0
                )
                total_sum += factor * values.to(tl.float32)
        if SPLIT:
            tl.store(target, total_sum.to(sums.dtype.element_ty), mask=column < tl.where(is_whole, DIM, 0))
            partial = partial_sums + partial_row.to(tl.int64) * DIM + column
            tl.store(partial, total_sum, mask=column < tl.where(is_whole, 0, DIM))
        else:
            tl.store(target, total_sum.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def merge_sums_kernel(partial_sums, piece_first, split_first, sums, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the partial sums of each segment that has several pieces, in order; 0 for one that has none."""
    segment = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < DIM
    count = tl.load(piece_first + segment + 1) - tl.load(piece_first + segment)
    if count != 1:
        source = partial_sums + tl.load(split_first + segment).to(tl.int64) * DIM + column
        total = tl.zeros((BLOCK,), tl.float32)
        for piece in range(count):
            total += tl.load(source + tl.cast(piece, tl.int64) * DIM, mask=inside, other=0.0)
        target = sums + segment.to(tl.int64) * DIM + column
        tl.store(target, total.to(sums.dtype.element_ty), mask=inside)


def hidden_gradient(grad: Tensor, pooled: Pooled) -> Tensor:
    """Gradient of `hidden` [T, D]: for each token, rows of `weight` summed over the terms whose maximum it is."""
    values, positions, hidden, weight, bounds, scale, softcap = pooled
    texts, terms = values.shape
    result = torch.zeros_like(hidden)
    step = max(1, SLAB_ENTRIES // terms)
    edges = [0] if step >= texts else bounds[:-1:step].tolist()  # waits for the GPU, as `nonzero` will anyway
    edges.append(len(hidden))
    for number, low in enumerate(range(0, texts, step)):
        high = min(texts, low + step)
        first, last = edges[number : number + 2]
        # Waits for the GPU: the number of entries decides what is allocated, which else would be for all of [B, V].
        where = active(grad[low:high], values[low:high]).flatten().nonzero()[:, 0]
        tokens, order = positions[low:high].flatten()[where].sort(stable=True)
        where = where[order]
        factor = coefficients(grad[low:high].flatten()[where], values[low:high].flatten()[where], scale, softcap)
        starts = torch.searchsorted(tokens, torch.arange(first, last + 1, device=tokens.device, dtype=tokens.dtype))
        sum_rows(weight, (where % terms).int(), factor, starts.int(), result[first:last], most=terms)
    return result


def weight_gradient(grad: Tensor, pooled: Pooled) -> Tensor:
    """Gradient of `weight` [V, D]: for each term, hidden states summed over the texts in which it is active."""
    values, positions, hidden, weight, _, scale, softcap = pooled
    texts, terms = values.shape
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    step = max(1, SLAB_ENTRIES // max(1, texts))
    for low in range(0, terms, step):
        span = slice(low, min(terms, low + step))
        is_active = active(grad[:, span], values[:, span])
        counts = torch.nn.functional.pad(is_active.sum(0, dtype=torch.int32).cumsum(0), (1, 0)).int()
        term, text = is_active.T.nonzero(as_tuple=True)  # by term, then by text; waits for the GPU, as above
        term += low
        factor = coefficients(grad[text, term], values[text, term], scale, softcap)
        sum_rows(hidden, positions[text, term], factor, counts, result[span], most=texts)
    return result


def active(grad: Tensor, values: Tensor) -> Tensor:
    """Where a gradient passes relu. NaN passes, so that whoever looks at gradients sees it."""
    return ~(values <= 0) & (grad != 0)


def coefficients(grad: Tensor, values: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Gradient by the products h . W."""
    return grad.float() * slope(values, softcap) * scale


def sum_rows(table: Tensor, row: Tensor, coefficient: Tensor, starts: Tensor, sums: Tensor, most: int) -> None:
    """Write sums over segments of entries, each the table's row times the coefficient, to `sums`.

    Args:
        table: [rows, D].
        row: Row of each entry, int32.
        coefficient: Factor of each entry, float32.
        starts: First entry of each segment, and the end [segments + 1], int32.
        sums: [segments, D], contiguous; 0 for a segment without entries.
        most: Largest number of entries that a segment can have.
    """
    entries, segments, dim = len(row), len(starts) - 1, table.shape[1]
    if not segments:
        return
    length = max(SHORTEST_PIECE, triton.next_power_of_2(2 * entries // MOST_PIECES))
    splits = min(entries, most) > length
    piece_segment = piece_first = split_first = starts
    partial_sums, launched = sums, segments
    if splits:
        pieces = starts.diff().add_(length - 1).floor_divide_(length)
        piece_first = torch.nn.functional.pad(pieces.cumsum(0), (1, 0)).int()
        split = torch.where(pieces > 1, pieces, 0)
        split_first = (split.cumsum(0) - split).int()
        launched = min(entries, segments + entries // length)
        number = torch.arange(launched, device=starts.device, dtype=torch.int32)
        piece_segment = torch.searchsorted(piece_first[1:], number, right=True, out_int32=True)
        partial_sums = sums.new_empty(2 * entries // length + 1, dim, dtype=torch.float32)

    columns = program_columns(table, entries)
    grid = (launched, triton.cdiv(dim, columns))
    sum_rows_kernel[grid](
        table, row, coefficient, starts, piece_segment, piece_first, split_first, sums, partial_sums,
        piece_first[-1:], length, table.stride(0), dim, columns, splits, num_warps=1,
    )  # fmt: skip
    if splits:
        merge_sums_kernel[segments, grid[1]](partial_sums, piece_first, split_first, sums, dim, columns, num_warps=1)


def program_columns(table: Tensor, entries: int) -> int:
    """Columns that a program sums, which change nothing in the result.

    Programs of the same columns run together, and those of the next ones after them. Where each row is read several
    times, the columns are so few that they stay in the GPU's cache until all programs have read them: each row then
    comes from memory once, whatever the number of entries.
    """
    columns, rows = COLUMNS, table.shape[0]
    if entries > 4 * rows:
        while rows * columns * table.element_size() > CACHE_BYTES and columns * table.element_size() > 128:
            columns //= 2
    return columns
