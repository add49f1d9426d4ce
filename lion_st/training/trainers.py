"""sentence-transformers' trainers: whole checkpoints, an end to what has collapsed, and batches over all devices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers import MultiVectorEncoderTrainer, SentenceTransformerTrainer, SparseEncoderTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.base.trainer import BaseTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.util import get_rank
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints, sort_checkpoints

from lion_st.data.fields import TASKS
from lion_st.files import LOCK, lock_folder
from lion_st.hooks import without_message
from lion_st.training.cost import TrainingCost
from lion_st.training.divided import DividedTrainer
from lion_st.training.learned_sparsity import PATTERN
from lion_st.training.progress.callbacks import EpochCallback, StopAfter
from lion_st.training.progress.checkpoints import (
    begin_checkpoint,
    checkpoint_damage,
    decided_by_first_rank,
    is_over,
    saved_callback,
    seal_checkpoint,
)
from lion_st.training.progress.collapse import CollapseGuard, VectorStatistics
from lion_st.training.progress.throughput import Throughput, lengths_of_read_texts, peak_memory
from lion_st.training.regularizers import TargetCallback
from lion_st.training.sampling import NoFalseNegativesBatchSampler
from lion_st.training.self_distillation import EmaTeacher
from lion_st.training.speed import faster_layers

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import BatchSampler, DataLoader


class GuardedTrainer(DividedTrainer):
    """transformers' Trainer whose checkpoints are whole and of a sound state, or are not there.

    One process writes weights, whichever trainer this is mixed into, and the same files whether they are sharded or
    not: a run goes on from them on any number of processes. A checkpoint ends with the checksums of its files, and
    only then an earlier one makes room for it; the best one is kept beside the last `save_total_limit`. A training that
    has collapsed ends with an error before it writes. One that goes on from its last step takes no further one.
    Evaluations draw no random numbers of the training's. `torch_compile` and `use_liger_kernel` are of the decoder
    layers, see `lion_st.training.speed`.
    """

    def __init__(self, *arguments: Any, guard: CollapseGuard | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard = CollapseGuard() if guard is None else guard
        self.guard.model = self.model
        self.add_callback(self.guard)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The loss, which the guard looks at too."""
        result = super().compute_loss(*arguments, **options)
        self.guard.loss = (result[0] if isinstance(result, tuple) else result).detach()
        return result

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, with the output folder locked against other runs.

        Raises:
            FolderInUse: If another process trains into the folder.
        """
        alone = "Trying to gather while torch.distributed is not"  # which is nothing to warn of: all texts are here
        with (
            _locked(Path(str(self.args.output_dir))),
            without_message("sentence_transformers.util.distributed", alone),
            faster_layers(self.model, self.args),
        ):
            if isinstance(resume_from_checkpoint, str):
                state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
                if is_over(state, getattr(self.args, "stop_after_steps", None)):
                    return self._end_again(state, resume_from_checkpoint)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate, and leave the random states as they were: what follows is the same as without."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*arguments, **options)

    def _end_again(self, state: TrainerState, checkpoint: str) -> TrainOutput:
        """Take the state of a training that was killed after its last checkpoint, before its result was written."""
        self.state = state
        state.is_world_process_zero = self.is_world_process_zero()
        self._find_best()
        if self.is_divided:
            self._prepare_for_training(state.max_steps, None, checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        for callback in self.callback_handler.callbacks:
            restored = saved_callback(state, type(callback).__name__)
            for name, value in restored.get("attributes", {}).items():
                setattr(callback, name, value)
            if isinstance(callback, StopAfter):
                callback.is_over = True
        return TrainOutput(state.global_step, 0.0, {})

    def _init_training_state(self, *arguments: Any, **options: Any) -> tuple[int, int]:
        found = super()._init_training_state(*arguments, **options)
        self._find_best()
        return found

    def _find_best(self) -> None:
        """Name the best checkpoint by where it is now, should the run's folder have moved."""
        if self.state.best_model_checkpoint is not None or self.state.best_global_step:
            step = Path(self.state.best_model_checkpoint or f"-{self.state.best_global_step}").name.rpartition("-")[2]
            best = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:  # which would not be there, from between two checkpoints
            self.control.should_save = True
        return is_best

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        problem = decided_by_first_rank(partial(checkpoint_damage, Path(best)))
        if problem is not None:
            raise ValueError(
                f"The best checkpoint, {best}, is damaged: {problem}. Restore it from a copy, or repeat the command "
                "with --load_best_model_at_end false to export the last state instead."
            )
        self._load_from_checkpoint(best)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # sentence-transformers expects to be called on the first process alone.
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.require_sound(self.state)
        output = str(self.args.output_dir)
        folder = Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random states
        if self.args.should_save:
            seal_checkpoint(folder)
            best = self.state.best_model_checkpoint
            if limit and best is not None and str(Path(best)) not in sort_checkpoints(output, use_mtime=True)[-limit:]:
                limit += 1
            rotate_checkpoints(output, limit, best, use_mtime=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder on the first process; if it is held by another run, all of them say so."""
    with ExitStack() as held:
        decided_by_first_rank(lambda: held.enter_context(lock_folder(folder, wait=False)))
        try:
            yield
        finally:
            if get_rank() == 0 and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was written
                (folder / LOCK).unlink()


class RetrieverTrainerMixin(GuardedTrainer, BaseTrainer):
    """What both trainers share: batches over all devices, `state.total_flos` of all that is computed, and a log of
    what the vectors are like.

    The sampler makes the batch of all devices, of which accelerate gives each its part (`split_batches`): what may
    stand together is decided over the whole batch, of one source, and does not depend on the number of devices.
    """

    cost: TrainingCost
    has_sparse_vectors = False
    self_teacher: EmaTeacher | None = None  # whose scores take the place of labels

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard.statistics = VectorStatistics(cast(nn.Module, self.model), self.has_sparse_vectors)
        self.throughput = Throughput()
        self._sampler: Any = None
        self.epoch_listeners: list[Callable[[int], Any]] = []  # of what draws negatives anew in each epoch
        self.add_callback(EpochCallback(self._set_epoch))
        self._has_logged = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """The loss; its parts and the statistics of the vectors are kept for the log."""
        statistics, self._has_logged = cast(Any, self.guard.statistics), False
        if self.self_teacher is not None:
            inputs = inputs | {"label": self.self_teacher.scores(self.collect_features(inputs)[0])}
        statistics.begin()
        try:
            result = super().compute_loss(model, inputs, *arguments, **options)
        finally:
            statistics.end()
        if not self._has_logged:  # the loss has no parts
            self.track_loss_components({})
        return result

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        """Add to the parts of the loss what is logged beside them, as means over the steps since the last log."""
        self._has_logged = True
        statistics: Any = self.guard.statistics
        super().track_loss_components(loss | statistics.means() | self._flops())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss with what else was seen since the last log, of all processes; see docs/watch.md."""
        if "loss" in logs:
            logs = logs | self._seen()
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate; the time is not that of training."""
        with self.throughput.paused():
            return super().evaluate(*arguments, **options)

    def store_flos(self) -> None:
        """Add the operations since the last call to `state.total_flos`."""
        trainer: Any = self  # whose count transformers declares to be whole
        trainer.current_flos += self.cost.flops(*self.throughput.take())
        super().store_flos()

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this device."""
        self.throughput = Throughput()
        configuration = self.accelerator.dataloader_config
        if configuration.split_batches:
            raise ValueError(
                "--accelerator_config has split_batches: batches are divided over the devices already. Leave it out, "
                "and give the batch of all devices as --batch_size."
            )
        if not self.args.dataloader_drop_last and self.args.world_size > 1:
            raise ValueError(
                f"--dataloader_drop_last is false, with {self.args.world_size} processes: a last batch that is not "
                "full has no part for some of them, for which the others wait. Leave it out."
            )
        if self.args.dataloader_persistent_workers:
            raise ValueError(
                "--dataloader_persistent_workers keeps workers that would draw each epoch's negatives as in the first: "
                "leave it out."
            )
        configuration.split_batches = True
        try:
            loader = super().get_train_dataloader()
        finally:
            configuration.split_batches = False
        sampler: Any = loader.batch_sampler
        while not hasattr(sampler, "set_epoch") and hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        self._sampler = sampler
        return loader

    def _set_epoch(self, epoch: int) -> None:
        """Tell the listeners, and the sampler.

        transformers misses that behind accelerate's when several processes resume in an epoch.
        """
        for listener in self.epoch_listeners:
            listener(epoch)
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)

    def get_batch_sampler(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> BatchSampler | None:
        """The batches of all devices in training."""
        if self.accelerator.split_batches:
            batch_size *= self.args.world_size
        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "drop_last": drop_last,
            "valid_label_columns": valid_label_columns,
            "generator": generator,
            "seed": seed,
        }
        if self.args.batch_sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED):
            return NoFalseNegativesBatchSampler(dataset, **settings)
        return super().get_batch_sampler(dataset, **settings)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights that decay; thresholds and ln k are not weights, and would end at 0 and one term."""
        return [name for name in super().get_decay_parameter_names(model) if not re.search(PATTERN, name)]

    def _load_callback_state(self) -> None:
        """Restore callbacks, but for that of target regularizers, which takes up its state as training begins."""
        state: Any = self.state
        saved = state.stateful_callbacks
        state.stateful_callbacks = {name: one for name, one in saved.items() if name != TargetCallback.__name__}
        try:
            super()._load_callback_state()
        finally:
            state.stateful_callbacks = saved

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count the texts of a step; their operations are added up in `store_flos`, without waiting for the device."""
        model: Any = self.accelerator.unwrap_model(self.model)
        self.throughput.add(lengths_of_read_texts(inputs, getattr(model, "query_table", None) is None))
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.self_teacher is not None and self.args.should_save:
            self.self_teacher.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.self_teacher is not None and checkpoint is not None:
            self.self_teacher.load(checkpoint)

    def _seen(self) -> dict[str, float]:
        """Tokens a second, peak memory and, of sparse vectors, the shares of terms that no text or every text has."""
        statistics: Any = self.guard.statistics
        pace, peak = self.throughput.tokens_per_second(), peak_memory()
        figures = self._of_all_ranks(torch.tensor([[pace, peak or 0.0]], dtype=torch.float32))
        seen = {"tokens_per_second": round(figures[:, 0].sum().item(), 1)}
        if peak is not None:
            seen["peak_memory_gib"] = round(figures[:, 1].max().item(), 3)
        for task, uses in sorted(statistics.take_uses().items()):
            *_, texts = counts = self._of_all_ranks(uses[None]).sum(dim=0)
            seen[f"{task}_dead_terms"] = round((counts[:-1] == 0).float().mean().item(), 4)
            seen[f"{task}_always_active_terms"] = round((counts[:-1] == texts).float().mean().item(), 4)
        return seen

    def _of_all_ranks(self, row: Tensor) -> Tensor:
        """Rows [1, N] of all processes, [W, N]."""
        return self.accelerator.gather(row.to(self.args.device))

    def _flops(self) -> dict[str, Tensor]:
        """FLOPS of queries and documents as the regularizers saw them, before their weights."""
        found = {}
        for task in TASKS:
            last = getattr(getattr(self.loss, f"{task}_regularizer", None), "last", None)
            if last is not None:
                found[f"{task}_flops"] = last
        return found


class SparseRetrieverTrainer(RetrieverTrainerMixin, SparseEncoderTrainer):
    """sentence-transformers' SparseEncoderTrainer, with batches over all devices."""

    has_sparse_vectors = True


class DenseRetrieverTrainer(RetrieverTrainerMixin, SentenceTransformerTrainer):
    """sentence-transformers' SentenceTransformerTrainer, with batches over all devices."""


class MultiVectorRetrieverTrainer(RetrieverTrainerMixin, MultiVectorEncoderTrainer):
    """sentence-transformers' MultiVectorEncoderTrainer, with batches over all devices."""

    training_args_class = BaseTrainingArguments  # type: ignore[assignment] # its own has a length, which the model has


class HybridRetrieverTrainer(DenseRetrieverTrainer):
    """The trainer of dense models, for those that give a sparse vector too."""

    has_sparse_vectors = True


TRAINERS: dict[str, type[RetrieverTrainerMixin]] = {
    "sparse": SparseRetrieverTrainer,
    "dense": DenseRetrieverTrainer,
    "multi_vector": MultiVectorRetrieverTrainer,
    "hybrid": HybridRetrieverTrainer,
}
