"""The joint objective with gradient caching."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn

from lion_st.losses.contrastive_distillation import ContrastiveDistillationLoss
from lion_st.losses.scoring import cat_texts


class CachedContrastiveDistillationLoss(CachedLossMixin, ContrastiveDistillationLoss):
    """:class:`ContrastiveDistillationLoss` in the memory of a mini-batch, with the same value and gradients.

    Texts are embedded twice, in mini-batches: once without gradients, to compute the loss over the whole batch and its
    gradient with respect to the embeddings, and once more to carry that gradient on into the weights. Activations are
    held for one mini-batch at a time, so that the batch, and with it the number of negatives, is not bound by them.
    Accumulation cannot do that: its micro-batches do not see each other's negatives.

    Sparse models need :class:`~sentence_transformers.sparse_encoder.losses.CachedSpladeLoss` around the uncached loss
    instead, which also caches the regularizers' gradients.

    Args:
        model: The model that is trained.
        mini_batch_size: Texts that are embedded at a time. Changes memory and speed alone.
        mini_batch_num_tokens: Pack mini-batches up to this many tokens instead of by `mini_batch_size`.
        show_progress_bar: Show the progress within each batch.
        settings: The settings of :class:`ContrastiveDistillationLoss`.

    Raises:
        ValueError: If a mini-batch limit is not positive, and as :class:`ContrastiveDistillationLoss`.

    References:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021:
        https://arxiv.org/abs/2101.06983.

    Example:
        ::

            loss = CachedContrastiveDistillationLoss(model, scale=100.0, mini_batch_size=16)
            SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=loss).train()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        for name, limit in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit!r}.")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar
        self._terms: dict[str, Tensor] = {}

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The terms of the loss; the first carries the gradient of all of them. Inside MatryoshkaLoss, one for all."""
        total = self.forward_cached(sentence_features, labels)
        if "calculate_loss" in vars(self):  # MatryoshkaLoss has put its own there, which adds up dimensions
            return {"matryoshka_loss": total}
        terms = dict(self._terms)
        first = next(iter(terms))
        # The trainer adds the terms up, so the sum must have the total's gradient exactly once.
        terms[first] = terms[first] + (total - total.detach())
        return terms

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of the whole batch from each column's mini-batches of embeddings."""
        terms = self.compute_loss_from_embeddings([cat_texts(column) for column in reps], labels)
        total = torch.stack(list(terms.values())).sum()
        if with_backward:
            total.backward()
        self._terms = {name: term.detach() for name, term in terms.items()}
        return total.detach()

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the objective's and of gradient caching's source."""
        return (
            super().citation
            + """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG},
}
"""
        )
