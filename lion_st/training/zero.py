"""DeepSpeed ZeRO: what of its configuration is read, and a model and its optimizer divided by it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin, DistributedType, PartialState
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from sentence_transformers.util import get_rank
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration
from transformers.training_args import OptimizerNames

from lion_st.errors import UsageError
from lion_st.extras import require
from lion_st.modules.loading import cast_weights
from lion_st.training.validation import is_true

# What a configuration may say. The rest is that of the training arguments, or has not been made to work.
_TUNED = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "round_robin_gradients"),
    *("allgather_bucket_size", "allgather_partitions", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
# Optimizers that treat each weight by itself, and keep numbers of the weights' shape.
_ELEMENTWISE = (OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAMW_TORCH)
_OF_THE_RUN = {
    "train_batch_size": "it is --batch_size",
    "train_micro_batch_size_per_gpu": "it is --per_device_train_batch_size",
    "gradient_accumulation_steps": "they are --gradient_accumulation_steps",
    "gradient_clipping": "it is --max_grad_norm",
}
_REFUSED = {
    "optimizer": "the optimizer is that of --optim and --learning_rate",
    "scheduler": "the schedule is that of --lr_scheduler_type",
    "offload_optimizer": "weights and optimizer stay on the GPUs: take more of them, or train an adapter",
    "offload_param": "weights and optimizer stay on the GPUs: take more of them, or train an adapter",
}


def zero_stage(arguments: TrainingArguments) -> int:
    """The stage of ZeRO that a run's arguments ask for, 2 or 3; 0 without DeepSpeed."""
    return arguments.deepspeed["zero_optimization"]["stage"] if isinstance(arguments.deepspeed, dict) else 0


def resolve_deepspeed(arguments: Any) -> dict[str, Any] | None:
    """What `--deepspeed` or accelerate's configuration says of DeepSpeed, taken from both.

    transformers and accelerate are not to read it: they want to know a batch before it is divided, and would build the
    model within DeepSpeed.

    Args:
        arguments: Training arguments, before transformers reads them; `deepspeed` is set to None.

    Returns:
        `zero_optimization` with its stage, or None without DeepSpeed.
    """
    given, arguments.deepspeed = arguments.deepspeed, None
    source = "--deepspeed"
    if is_true(os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)) and given is None:
        source, given = "accelerate's configuration", _configured()
    if given is None:
        return None
    config = read_json(given, source)
    zero = dict(config.pop("zero_optimization", None) or {})
    for name, value in {**config, **zero}.items():
        if name in _REFUSED and not (isinstance(value, Mapping) and value.get("device") == "none"):
            raise UsageError(f"{source} has {name}: {json.dumps(value)}, which is not supported: {_REFUSED[name]}.")
        if name in _OF_THE_RUN and value != "auto":
            raise UsageError(f'{source} has {name}: {value}: leave it out, or say "auto"; {_OF_THE_RUN[name]}.')
    for name, wanted in (("bf16", arguments.bf16), ("fp16", False)):
        enabled = (config.pop(name, None) or {}).get("enabled", "auto")
        if enabled not in ("auto", wanted):
            raise UsageError(f"{source} has {name}.enabled: {enabled}, and the run has {wanted}: leave it out.")
    if arguments.fp16:
        raise UsageError(f"--fp16 is not supported with {source}: say --bf16.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and not arguments.bf16:  # accelerate's autocast, which DeepSpeed takes the place of
        raise UsageError(
            f"accelerate's configuration has mixed_precision: {precision}, and the run is without --bf16: say "
            "--bf16, or mixed_precision: 'no'."
        )
    stage = zero.get("stage")
    if stage not in (2, 3):
        raise UsageError(f"{source} has zero_optimization.stage: {stage}: 2 and 3 are supported.")
    known = {*_TUNED, *_REFUSED, *_OF_THE_RUN, "stage", "stage3_gather_16bit_weights_on_model_save"}
    known |= {"steps_per_print", "wall_clock_breakdown"}
    if unknown := sorted({*config, *zero} - known):
        raise UsageError(f"{source} has {', '.join(unknown)}, which is not supported: leave it out.")
    if arguments.torch_compile or arguments.torch_compile_backend or arguments.torch_compile_mode:
        raise UsageError(f"--torch_compile is not built for {source}: leave out one of them.")
    if (optimizer := OptimizerNames(arguments.optim)) not in _ELEMENTWISE:
        raise UsageError(
            f"--optim {optimizer.value} is not supported with {source}, whose flat parts of weights have no rows and "
            f"columns: say --optim {_ELEMENTWISE[0].value}."
        )
    if arguments.fsdp:
        raise UsageError(f"--fsdp and {source} both divide the weights: leave out one of them.")
    return {"zero_optimization": {name: zero[name] for name in ("stage", *_TUNED) if zero.get(name, "auto") != "auto"}}


def use_deepspeed(accelerator: Any, arguments: TrainingArguments, hidden_size: int) -> None:
    """Have accelerate divide a training by DeepSpeed, with batch, clipping and precision of the training arguments.

    Gradients are added up, and sent, in float32. The trainer divides losses by the accumulation steps, not DeepSpeed.
    """
    settings: Any = arguments.deepspeed
    zero = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        **settings["zero_optimization"],
    }
    config = {
        "zero_optimization": zero,
        "gradient_clipping": arguments.max_grad_norm,
        "gradient_accumulation_steps": "auto",
    }
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    state = accelerator.state
    state.deepspeed_plugins = {"default": plugin}
    state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
    plugin.select(_from_accelerator_state=True)
    accelerator.native_amp = False  # DeepSpeed casts the weights
    accelerator.deepspeed_engine_wrapped = None
    integration.propagate_args_to_deepspeed(accelerator, arguments)
    plugin.hf_ds_config._dtype = torch.float32  # which the trainer rounds a teacher's scores to
    integration.unset_hf_deepspeed_config()  # a model that is loaded is a whole one
    each: Any = arguments.per_device_train_batch_size
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": each,
        "gradient_accumulation_steps": 1,
        "train_batch_size": each * arguments.world_size,
        "bf16": {"enabled": arguments.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def divide(model: nn.Module, accelerator: Any, awaits_weights: bool) -> None:
    """Divide a model's weights over the processes, one after the other, each as the first process has it (ZeRO-3).

    With ZeRO-2 nothing is divided: DeepSpeed sends the first process's weights to the others when it begins.
    """
    deepspeed = require("deepspeed")
    if accelerator.device.type == "cpu":  # for which DeepSpeed would compile collectives of its own
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)  # the processes have met already
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    cast_weights(model, dtype, awaits_weights)
    if config["zero_optimization"]["stage"] == 3:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(accelerator.device)
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)


class GradCacheEngine(DeepSpeedEngineWrapper):
    """accelerate's hold on DeepSpeed's engine, for losses that run the model within their backward pass, too.

    Gradient caching has a backward pass of its own for each mini-batch. DeepSpeed adds up gradients of several backward
    passes if each of them ends by itself, not within one that it was told of.
    """

    def __init__(self, engine: Any, caches: Callable[[], bool]) -> None:
        super().__init__(engine)
        self.caches = caches

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Compute gradients, and take the optimizer's step unless more are to be accumulated."""
        if not self.caches():
            return super().backward(loss, sync_gradients=sync_gradients, **kwargs)
        self.engine.set_gradient_accumulation_boundary(is_boundary=False)
        loss.backward()
        if sync_gradients:
            self.engine.set_gradient_accumulation_boundary(is_boundary=True)
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
            self.engine.step()


def is_divided(tensor: Tensor) -> bool:
    """Whether DeepSpeed divides a parameter, or its optimizer state, over the processes."""
    return _is_sharded(tensor) or hasattr(tensor, "_hp_mapping")


def gathered(parameter: Any) -> Tensor:
    """A parameter as all processes have it together, in float32 if it is trained. All of them call this together."""
    deepspeed = require("deepspeed")
    if parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or not _is_sharded(parameter)):
        return deepspeed.utils.safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def spread(value: Tensor | None, parameter: Any) -> None:
    """Set a parameter to what the first process gives. All processes call this together."""
    shape = parameter.ds_shape if _is_sharded(parameter) else parameter.shape
    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
    whole = torch.empty(shape, dtype=dtype, device=parameter.device)
    if value is not None:
        whole.copy_(value)
    dist.broadcast(whole, 0)
    if _is_sharded(parameter):
        with require("deepspeed").zero.GatheredParameters([parameter], modifier_rank=0):
            if get_rank() == 0:
                parameter.data.copy_(whole)
    else:
        parameter.data.copy_(whole)
    if parameter.requires_grad:
        _set_own_part(parameter, whole, None)


def whole_optimizer_state(optimizer: Any, groups: Sequence[dict[str, Any]], keep: bool) -> dict[str, Any]:
    """The optimizer's state as it would be without DeepSpeed. All processes call this together.

    Args:
        optimizer: The trainer's.
        groups: Those of parameters that the optimizer was given, before DeepSpeed put its own in their place and left
            out what was empty.
        keep: Whether this process is to have the tensors, on the CPU.
    """
    _link_states(optimizer.optimizer)
    torch_optimizer = optimizer.optimizer.optimizer
    slots = next(iter(torch_optimizer.state.values()))
    utils = require("deepspeed").utils
    state: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(_parameters(groups)):
        # Copies: of one tensor, steps that are counted for each parameter would be counted all together.
        state[number] = {name: deepcopy(value) for name, value in slots.items() if not _is_flat(value)}
        for name in filter(lambda name: _is_flat(slots[name]), slots):
            whole = utils.safe_get_full_optimizer_state(parameter, name)
            state[number][name] = whole.cpu() if keep else None
    live, numbers = iter(torch_optimizer.param_groups), iter(range(len(state)))
    settings = [(next(live) if group["params"] else group) | {"params": group["params"]} for group in groups]
    whole = [group | {"params": [next(numbers) for _ in group["params"]]} for group in settings]
    return {"state": state, "param_groups": whole}


@torch.no_grad()
def load_optimizer_state(optimizer: Any, groups: Sequence[dict[str, Any]], file: Path) -> None:
    """Give each process its part of an optimizer's whole state; the file is mapped, not read as a whole."""
    parameters = _parameters(groups)
    whole = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    divided = optimizer.optimizer
    flat = getattr(divided, "fp32_partitioned_groups_flat", None) or divided.single_partition_of_fp32_groups
    slots = next(iter(whole["state"].values()))
    for part in flat:
        divided.optimizer.state[part] = {
            name: torch.zeros_like(part) if _is_flat(value) else deepcopy(value) for name, value in slots.items()
        }
    _link_states(divided)
    for number, values in whole["state"].items():
        for name, value in values.items():
            if _is_flat(value):
                _set_own_part(parameters[number], value, name)
    filled = [group for group in whole["param_groups"] if group["params"]]
    for group, saved in zip(divided.optimizer.param_groups, filled, strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})


def whole_schedule(state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A schedule's state with a value for each group, also for the empty ones, which DeepSpeed leaves out."""
    filled = [bool(group["params"]) for group in groups]

    def whole(values: list[Any]) -> list[Any]:
        given = iter(values)
        return [next(given) if is_filled else values[0] for is_filled in filled]

    return {name: whole(value) if _has_length(value, sum(filled)) else value for name, value in state.items()}


def divided_schedule(state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of which `whole_schedule` makes this one."""
    filled = [bool(group["params"]) for group in groups]
    return {
        name: list(compress(value, filled)) if _has_length(value, len(filled)) else value
        for name, value in state.items()
    }


def _has_length(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _link_states(divided: Any) -> None:
    """Have ZeRO-2 find its parameters' optimizer states.

    By itself it looks for all of them after the step of the first group, when those of the others are not there yet.
    """
    if hasattr(divided, "_hp_optimizer_states_linked"):
        divided._hp_optimizer_states_linked = False
        divided._lazy_init_hp_params_optimizer_state()


def _parameters(groups: Sequence[dict[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


def _set_own_part(parameter: Any, whole: Tensor, slot: str | None) -> None:
    """Set this process's part of a parameter in float32, or of a slot of its optimizer state."""
    if not _is_sharded(parameter):
        parameter.set_full_hp_param(whole.to(parameter.device), slot)
        return
    size = parameter.ds_tensor.numel()
    first = size * get_rank()
    part = torch.zeros(size, dtype=torch.float32, device=parameter.device)
    own = whole.flatten()[first : first + size]
    part[: len(own)] = own
    parameter._z3_optimizer.set_local_hp_param(part, parameter, slot)


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id")


def _is_flat(value: Any) -> bool:
    """Whether a slot of the optimizer has a number for each weight."""
    return isinstance(value, Tensor) and value.ndim > 0


def read_json(given: Any, source: str) -> dict[str, Any]:
    """A configuration: a mapping, JSON, or the path of a JSON file."""
    if isinstance(given, str):
        try:
            given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{source} is neither a JSON file nor JSON: {error}.") from None
    return dict(given)


def _configured() -> Any:
    """What `accelerate launch` hands its processes: the path of a configuration, or its parts."""
    read = {name.removeprefix("ACCELERATE_DEEPSPEED_").lower(): value for name, value in os.environ.items()}
    if read.get("config_file", "none") != "none":
        return read["config_file"]
    zero: dict[str, Any] = {"stage": int(read.get("zero_stage", "2"))}
    for name in ("offload_optimizer", "offload_param"):
        zero[name] = {"device": read.get(f"{name}_device", "none")}
    config: dict[str, Any] = {"zero_optimization": zero}
    for name, by_default in (("gradient_accumulation_steps", "1"), ("gradient_clipping", "none")):
        value = os.environ.get(f"ACCELERATE_{name.upper()}", "auto")
        config[name] = "auto" if value == by_default else value
    return config
