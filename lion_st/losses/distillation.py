"""What a query's scores of its own documents learn from a teacher's scores, or from graded labels."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Distillation: TypeAlias = Literal["kl_div", "margin_mse", "margin_mse_kl", "listwise", "ranknet"]
# Those for which the size of the teacher's scores decides nothing, so that a temperature has nothing to change.
WITHOUT_TEMPERATURE: tuple[Distillation, ...] = ("listwise", "ranknet")


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(t_i) || softmax(s_i)) of each query i, [B].

    Args:
        student: Scores s [B, 1 + n].
        teacher: Scores t [B, 1 + n].
    """
    target = F.log_softmax(teacher, dim=1)
    return F.kl_div(F.log_softmax(student, dim=1), target, log_target=True, reduction="none").sum(dim=1)


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the negatives j of ((s_i0 - s_ij) - (t_i0 - t_ij))^2 of each query i, [B].

    Args:
        student: Scores s [B, 1 + n], the positive's first.
        teacher: Scores t [B, 1 + n].

    References:
        Hofstätter et al., 2020: https://arxiv.org/abs/2010.02666.
    """
    return (student[:, :1] - student[:, 1:] - teacher[:, :1] + teacher[:, 1:]).square().mean(dim=1)


def listwise(student: Tensor, grades: Tensor) -> Tensor:
    """Softmax cross-entropy -sum over j of y_ij / sum(y_i) * log softmax(s_i)_j of each query i, [B].

    With grades of 1 and 0 it is the contrastive loss over the query's own documents, with several positives if there
    are several. Only the proportions of a query's grades count.

    Args:
        student: Scores s [B, 1 + n].
        grades: y [B, 1 + n], at least 0 and in each row one above.

    References:
        Bruch et al., An Analysis of the Softmax Cost Function for Learning to Rank with Implicit Feedback, 2019:
        https://doi.org/10.1145/3341981.3344221.
    """
    shares = grades / grades.sum(dim=1, keepdim=True)
    return -(shares * F.log_softmax(student, dim=1)).sum(dim=1)


def ranknet(student: Tensor, teacher: Tensor) -> Tensor:
    """Rank distillation: the mean over P_i of log(1 + exp(s_ik - s_ij)) of each query i, [B].

    P_i are the pairs (j, k) of a query's documents of which the teacher scores j above k: its order alone is learnt,
    and not how far apart scores are. A query whose documents are all tied adds nothing.

    Args:
        student: Scores s [B, 1 + n].
        teacher: Scores t [B, 1 + n].

    References:
        Burges et al., Learning to Rank using Gradient Descent, 2005: https://doi.org/10.1145/1102351.1102363. Sun et
        al., Is ChatGPT Good at Search?, 2023, section 5.2 (distilling an order): https://arxiv.org/abs/2304.09542.
    """
    ordered = teacher[:, :, None] > teacher[:, None, :]  # [B, j, k]
    losses = F.softplus(student[:, None, :] - student[:, :, None]) * ordered
    return losses.sum(dim=(1, 2)) / ordered.sum(dim=(1, 2)).clamp(min=1)


def distil(student: Tensor, teacher: Tensor, distillation: Distillation, margin_mse_weight: float) -> Tensor:
    """One of these losses of each query [B] by name; `"margin_mse_kl"` is KL + margin_mse_weight * MarginMSE.

    Args:
        student: Scores [B, 1 + n] in float32 or float64.
        teacher: Scores or grades [B, 1 + n].
        distillation: Which.
        margin_mse_weight: Of `"margin_mse_kl"` alone.
    """
    if distillation == "margin_mse_kl":
        return kl_divergence(student, teacher) + margin_mse_weight * margin_mse(student, teacher)
    functions = {"kl_div": kl_divergence, "margin_mse": margin_mse, "listwise": listwise, "ranknet": ranknet}
    return functions[distillation](student, teacher)


def faulty_grades(grades: Tensor) -> tuple[int, str] | None:
    """The first row of grades [B, 1 + n], or of several teachers' [B, T, 1 + n], that `listwise` cannot read, and what
    is wrong with it; waits for the GPU.
    """
    grades = grades if grades.ndim == 3 else grades[:, None]
    negative = (grades < 0).any(dim=-1).any(dim=-1)
    wrong = negative | ~(grades > 0).any(dim=-1).all(dim=-1)
    if not bool(wrong.any()):
        return None
    row = int(wrong.to(torch.uint8).argmax())
    return row, f"a grade of {grades[row].min().item():g}" if bool(negative[row]) else "no grade above 0"
