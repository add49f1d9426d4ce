"""The sparse head's factor on the logits, folded into the final norm so that stock modules compute it."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lion_st.modules.adapters import merged_state_dict, saved_module
from lion_st.modules.backbones import decoder_of
from lion_st.modules.quantization import plain_config

# A checkpoint with its scale folded in keeps the unfolded norm here, so that training resumes to the bit.
RESUME_FILE = "lion_st.safetensors"
ROUNDING = 2**-7  # share of a weight that saving it in half precision changes, and some rest
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm")


def final_norm(model: PreTrainedModel) -> Any:
    """The norm in front of a model's LM head."""
    decoder = decoder_of(model)
    for name in FINAL_NORM_NAMES:
        if isinstance(getattr(getattr(decoder, name, None), "weight", None), torch.Tensor):
            return saved_module(getattr(decoder, name))
    raise ValueError(
        f"{type(model).__name__} has no final norm that a logit scale could be folded into; build the model with "
        "scale=1.0."
    )


@torch.no_grad()
def save_merged(model: PreTrainedModel, folder: str, scale: float = 1.0) -> None:
    """Save a model's weights and configuration with adapters merged and a scale folded in, the model untouched.

    Args:
        model: Model with or without adapters.
        folder: Existing folder.
        scale: Factor on the logits, folded into the final norm. Where the product is not exact in the model's
            dtype, that one tensor is saved in float32.

    Raises:
        ValueError: If the model has no norm that the scale can be folded into.
    """
    weights = merged_state_dict(model)
    if scale != 1.0:
        norm = final_norm(model)
        name = next(name for name, module in model.named_modules() if saved_module(module) is norm)
        for key, tensor in scaled_norm(norm, scale).items():
            weights[f"{name}.{key}"] = tensor
    with torch.device("meta"):
        shell = type(model)(plain_config(model.config))
    shell.load_state_dict(weights, assign=True)
    if shell.can_generate():
        shell.generation_config = model.generation_config
    shell.save_pretrained(folder, max_shard_size="5GB")


@torch.no_grad()
def scaled_norm(norm: Any, scale: float) -> dict[str, torch.Tensor]:
    """Parameters of the norm whose output is `scale` times this one's; float32 where its dtype cannot hold them."""
    probe = copy.deepcopy(norm).float().cpu()
    sample = torch.linspace(-1.0, 1.0, probe.weight.numel())
    # Gemma's norm multiplies by 1 + weight, the others by weight.
    for offset in (0.0, 1.0):
        for parameter in probe.parameters():
            parameter.fill_(0.0)
        probe.weight.fill_(-offset)
        if not probe(sample[None]).any():
            break
    else:
        raise ValueError(f"The scale cannot be folded into {type(norm).__name__}; build the model with scale=1.0.")
    scaled = {}
    for name, parameter in norm.named_parameters():
        shift = offset if name == "weight" else 0.0
        exact = ((parameter.cpu().double() + shift) * scale - shift).float()  # Apple's GPUs have no float64
        rounded = exact.to(parameter.dtype)
        scaled[name] = rounded if torch.equal(rounded.float(), exact) else exact
    return scaled


def save_unfolded(model: PreTrainedModel, folder: str, head: dict[str, Any]) -> None:
    """Keep what folding loses: the final norm as it is, and the configuration of the head whose scale is folded."""
    norm = {name: parameter.detach().cpu() for name, parameter in final_norm(model).named_parameters()}
    save_file(norm, f"{folder}/{RESUME_FILE}", metadata={"head": json.dumps(head)})


@torch.no_grad()
def unfold(model: PreTrainedModel, resume_file: str, has_weights: bool = True) -> dict[str, Any]:
    """Put back what `save_unfolded` kept.

    Args:
        model: The model whose norm has the scale folded in, changed in place.
        resume_file: What was written beside its weights.
        has_weights: Whether they are there already, to be compared.

    Returns:
        The configuration of the head.

    Raises:
        ValueError: If the weights were written anew since, such as by training with stock classes.
    """
    norm = final_norm(model)
    with safe_open(resume_file, framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = json.loads(file.metadata()["head"])
    unfolded = copy.deepcopy(norm).to(next(iter(kept.values())).dtype)
    unfolded.load_state_dict(kept)
    for name, folded in scaled_norm(unfolded, head["scale"]).items():
        parameter = norm.get_parameter(name)
        found = parameter.float().cpu()
        if has_weights and not torch.allclose(folded.float(), found, rtol=ROUNDING, atol=1e-4):
            raise ValueError(
                f"{resume_file!r} is of other weights than those beside it, which were written anew. Remove that file "
                "to load them as they are."
            )
        parameter.copy_(kept[name])
    return head
