"""What a CPU does with bfloat16: some multiply it faster than float32, the others emulate it many times slower."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def warn_of_slow_bfloat16(device_type: str, remedy: str) -> None:
    """Warn of products in bfloat16 on a CPU without instructions for them, and say what gives float32."""
    if device_type == "cpu" and not multiplies_bfloat16():
        logger.warning("This CPU has no instructions for bfloat16 and is several times faster in float32: %s.", remedy)


def warn_of_slow_weights(model: Any) -> None:
    """Warn of a transformers model whose weights are in bfloat16 on such a CPU."""
    if model.dtype == torch.bfloat16:
        warn_of_slow_bfloat16(model.device.type, 'dtype="float32" (--dtype float32)')
