"""What lion_st uses of its dependencies without their promise to keep it: every private name stands here.

`OVERRIDDEN` and `USED` were checked against the versions in `CHECKED`; pyproject.toml pins minor releases
of all but transformers, none of whose releases is ruled out. The tests name the one that went missing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.files import is_hub_name

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers.base.model import BaseModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

CHECKED = {"sentence-transformers": "6.2.0", "transformers": "5.24.0", "peft": "0.21.2"}

# Private methods that a class of lion_st overrides: class of lion_st -> class of the dependency -> methods.
OVERRIDDEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "lion_st.model_classes.LionModel": (
        "sentence_transformers.base.model.BaseModel",
        (
            "_get_model_type",
            "_inference",
            "_load_config_modules",
            "_load_default_modules",
            "_load_module_class_from_ref",
            "_parse_model_config",
        ),
    ),
    "lion_st.modules.lion_transformer.LionTransformer": (
        "sentence_transformers.base.modules.Transformer",
        ("_can_flatten_inputs", "_load_config", "_load_model"),
    ),
    "lion_st.training.divided.DividedTrainer": (
        "transformers.Trainer",
        (
            "_load_from_checkpoint",
            "_load_optimizer_and_scheduler",
            "_prepare_for_training",
            "_save_optimizer_and_scheduler",
        ),
    ),
    "lion_st.training.trainers.GuardedTrainer": (
        "transformers.Trainer",
        ("_determine_best_metric", "_init_training_state", "_load_best_model", "_save", "_save_checkpoint"),
    ),
    "lion_st.training.trainers.RetrieverTrainerMixin": (
        "transformers.Trainer",
        (
            "_load_callback_state",
            "_load_optimizer_and_scheduler",
            "_save_checkpoint",
            "_save_optimizer_and_scheduler",
        ),
    ),
}
# What is called or read, and what is public in name but described nowhere: an attribute of what is imported.
USED = (
    "torch.Tensor._version",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.apply_activation_checkpointing",
    "torch.nn.Module._apply",
    "torch.nn.Module._compiled_call_impl",
    "torch._dynamo.config.recompile_limit",
    "torch._inductor.list_mode_options",
    "sentence_transformers.base.model.BaseModel._create_model_card",
    "sentence_transformers.base.model.BaseModel._get_model_config",
    "sentence_transformers.base.model.BaseModel._resolve_inference_device",
    "sentence_transformers.base.modules.transformer.TRANSFORMER_TASK_TO_AUTO_MODEL",
    "sentence_transformers.base.losses.gradcache.CachedLossMixin",
    "sentence_transformers.base.losses.merged_forward.embed_columns",
    "numba.core.caching.FunctionCache.save_overload",
    "transformers.PreTrainedModel._can_set_attn_implementation",
    "transformers.PreTrainedModel._no_split_modules",
    "transformers.integrations.peft.PeftAdapterMixin._hf_peft_config_loaded",
    "transformers.PretrainedConfig._attn_implementation",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.utils.peft_utils.find_adapter_config_file",
    "transformers.Trainer._load_from_checkpoint",
    "transformers.trainer_utils.rotate_checkpoints",
    "transformers.trainer_utils.sort_checkpoints",
    "mteb.languages.iso_mappings._hf_langs_to_iso_lang_scripts",
    "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer",
    "peft.tuners.tuners_utils.cast_adapter_dtype",
    "peft.utils.other.ModulesToSaveWrapper",
)


def model_config(model: BaseModel) -> dict[str, Any]:
    """What sentence-transformers writes into a checkpoint's `config_sentence_transformers.json`."""
    return model._get_model_config()


def write_model_card(model: BaseModel, folder: str, model_name: str | None = None) -> None:
    """Write the README.md that sentence-transformers makes of a model."""
    model._create_model_card(folder, model_name)


def has_adapter(model: PreTrainedModel | None) -> bool:
    """Whether a PEFT adapter is attached to the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def mark_adapter(model: PreTrainedModel, attached: bool) -> None:
    """Tell transformers whether a PEFT adapter is attached to the model."""
    model._hf_peft_config_loaded = attached


def attention_implementation(model: PreTrainedModel) -> str | None:
    """The name of the attention function that the model runs."""
    return model.config._attn_implementation


def takes_attention_functions(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be replaced by a registered function."""
    return model.is_backend_compatible() and model._can_set_attn_implementation()


def layer_classes(model: PreTrainedModel) -> set[str]:
    """The names of the classes of a model's layers, none if its architecture does not say."""
    return set(model._no_split_modules or ())


def forget_compiled(module: Module) -> None:
    """Undo `module.compile()`."""
    module._compiled_call_impl = None


def allow_compilations(count: int) -> None:
    """Let torch.compile make so many versions of one function at least, beyond which it runs uncompiled."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def inductor_options(mode: str) -> dict[str, Any]:
    """What a mode of torch.compile stands for, with lengths that vary."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic=True))


def replace_submodule(module: Module, name: str, other: Module) -> None:
    """Give a shallow copy of a module, which shares its submodules with the original, another one of a name."""
    module._modules = module._modules | {name: other}


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written in place."""
    return tensor._version


def give_memory(module: Module) -> None:
    """Give the tensors of a module that are on the device "meta" memory of the CPU, with whatever is there."""
    import torch

    module._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)


def language_scripts(codes: list[str]) -> Any:
    """mteb's languages with their scripts, of the Hub's codes of languages."""
    from mteb.languages.iso_mappings import _hf_langs_to_iso_lang_scripts

    return _hf_langs_to_iso_lang_scripts(codes)


def hub_commit(config: Any) -> str | None:
    """The Hub commit that a configuration was loaded from, None for a local one."""
    return getattr(config, "_commit_hash", None)


def note_hub_commit(config: Any, name: str, revision: str | None) -> None:
    """Write down which Hub commit a configuration was loaded from, which transformers no longer does (since 5.20)."""
    from huggingface_hub import try_to_load_from_cache

    if config is None or not is_hub_name(name):
        return
    for file in ("modules.json", "adapter_config.json", "config.json", "hybrid.json"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            config._commit_hash = Path(path).parent.name  # the folder of the snapshot
            return


@contextmanager
def without_message(logger_name: str, text: str) -> Iterator[None]:
    """Hold back what a dependency logs with a text in it: what it warns of is done on purpose, and checked."""
    logger = logging.getLogger(logger_name)

    def drop(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def table_fingerprint(table: Dataset) -> str:
    """What `datasets` tells one state of a table from another by, the same in every process."""
    return table._fingerprint


def keep_going_uncached(function: Any, note: Callable[[OSError], Any]) -> None:
    """Have a cached numba function go on where its machine code cannot be written, as on a full disk or over a quota.

    Args:
        function: Of `numba.njit(cache=True)`.
        note: Takes the error.
    """
    cache = getattr(function, "_cache", None)
    if cache is None:  # with NUMBA_DISABLE_JIT
        return
    save = cache.save_overload

    def save_if_possible(signature: Any, data: Any) -> None:
        try:
            save(signature, data)
        except OSError as error:
            note(error)

    cache.save_overload = save_if_possible
