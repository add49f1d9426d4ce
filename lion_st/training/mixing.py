"""Batches from several sources of training data, in given shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sentence_transformers.base.sampler import MultiDatasetDefaultBatchSampler


class WeightedBatchSampler(MultiDatasetDefaultBatchSampler):
    """Batches of one source each, of which every source has its share; one that runs out begins again, reshuffled.

    In-batch negatives then come from the query's own source, where they are hardest. An epoch has as many batches as
    all sources together. Without weights, sentence-transformers' own `multi_dataset_batch_sampler` decides.

    Args:
        weights: Of each source, positive; shares are the weights over their sum.
        **settings: Of sentence-transformers' `MultiDatasetDefaultBatchSampler`.

    Example:
        ::

            arguments = RetrieverTrainingArguments(
                multi_dataset_batch_sampler=partial(WeightedBatchSampler, weights=[2, 1])
            )
    """

    def __init__(self, dataset: Any, weights: Sequence[float], **settings: Any) -> None:
        super().__init__(dataset, **settings)
        if len(weights) != len(self.batch_samplers) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(self.batch_samplers)} sources need as many positive weights, got {list(weights)}.")
        self.weights = weights

    def __len__(self) -> int:
        return sum(len(sampler) for sampler in self.batch_samplers)

    def batches(self) -> list[int]:
        """Batches of each source in an epoch: the shares, rounded so that they add up (largest remainders)."""
        exact = [len(self) * weight / sum(self.weights) for weight in self.weights]
        counts = [int(count) for count in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: counts[source] - exact[source])
        for source in by_remainder[: len(self) - sum(counts)]:
            counts[source] += 1
        return counts

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.generator is not None:  # which random batches of the sources are drawn with: a resumed run draws alike
            self.generator.manual_seed(self.seed + self.epoch)
        order = torch.repeat_interleave(torch.tensor(self.batches()))
        offsets = [0, *self.dataset.cumulative_sizes]
        streams = [self._endless(sampler) for sampler in self.batch_samplers]
        for source in order[torch.randperm(len(order), generator=generator)].tolist():
            yield [row + offsets[source] for row in next(streams[source])]

    def _endless(self, sampler: Any) -> Iterator[list[int]]:
        turn = 0
        while True:
            if turn:
                sampler.set_epoch(self.epoch + turn * 1_000_003)  # another order than that of any epoch
            empty = True
            for batch in sampler:
                empty = False
                yield batch
            if empty:
                raise ValueError("A source of training data has fewer rows than a batch.")
            turn += 1
