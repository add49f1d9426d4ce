"""Choosing and compiling the GPU kernels before the first text comes."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

from lion_st.kernels.dispatch import choose_backend

logger = logging.getLogger(__name__)


def pretune(
    model_or_shapes: nn.Module | Iterable[tuple[int, int]],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cuda",
) -> dict[Hashable, dict[str, float]]:
    """Compile the sparse head's kernels for models and choose their configurations, before the first text comes.

    Both would happen at the first call of each model, and take some ten seconds on a machine that has never run it.
    The choice is kept in the user's cache folder (`$XDG_CACHE_HOME/lion_st`, else `~/.cache/lion_st`), the compiled
    kernels in Triton's.

    Args:
        model_or_shapes: A model with an `lm_head`, on its GPU; or hidden sizes and vocabulary sizes (D, V).
        dtype: Of the hidden states; the LM head's own by default, and bfloat16 for shapes.
        device: Where shapes are tuned.

    Returns:
        Milliseconds of each configuration that was measured now, for each key; empty if all choices were known, or if
        the device runs another backend than Triton.

    Raises:
        ValueError: If the model has no LM head, or a shape is not two positive numbers.

    Example:
        ::

            lion_st.kernels.pretune(model)
            lion_st.kernels.pretune([(2048, 128_256), (4096, 128_256)])
    """
    if isinstance(model_or_shapes, nn.Module):
        weight = _lm_head_weight(model_or_shapes)
        weights = iter([weight])
        device = weight.device
    else:
        shapes = [tuple(shape) for shape in model_or_shapes]
        for shape in shapes:
            if len(shape) != 2 or min(shape) < 1:
                raise ValueError(f"A shape is a hidden size and a vocabulary size, got {shape!r}.")
        dtype = dtype or torch.bfloat16
        weights = (torch.randn(terms, dim, device=device, dtype=dtype) for dim, terms in shapes)
    if choose_backend(torch.device(device)) != "triton":
        logger.info("There is nothing to tune on %s, where the sparse head does not run in Triton.", device)
        return {}
    from lion_st.kernels import triton_backend

    known = set(triton_backend._TUNER.times)
    for weight in weights:
        triton_backend.pretune(weight, dtype or weight.dtype)
    return {
        key: {repr(configuration): time for configuration, time in times.items()}
        for key, times in triton_backend._TUNER.times.items()
        if key not in known
    }


def _lm_head_weight(model: nn.Module) -> Tensor:
    for module in model.modules():
        weight = getattr(getattr(module, "lm_head", None), "weight", None)
        if isinstance(weight, Tensor):
            return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()
    raise ValueError(f"{type(model).__name__} has no module with an lm_head; pretune sparse models, or give shapes.")
