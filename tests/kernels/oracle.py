"""Random inputs for the sparse head, and what comes of them in float64 by its definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_st.kernels import splade_pool, splade_pool_reference


@dataclass
class Case:
    """Padded hidden states with an LM head."""

    hidden: Tensor  # [B, L, D]
    weight: Tensor  # [V, D]
    mask: Tensor  # [B, L]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None

    @property
    def settings(self) -> dict:
        return {"scale": self.scale, "bias": self.bias, "softcap": self.softcap}

    @property
    def bounds(self) -> Tensor:
        return torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0)).int()

    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def double(self) -> Case:
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().double().requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        )
        return Case(hidden, weight, self.mask, bias, self.scale, self.softcap)

    def expected(self) -> Tensor:
        return splade_pool_reference(self.hidden[self.mask.bool()], self.weight, self.bounds, **self.settings)


def pooled(case: Case) -> Tensor:
    """What the kernels make of a case."""
    return splade_pool(case.hidden, case.weight, case.mask, **case.settings)


def make_case(
    lengths: tuple[int, ...],
    hidden_size: int = 24,
    terms: int = 300,
    *,
    dtype: torch.dtype = torch.float32,
    padding_side: str = "left",
    with_bias: bool = False,
    softcap: float | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A case whose texts have these many real tokens; its tensors require gradients."""
    generator = torch.Generator().manual_seed(seed)
    length = max(lengths, default=1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    mask = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, real in enumerate(lengths):
        if real:
            mask[row, slice(length - real, None) if padding_side == "left" else slice(real)] = 1
    return Case(
        random(len(lengths), length, hidden_size),
        random(terms, hidden_size),
        mask.to(device),
        random(terms) if with_bias else None,
        hidden_size**-0.25,
        softcap,
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference beside the largest expected value."""
    if not expected.numel():
        return 0.0
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
