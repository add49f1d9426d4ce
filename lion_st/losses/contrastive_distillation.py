"""The joint contrastive and distillation objective (CL + KD)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import get_rank
from torch import Tensor, nn

from lion_st.losses.distillation import WITHOUT_TEMPERATURE, Distillation, distil, faulty_grades
from lion_st.losses.distributed import mean_across_ranks, scores_of_all_documents
from lion_st.losses.scoring import scores_of_columns
from lion_st.losses.teachers import TeacherTerms


class WeightedTerms(dict[str, Tensor]):
    """Terms of a loss by name, with their weights applied; a weight times them is one times their sum.

    Trainers log the terms one by one and add them up. What weighs a loss as a whole, as MatryoshkaLoss does, gets the
    sum.
    """

    def __mul__(self, weight: float) -> Tensor:
        return weight * torch.stack(list(self.values())).sum()

    __rmul__ = __mul__


class ContrastiveDistillationLoss(nn.Module):
    """Learns from labelled positives and from a teacher's scores of the same documents, at once.

    For a query q_i, its candidates D_i = (d_i0, ..., d_in) with d_i0 the positive, and s(q, d) = scale * q . d, or
    scale * MaxSim(q, d) of models that give each token a vector:

    - L_NCE = mean over i of -log(exp s(q_i, d_i0) / sum of exp s(q_i, d) over d in D_B), where D_B holds the candidates
      of all queries of the batch, on all ranks;
    - L_KL = mean over i of KL(softmax(t_i / teacher_temperature) || softmax(s(q_i, D_i))), t_i the teacher's scores of
      D_i, or another of `lion_st.losses.distillation`: MarginMSE, both, listwise on graded labels, RankNet;
    - L = contrastive_weight * L_NCE + distillation_weight * L_KL (or the other).

    For sparse models, use it inside :class:`~sentence_transformers.sparse_encoder.losses.SpladeLoss` with
    :class:`FlopsRegularizer`; for dense ones on its own. Scores and loss are float32 at any precision of the model.
    With equal batches on all ranks, value and gradients are those of one process with the whole batch.

    Args:
        model: The model that is trained.
        contrastive_weight: Weight of L_NCE. The paper's objective is (L_NCE + L_KL) / 2.
        distillation_weight: Weight of the distillation term. At 0 the labels are not read.
        distillation: `"kl_div"`; `"margin_mse"`; `"margin_mse_kl"`, KL + margin_mse_weight * MarginMSE; `"listwise"`,
            softmax cross-entropy on labels that are grades; or `"ranknet"`, the order of the teacher's scores alone.
        margin_mse_weight: Of MarginMSE in `"margin_mse_kl"`; 0.05 is that of SPLADE-v3.
        scale: Factor on the student's scores, 1 / temperature: 1.0 for sparse and multi-vector models, 100.0 for dense
            ones, whose temperature in the paper is 0.01.
        teacher_temperature: Divisor of the teacher's scores.
        teachers: How several teachers count, whose labels are [B, T, 1 + n].
        gather_across_devices: Candidates of the other ranks are negatives too. If False, those of this rank alone.
        released_scaling: Reproduce the paper's released code, whose gradient of L_NCE is divided by the number of
            ranks while that of L_KL is not.

    Raises:
        TypeError: If the model is a MultiVectorEncoder of stock modules.
        ValueError: If a setting is out of range, or a temperature is given that changes nothing; when called, if there
            are too few columns, if columns differ in shape, or if the labels are missing, not of shape [B, 1 + n], not
            finite, or not grades where they should be (on a GPU looked at in the first batch alone, as this waits for
            it); if the ranks hold different shapes.

    References:
        Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025, section 3:
        https://arxiv.org/abs/2502.15526. van den Oord et al., 2018: https://arxiv.org/abs/1807.03748 (NCE). Lassance et
        al., SPLADE-v3, 2024: https://arxiv.org/abs/2403.06789 (KL and MarginMSE).

    Example:
        ::

            train_dataset = Dataset.from_dict({
                "query": ["what do lions eat"],
                "positive": ["Lions prey on zebras and wildebeest."],
                "negative_1": ["Lions sleep up to twenty hours a day."],
                "label": [[9.1, 2.4]],
            })
            loss = ContrastiveDistillationLoss(model, scale=100.0)
            SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        contrastive_weight: float = 0.5,
        distillation_weight: float = 0.5,
        distillation: Distillation = "kl_div",
        margin_mse_weight: float = 0.05,
        scale: float = 1.0,
        teacher_temperature: float = 1.0,
        teachers: TeacherTerms | None = None,
        gather_across_devices: bool = True,
        released_scaling: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(model, MultiVectorEncoder) and type(model[-1]).__module__.startswith("sentence_transformers."):
            raise TypeError(
                f"A {type(model).__name__} of stock modules gives no tensor in which tokens that do not count are 0: "
                "read it with lion_st.load, or take sentence-transformers' MultiVectorMultipleNegativesRankingLoss and "
                "MultiVectorDistillKLDivLoss."
            )
        weights = {
            "contrastive_weight": contrastive_weight,
            "distillation_weight": distillation_weight,
            "margin_mse_weight": margin_mse_weight,
        }
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {weight!r}.")
        if contrastive_weight == distillation_weight == 0:
            raise ValueError("contrastive_weight and distillation_weight are both 0: there is nothing to learn from.")
        for name, factor in (("scale", scale), ("teacher_temperature", teacher_temperature)):
            if not 0 < factor < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {factor!r}.")
        if distillation not in get_args(Distillation):
            raise ValueError(f"distillation must be one of {get_args(Distillation)}, got {distillation!r}.")
        if distillation in WITHOUT_TEMPERATURE and teacher_temperature != 1:
            raise ValueError(
                f"teacher_temperature={teacher_temperature!r} changes nothing of distillation={distillation!r}: leave "
                "it out."
            )
        if released_scaling and not gather_across_devices:
            raise ValueError("released_scaling=True needs gather_across_devices=True; local negatives are not scaled.")
        self.model = model
        self.contrastive_weight = contrastive_weight
        self.distillation_weight = distillation_weight
        self.distillation: Distillation = distillation
        self.margin_mse_weight = margin_mse_weight
        self.scale = scale
        self.teacher_temperature = teacher_temperature
        self.teachers = teachers
        self.gather_across_devices = gather_across_devices
        self.released_scaling = released_scaling
        self._labels_were_finite = False  # looked at in the first step, as this waits for the GPU

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Embed the columns and compute the loss; see :meth:`compute_loss_from_embeddings`."""
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted terms of the loss, which trainers log one by one and add up.

        Args:
            embeddings: Queries, positives and n columns of negatives, [B, D] each; of multi-vector models [B, L, D],
                L of each column its own, in which a token of zeros does not count.
            labels: [B, 1 + n] the teacher's scores of the positive and of each negative, in the order of the columns;
                [B, T, 1 + n] of several teachers.

        Returns:
            `"contrastive_loss"` and `"distillation_loss"`, float32 scalars with the weights applied; a term with
            weight 0 is left out.
        """
        self._check_embeddings(embeddings)
        queries, *columns = embeddings
        if self.distillation_weight > 0:
            several = () if self.teachers is None else (len(self.teachers.weights),)
            self._check_labels(labels, (len(queries), *several, len(columns)))
        gather = self.gather_across_devices and self.contrastive_weight > 0
        scores = self.scale * (scores_of_all_documents if gather else scores_of_columns)(queries, columns)
        own = torch.arange(len(columns) * len(queries), device=scores.device).view(len(columns), -1).T  # [B, 1 + n]
        if gather:
            own = own + get_rank() * own.numel()  # the columns of `scores` that hold each query's own documents

        loss = WeightedTerms()
        if self.contrastive_weight > 0:
            contrastive = F.cross_entropy(scores, own[:, 0])
            if self.released_scaling:
                contrastive = mean_across_ranks(contrastive, shrink_gradient=True)
            loss["contrastive_loss"] = self.contrastive_weight * contrastive
        if labels is not None and self.distillation_weight > 0:
            distillation = self._distil(scores.gather(1, own), labels.to(scores))
            loss["distillation_loss"] = self.distillation_weight * distillation
        return loss

    def _distil(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distillation term from both sides' scores [B, 1 + n]; of several teachers [B, T, 1 + n]."""
        of_rows = partial(distil, distillation=self.distillation, margin_mse_weight=self.margin_mse_weight)
        teacher = teacher / self.teacher_temperature
        return of_rows(student, teacher).mean() if self.teachers is None else self.teachers(of_rows, student, teacher)

    def _check_embeddings(self, embeddings: list[Tensor]) -> None:
        needed = 3 if self.distillation_weight > 0 else 2
        if len(embeddings) < needed:
            raise ValueError(
                f"{type(self).__name__} needs at least {needed} text columns (query, positive"
                f"{', negative_1, ...' if needed == 3 else ''}), got {len(embeddings)}. "
                "Add a column of negatives to the data set, for example with mine_hard_negatives."
            )
        shapes = [tuple(column.shape) for column in embeddings]
        alike = {(len(shape), *shape[:1], *shape[-1:]) for shape in shapes}  # all but the tokens L
        if len(alike) > 1 or len(shapes[0]) not in (2, 3):
            raise ValueError(
                f"{type(self).__name__} needs embeddings [B, D] or [B, L, D] of one shape for all columns, got "
                f"{shapes}. Give every query the same number of negatives."
            )

    def _check_labels(self, labels: Tensor | None, shape: tuple[int, ...]) -> None:
        if labels is None:
            raise ValueError(
                f"{type(self).__name__} needs teacher scores as the label, but the batch has none. Add a column "
                f'"label" with {shape[-1]} scores a row (the positive first), or set distillation_weight=0.'
            )
        if labels.shape != shape:
            raise ValueError(
                f"{type(self).__name__} needs teacher scores of shape "
                f"{'[B, 1 + n]' if self.teachers is None else '[B, teachers, 1 + n]'} = {list(shape)}, one for the "
                f"positive and each negative column, got {list(labels.shape)}. Make the label as wide as there are "
                "documents."
            )
        if self._labels_were_finite and labels.device.type != "cpu":
            return
        if not labels.isfinite().all():
            place = (~labels.isfinite()).nonzero()[0]
            raise ValueError(
                f"{type(self).__name__}: the teacher score of row {place[0]}, document {place[-1]} is "
                f"{labels[tuple(place)].item()}. Score it again or drop the row from the data set."
            )
        if self.distillation == "listwise" and (found := faulty_grades(labels)) is not None:
            raise ValueError(
                f"{type(self).__name__}: row {found[0]} has {found[1]}. Listwise labels are grades of at least 0, one "
                'of them above: bring scores there with teacher_normalization="minmax", or drop the row.'
            )
        self._labels_were_finite = True

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {
            "contrastive_weight": self.contrastive_weight,
            "distillation_weight": self.distillation_weight,
            "distillation": self.distillation,
            "scale": self.scale,
            "teacher_temperature": self.teacher_temperature,
            **({} if self.teachers is None else {"teachers": vars(self.teachers)}),
            "gather_across_devices": self.gather_across_devices,
            "released_scaling": self.released_scaling,
        } | ({"margin_mse_weight": self.margin_mse_weight} if self.distillation == "margin_mse_kl" else {})

    @property
    def citation(self) -> str:
        """BibTeX of the objective's source."""
        return """
@misc{zeng2025scalingsparsedenseretrieval,
    title={Scaling Sparse and Dense Retrieval in Decoder-Only LLMs},
    author={Hansi Zeng and Julian Killingback and Hamed Zamani},
    year={2025},
    eprint={2502.15526},
    archivePrefix={arXiv},
    primaryClass={cs.IR},
    url={https://arxiv.org/abs/2502.15526},
}
"""
