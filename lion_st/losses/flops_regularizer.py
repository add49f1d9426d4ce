"""FLOPS regularisation over the global batch."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sparse_encoder.losses import FlopsLoss
from torch import Tensor, nn

from lion_st.losses.distributed import mean_across_ranks


class FlopsRegularizer(FlopsLoss):
    r"""FLOPS(X) = sum over terms t of (1/N sum_i x_it)^2, the mean taken over the rows of all ranks.

    FLOPS of the mean is not the mean of each rank's FLOPS, which is larger the fewer rows a rank holds: sparsity would
    depend on the number of GPUs. Here ranks average their mean vectors, V floats a step and no embeddings, so that the
    value and the averaged gradient are those of one process with the whole batch.

    Args:
        model: The model that is trained, as sentence-transformers' regularizers take it.
        threshold: Rows with at most this many active terms count as zero (FLOPS with L0 masking).
        gather_across_devices: Take the mean over the rows of all ranks. If False, of this rank's alone.
        released_scaling: Divide the gradient by the number of ranks, as the paper's released code does.
        columns: Take FLOPS of this many equal blocks of rows one by one, and their mean. In
            :class:`~sentence_transformers.sparse_encoder.losses.SpladeLoss` a block is a document column of the data
            set. The released code's MarginMSE objective uses 2 (positives, negatives); its KL objective sums over its
            columns, which is `columns` with `columns` times the weight.

    Raises:
        ValueError: If `released_scaling` is set without `gather_across_devices`, if `columns` is not positive, or if
            the rows do not divide into `columns`.

    References:
        Paria et al., Minimizing FLOPs to Learn Efficient Sparse Representations, 2020, section 4:
        https://arxiv.org/abs/2004.05665. Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025,
        section 3: https://arxiv.org/abs/2502.15526.

    Example:
        ::

            loss = SpladeLoss(
                model,
                ContrastiveDistillationLoss(model),
                document_regularizer_weight=0.04,
                query_regularizer_weight=0.05,
                document_regularizer=FlopsRegularizer(model),
                query_regularizer=FlopsRegularizer(model),
            )
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = None,
        gather_across_devices: bool = True,
        released_scaling: bool = False,
        columns: int = 1,
    ) -> None:
        if released_scaling and not gather_across_devices:
            raise ValueError("released_scaling=True needs gather_across_devices=True; the local mean is not scaled.")
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns!r}.")
        super().__init__(model, threshold=threshold)  # type: ignore[arg-type]
        self.gather_across_devices = gather_across_devices
        self.released_scaling = released_scaling
        self.columns = columns
        self.last: Tensor | None = None  # the last value, without its gradient, for the log

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """FLOPS in float32 of embeddings [N, V]."""
        value = self.block_means(embeddings).square().sum() / self.columns
        self.last = value.detach()
        return value

    def block_means(self, embeddings: Tensor) -> Tensor:
        """Mean weight of each term over the rows of all ranks, in float32, [columns, V]."""
        if len(embeddings) % self.columns:
            raise ValueError(f"{len(embeddings)} rows do not divide into columns={self.columns} equal blocks.")
        if self.threshold is not None:
            embeddings = embeddings * ((embeddings != 0).sum(dim=1, keepdim=True) > self.threshold)
        blocks = embeddings.unflatten(0, (self.columns, -1))  # [columns, N / columns, V]
        # A sum with a dtype neither rounds to bfloat16 nor makes a float32 copy of the rows.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        means = blocks.sum(dim=1, dtype=dtype) / blocks.shape[1]
        if self.gather_across_devices:
            means = mean_across_ranks(means, shrink_gradient=self.released_scaling)
        return means

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {
            "threshold": self.threshold,
            "gather_across_devices": self.gather_across_devices,
            "released_scaling": self.released_scaling,
            "columns": self.columns,
        }
