"""What training arguments may not be: out of range, without effect, or for what is not built."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from lion_st.errors import UsageError
from lion_st.extras import require
from lion_st.kernels.bfloat16 import warn_of_slow_bfloat16
from lion_st.losses.distillation import WITHOUT_TEMPERATURE
from lion_st.modules.liger import KERNELS

SHARDING_BUILT = (
    "of the kinds of sharded training FSDP2 and DeepSpeed's ZeRO-2 and ZeRO-3 alone are built. `torchrun "
    "--nproc_per_node N ... --fsdp` divides weights, gradients and optimizer over N GPUs"
)
# What `accelerate launch` sets for its processes.
_SHARDING_VARIABLES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


class _Setting(NamedTuple):
    """What a run has to have for options of `RetrieverArguments` to be read."""

    words: str
    holds: Callable[[Mapping[str, Any]], bool]  # of the arguments' values
    options: tuple[str, ...]


def _is(option: str, *wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: values[option] in wanted


_SETTINGS = (
    _Setting(
        "--paradigm sparse or hybrid",
        _is("paradigm", "sparse", "hybrid"),
        (
            "scale",
            "activation",
            "query_max_active_dims",
            "document_max_active_dims",
            "regularizer",
            "regularizer_warmup_ratio",
            "query_regularizer_weight",
            "document_regularizer_weight",
        ),
    ),
    _Setting("--paradigm sparse", _is("paradigm", "sparse"), ("learn_thresholds", "learn_top_k")),
    _Setting("--paradigm dense or hybrid", _is("paradigm", "dense", "hybrid"), ("pooling", "normalize")),
    _Setting("--paradigm hybrid", _is("paradigm", "hybrid"), ("dense_temperature", "dense_weight")),
    _Setting("--paradigm multi_vector", _is("paradigm", "multi_vector"), ("token_dimension",)),
    _Setting("--use_peft", _is("use_peft", True), ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")),
    _Setting("--query_encoder static", _is("query_encoder", "static"), ("query_encoder_learning_rate",)),
    _Setting(
        "--learn_thresholds or --learn_top_k",
        lambda values: values["learn_thresholds"] or values["learn_top_k"],
        ("threshold_learning_rate",),
    ),
    _Setting("--regularizer df_flops", _is("regularizer", "df_flops"), ("df_alpha", "df_beta")),
    _Setting("--regularizer target", _is("regularizer", "target"), ("query_target_terms", "document_target_terms")),
    _Setting("--self_distillation", _is("self_distillation", True), ("ema_decay",)),
    _Setting(
        "several --teachers",
        lambda values: len(values["teachers"] or ()) > 1,
        ("combine", "weight_by_agreement"),
    ),
    _Setting("several --train_data", lambda values: len(values["train_data"]) > 1, ("train_weights",)),
    _Setting(
        "a teacher's scores (another --objective than cl)",
        lambda values: reads_scores(values),
        ("teachers", "teacher_normalization"),
    ),
    _Setting(
        "--objective kd, kl, margin_mse_kl or cl_kd",
        lambda values: reads_temperature(values),
        ("teacher_temperature",),
    ),
    _Setting(
        "--objective cl_kd",
        _is("objective", "cl_kd"),
        ("distillation", "contrastive_weight", "distillation_weight"),
    ),
    _Setting(
        "--objective margin_mse_kl (or --distillation margin_mse_kl)",
        lambda values: "margin_mse_kl" in (values["objective"], values["distillation"]),
        ("margin_mse_weight",),
    ),
)
_READ_WITH = {option: setting for setting in _SETTINGS for option in setting.options}


def is_true(value: str | None) -> bool:
    """Whether a variable of the environment says yes."""
    return str(value).lower() in ("true", "1", "yes")


def as_sources(given: Any) -> list[str]:
    """Paths and names, or one alone, as a list of texts without those that are empty."""
    return [os.fspath(one) for one in ([given] if isinstance(given, str | os.PathLike) else given or ()) if one]


def refuse_unread(arguments: Any, reasons: Mapping[str, str]) -> None:
    """Refuse options that are given and have no effect, and sharded training other than by FSDP."""
    known = type(arguments).__dataclass_fields__
    for name, reason in reasons.items():
        value = getattr(arguments, name, None)
        if value and value not in ("no", known[name].default):
            raise UsageError(f"--{name} is not read here: {reason}.")
    for variable, name in _SHARDING_VARIABLES.items():
        if is_true(os.environ.get(variable)):
            raise UsageError(f"accelerate's configuration asks for {name} ({variable}=true): {SHARDING_BUILT}.")


def require_read(arguments: Any, given: Iterable[str]) -> None:
    """Refuse options that were given and that the setting would not read."""
    values = vars(arguments)
    defaults = type(arguments).__dataclass_fields__
    unread = unread_options(values)
    for name in given:
        if name in unread and values[name] not in (None, defaults[name].default):
            setting = _READ_WITH[name].words
            raise UsageError(f"--{name} is read with {setting} alone, which this run is without: leave it out.")


def unread_options(values: Mapping[str, Any]) -> set[str]:
    """Options of `RetrieverArguments` that a run with these values does not read."""
    return {name for name, setting in _READ_WITH.items() if not setting.holds(values)}


def reads_scores(values: Mapping[str, Any]) -> bool:
    """Whether the scores in the data are learned from, see `RetrieverArguments`."""
    return values["objective"] != "cl" and not values["self_distillation"]


def reads_temperature(values: Mapping[str, Any]) -> bool:
    """Whether a temperature of the teacher changes anything of the objective, see `RetrieverArguments`."""
    objective = values["objective"]
    if objective == "cl_kd":
        return values["distillation"] not in WITHOUT_TEMPERATURE
    return objective not in ("cl", "listwise", "rank")


def resolve_compilation(arguments: Any) -> None:
    """Refuse compilation that does not fit batches of ever other lengths, and leave the precision as it is.

    Args:
        arguments: Training arguments, before transformers reads them: `tf32` is changed, which it would turn on.
    """
    configured = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if configured.lower() not in ("no", ""):
        raise UsageError(
            f"accelerate's configuration compiles the whole model (ACCELERATE_DYNAMO_BACKEND={configured}), anew for "
            "each length of text: leave it out, and say --torch_compile, which compiles the decoder layers."
        )
    backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
    if not (arguments.torch_compile or backend or mode):
        return
    if backend == "cudagraphs" or mode in ("reduce-overhead", "max-autotune"):
        name, value = ("backend", backend) if backend == "cudagraphs" else ("mode", mode)
        raise UsageError(
            f"--torch_compile_{name} {value} records CUDA graphs, each for one length of texts, and every batch has "
            "another: leave it out, or say --torch_compile_mode max-autotune-no-cudagraphs."
        )
    if mode and backend not in (None, "inductor"):
        raise UsageError(f"--torch_compile_mode is of the backend inductor, not of {backend}: leave one out.")
    if arguments.tf32 is None:
        arguments.tf32 = False


def refuse_liger(arguments: Any) -> None:
    """Refuse Liger's kernels where they cannot run or are compiled anyway, and those of a language model's loss.

    Args:
        arguments: Training arguments, before transformers reads them.
    """
    kernels = arguments.liger_kernel_config or {}
    if not arguments.use_liger_kernel:
        if kernels:
            raise UsageError("liger_kernel_config is read with --use_liger_kernel alone: add it, or leave both out.")
        return
    if unknown := set(kernels) - set(KERNELS):
        raise UsageError(
            f"liger_kernel_config names {', '.join(sorted(unknown))}: {', '.join(KERNELS)} are read. LM head and loss "
            "are not those of a causal language model here."
        )
    if arguments.torch_compile or arguments.torch_compile_backend or arguments.torch_compile_mode:
        raise UsageError("--torch_compile fuses what Liger's kernels do: leave out one of them.")
    if arguments.use_cpu or not torch.cuda.is_available():
        raise UsageError("--use_liger_kernel runs on GPUs alone: leave it out on a CPU.")
    require("liger_kernel")


def rename_checkpointing(arguments: Any) -> None:
    """Read `gradient_checkpointing` as `activation_checkpointing` where transformers calls it so, warning of it.

    Recipes have the former, which every supported version of transformers takes.
    """
    for rest in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{rest}", f"activation_checkpointing{rest}"
        if getattr(arguments, new, False) is None:
            setattr(arguments, new, getattr(arguments, old))
        if hasattr(arguments, new):
            setattr(arguments, old, None)


def refuse_several_gpus(arguments: Any) -> None:
    """Refuse several GPUs in one process: transformers' Trainer would divide batches over them by `nn.DataParallel`."""
    if arguments.n_gpu > 1:
        raise UsageError(
            f"{arguments.n_gpu} GPUs in one process would not share negatives, nor a model that is changed: run "
            f"`torchrun --nproc_per_node {arguments.n_gpu} ...`, or name one in CUDA_VISIBLE_DEVICES."
        )


def refuse_float16_on_cpus(arguments: Any) -> None:
    """Refuse `--fp16` without a GPU, where accelerate's Trainer would go on in float32."""
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU: on CPUs say --bf16, or --bf16 false for float32.")


def warn_of_slow_training(arguments: Any) -> None:
    """Warn, once on this machine, of mixed precision in bfloat16 on a CPU that is slow with it."""
    if arguments.bf16 and arguments.local_process_index == 0:
        warn_of_slow_bfloat16(arguments.device.type, "--bf16 false")


def recomputes_activations(arguments: Any) -> bool:
    """Whether training arguments have the backward pass recompute activations."""
    return any(getattr(arguments, f"{name}_checkpointing", None) for name in ("activation", "gradient"))


def require_training_ranges(arguments: Any) -> None:
    """Refuse training arguments out of their ranges, see `require_positive`."""
    require_positive(arguments, "learning_rate", "num_train_epochs", "max_seconds", "adam_epsilon")
    require_positive(arguments, "per_device_train_batch_size", "gradient_accumulation_steps")
    require_at_least_0(arguments, "weight_decay", "max_grad_norm", "warmup_steps")
    require_share(arguments, "warmup_ratio", "adam_beta1", "adam_beta2")
    if arguments.max_steps is not None and arguments.max_steps != -1:
        require_positive(arguments, "max_steps")


def require_positive(arguments: Any, *names: str) -> None:
    """Refuse options that are not positive numbers; None is left alone.

    Raises:
        UsageError: Naming the option and its value.
    """
    _require(arguments, names, "positive", lambda value: 0 < value < math.inf)


def require_at_least_0(arguments: Any, *names: str) -> None:
    """Refuse options below 0, see `require_positive`."""
    _require(arguments, names, "at least 0", lambda value: 0 <= value < math.inf)


def require_share(arguments: Any, *names: str) -> None:
    """Refuse options outside of [0, 1), see `require_positive`."""
    _require(arguments, names, "at least 0 and below 1", lambda value: 0 <= value < 1)


def _require(arguments: Any, names: Iterable[str], words: str, accepts: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None and not accepts(float(value)):
            raise UsageError(f"--{name} must be {words}, got {value}.")
