"""The teachers of a run, and whether their scores have something to teach, measured before training."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lion_st.data.teachers import Combination, Normalization, require_combination
from lion_st.data.tuples import reader_of
from lion_st.errors import UsageError
from lion_st.losses.teachers import TeacherTerms
from lion_st.training.validation import reads_scores, require_share

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
ROWS = 1_000
FLAT = 0.9  # share of the entropy of a uniform distribution from which a teacher is nearly flat
ONE_HOT = 0.02  # and up to which it is nearly one-hot
SMALLEST_MARGIN, LARGEST_MARGIN = 1.0, 50.0  # means in units of the student's scores


def teacher_weights(teachers: Sequence[str] | None) -> dict[str, float]:
    """The teachers of a command line, NAME or NAME:WEIGHT, with their weights; none for None.

    Example:
        >>> teacher_weights(["minilm", "bm25:0.5"])
        {'minilm': 1.0, 'bm25': 0.5}
    """
    weights: dict[str, float] = {}
    for given in teachers or ():
        name, colon, number = given.partition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise UsageError(f"--teachers takes NAME or NAME:WEIGHT, with a weight above 0, got {given!r}.")
        if name in weights:
            raise UsageError(f"--teachers names {name!r} twice.")
        weights[name] = weight
    return weights


@dataclass
class TeacherArguments:
    """The teachers that are learned from, and how their scores are read."""

    teachers: list[str] | None = field(
        default=None, metadata={"help": "Teachers to learn from, where the data name theirs: NAME or NAME:WEIGHT each."}
    )
    combine: Combination = field(
        default="zscore", metadata={"help": "How several --teachers become one, or separate: each its own loss."}
    )
    weight_by_agreement: bool = field(
        default=False, metadata={"help": "Learn less from the scores of queries on which --teachers disagree."}
    )
    teacher_normalization: Normalization = field(
        default="none", metadata={"help": "Bring the teacher's scores of each query's documents to one scale first."}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Divisor of the teacher's scores: smaller makes it surer."}
    )
    self_distillation: bool = field(
        default=False,
        metadata={
            "help": "Learn from the moving average of the weights that are trained (a mean teacher); the data's scores "
            "are not read."
        },
    )
    ema_decay: float = field(
        default=0.99, metadata={"help": "Share of the moving average of --self_distillation that stays in each step."}
    )

    @property
    def reads_scores(self: Any) -> bool:
        """Whether the scores in the data are learned from."""
        return reads_scores(vars(self))

    def require_teachers(self: Any) -> None:
        """Refuse teachers that do not fit."""
        teacher_weights(self.teachers)
        require_combination(self.combine)
        require_share(self, "ema_decay")
        if self.self_distillation and self.paradigm == "hybrid":
            raise UsageError("--self_distillation is of models of one vector, this one is hybrid: leave it out.")
        if self.self_distillation and self.objective in ("cl", "listwise"):
            wrong = "no teacher" if self.objective == "cl" else "grades, which a model's scores are not"
            raise UsageError(
                f"--objective {self.objective} learns from {wrong}: --self_distillation is of cl_kd, kl, kd, "
                "margin_mse_kl and rank."
            )
        if self.self_distillation and self.distillation == "listwise" and self.objective == "cl_kd":
            raise UsageError("--distillation listwise takes grades, which a model's scores are not: take another.")
        if self.self_distillation and self.preset is not None:
            raise UsageError(f"--preset {self.preset} is the released code, which has a teacher: leave it out.")
        if not self.weight_by_agreement:
            return
        if self.combine == "random":
            raise UsageError("--weight_by_agreement needs all teachers of a row; --combine random takes one of them.")
        if self.combine != "separate" and self.teacher_normalization != "none":
            raise UsageError(
                "--weight_by_agreement reads the teachers before they are combined, where --teacher_normalization "
                f"{self.teacher_normalization} has no place: leave it out, or take --combine separate."
            )

    def teacher_terms(self) -> TeacherTerms | None:
        """How the loss counts several teachers; None where it is given one score for each document."""
        weights = teacher_weights(self.teachers)
        if len(weights) < 2 or (self.combine != "separate" and not self.weight_by_agreement):
            return None
        return TeacherTerms(list(weights.values()), self.combine == "separate", self.weight_by_agreement)


@dataclass(frozen=True)
class TeacherStatistics:
    """A teacher over a sample of rows, after normalization and temperature.

    Attributes:
        rows: Rows of the sample.
        documents: Documents of a row.
        entropy: Mean entropy of the softmax over a row's documents, in nats.
        positive: Mean probability of the positive in that softmax.
        margin: Mean difference of the positive's score and a negative's.
        margin_deviation: Its standard deviation.
    """

    rows: int
    documents: int
    entropy: float
    positive: float
    margin: float
    margin_deviation: float

    @property
    def relative_entropy(self) -> float:
        """The entropy as a share of that of a uniform distribution, 0 (one-hot) to 1 (flat)."""
        return self.entropy / math.log(self.documents)


def teacher_statistics(tuples: Dataset, temperature: float = 1.0, rows: int = ROWS) -> TeacherStatistics:
    """Measure a teacher over rows spread evenly over the data.

    Args:
        tuples: Rows with the column `label`: of `load_tuples`, whose texts are not read for it, or others.
        temperature: Divisor of the scores.
        rows: How many at most.

    Example:
        >>> from datasets import Dataset
        >>> round(teacher_statistics(Dataset.from_dict({"label": [[1.0, 0.0, 0.0]]})).positive, 3)
        0.576
    """
    chosen = torch.linspace(0, len(tuples) - 1, min(rows, len(tuples))).long().tolist()
    reader = reader_of(tuples)
    if reader is not None:
        labels = reader.labels(tuples.with_format(None)[chosen])
    else:
        labels = tuples.select_columns("label")[chosen]["label"]
    scores = torch.tensor(labels, dtype=torch.float64) / temperature
    if scores.ndim == 1:  # margins of triplets
        scores = torch.stack([scores, torch.zeros_like(scores)], dim=1)
    if scores.ndim == 3:  # of several teachers
        scores = scores.flatten(0, 1)
    logarithms = scores.log_softmax(1)
    margins = scores[:, :1] - scores[:, 1:]
    return TeacherStatistics(
        rows=len(labels),
        documents=scores.shape[1],
        entropy=-(logarithms.exp() * logarithms).sum(1).mean().item(),
        positive=logarithms[:, 0].exp().mean().item(),
        margin=margins.mean().item(),
        margin_deviation=margins.std(correction=0).item(),
    )


def describe_teacher(found: TeacherStatistics, objective: str) -> tuple[str, str | None]:
    """What an objective will learn from a teacher, and what is wrong with it, None if nothing seems to be."""
    if objective == "kd":
        line = (
            f"the positive's score is {found.margin:.3g} above a negative's on average (standard deviation "
            f"{found.margin_deviation:.3g}), which the student's scores shall reach"
        )
        if abs(found.margin) < SMALLEST_MARGIN:
            return line, "margins that small hardly tell documents apart: lower --teacher_temperature"
        if found.margin > LARGEST_MARGIN:
            return line, "margins that large are beyond the student's: raise --teacher_temperature"
        return line, None
    line = (
        f"its softmax over {found.documents} documents gives the positive {found.positive:.3f} on average, with an "
        f"entropy of {found.entropy:.2f} of at most {math.log(found.documents):.2f} nats"
    )
    if found.relative_entropy > FLAT:
        return line, "nearly flat, all documents count as equally relevant: lower --teacher_temperature"
    if found.relative_entropy < ONE_HOT:
        return line, "nearly one-hot, it says no more than the labels: raise --teacher_temperature"
    return line, None


def report_teacher(sources: dict[str, Any], objective: str, temperature: float) -> None:
    """Print what the objective will learn from the teacher of each source, and warn of what seems wrong."""
    for name, tuples in sources.items():
        if "label" not in tuples[0] or objective in ("listwise", "rank"):
            continue  # the loss refuses the one, and reads neither softmax nor margins of the other
        found = teacher_statistics(tuples, temperature)
        line, fault = describe_teacher(found, objective)
        print(f"Teacher of {name} over {found.rows:,} rows: {line}.")
        if fault is not None:
            logger.warning("Teacher of %s: %s, or choose another --teacher_normalization.", name, fault)
