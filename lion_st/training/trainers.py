"""sentence-transformers' trainers with batches over all devices, and the operations of training counted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SparseEncoderTrainer
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.base.trainer import BaseTrainer

from lion_st.training.cost import TrainingCost
from lion_st.training.sampling import NoFalseNegativesBatchSampler

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import BatchSampler, DataLoader


class RetrieverTrainerMixin(BaseTrainer):
    """What both trainers share: batches over all devices, and `state.total_flos` of all that is computed.

    The sampler makes the batch of all devices, of which accelerate gives each its part (`split_batches`): what may
    stand together is decided over the whole batch, of one source, and does not depend on the number of devices.
    """

    cost: TrainingCost

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


class SparseRetrieverTrainer(RetrieverTrainerMixin, SparseEncoderTrainer):
    """sentence-transformers' SparseEncoderTrainer, with batches over all devices."""


class DenseRetrieverTrainer(RetrieverTrainerMixin, SentenceTransformerTrainer):
    """sentence-transformers' SentenceTransformerTrainer, with batches over all devices."""
