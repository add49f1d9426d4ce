"""What all backends share: their input, the activation of a maximum, and its slope recovered from the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What the `forward` of a backend reads: packed tokens and an LM head."""

    hidden: Tensor  # [T, D], whose dtype the products are computed in
    weight: Tensor  # [V, D], cast a tile or slab of terms at a time if its dtype is another
    bias: Tensor | None  # [V]
    bounds: Tensor  # where each text begins, and the end [B + 1], int32
    scale: float  # factor on the products
    softcap: float | None  # limit of the logits


class Gradients(NamedTuple):
    """Gradients that a backend computed, None where none was asked for."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]


class Pooled(NamedTuple):
    """A forward pass: what it read and returned, as its backward pass needs it."""

    values: Tensor  # [B, V]
    positions: Tensor  # row of `hidden` that each came from [B, V], int32
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bounds: Tensor  # where each text begins, and the end [B + 1], int32
    scale: float
    softcap: float | None


def activate(maxima: Tensor, scale: float, bias: Tensor | None, softcap: float | None) -> Tensor:
    """log1p(relu(softcap(scale * maxima + bias))), in place."""
    maxima *= scale
    if bias is not None:
        maxima += bias
    if softcap is not None:
        maxima.div_(softcap).tanh_().mul_(softcap)
    return maxima.relu_().log1p_()


def slope(values: Tensor, softcap: float | None) -> Tensor:
    """Derivative of a value by its logit before softcap, from the value alone; 0 where the term is not active."""
    slopes = torch.exp(-values)
    if softcap is not None:
        slopes *= 1 - (torch.expm1(values) / softcap) ** 2
    return slopes.masked_fill_(values <= 0, 0)
