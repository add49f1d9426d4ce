"""The joint loss of models that give a sparse and a dense vector of each text."""

from __future__ import annotations

import math
from typing import Any

from sentence_transformers.util import get_world_size
from torch import Tensor, nn


class HybridLoss(nn.Module):
    """A loss of the sparse vectors and one of the dense ones: L = L_sparse + dense_weight * L_dense.

    Both learn from the same batch and its one pass through the backbone. It is for the inside of
    :class:`~sentence_transformers.sparse_encoder.losses.SpladeLoss`, whose regularizers are each in a
    :class:`SparsePart`; in its cached form, gradient caching is that of the joint loss.

    Args:
        sparse_loss: With `compute_loss_from_embeddings`, such as :class:`ContrastiveDistillationLoss`.
        dense_loss: The same, of the dense vectors.
        dense_dimension: D, their width: what stands behind the V terms in an embedding [B, V + D].
        dense_weight: Weight of the dense loss.

    Raises:
        ValueError: If the width is below 1, or the weight negative or not finite.

    Example:
        ::

            sparse, dense = ContrastiveDistillationLoss(model), ContrastiveDistillationLoss(model, scale=100.0)
            joint = HybridLoss(sparse, dense, dense_dimension=2048)
            flops = SparsePart(FlopsRegularizer(model), 2048)
            SpladeLoss(model, joint, 0.04, 0.05, document_regularizer=flops, query_regularizer=flops)
    """

    def __init__(
        self, sparse_loss: nn.Module, dense_loss: nn.Module, dense_dimension: int, dense_weight: float = 1.0
    ) -> None:
        super().__init__()
        if dense_dimension < 1:
            raise ValueError(f"dense_dimension must be at least 1, got {dense_dimension!r}.")
        if not 0 <= dense_weight < math.inf:
            raise ValueError(f"dense_weight must be a finite number of at least 0, got {dense_weight!r}.")
        self.sparse_loss = sparse_loss
        self.dense_loss = dense_loss
        self.dense_dimension = dense_dimension
        self.dense_weight = dense_weight

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted terms of both losses, named `"sparse_..."` and `"dense_..."`.

        Args:
            embeddings: Queries and columns of documents [B, V + D].
            labels: As both losses take them.
        """
        widths = [embeddings[0].shape[1] - self.dense_dimension, self.dense_dimension]
        split = [column.split(widths, dim=1) for column in embeddings]
        terms = {}
        for name, loss, weight, part in (
            ("sparse", self.sparse_loss, 1.0, 0),
            ("dense", self.dense_loss, self.dense_weight, 1),
        ):
            vectors = [_sendable(column[part]) for column in split]
            found: Any = loss
            value = found.compute_loss_from_embeddings(vectors, labels)
            for term, one in (value if isinstance(value, dict) else {"loss": value}).items():
                terms[f"{name}_{term}"] = weight * one
        return terms

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {"sparse_loss": self.sparse_loss, "dense_loss": self.dense_loss, "dense_weight": self.dense_weight}


class SparsePart(nn.Module):
    """A regularizer of the first V columns of embeddings [N, V + D].

    Args:
        regularizer: Of sparse vectors.
        dense_dimension: D.
    """

    def __init__(self, regularizer: nn.Module, dense_dimension: int) -> None:
        super().__init__()
        self.regularizer: Any = regularizer
        self.dense_dimension = dense_dimension

    @property
    def last(self) -> Tensor | None:
        """The last value without its gradient, where the regularizer keeps it."""
        return getattr(self.regularizer, "last", None)

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """The regularizer's value."""
        return self.regularizer.compute_loss_from_embeddings(_sendable(embeddings[:, : -self.dense_dimension]))

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return self.regularizer.get_config_dict()


def regularizer_of(loss: nn.Module, task: str) -> nn.Module | None:
    """The regularizer of a `SpladeLoss` for queries or documents, None of other losses."""
    found = getattr(loss, f"{task}_regularizer", None)
    return found.regularizer if isinstance(found, SparsePart) else found


def _sendable(part: Tensor) -> Tensor:
    """A part of rows, in a piece where other ranks are to have it."""
    return part.contiguous() if get_world_size() > 1 else part
