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


AHEAD = 10  # batches that a target regularizer looks ahead
BAND = 0.3  # of the logarithm of the number of terms, in which its penalty sets in
SMOOTHING = 0.3


class TargetRegularizer(nn.Module):
    r"""Reaches a given mean number of active terms: TARGET(X) = c * g * 1/N sum_i sum_t x_it [x_it < tau].

    With n the mean number of active terms of the batch's texts and r what it should be now,

    - tau is the weight above which texts have r terms on average. It is followed from batch to batch, ln tau growing by
      half of ln(m / r), m being how many terms are above it. Terms below it are the surplus, which alone is penalized;
    - e is how far ln n will be from ln r in ten batches if it goes on as it does, for so long Adam's momentum lasts;
      ln n and its slope are moving averages, with .3 of each new one;
    - g = clip(e / .3 + 1/2, 0, 1), so that the penalty ends where it has done its work;
    - ln c grows by rate * clip(e, -1, 1), within the logarithms of `bounds`;
    - r goes from the n of the first batch to the target within `steps` batches, by ever smaller ratios, and stays.

    All of these are without a gradient. That is PID control of a constraint, and of a penalty that does little harm
    where it is too large for a while, being of small weights alone: terms that are gone seldom come back.

    A penalty takes terms away and gives none: a number above what the model keeps without one is out of its reach.
    Queries and documents are encoded by the same weights, so that this can be a matter of both targets together.

    Args:
        model: The model that is trained.
        target: Mean number of active terms, positive.
        steps: Batches in which it should be reached. `lion-st train` sets it to the ramp of the regularizers.
        rate: Change of ln c in one batch, for e = 1.
        multiplier: c at the beginning.
        bounds: Least and largest c.
        gather_across_devices: Count and penalize the rows of all ranks. If False, of this rank's alone.
        columns: Without effect, as the mean over blocks of rows is that over all.

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
    threshold: Tensor
    start: Tensor
    batches: Tensor
    level: Tensor
    slope: Tensor
    STATE = ("multiplier", "threshold", "start", "batches", "level", "slope")  # what the next batches depend on

    def __init__(
        self,
        model: nn.Module | None,
        target: float,
        steps: float = 100,
        rate: float = 0.3,
        multiplier: float = 0.3,
        bounds: tuple[float, float] = (1e-3, 1e4),
        gather_across_devices: bool = True,
        columns: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("target", target), ("steps", steps), ("rate", rate), ("multiplier", multiplier)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}.")
        if not 0 < bounds[0] <= multiplier <= bounds[1]:
            raise ValueError(f"bounds must be positive and hold the multiplier {multiplier!r}, got {bounds!r}.")
        self.model = model
        self.target = target
        self.steps = steps
        self.rate = rate
        self.bounds = bounds
        self.gather_across_devices = gather_across_devices
        self.last: Tensor | None = None  # FLOPS of the last batch, for the log
        for name in self.STATE:
            value = {"multiplier": multiplier, "batches": 0.0, "slope": 0.0}.get(name, math.nan)
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)

    def get_state(self) -> dict[str, float]:
        """c, tau, n of the first batch, how many there were, and the moving averages of ln n and of its slope."""
        return {name: getattr(self, name).item() for name in self.STATE}

    def set_state(self, state: dict[str, float]) -> None:
        """Go on where `get_state` returned it."""
        for name in self.STATE:
            getattr(self, name).fill_(state[name])

    def compute_loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """The penalty in float32 of embeddings [N, V]; where it has a gradient, tau and c follow."""
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        with torch.no_grad():
            for name in self.STATE:
                setattr(self, name, getattr(self, name).to(embeddings.device))
            means = embeddings.sum(dim=0, dtype=dtype) / len(embeddings)
            counted = torch.stack([(embeddings != 0).sum(), embeddings.sum(dtype=dtype)]).double() / len(embeddings)
            active, total = self._mean(counted).clamp(min=1e-9)
            self.last = self._mean(means).square().sum()
            is_first = self.batches == 0
            start = torch.where(is_first, active, self.start)
            threshold = torch.where(is_first, total / active, self.threshold)
            left = (1 - (self.batches + 1) / self.steps).clamp(min=0).square()
            wanted = start**left * self.target ** (1 - left)
            above = self._mean((embeddings > threshold).sum().double() / len(embeddings)).clamp(min=1e-9)
            before = torch.where(is_first, active.log(), self.level)
            level = before + SMOOTHING * (active.log() - before)
            slope = self.slope + SMOOTHING * (level - before - self.slope)
            error = level + AHEAD * slope - wanted.log()
            gate = (error / BAND + 0.5).clamp(0, 1)
            factor = (self.multiplier * gate).to(dtype)
        surplus = embeddings * (embeddings < threshold)
        value = factor * self._mean(surplus.sum(dim=1, dtype=dtype).mean())
        if value.requires_grad:
            with torch.no_grad():
                growth = self.rate * error.clamp(-1, 1)
                found = {
                    "multiplier": (self.multiplier * growth.exp()).clamp(*self.bounds),
                    "threshold": threshold * (0.5 * (above / wanted).log().clamp(-1, 1)).exp(),
                    "start": start,
                    "batches": self.batches + 1,
                    "level": level,
                    "slope": slope,
                }
                for name, now in found.items():
                    getattr(self, name).copy_(now)
        return value

    def _mean(self, value: Tensor) -> Tensor:
        return mean_across_ranks(value) if self.gather_across_devices else value

    def get_config_dict(self) -> dict[str, Any]:
        """The hyperparameters, for the model card."""
        return {"target": self.target, "steps": self.steps, "rate": self.rate, "bounds": list(self.bounds)}
