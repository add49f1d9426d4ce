"""PEFT adapters inside a transformers model: attach, load, merge, and read merged weights without merging."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lion_st.files import hub_options, read_json
from lion_st.hooks import mark_adapter
from lion_st.modules.quantization import dequantized, is_four_bit, on_plain_weights

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

SETTINGS = "sentence_bert_config.json"  # of a transformer module
TOKENS = ".token_adapter"  # end of the name of a layer that trains some tokens' embeddings, in a wrapper of its own


def attach_adapter(model: PreTrainedModel, config: PeftConfig, revision: str | None = None) -> None:
    """Attach a new adapter whose weights are float32 whatever the model's, and record the base it belongs to.

    Args:
        model: The base model, changed in place.
        config: PEFT configuration. It is copied, so that one configuration serves many models.
        revision: Hub revision of the base model, saved in the adapter's configuration.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    config = copy.deepcopy(config)
    base = Path(str(model.name_or_path))
    config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(model.name_or_path)
    config.revision = revision
    # peft's own function, as model.add_adapter of transformers 5.24 asks for a peft that is not released.
    inject_adapter_in_model(config, model, "default")
    mark_adapter(model, True)
    cast_adapter_dtype(model, "default", autocast_adapter_dtype=True)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Save the attached adapter alone, as `PeftModel.save_pretrained` does."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name = active_adapter(model)
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    vocabulary = {id(weight): name for name, weight in reversed(_vocabulary_weights(model).items())}
    tied = _vocabulary_weights(model).keys() - vocabulary.values()  # PEFT names them where there are more tokens
    named = {
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if name not in tied
    }
    save_file(named, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(str(folder))


def active_adapter(model: PreTrainedModel) -> str:
    """The name of the adapter that the model runs, the one that is saved."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    names = next((layer.active_adapters for layer in layers), list(model.peft_config))
    if len(names) != 1:
        raise ValueError(
            f"The model runs the adapters {names}, and a checkpoint holds one: choose it with model.set_adapter, or "
            "write them merged with lion_st.export."
        )
    return names[0]


def saved_module(module: Any) -> Any:
    """The module that takes another one's place where an adapter names it in `modules_to_save`; any other itself."""
    if type(module).__name__ != "ModulesToSaveWrapper":  # of peft, whose import takes seconds
        return module
    return module.modules_to_save[module.active_adapters[0]]


def without_wrapper(model: Any) -> Any:
    """The model inside of a `PeftModel`, which has the adapter in its layers; any other as it is."""
    if not type(model).__module__.startswith("peft."):
        return model
    inner, config = model.get_base_model(), model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} puts virtual tokens in front of texts: take LoRA or its like.")
    inner.peft_config = model.peft_config
    mark_adapter(inner, True)
    return inner


def load_adapter_weights(model: PreTrainedModel, source: str, **hub_options: Any) -> None:
    """Load saved adapter weights into the adapter attached to the model.

    A key's prefix says only which class the adapter was trained on; the keys are fitted to this model, with or
    without an LM head around its decoder.

    Args:
        model: Model with an attached adapter, changed in place.
        source: Adapter folder or Hub repository; safetensors, or a `.bin` read with `weights_only`.
        hub_options: `token`, `revision`, `cache_dir`, ... of the download.

    Raises:
        ValueError: If the weights are not exactly those the adapter's configuration asks for.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from peft.utils.save_and_load import get_peft_model_state_dict

    inner = f"{model.base_model_prefix}."
    prefix = inner if hasattr(model, model.base_model_prefix) else ""

    def fitted(key: str) -> str:
        key = key.removeprefix("base_model.model.").removeprefix(inner)
        return key if key.startswith("lm_head.") else prefix + key

    saved = {fitted(key): tensor for key, tensor in load_peft_weights(source, device="cpu", **hub_options).items()}
    _load_larger_vocabulary(model, saved)
    vocabulary = _vocabulary_weights(model)
    saved = {key: tensor for key, tensor in saved.items() if key not in vocabulary}
    expected = {key: tensor for key, tensor in get_peft_model_state_dict(model).items() if key not in vocabulary}
    missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    mismatched = [key for key in expected.keys() & saved.keys() if expected[key].shape != saved[key].shape]
    raise_on_wrong_weights(source, missing, unexpected, mismatched)
    set_peft_model_state_dict(model, saved)


def _vocabulary_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of embeddings and LM head by name, where no adapter has them."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if any(module is one for one in modules) and not type(module).__module__.startswith("peft.")
    }


@torch.no_grad()
def _load_larger_vocabulary(model: PreTrainedModel, saved: dict[str, torch.Tensor]) -> None:
    """Give a model the embeddings and LM head that PEFT saves with an adapter whose base was given more tokens."""
    there = saved.keys() & _vocabulary_weights(model).keys()
    for key in sorted(there):
        if len(saved[key]) != len(_vocabulary_weights(model)[key]):
            model.resize_token_embeddings(len(saved[key]), mean_resizing=False)
        _vocabulary_weights(model)[key].copy_(saved[key])


def raise_on_wrong_weights(source: str, missing: list[str], unexpected: list[str], mismatched: list[Any]) -> None:
    """Raise if a checkpoint's weights are not those its configuration asks for."""
    problems = [
        f"{len(keys)} {kind} (first: {keys[0]})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if keys
    ]
    if problems:
        raise ValueError(
            f"The weights in {source!r} do not match its configuration: {', '.join(problems)}. "
            "Restore the weights and configuration that were saved together, or build from another backbone."
        )


@torch.no_grad()
def merged_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict of the model with its adapters merged, the model itself left as it is.

    One adapted layer is copied and merged at a time and its result moved to the CPU; every other tensor is shared.
    Weights of 4 bits are given as those that they stand for, which the adapter was trained on.

    Returns:
        Tensors under the names of the same model without adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in model.named_modules():
        if saved_module(module) is not module:
            wrapped[name] = saved_module(module).state_dict()
        elif isinstance(module, BaseTunerLayer):
            layer = on_plain_weights(module) if is_four_bit(module.get_base_layer()) else copy.deepcopy(module)
            layer.merge(safe_merge=True)
            tensors = layer.get_base_layer().state_dict()
            wrapped[name.removesuffix(TOKENS)] = {key: tensor.cpu() for key, tensor in tensors.items()}
            del layer
        elif is_four_bit(module) and not name.endswith(".base_layer"):
            wrapped[name] = {key: tensor.cpu() for key, tensor in dequantized(module).state_dict().items()}
    merged = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in wrapped)
    }
    for module, tensors in wrapped.items():
        merged |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    return merged


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, awaits_weights: bool = False) -> None:
    """Merge the attached adapter into the model's weights and remove it, in place.

    Args:
        model: The model.
        awaits_weights: Whether there are no weights yet to merge into, so that the adapter is only removed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        parent, _, leaf = name.removesuffix(TOKENS).rpartition(".")
        if saved_module(module) is not module:
            setattr(model.get_submodule(parent), leaf, saved_module(module))
        elif isinstance(module, BaseTunerLayer):
            if not awaits_weights:
                module.merge(safe_merge=True)
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    mark_adapter(model, False)
    del model.peft_config


def find_adapter_config(source: str, subfolder: str = "", **hub_options: Any) -> str | None:
    """The file of an adapter's configuration, None if there is none.

    (Before 5.21 transformers' own function passes over the subfolder of a folder on this machine.)
    """
    if Path(source).is_dir():
        source, subfolder = str(Path(source, subfolder)), ""
        if not Path(source).is_dir():
            return None
    return find_adapter_config_file(source, subfolder=subfolder, **hub_options)


def read_adapter_config(source: str, **hub_options: Any) -> PeftConfig:
    """An adapter's configuration: its kind, its layers, its base model."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(source, **hub_options)


def layers_of_base(source: str, **hub_options: Any) -> list[int] | None:
    """Those that an adapter is on, where it was trained on some of its base's alone."""
    file = cached_file(source, SETTINGS, _raise_exceptions_for_missing_entries=False, **hub_options)
    return None if file is None else read_json(file).get("layers")


def base_with_tokenizer(source: str, base: str | None, options: dict[str, Any]) -> tuple[str, str | None] | None:
    """The base model, and its revision, of an adapter that was saved without a tokenizer of its own.

    Args:
        source: Folder or Hub name, of an adapter or of anything else.
        base: Where the base model is, in place of where the adapter says.
        options: What `from_pretrained` is given.
    """
    hub = hub_options({name: value for name, value in options.items() if name != "subfolder"})
    if find_adapter_config_file(source, **hub) is None:
        return None
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub):
        return None
    if base:
        return base, None
    adapter = read_adapter_config(source, **hub)
    return str(adapter.base_model_name_or_path), adapter.revision
