"""The trainer of each paradigm."""

from __future__ import annotations

from sentence_transformers import MultiVectorEncoderTrainer, SentenceTransformerTrainer, SparseEncoderTrainer
from sentence_transformers.base.training_args import BaseTrainingArguments

from lion_st.training.trainers import RetrieverTrainerMixin


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
