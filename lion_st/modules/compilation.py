"""torch.compile of a backbone's decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lion_st.hooks import allow_compilations, forget_compiled, inductor_options, layer_classes

# Of one function: with and without gradients of input and weights, packed and padded, one text and several, evaluating.
MOST_COMPILATIONS = 64


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model, first to last."""
    names = layer_classes(model)
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"{type(model).__name__} does not say which of its modules are its layers.")
    return layers


def compile_layers(model: PreTrainedModel, backend: str = "inductor", mode: str | None = None) -> None:
    """Have torch.compile take each decoder layer by itself, in place: names of weights and hooks stay as they are.

    All layers share their compiled code, and lengths of texts are variables in it, so that a few compilations serve
    all batches. Embeddings, the final norm and the LM head stay as they are: the sparse head has its own kernels.

    Compiled dropout draws the numbers that eager dropout does. Gradient caching and recomputed activations repeat a
    forward pass, which torch may have compiled in one of the two passes alone: with numbers of its own the two would
    have different dropout, and the gradient would be wrong.

    Raises:
        ValueError: If the architecture does not say what its layers are.
    """
    allow_compilations(MOST_COMPILATIONS)
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options, mode = {**inductor_options(mode or "default"), "fallback_random": True}, None
    for layer in decoder_layers(model):
        layer.compile(backend=backend, mode=mode, options=options, dynamic=True)


def release_layers(model: PreTrainedModel) -> None:
    """Run the decoder layers as they were before `compile_layers`, whatever they are wrapped in by now."""
    for module in model.modules():
        forget_compiled(module)
