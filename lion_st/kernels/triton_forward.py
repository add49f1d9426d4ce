"""Triton kernels of the sparse head's forward pass.

A tile of logits is [terms, slots], so that a maximum over tokens stays inside the threads that computed them. Every
text begins at a multiple of 8 slots, its last token repeated up to the next multiple: repeats never win a maximum, ties
go to the first, and no mask is needed. A group of 8 slots is reduced in registers, whatever the texts are; a segmented
scan over a tile's groups then leaves each text's maximum at its last group. A text that lies in several tiles has one
partial maximum in each, which a second, small kernel merges in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8  # slots that belong to one text; of 4, there is less padding, and half as much again to reduce


@triton.jit(do_not_specialize=["texts", "tokens"])
def schedule_kernel(
    bounds, ends, order, group_text, group_first, group_last, group_start, texts, tokens, terms, partial_terms,
    TILE: tl.constexpr,
):  # fmt: skip
    """What each group of 8 slots holds, and where its text's maximum goes; one program a tile.

    Args:
        bounds: Where each text begins, and the end [texts + 1].
        ends: Group after the last one of each text [texts].
        order: Token of each slot [slots], written in the order of the tile's columns.
        group_text: Text of each group, `texts` after the last [groups].
        group_first: Token of its first slot [groups].
        group_last: Last token of its text [groups].
        group_start: Where to write the text's maxima, if they are complete with this group [groups]: twice the offset
            of their row in the result; or twice that in the partial maxima and 1, where the text lies in other tiles
            too; -1 for nowhere. A tile has two rows of partial maxima: 2 * tile for the text that an earlier tile
            began, and 2 * tile + 1 for the one that a later tile ends.
        texts: Number of texts.
        tokens: Number of tokens.
        terms: Width of the result.
        partial_terms: Width of the partial maxima.
        TILE: Slots of a tile.
    """
    GROUPS: tl.constexpr = TILE // 8
    tile = tl.program_id(0)
    group = tile * GROUPS + tl.arange(0, GROUPS)
    text = tl.zeros((GROUPS,), tl.int32)
    stop = tl.zeros((GROUPS,), tl.int32) + texts
    while tl.max(stop - text, 0) > 0:  # the first text that ends after the group
        middle = (text + stop) // 2
        after = tl.load(ends + tl.minimum(middle, texts - 1)) <= group
        open_ = text < stop
        text = tl.where(open_ & after, middle + 1, text)
        stop = tl.where(open_ & (after == 0), middle, stop)
    real = text < texts
    begin = tl.load(ends + text - 1, mask=real & (text > 0), other=0)
    end = tl.load(ends + text, mask=real, other=0)
    first = tl.load(bounds + text, mask=real, other=0) + (group - begin) * 8
    last = tl.load(bounds + text + 1, mask=real, other=1) - 1
    closes = real & ((group + 1 == end) | (group % GROUPS == GROUPS - 1))
    continues, goes_on = begin < tile * GROUPS, end > tile * GROUPS + GROUPS
    partial_row = 2 * tile + tl.where(continues, 0, 1)
    partial_start = partial_row.to(tl.int64) * partial_terms * 2 + 1
    start = tl.where(continues | goes_on, partial_start, text.to(tl.int64) * terms * 2)
    tl.store(group_text + group, text)
    tl.store(group_first + group, first)
    tl.store(group_last + group, last)
    tl.store(group_start + group, tl.where(closes, start, -1))
    # Slot s of group GROUPS // 4 * lane + chunk is column 32 * chunk + 8 * (s // 2) + 2 * lane + s % 2: a thread
    # of a matrix unit holds columns 2 * lane and 2 * lane + 1 of every eight.
    slot = tl.arange(0, 8)
    local = tl.arange(0, GROUPS)
    chunk, lane = local % (GROUPS // 4), local // (GROUPS // 4)
    column = (32 * chunk + 2 * lane)[:, None] + (8 * (slot // 2) + slot % 2)[None, :]
    token = tl.minimum(tl.minimum(first[:, None] + slot[None, :], last[:, None]), tokens - 1)
    tl.store(order + tile * TILE + column, tl.where(real[:, None], token, 0))


@triton.jit
def _larger(value, place, other, other_place):
    """The larger of two and its place: the first of equals, NaN if either is."""
    places = tl.where(other > value, other_place, place)
    return tl.maximum(value, other, propagate_nan=tl.PropagateNan.ALL), places


@triton.jit
def _fold(values, places, step: tl.constexpr):
    """Maxima over the last dimension, of size 2; places in its second half are `step` later."""
    left, right = tl.split(values)
    left_places, right_places = tl.split(places)
    return _larger(left, left_places, right, right_places + step)


@triton.jit
def _group_maxima(logits, TERMS: tl.constexpr, TILE: tl.constexpr):
    """Maximum of each group and its slot [TERMS, TILE / 8], from logits [TERMS, TILE]."""
    CHUNKS: tl.constexpr = TILE // 32
    values = tl.reshape(logits, (TERMS, CHUNKS, 2, 2, 4, 2))  # terms, chunk, two bits of the slot, lane, its lowest bit
    places = tl.zeros((TERMS, CHUNKS, 2, 2, 4, 2), tl.int32)
    values, places = _fold(values, places, 1)
    values, places = _fold(tl.permute(values, (0, 1, 2, 4, 3)), tl.permute(places, (0, 1, 2, 4, 3)), 2)
    values, places = _fold(tl.permute(values, (0, 1, 3, 2)), tl.permute(places, (0, 1, 3, 2)), 4)
    values, places = tl.permute(values, (0, 2, 1)), tl.permute(places, (0, 2, 1))
    return tl.reshape(values, (TERMS, 4 * CHUNKS)), tl.reshape(places, (TERMS, 4 * CHUNKS))


@triton.jit
def _join(value, place, text, other, other_place, other_text):
    """`_larger` where both are of one text, else the second: scans a maximum that begins anew with each text."""
    is_same = text == other_text
    values, places = _larger(value, place, other, other_place)
    return tl.where(is_same, values, other), tl.where(is_same, places, other_place), other_text


@triton.jit
def _join_values(value, text, other, other_text):
    """`_join` without places."""
    values = tl.maximum(value, other, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(text == other_text, values, other), other_text


# Term counts stay unspecialized: known to be multiples of 16 they would make the stores of several terms a thread, in a
# layout that spreads a tile's groups over the warps, and the scan would go through shared memory.
@triton.jit(do_not_specialize=["texts", "first_term", "last_term"])
def maxima_kernel(
    hidden, weight, values, positions, partial_values, partial_positions, group_text, group_first, group_last,
    group_start, ends, texts, first_term, last_term, weight_stride,
    DIM: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, BLOCK_DIM: tl.constexpr, SUPERTILE: tl.constexpr,
    WITH_POSITIONS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Largest logit of each text and its token, for terms `first_term` to `last_term`, by any number of programs.

    Args:
        hidden: Hidden states of the slots [slots, DIM], contiguous; a pointer or a descriptor of blocks
            [TILE, BLOCK_DIM].
        weight: The terms' rows of the LM head [last_term - first_term, DIM], of the dtype of `hidden`; a pointer or a
            descriptor of blocks [TERMS, BLOCK_DIM].
        values: Written where a text lies in one tile [texts, terms].
        positions: As `values`.
        partial_values: Written where it does not [2 * tiles, partial_terms].
        partial_positions: As `partial_values`.
        group_text: These four as `schedule_kernel` wrote them.
        group_first: See there.
        group_last: See there.
        group_start: See there.
        ends: See there.
        texts: Number of texts, at least 1.
        first_term: First term.
        last_term: Term after the last.
        weight_stride: Elements from one row of `weight` to the next.
        DIM: Hidden size.
        TERMS: Terms of a tile.
        TILE: Slots of a tile.
        BLOCK_DIM: Hidden dimensions of a step.
        SUPERTILE: Tiles of the vocabulary that are computed for all tokens before the next ones, to stay in the cache.
        WITH_POSITIONS: Also write positions.
        PRECISION: How float32 is multiplied: "tf32", "tf32x3" or "ieee".
        DESCRIPTORS: `hidden` and `weight` are descriptors, and a program's tiles make one pipeline.
    """
    GROUPS: tl.constexpr = TILE // 8
    tiles = tl.cdiv(tl.load(ends + texts - 1), GROUPS)
    term_tiles = tl.cdiv(last_term - first_term, TERMS)
    for index in tl.range(tl.program_id(0), tiles * term_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        supertile = index // (SUPERTILE * tiles)
        width = tl.minimum(term_tiles - supertile * SUPERTILE, SUPERTILE)
        inside = index - supertile * SUPERTILE * tiles
        tile = inside // width
        corner = (supertile * SUPERTILE + inside % width) * TERMS
        term = first_term + corner + tl.arange(0, TERMS)
        logits = tl.zeros((TERMS, TILE), tl.float32)
        if DESCRIPTORS:
            for step in tl.range(0, DIM, BLOCK_DIM):
                tokens = hidden.load([tile * TILE, step])
                rows = weight.load([corner, step])
                logits = tl.dot(rows, tokens.T, logits, input_precision=PRECISION)
        else:
            dim = tl.arange(0, BLOCK_DIM)
            slot = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
            row = tl.minimum(corner + tl.arange(0, TERMS), last_term - first_term - 1).to(tl.int64)
            for step in tl.range(0, DIM, BLOCK_DIM):
                token_pointers = hidden + slot[None, :] * DIM + (step + dim)[:, None]
                row_pointers = weight + row[:, None] * weight_stride + (step + dim)[None, :]
                if DIM % BLOCK_DIM == 0:
                    tokens = tl.load(token_pointers)
                    rows = tl.load(row_pointers)
                else:
                    tokens = tl.load(token_pointers, mask=(step + dim < DIM)[:, None], other=0)
                    rows = tl.load(row_pointers, mask=(step + dim < DIM)[None, :], other=0)
                logits = tl.dot(rows, tokens, logits, input_precision=PRECISION)
        group = tile * GROUPS + tl.arange(0, GROUPS)
        text = tl.load(group_text + group)  # before the products they would take registers that those need
        first = tl.load(group_first + group)
        last = tl.load(group_last + group)
        start = tl.load(group_start + group)
        best, place = _group_maxima(logits, TERMS, TILE)
        texts_of = tl.broadcast_to(text[None, :], (TERMS, GROUPS))
        if WITH_POSITIONS:
            place = tl.minimum(first[None, :] + place, last[None, :])
            best, place, _ = tl.associative_scan((best, place, texts_of), 1, _join)
        else:
            best, _ = tl.associative_scan((best, texts_of), 1, _join_values)
        offset = (start >> 1)[None, :] + term[:, None]
        mask = (start != -1)[None, :] & (term < last_term)[:, None]
        target = tl.where((start & 1) == 1, partial_values - first_term, values)
        tl.store(target[None, :] + offset, best, mask=mask)
        if WITH_POSITIONS:
            target = tl.where((start & 1) == 1, partial_positions - first_term, positions)
            tl.store(target[None, :] + offset, place, mask=mask)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent for x >= 0, with a small relative error near 0 too."""
    small = tl.minimum(x, 1.0)
    square = small * small
    near = small * (10395 + square * (1260 + 21 * square)) / (10395 + square * (4725 + square * (210 + square)))
    decay = tl.exp(-2 * x)
    return tl.where(x < 1, near, (1 - decay) / (1 + decay))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, with a small relative error near 0 too."""
    half = x / (x + 2)
    square = half * half
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13 + square * (1 / 15)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return tl.where(x < 1, 2 * half * series, tl.log(1 + x))


@triton.jit
def finish_kernel(
    values, positions, partial_values, partial_positions, ends, bias, first_term, last_term, terms, partial_terms,
    scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_POSITIONS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the maxima of texts that lie in several tiles, and apply scale, bias, softcap, relu and log1p to all."""
    text = tl.program_id(0)
    term = first_term + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = term < last_term
    begin = tl.load(ends + text - 1, mask=text > 0, other=0)
    end = tl.load(ends + text)
    first = begin // GROUPS
    last = (end - 1) // GROUPS
    target = text.to(tl.int64) * terms + term
    is_whole = term < tl.where((begin < end) & (first == last), last_term, 0)
    best = tl.load(values + target, mask=is_whole, other=float("-inf"))
    place = tl.full((BLOCK,), -1, tl.int32)
    for tile in range(first, tl.where((begin < end) & (first < last), last + 1, first)):
        row = 2 * tile + (tile == first).to(tl.int32)
        source = row.to(tl.int64) * partial_terms + (term - first_term)
        other = tl.load(partial_values + source, mask=inside, other=float("-inf"))
        if WITH_POSITIONS:
            other_place = tl.load(partial_positions + source, mask=inside, other=-1)
            place = tl.where((other > best) | (place < 0), other_place, place)  # NaN has a place too
        best = tl.maximum(best, other, propagate_nan=tl.PropagateNan.ALL)
    logits = best * scale
    if HAS_BIAS:
        logits += tl.load(bias + term, mask=inside, other=0).to(tl.float32)
    logits = tl.maximum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HAS_SOFTCAP:
        logits = softcap * _tanh(logits / softcap)
    tl.store(values + target, tl.where(begin < end, _log1p(logits), 0.0), mask=inside)
    if WITH_POSITIONS:
        tl.store(positions + target, place, mask=inside & (is_whole == 0))
