"""sentence-transformers' trainers: whole checkpoints, an end to what has collapsed, and batches over all devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from sentence_transformers import SentenceTransformerTrainer, SparseEncoderTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.base.trainer import BaseTrainer
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lion_st.losses import FlopsRegularizer
from lion_st.training.checkpoints import discard_checkpoint, seal_checkpoint
from lion_st.training.collapse import CollapseGuard, VectorStatistics
from lion_st.training.cost import TrainingCost
from lion_st.training.sampling import NoFalseNegativesBatchSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import BatchSampler, DataLoader


class GuardedTrainer(Trainer):
    """transformers' Trainer whose checkpoints are whole and of a sound state, or are not there.

    One process writes weights, whichever trainer this is mixed into. A checkpoint ends with the checksums of its files,
    and only then an earlier one makes room for it. A training that has collapsed ends with an error before it writes.

    Args:
        arguments: Of the trainer.
        guard: Looks at the training, see `CollapseGuard`; by default at loss and weights alone.
        options: Of the trainer.
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

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # sentence-transformers expects to be called on the first process alone.
        if self.args.should_save:
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.guard.require_sound(self.state)
        output = str(self.args.output_dir)
        folder = Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            discard_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random states
        if self.args.should_save:
            seal_checkpoint(folder)
            rotate_checkpoints(output, limit, self.state.best_model_checkpoint, use_mtime=True)


class RetrieverTrainerMixin(GuardedTrainer, BaseTrainer):
    """What both trainers share: batches over all devices, `state.total_flos` of all that is computed, and a log of
    what the vectors are like.

    The sampler makes the batch of all devices, of which accelerate gives each its part (`split_batches`): what may
    stand together is decided over the whole batch, of one source, and does not depend on the number of devices.
    """

    cost: TrainingCost
    has_sparse_vectors: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard.statistics = VectorStatistics(cast(nn.Module, self.model), self.has_sparse_vectors)
        self._has_logged = False

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The loss; its parts and the statistics of the vectors are kept for the log."""
        statistics: Any = self.guard.statistics
        self._has_logged = False
        statistics.begin()
        try:
            result = super().compute_loss(*arguments, **options)
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

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this device."""
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
            return super().get_train_dataloader()
        finally:
            configuration.split_batches = False

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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step over these inputs."""
        lengths = [mask.sum(1) for name, mask in inputs.items() if name.endswith("attention_mask")]
        tokens = torch.cat(lengths).double()
        return int(self.cost.flops(len(tokens), tokens.sum().item(), tokens.square().sum().item()))

    def _flops(self) -> dict[str, Tensor]:
        """FLOPS of queries and documents as the regularizers saw them, before their weights."""
        found = {}
        for task in ("query", "document"):
            regularizer = getattr(self.loss, f"{task}_regularizer", None)
            if isinstance(regularizer, FlopsRegularizer) and regularizer.last is not None:
                found[f"{task}_flops"] = regularizer.last
        return found


class SparseRetrieverTrainer(RetrieverTrainerMixin, SparseEncoderTrainer):
    """sentence-transformers' SparseEncoderTrainer, with batches over all devices."""

    has_sparse_vectors = True


class DenseRetrieverTrainer(RetrieverTrainerMixin, SentenceTransformerTrainer):
    """sentence-transformers' SentenceTransformerTrainer, with batches over all devices."""

    has_sparse_vectors = False
