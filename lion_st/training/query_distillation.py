"""Small query encoders learn to score documents as the full model does, whose vectors of them stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import Tensor, nn

from lion_st.encoding.encode import encode_texts
from lion_st.encoding.fingerprints import prompt_for
from lion_st.encoding.vectors import Vectors
from lion_st.losses import dot_scores
from lion_st.training.trainers import GuardedTrainer

if TYPE_CHECKING:
    from datasets import Dataset


class DistillationTargets(NamedTuple):
    """What a query encoder learns from: the full model's vectors of queries and of documents to score."""

    queries: list[str]
    query_vectors: Vectors  # [Q, V] or [Q, D]
    document_vectors: Vectors  # [N, V] or [N, D]
    candidates: np.ndarray  # int64 [Q, C], rows of the documents to score for each query


def document_columns(tuples: Dataset) -> list[str]:
    """The columns with documents of tuples that `load_tuples` made."""
    return [name for name in tuples[0] if name == "positive" or name.startswith("negative")]


def make_distillation_targets(
    model: SentenceTransformer | SparseEncoder,
    tuples: Dataset,
    *,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> DistillationTargets:
    """Encode training tuples with the full model, each document once.

    Args:
        model: Full model.
        tuples: As `lion_st.data.load_tuples` makes them: `query`, `positive` and any `negative_1` ... `negative_n`.
        tokens_per_batch: Padded tokens per batch.
        show_progress: Show progress bars.

    Raises:
        ValueError: If there is no tuple, or a column is missing.
    """
    if not len(tuples) or not {"query", "positive"} <= tuples[0].keys():
        raise ValueError(f"Tuples need the columns query and positive, got {tuples} with {len(tuples)} rows.")
    columns = document_columns(tuples)
    rows: dict[str, int] = {}
    queries: list[str] = []
    candidates = np.empty((len(tuples), len(columns)), dtype=np.int64)
    for number in range(len(tuples)):
        row = tuples[number]
        queries.append(row["query"])
        candidates[number] = [rows.setdefault(row[name], len(rows)) for name in columns]
    options: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "show_progress": show_progress}
    return DistillationTargets(
        queries,
        encode_texts(model, queries, "query", **options),
        encode_texts(model, list(rows), "document", **options),
        candidates,
    )


class QueryDistillationLoss(nn.Module):
    """Makes a query encoder score documents as the full model does.

    With s(q, d) the student's and t(q, d) the full model's dot products, both over the candidates of all queries of the
    batch and times `scale`: the mean over queries of KL(softmax(t) || softmax(s)), plus `vector_weight` times the mean
    squared distance of the student's vectors from the full model's, which also keeps sparse students sparse.

    Args:
        model: The student, a sentence-transformers model.
        targets: See `make_distillation_targets`; labels of the training set are rows of them.
        scale: Factor on the scores: 1 for sparse vectors, 100 for dense ones (temperature 0.01).
        vector_weight: Weight of the distance; 0 for a static encoder, which cannot expand a query.
    """

    def __init__(
        self, model: nn.Module, targets: DistillationTargets, scale: float = 1.0, vector_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.targets = targets
        self.scale = scale
        self.vector_weight = vector_weight

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms of the loss for a batch of queries and their rows in the targets."""
        (features,) = sentence_features
        student = self.model(features)["sentence_embedding"].float()
        if sparse.issparse(self.targets.query_vectors):
            student = student.relu()  # a term's weight below 0 counts as 0, as it will be saved
        rows = labels.cpu().numpy()
        teacher = self._dense(self.targets.query_vectors, rows, student)
        documents = self._dense(self.targets.document_vectors, np.unique(self.targets.candidates[rows]), student)
        targets = F.log_softmax(dot_scores(teacher, documents, self.scale), dim=-1)
        scores = F.log_softmax(dot_scores(student, documents, self.scale), dim=-1)
        terms = {"score_loss": F.kl_div(scores, targets, log_target=True, reduction="batchmean")}
        if self.vector_weight:
            terms["vector_loss"] = self.vector_weight * (student - teacher).square().sum(dim=-1).mean()
        return terms

    @staticmethod
    def _dense(vectors: Vectors, rows: np.ndarray, like: Tensor) -> Tensor:
        part = vectors[rows]
        return torch.from_numpy(part.toarray() if isinstance(part, sparse.csr_array) else np.asarray(part)).to(like)


class _OneGpu:
    @property
    def n_gpu(self) -> int:
        """At most 1: transformers would copy the model to the others, and what it learns from is on the first."""
        return min(1, super().n_gpu)  # type: ignore[misc]


class SparseDistillationArguments(_OneGpu, SparseEncoderTrainingArguments):
    """sentence-transformers' arguments for a `SparseEncoder` that learns queries, with one GPU at most."""


class DenseDistillationArguments(_OneGpu, SentenceTransformerTrainingArguments):
    """sentence-transformers' arguments for a `SentenceTransformer` that learns queries, with one GPU at most."""


class SparseDistillationTrainer(GuardedTrainer, SparseEncoderTrainer):
    """sentence-transformers' SparseEncoderTrainer, which ends when loss or weights are lost."""


class DenseDistillationTrainer(GuardedTrainer, SentenceTransformerTrainer):
    """The same of dense models."""


def distill_query_encoder(
    student: SentenceTransformer | SparseEncoder,
    targets: DistillationTargets,
    output_dir: str | Path,
    *,
    epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float | None = None,
    vector_weight: float | None = None,
    seed: int = 0,
    **training_options: Any,
) -> SentenceTransformer | SparseEncoder:
    """Train a query encoder to score as the full model does, by `QueryDistillationLoss`.

    Args:
        student: Of `static_query_encoder` or `truncated_query_encoder`; it is trained in place.
        targets: See `make_distillation_targets`.
        output_dir: Folder of the trainer's checkpoints.
        epochs: Passes over the targets.
        batch_size: Queries of a step; their candidates are scored for all of them. Small ones make more
            steps, which layers need: the first take away nearly all terms, which then have to come back.
        learning_rate: By default 1e-2 for static weights and 1e-4 for layers.
        vector_weight: See `QueryDistillationLoss`; by default 0 for static weights and 1 for layers.
        seed: Of the order of the queries.
        training_options: Further arguments of sentence-transformers' training arguments.

    Returns:
        The student.

    Raises:
        TrainingCollapsed: If its loss or weights are no longer finite.
        FolderInUse: If another process trains into the folder.

    Example:
        >>> tuples = load_tuples("lion-st/lion-quickstart", negatives=4)  # doctest: +SKIP
        >>> targets = make_distillation_targets(model, tuples)  # doctest: +SKIP
        >>> student = distill_query_encoder(static_query_encoder(model), targets, "runs/static")  # doctest: +SKIP
        >>> save_query_encoder(student, model, "lion-sp-static")  # doctest: +SKIP
    """
    from datasets import Dataset
    from transformers import set_seed

    is_static = isinstance(student[0], SparseStaticEmbedding)
    if vector_weight is None:
        vector_weight = 0.0 if is_static else 1.0
    scale = 1.0 if sparse.issparse(targets.query_vectors) else 100.0
    prompt = prompt_for(student, "query")
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate or (1e-2 if is_static else 1e-4),
        "router_mapping": {"query": "query"},
        "prompts": {"query": prompt} if prompt else None,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": student.device.type == "cpu",
        **training_options,
    }
    is_encoder = isinstance(student, SparseEncoder)
    arguments = (SparseDistillationArguments if is_encoder else DenseDistillationArguments)(**options)
    trainer_class: Any = SparseDistillationTrainer if is_encoder else DenseDistillationTrainer
    set_seed(seed)
    trainer = trainer_class(
        model=student,
        args=arguments,
        train_dataset=Dataset.from_dict({"query": targets.queries, "label": range(len(targets.queries))}),
        loss=QueryDistillationLoss(student, targets, scale, vector_weight),
    )
    trainer.train()
    if is_static:
        with torch.no_grad():
            student[0].get_parameter("weight").clamp_(min=0)
    return student.eval()
