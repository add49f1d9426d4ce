"""Scores of one teacher or several: their names in a table, and how several become one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

Normalization: TypeAlias = Literal["none", "zscore", "minmax"]
Combination: TypeAlias = Literal["weighted", "zscore", "minmax", "reciprocal_rank", "random", "separate"]
Teachers: TypeAlias = "Mapping[str, float] | Sequence[str]"
UNNAMED = ""  # the one teacher of a layout that does not name it
COLUMN = "teacher_scores"
RANK_CONSTANT = 60


def column_of(teacher: str) -> str:
    """The column of a table of tuples that holds a teacher's scores."""
    return f"{COLUMN}:{teacher}" if teacher else COLUMN


def teachers_of(columns: Iterable[str]) -> list[str]:
    """The teachers whose scores are among the columns of a table of tuples."""
    found = (name.partition(":") for name in columns)
    return [teacher for column, _, teacher in found if column == COLUMN]


def choose_teachers(source: str, present: Sequence[str], wanted: Teachers | None) -> dict[str, float]:
    """The teachers to learn from, with their weights.

    Args:
        source: What messages call the data.
        present: The teachers there are.
        wanted: Names, or weights by name; None takes the only one there is.
    """
    if isinstance(wanted, str):
        raise TypeError(f"teachers are a list of names or weights by name, got the string {wanted!r}.")
    weights = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted or present, 1.0)
    named = ", ".join(filter(None, present))
    if not wanted and len(present) > 1:
        raise ValueError(f"{source} has the scores of the teachers {named}: name those to learn from, as teachers.")
    for name, weight in weights.items():
        if name not in present:
            there = f"it has those of {named}" if named else "its scores are of one teacher without a name: name none"
            raise ValueError(f"{source} has no scores of the teacher {name!r}; {there}.")
        if not 0 < weight < math.inf:
            raise ValueError(f"The weight of the teacher {name!r} is a finite number above 0, got {weight!r}.")
    return weights


def require_combination(rule: str) -> None:
    """Raise a ValueError unless there is such a rule."""
    if rule not in get_args(Combination):
        raise ValueError(f"combine is {rule!r}: choose one of {', '.join(get_args(Combination))}.")


@dataclass(frozen=True)
class TeacherMixture:
    """Several teachers' scores of a query's documents, combined by a rule.

    | rule | |
    |---|---|
    | weighted | the weighted mean of the scores as they are |
    | zscore | the weighted mean of the scores less their mean and over their standard deviation |
    | minmax | the weighted mean of the scores from 0 for the lowest to 1 for the highest |
    | reciprocal_rank | the weighted mean of 1 / (60 + rank), where equal scores share the best of their ranks |
    | random | those of one teacher, drawn by the weights for each query and epoch |
    | separate | those of each, each its own term of the loss |

    Args:
        weights: By name, positive; only their ratios matter.
        rule: The rule.
        apart: Keep the teachers apart, after the rule's transformation, for a loss that weighs them.

    Example:
        >>> TeacherMixture({"a": 1.0, "b": 3.0}, "minmax").combine([[2.0, 1.0, 0.0], [0.0, 5.0, 10.0]], "any")
        [0.25, 0.5, 0.75]
    """

    weights: Mapping[str, float]
    rule: Combination
    apart: bool = False

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [column_of(name) for name in self.weights]

    @property
    def is_nested(self) -> bool:
        """Whether a query's scores are a list for each teacher."""
        return self.apart or self.rule == "separate"

    def combine(self, scores: Sequence[Sequence[float]], draw: str) -> list[Any]:
        """One query's scores.

        Args:
            scores: Of each teacher, each of all documents.
            draw: What the rule "random" draws by.

        Returns:
            A score for each document, or a list of such for each teacher.
        """
        weights = list(self.weights.values())
        if self.rule == "random":
            (chosen,) = random.Random(draw).choices(scores, weights)
            return list(chosen)
        transformed = [self._transform(of_teacher) for of_teacher in scores]
        if self.is_nested:
            return transformed
        return np.average(np.array(transformed), axis=0, weights=weights).tolist()

    def _transform(self, scores: Sequence[float]) -> list[float]:
        if self.rule == "reciprocal_rank":
            values = np.asarray(scores)
            ranks = 1 + (values[None, :] > values[:, None]).sum(1)
            return (1 / (RANK_CONSTANT + ranks)).tolist()
        if self.rule == "zscore" or self.rule == "minmax":
            return normalize_scores(scores, self.rule)
        return list(scores)


def normalize_scores(scores: Sequence[float], normalization: Normalization) -> list[float]:
    """The teacher's scores of a query's documents, brought to the same scale for all queries.

    Example:
        >>> normalize_scores([4.0, 1.0, 2.5], "minmax")
        [1.0, 0.0, 0.5]
    """
    if normalization == "none":
        return list(scores)
    if normalization == "minmax":
        zero, one = min(scores), max(scores) - min(scores)
    else:
        zero = sum(scores) / len(scores)
        one = math.sqrt(sum((score - zero) ** 2 for score in scores) / len(scores))
    return [(score - zero) / one if one else 0.0 for score in scores]
