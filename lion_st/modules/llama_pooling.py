"""Dense pooling over the last hidden states."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.modules import Module, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

PoolingName = Literal["mean_normalized", "mean", "last_token"]


class LlamaPooling(Module):
    """Pools hidden states [B, L, D] of the real tokens into one vector per text [B, D].

    Args:
        embedding_dimension: D, the backbone's hidden size.
        mode: `"mean_normalized"` is the mean of the L2-normalised states, itself not normalised again (Lion-DS);
            `"mean"` the plain mean; `"last_token"` the state of the last token (RepLLaMA).

    Raises:
        ValueError: If `mode` is none of these.

    References:
        Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025, section 3.1:
        https://arxiv.org/abs/2502.15526. Ma et al., Fine-Tuning LLaMA for Multi-Stage Text Retrieval, 2023:
        https://arxiv.org/abs/2310.08319.

    Example:
        ::

            pooling = LlamaPooling(2048)
            features = pooling({"token_embeddings": hidden, "attention_mask": mask})
            features["sentence_embedding"]  # [B, 2048]
    """

    config_keys: list[str] = ["embedding_dimension", "mode"]  # noqa: RUF012

    def __init__(self, embedding_dimension: int, mode: PoolingName = "mean_normalized") -> None:
        super().__init__()
        if mode not in get_args(PoolingName):
            raise ValueError(f"mode must be one of {get_args(PoolingName)}, got {mode!r}.")
        self.embedding_dimension = embedding_dimension
        self.mode = mode
        self.stages = torch.nn.Sequential(*self.stock_modules())

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Writes `features["sentence_embedding"]` [B, D] from `"token_embeddings"` and `"attention_mask"`."""
        return self.stages(features)

    def stock_modules(self) -> list[Module]:
        """The sentence-transformers modules that compute the same vectors."""
        if self.mode == "last_token":
            return [Pooling(self.embedding_dimension, "lasttoken")]
        pooling = Pooling(self.embedding_dimension, "mean")
        if self.mode == "mean":
            return [pooling]
        return [Normalize(module_input_name="token_embeddings"), pooling]

    def get_embedding_dimension(self) -> int:
        """Width D of the vectors."""
        return self.embedding_dimension

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        """Save the configuration; there are no weights."""
        self.save_config(output_path)
