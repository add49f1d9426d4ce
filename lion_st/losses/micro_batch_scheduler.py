"""The regulariser ramp of the released code, which counts micro-batches."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback


class MicroBatchRegularizerWeightSchedulerCallback(SpladeRegularizerWeightSchedulerCallback):
    """Ramps the weights of a SpladeLoss by the micro-batch: lambda_t = lambda * min(1, t / T)^2, t from 1.

    T is `warmup_ratio` of the optimizer steps, as in the parent, but t counts forward passes: with A accumulation
    steps the ramp is over A times sooner. Only for comparisons with the paper's released code. Otherwise take the
    parent, which counts optimizer steps, starts at zero, and does not change with accumulation. Both continue where
    they were when training resumes, because they read the trainer's step.

    Args:
        loss: The :class:`~sentence_transformers.sparse_encoder.losses.SpladeLoss` whose weights are ramped.
        scheduler_type: `"quadratic"` or `"linear"`.
        warmup_ratio: T as a share of all optimizer steps.
        micro_batches: A, if not the run's own: those of an optimizer step elsewhere, over which a step's are spread.

    References:
        Paria et al., Minimizing FLOPs to Learn Efficient Sparse Representations, 2020, section 4:
        https://arxiv.org/abs/2004.05665 (the quadratic ramp).

    Example:
        ::

            SparseEncoderTrainer(..., callbacks=[MicroBatchRegularizerWeightSchedulerCallback(loss)])
    """

    _micro_batch = 0.0

    def __init__(self, loss: Any, *, micro_batches: int | None = None, **settings: Any) -> None:
        super().__init__(loss, **settings)
        self.micro_batches = micro_batches

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the weights of the first micro-batch of an optimizer step."""
        self._set_weights(state.global_step * (self.micro_batches or args.gradient_accumulation_steps) + 1)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the weights of the next micro-batch of the same optimizer step."""
        steps = args.gradient_accumulation_steps
        self._set_weights(self._micro_batch + (self.micro_batches or steps) / steps)

    def _set_weights(self, micro_batch: float) -> None:
        self._micro_batch = micro_batch
        counted = int(micro_batch)
        query_weight = self._calculate_weight_value(counted, self.max_query_regularizer_weight)  # type: ignore
        document_weight = self._calculate_weight_value(counted, self.max_document_regularizer_weight)
        self.loss.query_regularizer_weight = self._current_query_regularizer_weight = query_weight
        self.loss.document_regularizer_weight = self._current_document_regularizer_weight = document_weight
