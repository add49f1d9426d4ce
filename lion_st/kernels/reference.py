"""The sparse head as its definition reads, every logit in memory: what the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def splade_pool_reference(
    hidden: Tensor,
    weight: Tensor,
    bounds: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """log1p(relu(max_i softcap(scale * h_i . W + bias))) over each text's tokens, by plain differentiable operations.

    Args:
        hidden: Real tokens of all texts, one after the other [T, D].
        weight: LM head [V, D].
        bounds: Where each text begins, and the end [B + 1].
        scale: Factor on the products.
        bias: [V].
        softcap: Limit c of the logits, c * tanh(logit / c).

    Returns:
        [B, V]; zeros for a text without tokens.
    """
    logits = (
        hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        @ weight.to(hidden.dtype).to(torch.promote_types(hidden.dtype, torch.float32)).T
    )  # [T, V]
    logits = logits * scale
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    rows = [
        text.amax(0) if len(text) else logits.new_zeros(logits.shape[1])
        for text in logits.split(bounds.diff().tolist())
    ]
    pooled = torch.stack(rows) if rows else logits.new_zeros(0, logits.shape[1])
    return pooled.relu().log1p()
