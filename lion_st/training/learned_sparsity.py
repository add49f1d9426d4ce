"""Thresholds and numbers of terms that are learned, in place of being chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lion_st.errors import UsageError
from lion_st.modules import SpladeHead
from lion_st.training.validation import require_positive

if TYPE_CHECKING:
    from lion_st.training.options.arguments import RetrieverArguments

PATTERN = r"\d+\.(thresholds|log_top_k)$"  # of the names of such parameters


@dataclass
class LearnedSparsityArguments:
    """What a sparse model learns of how sparse it is."""

    learn_thresholds: bool = field(
        default=False,
        metadata={"help": "Sparse: learn a threshold of each term, which its logit has to pass. lion_st.load alone "
                  "reads the result."},
    )  # fmt: skip
    learn_top_k: bool = field(
        default=False,
        metadata={"help": "Sparse: learn how many terms queries and documents keep, from --query_max_active_dims and "
                  "--document_max_active_dims."},
    )  # fmt: skip
    threshold_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of thresholds, and of ln k of --learn_top_k."}
    )

    def require_learned_sparsity(self: Any) -> None:
        """Refuse settings that cannot be learned."""
        require_positive(self, "threshold_learning_rate")
        asked = [f"--{name}" for name in ("learn_thresholds", "learn_top_k") if getattr(self, name)]
        if not asked:
            return
        if self.paradigm == "hybrid":
            raise UsageError(f"{asked[0]} is of sparse models, this one is hybrid: leave it out.")
        if self.query_encoder != "full":
            raise UsageError(f"{asked[0]} has no place in the Router of --query_encoder {self.query_encoder}.")
        if self.preset is not None:
            raise UsageError(f"--preset {self.preset} is the released code, without {asked[0]}: leave it out.")
        if self.learn_top_k and not (self.query_max_active_dims and self.document_max_active_dims):
            raise UsageError(
                "--learn_top_k begins with --query_max_active_dims and --document_max_active_dims: give both."
            )


def attach_learned_sparsity(model: Any, arguments: RetrieverArguments) -> dict[str, float]:
    """Have a model's head learn what the run asks for; what it learned in an earlier run stays as it is otherwise.

    Returns:
        Learning rates by pattern of parameter names.
    """
    head = model[1]
    if not isinstance(head, SpladeHead):
        return {}
    if arguments.learn_thresholds:
        head.learn_thresholds()
    elif head.thresholds is not None:
        head.thresholds.requires_grad_(False)
    if arguments.learn_top_k:
        head.learn_top_k(int(arguments.query_max_active_dims or 1), int(arguments.document_max_active_dims or 1))
    else:
        head.freeze_top_k()
    learns = arguments.learn_thresholds or arguments.learn_top_k
    return {PATTERN: arguments.threshold_learning_rate} if learns else {}
