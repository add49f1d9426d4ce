"""Regularizers beside FLOPS, one small class each, for the `SpladeLoss` of sentence-transformers.

All take embeddings [N, V] of non-negative term weights x and are the same function of the global batch at any number of
ranks: N is the rows of all of them, and what is measured of the batch is measured on all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lion_st.losses.distributed import mean_across_ranks
from lion_st.losses.flops_regularizer import FlopsRegularizer

RegularizerName: TypeAlias = Literal["flops", "l1", "df_flops", "idf_flops", "target"]


class L1Regularizer(nn.Module):
    r"""L1(X) = 1/N sum_i sum_t |x_it|: the mean sum of a text's weights, whichever terms they are of.

    Unlike FLOPS it does not spread terms evenly over the vocabulary.

    Args:
        model: The model that is trained, as sentence-transformers' regularizers take it.

    References:
        Zamani et al., From Neural Re-Ranking to Neural Ranking (SNRM), 2018: https://doi.org/10.1145/3269206.3271800.

    Example:
        ::

            SpladeLoss(model, loss, document_regularizer_weight=1e-3, document_regularizer=L1Regularizer(model))
    """

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.model = model

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """L1 in float32 of embeddings [N, V]."""
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        return mean_across_ranks(embeddings.abs().sum(dim=1, dtype=dtype).mean())

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {}


class WeightedFlopsRegularizer(FlopsRegularizer):
    """FLOPS with a weight for each term: sum over terms t of (w_t * 1/N sum_i x_it)^2, w_t without a gradient."""

    def term_weights(self, embeddings: Tensor) -> Tensor:
        """The weights [V] for embeddings [N, V]."""
        raise NotImplementedError

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """The weighted FLOPS in float32 of embeddings [N, V]."""
        means = self.block_means(embeddings)  # [columns, V]
        self.last = means.detach().square().sum() / self.columns
        with torch.no_grad():
            weights = self.term_weights(embeddings).to(means)
        return (weights * means).square().sum() / self.columns


class DfFlopsRegularizer(WeightedFlopsRegularizer):
    r"""DF-FLOPS(X) = sum over terms t of (w_t * 1/N sum_i x_it)^2 with w_t = 1 / (1 + ((df_t)^(log_alpha 2) - 1)^beta).

    df_t is the share of documents in which t is active. The weight is 0 for a term of none, 1/2 where df_t = alpha, 1
    for a term of all: terms that are in few documents cost hardly anything, and long posting lists do.

    The paper estimates df_t every 100 steps on a sample of the corpus. Here it is that of the documents of the global
    batch, so that nothing has to be kept from step to step. Take batches of some hundred documents: of 2,000, a share
    of .1 is known to .007.

    Args:
        model: The model that is trained.
        alpha: The share of documents at which a term has half the weight, above 0 and below 1.
        beta: Steepness around it, positive.
        settings: Of `FlopsRegularizer`.

    Raises:
        ValueError: If alpha or beta is out of range.

    References:
        Porco et al., An Alternative to FLOPS Regularization to Effectively Productionize SPLADE-Doc, 2025:
        https://arxiv.org/abs/2505.15070.

    Example:
        ::

            SpladeLoss(model, loss, document_regularizer_weight=.04, document_regularizer=DfFlopsRegularizer(model))
    """

    def __init__(self, model: nn.Module | None, alpha: float = 0.1, beta: float = 10.0, **settings: Any) -> None:
        super().__init__(model, **settings)  # type: ignore[arg-type]
        if not 0 < alpha < 1:
            raise ValueError(f"alpha is a share of documents above 0 and below 1, got {alpha!r}.")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be a finite number above 0, got {beta!r}.")
        self.alpha = alpha
        self.beta = beta

    def term_weights(self, embeddings: Tensor) -> Tensor:
        """The weights [V] of the terms by their share of the batch's documents."""
        shares = (embeddings != 0).sum(dim=0).double() / len(embeddings)
        if self.gather_across_devices:
            shares = mean_across_ranks(shares)
        # A share of 0 becomes infinity, whose weight is 0; rounding may leave a share of 1 a little below 1.
        return 1 / (1 + (shares ** (math.log(2) / math.log(self.alpha)) - 1).clamp(min=0) ** self.beta)

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {**super().get_config_dict(), "alpha": self.alpha, "beta": self.beta}


class IdfFlopsRegularizer(WeightedFlopsRegularizer):
    r"""IDF-FLOPS(X) = sum over terms t of (w_t * 1/N sum_i x_it)^2 with w_t = idf_max / idf_t.

    idf_t = 1 + ln((M + 1) / (m_t + 1)) over M documents, m_t of which have the token t in their own text; idf_max is
    that of a token in none. A term that stands in no text weighs 1, as in FLOPS; one that stands in all 1 + ln(M + 1)
    times as much. Which terms are frequent is a matter of the texts here, in DF-FLOPS one of the vectors.

    The formula is ours: it carries the idea of Geng et al., to hold terms of low IDF back, from the scores of an
    inference-free retriever to the regularizer.

    Args:
        model: The model that is trained.
        idf: [V], positive, see `term_idf`; it may be set later.
        settings: Of `FlopsRegularizer`.

    Raises:
        ValueError: If a value is not positive; when called, if there is no `idf` or not one for each term.

    References:
        Geng et al., Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers, 2024:
        https://arxiv.org/abs/2411.04403.

    Example:
        ::

            idf = term_idf((model.tokenizer(text)["input_ids"] for text in documents), len(documents), terms)
            SpladeLoss(model, loss, .04, document_regularizer=IdfFlopsRegularizer(model, idf))
    """

    def __init__(self, model: nn.Module | None, idf: Tensor | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)  # type: ignore[arg-type]
        self.idf: Tensor | None = None
        if idf is not None:
            self.set_idf(idf)

    def set_idf(self, idf: Tensor) -> None:
        """Set the inverse document frequencies [V]."""
        if not bool((idf > 0).all()):
            raise ValueError(f"Inverse document frequencies are positive, the smallest is {idf.min().item()}.")
        self.idf = idf.detach()

    def term_weights(self, embeddings: Tensor) -> Tensor:
        """The weights [V]."""
        if self.idf is None or len(self.idf) != embeddings.shape[1]:
            there = "none" if self.idf is None else f"{len(self.idf)}"
            raise ValueError(
                f"IdfFlopsRegularizer needs idf for {embeddings.shape[1]} terms, it has {there}: use term_idf."
            )
        return (self.idf.max() / self.idf).to(embeddings.device)

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {**super().get_config_dict(), "formula": "idf_max / idf"}


def term_idf(token_ids: Iterable[Iterable[int]], documents: int, terms: int) -> Tensor:
    """Smoothed inverse document frequencies 1 + ln((M + 1) / (m_t + 1)), [terms] in float32.

    Args:
        token_ids: Of each document.
        documents: M, how many there are.
        terms: Size of the vocabulary.
    """
    counts = torch.zeros(terms, dtype=torch.float64)
    for ids in token_ids:
        counts[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
    return (1 + torch.log((documents + 1) / (counts + 1))).float()


class TargetRegularizer(nn.Module):
    r"""Reaches a given mean number of active terms: TARGET(X) = c * FLOPS(X) / FLOPS(X)', ' without a gradient.

    The gradient is c times that of ln FLOPS(X), so that the same c weighs as much of many terms as of few. With n the
    mean number of active terms of the batch's texts, r what it should be now, and e = ln(n / r),

    - ln c = I + clip(gain * e, -3, 3);
    - after every batch in training I grows by rate * clip(e, -1, 1), within the logarithms of `bounds`;
    - r goes from the n of the first batch to the target in `steps` batches of equal ratios, and stays there: I would
      grow far too large while n is far off.

    That is PI control of the multiplier of a constraint. I makes up for the weight in the SpladeLoss, a factor of c.

    A penalty takes terms away and gives none: a number above what the model keeps without one is out of its reach.
    Queries and documents are encoded by the same weights, so that this can be a matter of both targets together.

    Args:
        model: The model that is trained.
        target: Mean number of active terms, positive.
        steps: Batches in which it should be reached. `lion-st train` sets it to the ramp of the regularizers.
        rate: Change of I in one batch, for e = 1.
        gain: Of ln c, for e.
        multiplier: c at the beginning.
        bounds: Least and largest exp(I).
        settings: Of the `FlopsRegularizer` inside.

    Raises:
        ValueError: If a setting is out of range.

    References:
        Stooke et al., Responsive Safety in Reinforcement Learning by PID Lagrangian Methods, 2020:
        https://arxiv.org/abs/2007.03964.

    Example:
        ::

            SpladeLoss(
                model,
                loss,
                document_regularizer_weight=0.04,
                document_regularizer=TargetRegularizer(model, target=200),
                query_regularizer_weight=0.05,
                query_regularizer=TargetRegularizer(model, target=40),
            )
    """

    multiplier: Tensor
    start: Tensor
    batches: Tensor
    mean: Tensor
    STATE = ("multiplier", "start", "batches", "mean")  # what the next batches depend on, and a mean for the log

    def __init__(
        self,
        model: nn.Module | None,
        target: float,
        steps: float = 100,
        rate: float = 0.3,
        gain: float = 20.0,
        multiplier: float = 0.1,
        bounds: tuple[float, float] = (1e-4, 1e4),
        **settings: Any,
    ) -> None:
        super().__init__()
        positive = {"target": target, "steps": steps, "rate": rate, "gain": gain, "multiplier": multiplier}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
        if not 0 < bounds[0] <= multiplier <= bounds[1]:
            raise ValueError(f"bounds must be positive and hold the multiplier {multiplier!r}, got {bounds!r}.")
        self.flops = FlopsRegularizer(model, **settings)  # type: ignore[arg-type]
        self.target = target
        self.steps = steps
        self.rate = rate
        self.gain = gain
        self.bounds = bounds
        for name, number in (("multiplier", multiplier), ("start", math.nan), ("batches", 0.0), ("mean", math.nan)):
            self.register_buffer(name, torch.tensor(number, dtype=torch.float64), persistent=False)

    @property
    def last(self) -> Tensor | None:
        """FLOPS of the last batch."""
        return self.flops.last

    def get_state(self) -> dict[str, float]:
        """exp(I), n of the first batch, how many there were, and a mean of n over about the last ten of them."""
        return {name: getattr(self, name).item() for name in self.STATE}

    def set_state(self, state: dict[str, float]) -> None:
        """Go on where `get_state` returned it."""
        for name in self.STATE:
            getattr(self, name).fill_(state[name])

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """The penalty in float32 of embeddings [N, V]; where it has a gradient, I follows."""
        value = self.flops.compute_loss_from_embeddings(embeddings)
        with torch.no_grad():
            for name in self.STATE:
                setattr(self, name, getattr(self, name).to(embeddings.device))
            # Of all ranks also where FLOPS is not: a checkpoint keeps one state, that of all.
            active = mean_across_ranks((embeddings != 0).sum(dim=1).double().mean()).clamp(min=1e-9)
            is_first = self.batches == 0
            start = torch.where(is_first, active, self.start)
            progress = ((self.batches + 1) / self.steps).clamp(max=1)
            error = (active / (start ** (1 - progress) * self.target**progress)).log()
            factor = self.multiplier * (self.gain * error).clamp(-3, 3).exp()
            factor = factor / value.clamp(min=1e-20)  # of empty vectors too it is finite in float32
            if value.requires_grad:
                found = {
                    "multiplier": (self.multiplier * (self.rate * error.clamp(-1, 1)).exp()).clamp(*self.bounds),
                    "start": start,
                    "batches": self.batches + 1,
                    "mean": torch.where(is_first, active, 0.9 * self.mean + 0.1 * active),
                }
                for name, now in found.items():
                    getattr(self, name).copy_(now)
        return factor.to(value) * value

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {
            "target": self.target,
            "steps": self.steps,
            "rate": self.rate,
            "gain": self.gain,
            "bounds": list(self.bounds),
        }
