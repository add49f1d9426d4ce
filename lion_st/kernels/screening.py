"""Maxima of float32 products at the price of bfloat16's: screened in half precision, computed where they can matter.

Some CPUs multiply bfloat16 at twice to sixteen times the speed of float32. Rounding both factors bounds the error of a
product, so that the rounded products tell for certain that most terms of a text are not active, and which few tokens
can hold the maximum of each that may be. Only those products are then computed in float32: the result is float32's own,
from about half the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lion_st.kernels import cpu
from lion_st.kernels.bfloat16 import multiplies_bfloat16

MIN_TOKENS = 512  # fewer leave the casts of the LM head too large a share
MIN_HIDDEN_SIZE = 256
MAX_SHARE = 1 / 32  # of the products, computed again: beyond it a float32 product of all costs less
PATIENCE = 3  # tiles beyond that share, one after the other, that end the screening
FACTOR_ERROR = 2**-7 + 2**-16  # share of a product that rounding both of its factors to bfloat16 changes at most
SUM_ERROR = 2**-23  # the same of a sum in float32, in either order, for each of its terms


class Screen:
    """Texts whose maxima over the terms of an LM head are screened, tile after tile.

    Args:
        tokens: [T, D], float32.
        bounds: Where each text begins, and the end [B + 1], int32.
        floors: Product from which on each term is active [V].
    """

    def __init__(self, tokens: Tensor, bounds: Tensor, floors: Tensor) -> None:
        self.tokens = tokens
        self.bounds = bounds
        self.floors = floors
        self.rounded = tokens.bfloat16()
        norms = torch.linalg.vector_norm(tokens, dim=1)
        self.norms = torch.segment_reduce(norms, "max", lengths=bounds.diff().long(), initial=0)
        self.failures = 0

    def write_maxima(self, rows: Tensor, values: Tensor, positions: Tensor, offset: int, buffer: Tensor) -> bool:
        """Write the maxima of a tile's products and their tokens; -inf and -1 where the term is not active.

        Args:
            rows: Rows of the LM head from term `offset` on [tile, D], float32.
            values: Written [B, V], float32.
            positions: Written [B, V], int32; or empty.
            offset: Term of the first row.
            buffer: Room for T x tile numbers in float32, used as bfloat16.

        Returns:
            Whether they were written; not if too many would have to be computed again.
        """
        if self.failures == PATIENCE:
            return False
        products = buffer.view(torch.bfloat16)[: len(self.rounded) * len(rows)].view(len(self.rounded), len(rows))
        torch.mm(self.rounded, rows.bfloat16().T, out=products)
        cpu.segment_max(products, self.bounds, values, torch.empty(0, 0, dtype=torch.int32), offset)
        errors = torch.linalg.vector_norm(rows, dim=1) * (FACTOR_ERROR + SUM_ERROR * rows.shape[1])
        written = cpu.refine_maxima(
            products, self.tokens, rows, self.bounds, values, positions, offset,
            self.floors[offset : offset + len(rows)], errors, self.norms, int(MAX_SHARE * products.numel()),
        )  # fmt: skip
        self.failures = 0 if written else self.failures + 1
        return written


def can_screen(tokens: Tensor, bounds: Tensor) -> bool:
    """Whether these tokens are worth screening on this machine."""
    return (
        tokens.dtype == torch.float32
        and len(tokens) >= MIN_TOKENS
        and tokens.shape[1] >= MIN_HIDDEN_SIZE
        and int(bounds.diff().max()) < 2**15
        and multiplies_bfloat16()
    )
