"""Dense pooling over the last hidden states."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from sentence_transformers.base.modules import Module, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn.functional import normalize

from lion_st.kernels import check_finite
from lion_st.modules.query_table import Head

PoolingName = Literal["mean_normalized", "mean", "last_token"]


class LlamaPooling(Head):
    """Pools hidden states [B, L, D] of the real tokens into one vector per text [B, D].

    Args:
        embedding_dimension: D, the backbone's hidden size.
        mode: `"mean_normalized"` is the mean of the L2-normalised states, itself not normalised again (Lion-DS);
            `"mean"` the plain mean; `"last_token"` the state of the last token (RepLLaMA).
        normalize: Bring each vector to length 1, so that its inner products are cosines.

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

    config_keys: list[str] = ["embedding_dimension", "mode", "normalize"]  # noqa: RUF012

    def __init__(
        self, embedding_dimension: int, mode: PoolingName = "mean_normalized", normalize: bool = False
    ) -> None:
        super().__init__()
        if mode not in get_args(PoolingName):
            raise ValueError(f"mode must be one of {get_args(PoolingName)}, got {mode!r}.")
        self.embedding_dimension = embedding_dimension
        self.mode = mode
        self.normalize = normalize
        self.pooling = Pooling(embedding_dimension, "lasttoken" if mode == "last_token" else "mean")

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Writes `features["sentence_embedding"]` [B, D] from the last hidden states.

        Args:
            features: `"token_embeddings"` [B, L, D] with `"attention_mask"` [B, L], or packed [1, T, D] with
                `"cu_seq_lens_q"` [B + 1].

        Raises:
            ValueError: If the model is in evaluation mode without gradients, as when it encodes, and a vector holds NaN
                or infinity. Training is not checked, which would wait for the GPU at every step.
        """
        if self.mode == "mean_normalized":
            states = features["token_embeddings"]
            # Stock divides by an eps that float16 rounds to 0, so that padding of zeros would become NaN.
            eps = max(1e-12, torch.finfo(states.dtype).tiny)
            features["token_embeddings"] = normalize(states, dim=-1, eps=eps)
        features = self.pooling(features)
        if self.normalize:
            features["sentence_embedding"] = normalize(features["sentence_embedding"], dim=-1)
        encodes = not self.training and not torch.is_grad_enabled()
        if encodes and not torch.compiler.is_compiling():
            check_finite(features["sentence_embedding"])
        return features

    def stock_modules(self) -> list[Module]:
        """The sentence-transformers modules that compute the same vectors."""
        modules: list[Module] = [Pooling(self.embedding_dimension, self.pooling.pooling_mode)]
        if self.mode == "mean_normalized":
            modules.insert(0, Normalize(module_input_name="token_embeddings"))
        if self.normalize:
            modules.append(Normalize())
        return modules

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the pooling, `normalize` only where it is set."""
        config = super().get_config_dict()
        if not self.normalize:
            del config["normalize"]
        return config

    def get_embedding_dimension(self) -> int:
        """Width D of the vectors."""
        return self.embedding_dimension
