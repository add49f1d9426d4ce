"""A limit of active terms that is learned: hard in what comes out, soft in its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 0.1  # width of the gate, as a share of k
REACH = 8.0  # in temperatures: terms further behind k have a gate below .0004, which counts as 0


def soft_top_k(values: Tensor, log_k: Tensor, temperature: float = TEMPERATURE, hard: bool = True) -> Tensor:
    r"""The k largest values of each row, the others 0, with a gradient for k.

    The value of rank r, from 1, has the gate g_r = sigmoid((1 - (r - 1/2) / k) / temperature), which is 1/2 between the
    ranks k and k + 1. What comes out is the value where g_r >= 1/2, that is of the first floor(k + 1/2) ranks, as when
    the model encodes; the gradient is that of value * g_r (a straight-through estimator).

    Args:
        values: [N, V], at least 0.
        log_k: ln k, a scalar; k counts as 1 below 1 and as V above V.
        temperature: Width of the gate, as a share of k.
        hard: If False, value * g_r comes out too.

    Returns:
        [N, V].
    """
    k = log_k.exp().clamp(1, values.shape[1])
    reach = min(values.shape[1], math.ceil(k.item() * (1 + REACH * temperature)))  # waits for the GPU
    largest, terms = values.topk(reach, dim=1)
    ranks = torch.arange(1, reach + 1, device=values.device, dtype=torch.promote_types(values.dtype, torch.float32))
    gates = torch.sigmoid((1 - (ranks - 0.5) / k) / temperature)
    kept = largest * gates
    if hard:
        kept = kept + (largest * (gates >= 0.5) - kept).detach()
    return torch.zeros_like(values).scatter(1, terms, kept.to(values.dtype))


def hard_k(log_k: Tensor) -> int:
    """How many terms `soft_top_k` lets through."""
    return max(1, math.floor(log_k.exp().item() + 0.5))
