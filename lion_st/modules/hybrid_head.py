"""The heads of a sparse and of a dense retriever on one backbone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lion_st.errors import as_weights
from lion_st.hooks import replace_submodule
from lion_st.modules.lion_transformer import STOCK_DENSE, LionTransformer
from lion_st.modules.llama_pooling import LlamaPooling, PoolingName
from lion_st.modules.splade_head import SpladeHead


class HybridHead(SpladeHead):
    """Makes of the states of one pass both vectors of a text: that of `SpladeHead` [B, V] and of `LlamaPooling` [B, D].

    Args:
        embedding_dimension: D, the backbone's hidden size.
        pooling: Of the dense vector, see `LlamaPooling`.
        normalize: Bring the dense vector to length 1.
        fusion_weights: Of the sparse and of the dense score in searches, see `lion_st.retrieval.convex_fusion`; None
            fuses by reciprocal ranks. `lion_st.evaluation.fit_fusion` fits them.
        sparse: As for `SpladeHead`.

    Raises:
        ValueError: If the weights are not two finite numbers of at least 0, one of them above, and as `SpladeHead` and
            `LlamaPooling`.

    Example:
        ::

            model = lion_st.build("meta-llama/Llama-3.2-1B", "hybrid")
            vectors = lion_st.encoding.encode_texts(model, ["what is a lion"], "query")
            vectors.sparse.shape, vectors.dense.shape  # (1, 128256), (1, 2048)
    """

    folds_scale = False  # the dense vector is made of the same states

    def __init__(
        self,
        embedding_dimension: int,
        pooling: PoolingName = "mean_normalized",
        normalize: bool = False,
        fusion_weights: Sequence[float] | None = None,
        **sparse: Any,
    ) -> None:
        super().__init__(**sparse)
        self.dense = LlamaPooling(embedding_dimension, pooling, normalize)
        self.fusion_weights = fusion_weights

    @property
    def fusion_weights(self) -> tuple[float, float] | None:
        """Weights of the sparse and of the dense score."""
        return self._fusion_weights

    @fusion_weights.setter
    def fusion_weights(self, weights: Sequence[float] | None) -> None:
        found = None if weights is None else as_weights(weights, 2)
        if weights is not None and found is None:
            raise ValueError(
                "fusion_weights are two finite numbers of at least 0, for the sparse and the dense score, and not both "
                f"0; got {weights!r}."
            )
        self._fusion_weights = None if found is None else (found[0], found[1])

    def forward(
        self,
        features: dict[str, Any],
        task: str | None = None,
        max_active_dims: int | None = None,
        output: Literal["dense", "sparse"] = "dense",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Writes `"sparse_embedding"` [B, V] and `"dense_embedding"` [B, D]; see `SpladeHead.forward`.

        `"sentence_embedding"` is both in one row [B, V + D] in float32; where the output is sparse, the former alone.
        """
        dense = self.dense(dict(features))["sentence_embedding"]
        features = super().forward(features, task, max_active_dims, output, **kwargs)
        sparse = features["sentence_embedding"]
        if output == "dense":
            features["sentence_embedding"] = torch.cat([sparse, dense.to(sparse.dtype)], dim=1)
        return features | {"sparse_embedding": sparse, "dense_embedding": dense}

    def get_embedding_dimension(self) -> int:
        """V + D."""
        return super().get_embedding_dimension() + self.dense.embedding_dimension

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the head."""
        return super().get_config_dict() | {
            "embedding_dimension": self.dense.embedding_dimension,
            "pooling": self.dense.mode,
            "normalize": self.dense.normalize,
            "fusion_weights": self.fusion_weights,
        }

    def sparse_head(self) -> SpladeHead:
        """The head of the sparse vector alone."""
        head = SpladeHead(**{name: getattr(self, name) for name in SpladeHead.config_keys})
        head.thresholds, head.log_top_k = self.thresholds, self.log_top_k
        return head


def without_lm_head(transformer: LionTransformer) -> LionTransformer:
    """A transformer as a dense model has it, on the same weights as one with an LM head."""
    view: Any = copy.copy(transformer)
    replace_submodule(view, "model", transformer.decoder)
    view.transformer_task = "feature-extraction"
    for name, value in (copy.deepcopy(STOCK_DENSE) | {"processing_kwargs": {}}).items():
        setattr(view, name, value)
    view.checked = {name: found for name, found in transformer.checked.items() if name != "lm_head"}
    return view
