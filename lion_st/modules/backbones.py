"""Which layers of a backbone are kept, and backbones that lie in GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from lion_st.extras import require

GGUF_MAGIC = b"GGUF"
LISTS_BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # a value for each layer, in configurations
LISTS_OF_LAYERS = ("mlp_only_layers", "cross_attention_layers", "full_attention_layers", "attn_layer_indices")


def decoder_of(model: PreTrainedModel) -> Any:
    """A causal LM without its LM head, and a decoder itself.

    `get_decoder` takes the LM head of some for it, which has that name, as in ModernBERT's decoder.
    """
    decoder = model.get_decoder()
    return model.base_model if decoder is model.get_output_embeddings() else decoder


def choose_layers(
    total: int, num_layers: int | None = None, layers: Sequence[int] | None = None
) -> tuple[int, ...] | None:
    """The numbers of the layers to keep, None if all are."""
    if num_layers is not None and layers is not None:
        raise ValueError(f"Give num_layers ({num_layers}) or layers ({list(layers)}), not both.")
    if num_layers is not None:
        if isinstance(num_layers, bool) or not 1 <= num_layers <= total:
            raise ValueError(f"num_layers is {num_layers!r}: the backbone has {total} layers, keep 1 to {total}.")
        layers = range(num_layers)
    if layers is None:
        return None
    kept = tuple(layers)
    wrong = [layer for layer in kept if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < total]
    if wrong or not kept:
        raise ValueError(
            f"layers is {list(kept)}: name at least one of the backbone's {total} layers, 0 to {total - 1}."
        )
    if list(kept) != sorted(set(kept)):
        raise ValueError(f"layers is {list(kept)}: name each layer once, in ascending order.")
    return None if kept == tuple(range(total)) else kept


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Cut a model to some of its layers; its configuration then describes what is left."""
    decoder = decoder_of(model)
    name = next(
        (name for name in ("layers", "h") if isinstance(getattr(decoder, name, None), torch.nn.ModuleList)), None
    )
    if name is None:
        raise ValueError(
            f"{type(model).__name__} does not hold its layers in one list: it cannot be cut to {list(kept)}."
        )
    numbered = [key for key in LISTS_OF_LAYERS if getattr(decoder.config, key, None)]
    if numbered:
        raise ValueError(
            f"{type(model).__name__} numbers layers in its {numbered[0]}: it cannot be cut to {list(kept)}."
        )
    layers = getattr(decoder, name)
    total = len(layers)
    setattr(decoder, name, torch.nn.ModuleList(layers[number] for number in kept))
    for number, layer in enumerate(getattr(decoder, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    for config in {id(part): part for part in (model.config, model.config.get_text_config(), decoder.config)}.values():
        for key in LISTS_BY_LAYER:
            if isinstance(value := getattr(config, key, None), list) and len(value) == total:
                setattr(config, key, [value[number] for number in kept])
        config.num_hidden_layers = len(kept)


def gguf_options(source: str) -> tuple[str, dict[str, str]]:
    """Where transformers finds a backbone: its folder or name, and the GGUF file in it if it is one."""
    if not source.lower().endswith(".gguf"):
        return source, {}
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no GGUF file {source!r}.")
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ValueError(f"{source!r} is not a GGUF file: it does not begin with {GGUF_MAGIC.decode()!r}.")
    require("gguf")
    return str(path.parent), {"gguf_file": path.name}


def unpacked_weights() -> dict[str, Any]:
    """Options of `from_pretrained` for a GGUF file.

    From 5.24 on transformers leaves the weights of some architectures in the file's blocks where it has kernels for
    them, and such layers cannot be trained.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def as_plain_weights(model: PreTrainedModel, source: str) -> None:
    """Make a model that was read from a GGUF file one of ordinary weights, which can be trained and saved."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        if getattr(model, name, value) != value:
            setattr(model, name, value)
    model.name_or_path = source  # what an adapter names as its base
