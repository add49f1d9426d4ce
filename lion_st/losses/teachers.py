"""What several teachers say together: their mean, each of them, and how far they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TeacherTerms:
    """The distillation term of several teachers.

    For a query with teachers t_1 ... t_T of weights w_1 ... w_T, which sum to 1 once divided by their sum, and a term
    D(student, teacher) of each row:

    - D(student, sum of w_k t_k) or, with `separate`, sum of w_k D(student, t_k);
    - times the agreement 1 - JSD / H(w), if rows are weighted by it: JSD is the Jensen-Shannon divergence of the
      teachers' softmaxes over the row's documents, H(w) the entropy of the weights, which is the largest it can be. A
      row of teachers that agree counts in full, one of teachers that have nothing in common not at all.

    Args:
        weights: Of the teachers, in the order of the labels; positive.
        separate: Each teacher its own term.
        by_agreement: Weight rows by the agreement.

    Raises:
        ValueError: If there are fewer than two weights, or one is not positive.

    References:
        Lin, Divergence Measures Based on the Shannon Entropy, 1991: https://doi.org/10.1109/18.61115.
    """

    def __init__(self, weights: Sequence[float], separate: bool = False, by_agreement: bool = False) -> None:
        if len(weights) < 2 or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"Several teachers need as many positive weights, got {list(weights)}.")
        self.weights = [weight / sum(weights) for weight in weights]
        self.separate = separate
        self.by_agreement = by_agreement

    def __call__(self, distil: Callable[[Tensor, Tensor], Tensor], student: Tensor, teachers: Tensor) -> Tensor:
        """The mean over the rows.

        Args:
            distil: The term of each row [B] from both sides' scores [B, 1 + n].
            student: Scores [B, 1 + n].
            teachers: Scores [B, T, 1 + n], at their temperature.
        """
        weights = teachers.new_tensor(self.weights)
        if self.separate:
            each = torch.stack([distil(student, teacher) for teacher in teachers.unbind(1)])  # [T, B]
            rows = weights @ each
        else:
            rows = distil(student, torch.einsum("t,btd->bd", weights, teachers))
        if self.by_agreement:
            rows = rows * agreement(teachers, weights)
        return rows.mean()


def agreement(teachers: Tensor, weights: Tensor) -> Tensor:
    """How far teachers agree on each row, from 1 (the same softmax) to 0 (nothing in common), [B].

    Args:
        teachers: Scores [B, T, documents].
        weights: Of the teachers, with the sum 1, [T].
    """
    logarithms = teachers.log_softmax(2)
    together = (logarithms + weights.log()[:, None]).logsumexp(1, keepdim=True)
    divergences = (logarithms.exp() * (logarithms - together)).sum(2)  # [B, T], each from their mixture
    largest = -(weights * weights.log()).sum()
    return (1 - divergences @ weights / largest).clamp(0, 1)
