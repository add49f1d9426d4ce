"""sentence-transformers' evaluators for models that give a sparse and a dense vector of each text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from torch import Tensor

from lion_st.losses import dot_scores


class HybridInformationRetrievalEvaluator(InformationRetrievalEvaluator):
    """Measures the sparse scores ("sparse_dot"), the dense ones ("dense_dot"), and both together ("dot").

    Together they are the weighted sum of a query's sparse and of its dense scores, each divided by its standard
    deviation over the documents; the weights are the model's, equal ones where it has none yet. Searches normalise by
    the least and the greatest score of those that they find in place of it, see `lion_st.retrieval.convex_fusion`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"main_score_function": "dot"} | options))

    def _model_score_functions(self, model: Any) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        width, weights = model[-1].dense.embedding_dimension, model[-1].fusion_weights or (0.5, 0.5)
        return {
            "dot": partial(_scores, width=width, weights=weights),
            "sparse_dot": partial(_scores, width=width, weights=(1.0, 0.0)),
            "dense_dot": partial(_scores, width=width, weights=(0.0, 1.0)),
        }


class HybridNanoBEIREvaluator(NanoBEIREvaluator):
    """NanoBEIR with `HybridInformationRetrievalEvaluator`."""

    information_retrieval_class = HybridInformationRetrievalEvaluator

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"main_score_function": "dot"} | options))


def _scores(queries: Tensor, documents: Tensor, width: int, weights: tuple[float, float]) -> Tensor:
    """Fused scores [Q, N] of rows [Q, V + D] and [N, V + D]."""
    parts = (slice(None, -width), slice(-width, None))
    found = [
        (weight, dot_scores(queries[:, part], documents[:, part]))
        for weight, part in zip(weights, parts, strict=True)
        if weight
    ]
    if len(found) == 1:
        return found[0][1]
    return sum(weight * scores / scores.std(dim=1, keepdim=True).clamp(min=1e-9) for weight, scores in found)  # type: ignore[return-value]
