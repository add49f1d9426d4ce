"""Objectives: the joint contrastive and distillation loss, FLOPS across ranks, and scores for the stock losses."""

from lion_st.losses.cached_contrastive_distillation import CachedContrastiveDistillationLoss
from lion_st.losses.contrastive_distillation import ContrastiveDistillationLoss
from lion_st.losses.flops_regularizer import FlopsRegularizer
from lion_st.losses.hybrid import HybridLoss, SparsePart
from lion_st.losses.micro_batch_scheduler import MicroBatchRegularizerWeightSchedulerCallback
from lion_st.losses.regularizers import (
    DfFlopsRegularizer,
    IdfFlopsRegularizer,
    L1Regularizer,
    TargetRegularizer,
    term_idf,
)
from lion_st.losses.scoring import dot_scores, maxsim_scores, pairwise_dot_scores, pairwise_maxsim_scores
from lion_st.losses.teachers import TeacherTerms

__all__ = [
    "CachedContrastiveDistillationLoss",
    "ContrastiveDistillationLoss",
    "DfFlopsRegularizer",
    "FlopsRegularizer",
    "HybridLoss",
    "IdfFlopsRegularizer",
    "L1Regularizer",
    "MicroBatchRegularizerWeightSchedulerCallback",
    "SparsePart",
    "TargetRegularizer",
    "TeacherTerms",
    "dot_scores",
    "maxsim_scores",
    "pairwise_dot_scores",
    "pairwise_maxsim_scores",
    "term_idf",
]
