"""Sharded training (FSDP2): what is sharded how, and whole models and optimizer states from the shards."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from sentence_transformers.util import get_rank, get_world_size
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from lion_st.errors import UsageError
from lion_st.extras import require
from lion_st.modules import unpadding
from lion_st.modules.compilation import decoder_layers
from lion_st.modules.loading import awaiting_weights
from lion_st.training import zero
from lion_st.training.cost import Sharding
from lion_st.training.validation import is_true

# Settings of FSDP that would have no effect, or have not been made to work: their values that are refused, and why.
_REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "version": (("1",), "FSDP1 is deprecated: say 2"),
    "cpu_offload": (("true", "1"), "weights and optimizer stay on the GPUs: take more of them, or train an adapter"),
    "offload_params": (("true", "1"), "weights and optimizer stay on the GPUs: take more of them, or train an adapter"),
    "auto_wrap_policy": (("size_based_wrap", "no_wrap"), "each decoder layer is sharded by itself"),
    "xla": (("true", "1"), "FSDP runs on PyTorch's own devices alone"),
}


def uses_fsdp(arguments: TrainingArguments) -> bool:
    """Whether FSDP divides weights over the processes: by `--fsdp`, or by accelerate's configuration."""
    return bool(arguments.fsdp) or (is_true(os.environ.get("ACCELERATE_USE_FSDP")) and not zero.zero_stage(arguments))


def sharding_of(arguments: TrainingArguments) -> Sharding:
    """What of weights, gradients and optimizer is divided over the processes."""
    of_zero: dict[int, Sharding] = {2: "ZeRO-2", 3: "ZeRO-3"}
    return "FSDP2" if uses_fsdp(arguments) else of_zero.get(zero.zero_stage(arguments), "none")


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether anything of weights, gradients and optimizer is divided over the processes."""
    return sharding_of(arguments) != "none"


def resolve_fsdp(arguments: Any) -> None:
    """Refuse settings of FSDP that are not heeded, and read the weights once per node unless something else is said.

    Args:
        arguments: Training arguments, before transformers reads `fsdp` and `fsdp_config`, which is changed.
    """
    if arguments.fsdp:
        arguments.fsdp_config = _read_config(arguments.fsdp_config)
        arguments.fsdp_config.setdefault("cpu_ram_efficient_loading", True)
        if "offload" in str(arguments.fsdp):
            raise UsageError(f"--fsdp {arguments.fsdp}: {_REFUSED['cpu_offload'][1]}.")
        given = {name: ("--fsdp_config", value) for name, value in arguments.fsdp_config.items()}
    elif arguments.fsdp_config:
        raise UsageError("--fsdp_config is read with --fsdp alone, which this run is without: add it.")
    elif uses_fsdp(arguments):
        given = {
            name.removeprefix("FSDP_").lower(): ("accelerate's configuration", value)
            for name, value in os.environ.items()
            if name.startswith("FSDP_")
        }
        given.setdefault("version", ("accelerate's configuration", "1"))  # its default
    else:
        return
    for name, (source, value) in given.items():
        values, reason = _REFUSED.get(name, ((), ""))
        if str(value).lower() in values:
            raise UsageError(f"{source} has {name}: {value}, which is not supported: {reason}.")


def refuse_with_quantization(arguments: Any, training_arguments: TrainingArguments) -> None:
    """Refuse to shard weights of 4 bits."""
    if arguments.load_in_4bit and is_sharded(training_arguments):
        raise UsageError(
            "--load_in_4bit is not built for sharded weights: leave out --fsdp or --deepspeed, and each GPU holds "
            "the frozen layers in a quarter of what they take in bfloat16; or leave out --load_in_4bit."
        )


def refuse_unsharded(arguments: Any, training_arguments: TrainingArguments) -> None:
    """Refuse to shard a retriever's training with what holds weights beside the model's."""
    refuse_with_quantization(arguments, training_arguments)
    options = {
        f"--query_encoder {arguments.query_encoder}": arguments.query_encoder != "full",
        "--learn_thresholds": arguments.learn_thresholds,
        "--learn_top_k": arguments.learn_top_k,
        "--self_distillation": arguments.self_distillation,
    }
    asked = [option for option, is_asked in options.items() if is_asked]
    if asked and is_sharded(training_arguments):
        raise UsageError(f"{asked[0]} has no sharded form: leave out either this or --fsdp and --deepspeed.")


def reads_once(arguments: TrainingArguments) -> bool:
    """Whether one process of each node reads the weights, and the others get theirs before the first step.

    They are sent by the first process of all: of FSDP2 by accelerate, which `cpu_ram_efficient_loading` of its
    configuration or of `--fsdp_config` asks for, of ZeRO by DeepSpeed.
    """
    # The variable is accelerate's, and transformers sets it for `--fsdp_config`.
    by_fsdp = uses_fsdp(arguments) and is_true(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
    return by_fsdp or bool(zero.zero_stage(arguments))


def awaits_weights(arguments: TrainingArguments) -> bool:
    """Whether this process leaves reading the weights to the first one of its node."""
    return reads_once(arguments) and arguments.local_process_index > 0


def build_device(arguments: TrainingArguments) -> str:
    """The device to build a model on: the process's own, or the CPU, from which it is sharded."""
    return "cpu" if is_sharded(arguments) else str(arguments.device)


@contextmanager
def reading_for_shards(training_arguments: TrainingArguments) -> Iterator[None]:
    """Leave reading weights that are to be sharded to the first process of each node, see `awaits_weights`."""
    if zero.zero_stage(training_arguments):
        require("deepspeed")
    if is_sharded(training_arguments) and training_arguments.world_size == 1:
        raise UsageError("Weights are sharded over several processes: run `torchrun --nproc_per_node N ...`.")
    with awaiting_weights() if awaits_weights(training_arguments) else nullcontext():
        yield


def share_checks(transformer: Any) -> None:
    """Have the processes that await their weights run a `LionTransformer` as the first one does, which checked it."""
    found = [(transformer.checked, transformer.runs_packed)]
    if get_world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    if transformer.awaits_weights:
        transformer.checked, transformer.runs_packed = found[0]
        if transformer.runs_packed:
            transformer.model.set_attn_implementation(unpadding.NAME)


def saved_buffers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and names of buffers that are saved with the weights, such as the factor of each layer of Gemma 4."""
    return [
        (module, name)
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name in module.state_dict()
    ]


def share_buffers(model: nn.Module) -> None:
    """Give each process the saved buffers of the first one, which neither FSDP2 nor ZeRO sends. All call this."""
    places = saved_buffers(model)
    if not places:
        return
    found = [[module.get_buffer(name).cpu() for module, name in places]]
    dist.broadcast_object_list(found, src=0)
    for (module, name), value in zip(places, found[0], strict=True):
        module.get_buffer(name).copy_(value)


@contextmanager
def without_saved_buffers(model: nn.Module) -> Iterator[None]:
    """Have a model's state be its weights alone, of which accelerate takes every tensor for one that is sharded."""
    places = saved_buffers(model)
    for module, name in places:
        module.register_buffer(name, module.get_buffer(name), persistent=False)
    try:
        yield
    finally:
        for module, name in places:
            module.register_buffer(name, module.get_buffer(name))


def shard_on_cpu(accelerator: Any, arguments: TrainingArguments) -> None:
    """Have accelerate shard a training on CPUs too, such as a trial of a configuration before there are GPUs for it."""
    plugin = FullyShardedDataParallelPlugin(**(arguments.fsdp_plugin_args or {}))
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP


def configure_units(plugin: Any, model: nn.Module, half_precision: torch.dtype | None) -> None:
    """Say which modules are gathered and freed together, and in which precision.

    Each decoder layer is a unit. So is the embedding where the LM head is not tied to it. The LM head stays with the
    root, which is gathered once and kept until the end of the backward pass: the sparse head reads it there, for every
    mini-batch, without another gathering. Of Llama 3 8B that is 1 GiB in bfloat16.

    Gradients are reduced in float32, and what the model returns is not rounded to half precision.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`, changed in place.
        model: A sentence-transformers model, or a model of transformers or PEFT.
        half_precision: Data type of the gathered weights, None to leave them as they are.
    """
    if plugin.fsdp_version != 2:
        raise UsageError(f"FSDP version {plugin.fsdp_version} is not supported: {_REFUSED['version'][1]}.")
    backbone = backbone_of(model)
    layers = sorted({type(layer).__name__ for layer in decoder_layers(backbone)})
    if plugin.activation_checkpointing:
        # accelerate's own would draw another dropout in the backward pass, and so give a wrong gradient.
        plugin.activation_checkpointing = False
        apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in layers)
    embedding, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        layers.append(type(embedding).__name__)
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = layers
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=half_precision, reduce_dtype=None if half_precision is None else torch.float32
    )


def backbone_of(model: Any) -> Any:
    """The model of transformers in a sentence-transformers model or under PEFT, or itself."""
    inner = getattr(model, "transformers_model", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def structure_of(model: nn.Module) -> Any:
    """A copy of a model without its weights, which are on the meta device; buffers are shared."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    card = getattr(model, "model_card_data", None)  # it holds model and trainer
    memo[id(card)] = card
    return copy.deepcopy(model, memo)


@torch.no_grad()
def whole_model(structure: Any, model: nn.Module) -> Any:
    """A sharded model put together on the CPU of the first process. All processes call this together.

    Returns:
        The model, None on the other processes.
    """
    is_first = get_rank() == 0
    gathered: dict[int, nn.Parameter | Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:  # tied weights have two names
            whole = _whole(tensor, is_first)
            if isinstance(tensor, nn.Parameter) and is_first:
                whole = nn.Parameter(whole, tensor.requires_grad)
            gathered[id(tensor)] = whole
        weights[name] = gathered[id(tensor)]
    if not is_first:
        return None
    result = structure_of(structure)
    result.load_state_dict(weights, assign=True)
    return result


@torch.no_grad()
def spread_weights(whole: nn.Module | None, model: nn.Module) -> None:
    """Give each process its shards of the first one's whole model, None on the others. All call this together."""
    weights = {} if whole is None else whole.state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if zero.is_divided(tensor):
            zero.spread(weights.get(name), tensor)
        elif isinstance(tensor, DTensor):
            given = weights[name] if whole is not None else torch.empty(tensor.shape, dtype=tensor.dtype)
            given = given.to(tensor.device, tensor.dtype)
            tensor.to_local().copy_(distribute_tensor(given, tensor.device_mesh, tensor.placements).to_local())


@contextmanager
def described_by_card(model: Any) -> Iterator[None]:
    """Have a model's card describe, and run, this model instead of the sharded one it shares the card with."""
    card = getattr(model, "model_card_data", None)
    if card is None:
        yield
        return
    sharded, card.model = card.model, model
    try:
        yield
    finally:
        card.model = sharded


@torch.no_grad()
def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state as it would be without sharding, on the CPU of the first process.

    All processes call this together; what the others get has no tensors of the state.
    """
    live, is_first = optimizer.state_dict(), get_rank() == 0
    whole = {
        number: {name: _whole(value, is_first) if isinstance(value, Tensor) else value for name, value in slots.items()}
        for number, slots in live["state"].items()
    }
    return live | {"state": whole}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, file: Path) -> None:
    """Give each process its shards of an optimizer's whole state; the file is mapped, not read as a whole."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, slots in state["state"].items():
        parameter = parameters[number]
        for name, value in slots.items():
            if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[name] = distribute_tensor(
                    value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
    optimizer.load_state_dict(state)


def _whole(tensor: Tensor, keep: bool) -> Any:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if zero.is_divided(tensor):
        whole = zero.gathered(tensor)
    return whole.detach().cpu() if keep else None


def _read_config(given: Any) -> dict[str, Any]:
    """`fsdp_config` as a mapping without the prefix `fsdp_` of accelerate's configurations."""
    return {name.removeprefix("fsdp_"): value for name, value in zero.read_json(given or {}, "--fsdp_config").items()}
