"""A trainer whose weights may be divided, by FSDP2 or DeepSpeed, and are written as if they were not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DynamoBackend
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from lion_st.model_classes import LionModel
from lion_st.modules.adapters import load_adapter_weights
from lion_st.modules.quantization import is_quantized
from lion_st.training import zero
from lion_st.training.contract import load_heads, transformer_folder
from lion_st.training.sharding import (
    awaits_weights,
    backbone_of,
    configure_units,
    described_by_card,
    load_optimizer_state,
    shard_on_cpu,
    share_buffers,
    spread_weights,
    structure_of,
    uses_fsdp,
    whole_model,
    whole_optimizer_state,
    without_saved_buffers,
)


class DividedTrainer(Trainer):
    """transformers' Trainer that writes and reads the same files whether weights are divided or not."""

    _structure: Any = None  # of the model, before its weights are divided
    _groups: list[dict[str, Any]]  # the optimizer's, before their parameters are divided

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, sharding also on CPUs, where accelerate would leave it out without a word.

        It compiles nothing: it would take the whole model, with sizes of texts as constants, for `torch_compile`.
        """
        super().create_accelerator_and_postprocess()
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        if zero.zero_stage(self.args):
            hidden_size = backbone_of(self.model).config.get_text_config().hidden_size
            zero.use_deepspeed(self.accelerator, self.args, hidden_size)
            self.is_deepspeed_enabled = True
        elif uses_fsdp(self.args) and not self.is_fsdp_enabled:
            shard_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True

    @property
    def is_divided(self) -> bool:
        """Whether weights or what belongs to them are divided over the processes, by FSDP or by DeepSpeed."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_optimizer(self, *arguments: Any, **options: Any) -> Any:
        """Make the optimizer, and remember its parameters, which DeepSpeed replaces by its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*arguments, **options)
        if is_new:
            self._groups = [group | {"params": list(group["params"])} for group in optimizer.param_groups]
        return optimizer

    def whole_model(self) -> Any:
        """The trained model: itself, or put together on the CPU of the first process where its weights are sharded.

        All processes call this together; with sharded weights the others get None.
        """
        if not self.is_divided:
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # nor under autocast
        if self.is_deepspeed_enabled:
            # Else weights that an evaluation asked for ahead, and did not use, could not be gathered.
            cast(Any, self.accelerator.deepspeed_engine_wrapped).engine.empty_partition_cache()
        return whole_model(self._structure, cast(nn.Module, self.model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as it is written without sharding, on the first process."""
        if not self.is_divided:
            return super().save_model(output_dir, _internal_call)
        whole = self.whole_model()
        if self.args.should_save:
            with self._as_unsharded(whole):
                self._save(output_dir)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _as_unsharded(self, model: Any) -> Iterator[None]:
        """Work on a whole model in place of the sharded one, as transformers does without sharding."""
        kept = self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled
        self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled = model, False, False
        try:
            with described_by_card(model):
                yield
        finally:
            self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled = kept

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[Any, Any]:
        if self.is_divided and self._structure is None:
            model = cast(nn.Module, self.model)
            if self.is_deepspeed_enabled:
                share_buffers(model)
                self._structure = structure_of(model)
                zero.divide(model, self.accelerator, awaits_weights(self.args))
            else:
                plugin = self.accelerator.state.fsdp_plugin
                if resume_from_checkpoint is not None and not awaits_weights(self.args):
                    with self._as_unsharded(model):
                        super()._load_from_checkpoint(resume_from_checkpoint)
                share_buffers(model)
                self._structure = structure_of(model)
                half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
                configure_units(plugin, model, half)
        if not self.is_deepspeed_enabled:
            with without_saved_buffers(cast(nn.Module, self.model)) if self.is_divided else nullcontext():
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        engine, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        caches = partial(uses_gradient_cache, getattr(self, "loss", None))
        self.accelerator.deepspeed_engine_wrapped = zero.GradCacheEngine(engine, caches)
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return engine, loader

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        backbone = backbone_of(self.model)
        if is_quantized(backbone) and isinstance(self.model, LionModel):
            folder = Path(resume_from_checkpoint, transformer_folder(resume_from_checkpoint))
            load_adapter_weights(backbone, str(folder))  # on a base that is as it was
            load_heads(self.model, resume_from_checkpoint)
        elif not self.is_divided:
            super()._load_from_checkpoint(resume_from_checkpoint)
        elif model is None:  # else read above, before it was sharded
            whole = self.whole_model()
            if whole is not None:
                with self._as_unsharded(whole):
                    super()._load_from_checkpoint(resume_from_checkpoint)
            spread_weights(whole, cast(nn.Module, self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_divided:
            return super()._save_optimizer_and_scheduler(output_dir)
        schedule: Any = cast(Any, self.lr_scheduler).state_dict()
        if self.is_deepspeed_enabled:
            state = zero.whole_optimizer_state(self.optimizer, self._groups, self.args.should_save)
            schedule = zero.whole_schedule(schedule, self._groups)
        else:
            state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(schedule, Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_divided or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        if self.is_deepspeed_enabled:
            zero.load_optimizer_state(self.optimizer, self._groups, Path(checkpoint) / OPTIMIZER_NAME)
            schedule = zero.divided_schedule(schedule, self._groups)
        else:
            load_optimizer_state(self.optimizer, Path(checkpoint) / OPTIMIZER_NAME)
        cast(Any, self.lr_scheduler).load_state_dict(schedule)
