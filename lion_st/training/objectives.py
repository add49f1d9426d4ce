"""The loss of an objective, by paradigm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMarginMSELoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch import Tensor, nn

from lion_st.losses import (
    CachedContrastiveDistillationLoss,
    ContrastiveDistillationLoss,
    HybridLoss,
    SparsePart,
    dot_scores,
    maxsim_scores,
    pairwise_dot_scores,
    pairwise_maxsim_scores,
)
from lion_st.losses.distillation import Distillation
from lion_st.training.options.released_code import SHARE
from lion_st.training.recipes import WITH_TERMS
from lion_st.training.regularizers import make_regularizer
from lion_st.training.validation import reads_temperature

if TYPE_CHECKING:
    from lion_st.training.options.arguments import RetrieverArguments

DISTILLATIONS: dict[str, Distillation] = {
    "kl": "kl_div",
    "margin_mse_kl": "margin_mse_kl",
    "listwise": "listwise",
    "rank": "ranknet",
}


class StockLosses(NamedTuple):
    """sentence-transformers' losses of a paradigm, and the scores that they compare."""

    cl: type[nn.Module]
    cached_cl: type[nn.Module] | None  # None where another loss around it caches
    cl_scores: Callable[..., Tensor]
    kd: type[nn.Module]
    kd_scores: Callable[..., Tensor]


STOCK_LOSSES: dict[str, StockLosses] = {
    "sparse": StockLosses(
        SparseMultipleNegativesRankingLoss, None, dot_scores, SparseMarginMSELoss, pairwise_dot_scores
    ),
    "dense": StockLosses(
        MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss, dot_scores, MarginMSELoss, pairwise_dot_scores
    ),
    "multi_vector": StockLosses(
        MultiVectorMultipleNegativesRankingLoss,
        CachedMultiVectorMultipleNegativesRankingLoss,
        maxsim_scores,
        MultiVectorMarginMSELoss,
        pairwise_maxsim_scores,
    ),
}


def build_loss(model: Any, arguments: RetrieverArguments) -> nn.Module:
    """The loss of an objective; cached where `mini_batch_size` is set.

    | objective | dense | sparse, with FLOPS of queries and documents or another regularizer |
    |---|---|---|
    | cl | MultipleNegativesRankingLoss | SpladeLoss of SparseMultipleNegativesRankingLoss |
    | kd | MarginMSELoss | SpladeLoss of SparseMarginMSELoss |
    | all others, and kd at a temperature | ContrastiveDistillationLoss | SpladeLoss of ContrastiveDistillationLoss |

    Multi-vector models have the losses of dense ones, of sentence-transformers those called MultiVector..., on MaxSim.
    Hybrid models have SpladeLoss of a HybridLoss of the two, the dense one at `dense_temperature`.

    "At a temperature" is with another `teacher_temperature` than 1, or with several teachers that the loss tells apart.
    Negatives and FLOPS are over all devices. Only of sparse and hybrid models has `kd` a cached form;
    it needs none, as it has no terms across queries, so that accumulation steps are as good.

    With `preset="released"` the terms have the weights that the released code's gradients come out with on its four
    GPUs, on any number here: (NCE / 4 + KL) / 2 + FLOPS / 4 in place of (NCE + KL) / 2 + FLOPS, and `kd` has FLOPS of
    each device.

    Args:
        model: The model to train.
        arguments: Those of `RetrieverArguments` under "objective".
    """
    cached: dict[str, Any] = {}
    if arguments.mini_batch_size is not None:
        cached["mini_batch_size"] = arguments.mini_batch_size
    if not has_terms(arguments):
        return _vector_loss(model, arguments, arguments.paradigm, arguments.temperature, cached)
    loss = _vector_loss(model, arguments, "sparse", arguments.temperature)
    dimension = None
    if arguments.paradigm == "hybrid":
        dimension = model[1].dense.embedding_dimension
        dense = _vector_loss(model, arguments, "dense", arguments.dense_temperature)
        loss = HybridLoss(loss, dense, dimension, arguments.dense_weight)
    # MarginMSE regularizes positives and negatives each for themselves, the contrastive objectives all at once.
    columns = 1 + arguments.negatives if arguments.objective == "kd" else 1
    gather = not (arguments.preset == "released" and arguments.objective == "kd")
    regularizers = {
        "query_regularizer": make_regularizer(model, arguments, "query", gather=gather),
        "document_regularizer": make_regularizer(model, arguments, "document", columns, gather),
    }
    if dimension is not None:
        regularizers = {name: SparsePart(one, dimension) for name, one in regularizers.items()}
    splade: Any = partial(CachedSpladeLoss, **cached) if cached else SpladeLoss
    return splade(
        model,
        loss,
        query_regularizer_weight=_share(arguments) * arguments.query_regularizer_weight,
        document_regularizer_weight=_share(arguments) * arguments.document_regularizer_weight,
        **regularizers,
    )


def _share(arguments: RetrieverArguments) -> float:
    """Of what the released code's gradients shrink."""
    return SHARE if arguments.preset == "released" and arguments.objective != "kd" else 1.0


def _vector_loss(
    model: Any, arguments: RetrieverArguments, kind: str, temperature: float, cached: Mapping[str, Any] | None = None
) -> nn.Module:
    """The loss of one kind of vectors without regularizers; `cached` has the settings of its cached form."""
    scale, share = 1 / temperature, _share(arguments)
    stock = STOCK_LOSSES[kind]
    loss: nn.Module
    teachers = arguments.teacher_terms()
    if arguments.objective == "kd" and (arguments.teacher_temperature != 1 or teachers is not None):
        loss = ContrastiveDistillationLoss(
            model,
            contrastive_weight=0.0,
            distillation_weight=1.0,
            distillation="margin_mse",
            scale=scale,
            teacher_temperature=arguments.teacher_temperature,
            teachers=teachers,
        )
    elif arguments.objective == "kd":
        loss = stock.kd(model, similarity_fct=partial(stock.kd_scores, scale=scale))
    elif arguments.objective == "cl" and arguments.preset != "released":
        settings: dict[str, Any] = {"scale": scale, "similarity_fct": stock.cl_scores, "gather_across_devices": True}
        if cached and stock.cached_cl is not None:
            loss = stock.cached_cl(model, **settings, **cached)
        else:
            loss = stock.cl(model, **settings)
    else:
        objective = arguments.objective
        contrastive = {"cl": share, "cl_kd": share * arguments.contrastive_weight}.get(objective, 0.0)
        distillation = {"cl": 0.0, "cl_kd": arguments.distillation_weight}.get(objective, 1.0)
        joint: Any = ContrastiveDistillationLoss
        if cached:
            joint = partial(CachedContrastiveDistillationLoss, **cached)
        loss = joint(
            model,
            contrastive_weight=contrastive,
            distillation_weight=distillation,
            distillation=DISTILLATIONS.get(objective, arguments.distillation),
            margin_mse_weight=arguments.margin_mse_weight,
            scale=scale,
            teacher_temperature=arguments.teacher_temperature if reads_temperature(vars(arguments)) else 1.0,
            teachers=None if objective == "cl" else teachers,
        )
    return loss


def has_terms(arguments: RetrieverArguments) -> bool:
    """Whether a text's vectors have a weight for each term."""
    return arguments.paradigm in WITH_TERMS


def uncacheable(arguments: RetrieverArguments) -> bool:
    """Whether the setting's loss has no cached form."""
    return arguments.objective == "kd" and not has_terms(arguments)
