"""Reading a backbone's configuration and weights, with errors that say what does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_TO_AUTO_MODEL
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lion_st.hooks import give_memory
from lion_st.modules.adapters import raise_on_wrong_weights
from lion_st.modules.backbones import as_plain_weights, gguf_options, unpacked_weights
from lion_st.modules.checks import require_layers, saved_names
from lion_st.modules.quantization import four_bit_config, keep_weights

_awaiting: ContextVar[bool] = ContextVar("awaiting", default=False)


@contextmanager
def awaiting_weights() -> Iterator[None]:
    """Build backbones without their weights, which another process reads and sends later.

    Of their files the names, types and shapes are read and compared with the configuration as ever. What is in no file,
    such as the frequencies of rotary positions, is computed. GGUF files are read all the same.
    """
    from accelerate.utils import patch_environment

    # In a process that is not a node's first, transformers computes the buffers of a model on the meta device then.
    with patch_environment(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true"):
        token = _awaiting.set(True)
        try:
            yield
        finally:
            _awaiting.reset(token)


def read_config(source: str, options: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a backbone."""
    folder, gguf = gguf_options(source)
    try:
        return AutoConfig.from_pretrained(folder, **options, **gguf)
    except ValueError as error:
        if not gguf:
            raise
        raise ValueError(
            f"transformers cannot read the GGUF file {source!r}: {error} Convert it, or name the model that it was "
            "made of."
        ) from error


def read_base_config(adapter: str, base: str, revision: str | None, options: dict[str, Any]) -> PretrainedConfig:
    """The configuration of an adapter's base model."""
    options = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    try:
        return read_config(base, options | {"revision": revision})
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The adapter {adapter!r} belongs to the base model {base!r}, which cannot be read "
            f"({str(error).splitlines()[0]}). Fetch that model, or name where it is: "
            'lion_st.load(path, base="path/to/base").'
        ) from error


def load_backbone(task: Any, source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A backbone whose weights are all those that its configuration asks for.

    Args:
        task: `"text-generation"` with its LM head, `"feature-extraction"` without.
        source: Folder, Hub name or GGUF file.
        config: Its configuration.
        options: Of `from_pretrained`. The weights of a GGUF file are bfloat16 unless they name another dtype.
            `load_in_4bit` holds the linear layers in 4 bits, see `lion_st.modules.quantization`.

    Raises:
        ValueError: If weights and configuration do not match, or are quantized already and are to have 4 bits.
        ImportError: If the package that 4 bits need is missing.
    """
    folder, gguf = gguf_options(source)
    options = {key: value for key, value in options.items() if (key, value) != ("revision", None)} | gguf
    if gguf:
        options = unpacked_weights() | options
        if options.get("dtype") in (None, "auto"):
            options["dtype"] = torch.bfloat16
    four_bits = options.pop("load_in_4bit", False)
    if four_bits:
        if gguf or getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"{source!r} is quantized already: load_in_4bit takes weights that are not.")
        dtype = options.get("dtype")
        options["quantization_config"] = four_bit_config(config.dtype if dtype in (None, "auto") else dtype)
    saved = saved_names(folder, options)
    require_layers(config, folder, saved)
    if _awaiting.get() and not gguf:
        options["device_map"] = "meta"  # files are mapped, and what is moved there is not read
    auto_class = TRANSFORMER_TASK_TO_AUTO_MODEL[task]
    try:
        model, report = auto_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"The weights in {source!r} do not match its configuration: {error} Restore the weights and "
            "configuration that were saved together."
        ) from error
    # A backbone's LM head, whatever its name, is rightly left out of a dense model.
    decoder = f"{model.base_model_prefix}." if task == "feature-extraction" else ""
    of_causal_lm = any(name.startswith(decoder) for name in saved)
    unexpected = [
        key
        for key in report["unexpected_keys"]
        if not key.startswith("lm_head.") and (key.startswith(decoder) or not of_causal_lm)
    ]
    raise_on_wrong_weights(
        source, sorted(report["missing_keys"]), sorted(unexpected), sorted(report["mismatched_keys"], key=str)
    )
    if gguf:
        as_plain_weights(model, source)
    if four_bits:
        keep_weights(model)
    return model


def hold_places(model: PreTrainedModel) -> bool:
    """Give a model room for the weights that it was built without, see `awaiting_weights`, if it was.

    Memory that is never written is not taken.

    Returns:
        Whether the weights are missing.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return False
    give_memory(model)
    model.tie_weights()
    return True


@torch.no_grad()
def cast_weights(model: nn.Module, dtype: torch.dtype, awaits_weights: bool = False) -> None:
    """Give a model's weights another dtype, in place.

    Args:
        model: The model.
        dtype: Of the weights.
        awaits_weights: Whether it has only room for them, of which there is to be no copy.
    """
    for parameter in model.parameters():
        room = torch.empty_like(parameter, dtype=dtype) if awaits_weights else None
        parameter.data = parameter.data.to(dtype) if room is None else room
