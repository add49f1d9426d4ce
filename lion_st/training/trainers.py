"""The trainers of sentence-transformers, with what every run of lion_st adds to them."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SparseEncoderTrainer

from lion_st.training.cost import TrainingCost


class _CountsFlops:
    """Has the trainer's `state.total_flos` count every column, adapter, attention and LM head."""

    cost: TrainingCost

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        lengths = [mask.sum(1) for name, mask in inputs.items() if name.endswith("attention_mask")]
        tokens = torch.cat(lengths).double()
        return int(self.cost.flops(len(tokens), tokens.sum().item(), tokens.square().sum().item()))


class SparseRetrieverTrainer(_CountsFlops, SparseEncoderTrainer):
    """sentence-transformers' SparseEncoderTrainer, counting operations."""


class DenseRetrieverTrainer(_CountsFlops, SentenceTransformerTrainer):
    """sentence-transformers' SentenceTransformerTrainer, counting operations."""
