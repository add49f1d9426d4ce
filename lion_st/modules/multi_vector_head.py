"""The head of late interaction: a vector for each token."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Module, Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import nn
from torch.nn.functional import normalize

from lion_st.files import hub_options
from lion_st.hooks import has_adapter
from lion_st.kernels import check_finite

TOKEN_DIMENSION = 128


class MultiVectorHead(Module):
    """Projects the hidden state of each token [B, L, D] to a vector of length 1 [B, L, token_dimension].

    It computes what the stock modules `Dense`, `MultiVectorMask` and `Normalize` do one after the other, also of packed
    states. On an adapter's model the projection stays float32, as the adapter does: steps of an optimizer are smaller
    than bfloat16's rounding.

    Args:
        hidden_size: D, the backbone's hidden size.
        token_dimension: Width of a token's vector.
        mask: Which tokens count; all real ones by default.

    Raises:
        ValueError: If a width is not positive.

    References:
        Khattab and Zaharia, ColBERT, 2020: https://arxiv.org/abs/2004.12832.

    Example:
        ::

            head = MultiVectorHead(2048)
            features = head({"token_embeddings": hidden, "input_ids": ids, "attention_mask": mask})
            features["token_embeddings"]  # [B, L, 128]
    """

    config_keys: list[str] = ["hidden_size", "token_dimension"]  # noqa: RUF012
    forward_kwargs: set[str] = {"task"}  # noqa: RUF012
    query_table = None  # a table has one vector of a query

    def __init__(
        self, hidden_size: int, token_dimension: int = TOKEN_DIMENSION, mask: MultiVectorMask | None = None
    ) -> None:
        super().__init__()
        for name, width in (("hidden_size", hidden_size), ("token_dimension", token_dimension)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width!r}.")
        self.hidden_size = hidden_size
        self.token_dimension = token_dimension
        self.projection = Dense(
            hidden_size, token_dimension, bias=False, activation_function=None, module_input_name="token_embeddings"
        )
        self.mask = MultiVectorMask() if mask is None else mask
        self._read: torch.Tensor | None = None  # the weights as a checkpoint has them, until the model stands

    @classmethod
    def of_stock(cls, dense: Dense, mask: MultiVectorMask) -> MultiVectorHead:
        """The head that computes what these two and `Normalize("token_embeddings")` do."""
        head = cls(dense.in_features, dense.out_features, mask)
        head.projection = dense
        return head

    def forward(  # type: ignore[override]
        self, features: dict[str, Any], task: str | None = None
    ) -> dict[str, Any]:
        """Writes the vectors of the tokens and which of them count.

        Args:
            features: `"token_embeddings"` [B, L, D] with `"input_ids"` and `"attention_mask"` [B, L], or packed
                [1, T, D] with `"cu_seq_lens_q"` [B + 1].
            task: `"query"` or `"document"`; by default the features' own.

        Returns:
            The features with `"token_embeddings"` and `"sentence_embedding"`, which are one tensor
            [B, L, token_dimension] with zeros where `"attention_mask"` [B, L] says that a token does not count.

        Raises:
            ValueError: See `LlamaPooling.forward`.
        """
        features = dict(features)
        features["token_embeddings"] = features["token_embeddings"].to(self.projection.linear.weight.dtype)
        features = self.mask(self.projection(features), task=task or features.get("task"))
        states = features["token_embeddings"]
        # Stock divides by an eps that float16 rounds to 0, so that padding of zeros would become NaN.
        vectors = normalize(states, dim=-1, eps=max(1e-12, torch.finfo(states.dtype).tiny))
        vectors = torch.where(features["attention_mask"].bool()[..., None], vectors, 0.0)
        if not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            check_finite(vectors.flatten(1))
        return features | {"token_embeddings": vectors, "sentence_embedding": vectors}

    def stock_modules(self) -> list[Module]:
        """The sentence-transformers modules that compute the same vectors."""
        return [self.projection, self.mask, Normalize(module_input_name="token_embeddings")]

    def get_embedding_dimension(self) -> int:
        """Width of a token's vector."""
        return self.token_dimension

    def on_model_ready(self, model: BaseModel) -> None:
        """Resolve the tokens that do not count, and keep the projection of an adapter's model in float32."""
        self.mask.on_model_ready(model)
        transformer: Any = model[0]
        if has_adapter(transformer.model):
            self.float()
            if self._read is not None:
                device = self.projection.linear.weight.device
                self.projection.linear.weight = nn.Parameter(self._read.to(device, torch.float32))
        self._read = None

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save configuration and weights, as safetensors."""
        self.save_config(output_path)
        self.save_torch_weights(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> MultiVectorHead:  # type: ignore[override]
        """Load a saved head."""
        hub = hub_options(options)
        config = cls.load_config(model_name_or_path, **hub)
        head = cls(config["hidden_size"], config["token_dimension"], MultiVectorMask(**config.get("mask", {})))
        cls.load_torch_weights(model_name_or_path, model=head, **hub)
        head._read = head.projection.linear.weight.detach().clone()
        return head

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the head."""
        return super().get_config_dict() | {"mask": self.mask.get_config_dict()}
