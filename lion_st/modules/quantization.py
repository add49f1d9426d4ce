"""Weights of 4 bits (QLoRA): a frozen base of bitsandbytes' NormalFloat4 that an adapter is trained on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from lion_st.extras import require


def four_bit_config(dtype: str | torch.dtype | None) -> BitsAndBytesConfig:
    """NormalFloat4 with constants that are quantized too, computing in the dtype of the weights (QLoRA's own setting).

    The linear layers of the decoder alone are quantized: embeddings, norms and the LM head, which the sparse head
    reads, stay as they are.

    Args:
        dtype: Of the weights on the disk; None for float32.

    Raises:
        ImportError: If bitsandbytes is missing, with the line that installs it.

    References:
        Dettmers et al., QLoRA, 2023: https://arxiv.org/abs/2305.14314.
    """
    require("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


def is_quantized(model: Any) -> bool:
    """Whether a model of transformers has weights of 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def keep_weights(model: PreTrainedModel) -> None:
    """Have bitsandbytes leave the quantized weights as they are when the model encodes on a CPU.

    It would pack them anew and round their constants to bfloat16, in place: other weights than those trained on.
    """
    for module in model.modules():
        if is_four_bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_four_bit(module: nn.Module) -> bool:
    """Whether this is a linear layer of 4 bits."""
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def dequantized(layer: Any) -> nn.Linear:
    """A linear layer with the weights that a layer of 4 bits stands for, in the dtype it was quantized from."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer).to(layer.weight.quant_state.dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


def on_plain_weights(layer: Any) -> Any:
    """A copy of a LoRA layer whose base has 4 bits, on the weights that these stand for.

    peft would quantize the merged weights again, and lose much of what was learned to rounding.
    """
    from peft.tuners.lora.layer import Linear

    base, memo = layer.base_layer, {}
    memo[id(base)] = dequantized(base)
    plain = copy.deepcopy(layer, memo)
    plain.__class__ = Linear
    return plain


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration that says nothing of quantized weights."""
    plain = copy.deepcopy(config)
    if getattr(plain, "quantization_config", None) is not None:
        del plain.quantization_config
    return plain
