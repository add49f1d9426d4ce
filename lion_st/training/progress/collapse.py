"""Looks at a training while it runs, and ends it when nothing good can come of it any more."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lion_st.losses.distributed import mean_across_ranks
from lion_st.losses.scoring import cat_texts, scores_of_columns

EVERY = 20  # steps from one look to the next
IDENTICAL = 1e-4  # spread below which vectors are the same but for rounding
NEARLY_ALL = 0.5  # share of the vocabulary
FALLS = 0.95  # what is left of the active terms at the next look where a regularizer still takes them away
FEW_TEXTS = 4  # fewer may be empty, or the same text, by chance
NOT_FINITE = "Lower --learning_rate, or train in bfloat16 or float32 where this run used float16"


class TrainingCollapsed(RuntimeError):
    """A training whose weights or vectors are of no use any more; the message says what was seen and what to change."""


class VectorStatistics:
    """Statistics of the vectors of a batch, by task; they stay on the device until someone reads them.

    Args:
        model: Its vectors are looked at when it is called between `begin` and `end`.
        counts_terms: Whether the vectors are sparse.
    """

    def __init__(self, model: nn.Module, counts_terms: bool) -> None:
        self.counts_terms = counts_terms
        self.width = 0
        self.rows: dict[str, int] = {}
        self.uses: dict[str, Tensor] = {}  # by task, int64 [V + 1]: of how many texts each term is, and their number
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._ranking: Ranking | None = None
        self._is_open = False
        model.register_forward_hook(self._observe)

    def begin(self) -> None:
        """Forget what was seen, but for `uses`, and look at what is embedded from now on."""
        self.rows, self._sums, self._ranking, self._is_open = {}, {}, Ranking(), True

    def end(self) -> None:
        """Look no more: gradient caching embeds every text again in its backward pass."""
        self._is_open = False
        if self._ranking is not None:
            self._ranking.forget_queries()

    def take_uses(self) -> dict[str, Tensor]:
        """`uses` since this was last called, a tensor for each of queries and documents, also if there were none."""
        uses, self.uses = self.uses, {}
        return uses

    def means(self) -> dict[str, Tensor]:
        """What was seen since `begin`, as scalars on the device.

        Of queries and of documents, and apart of the dense vectors of a hybrid model: `..._active_dims` of a text and
        `..._empty`, the share of texts without any, both of sparse vectors alone; and `..._spread`, the share of the
        vectors' squared length by which they differ from their mean: 0 if all are identical. A text of several vectors
        counts with their mean, brought to length 1. Of both: `in_batch_accuracy`, see `Ranking`, of a hybrid model by
        its sparse vectors.
        """
        means = {}
        if self._ranking is not None and self._ranking.is_complete:
            means["in_batch_accuracy"] = self._ranking.accuracy()
        for task, sums in self._sums.items():
            rows = self.rows[task]
            if "active" in sums:
                means[f"{task}_active_dims"] = sums["active"] / rows
                means[f"{task}_empty"] = sums["empty"] / rows
            if rows > 1:
                squares = sums["squares"].clamp(min=torch.finfo(torch.float32).tiny)
                means[f"{task}_spread"] = (1 - sums["vectors"].square().sum() / (rows * squares)).clamp(min=0)
        return means

    @torch.no_grad()
    def _observe(self, model: nn.Module, inputs: Any, output: dict[str, Any]) -> None:
        if not self._is_open:
            return
        task = output.get("task") or "text"
        if "dense_embedding" in output:
            self._add(f"{task}_dense", output["dense_embedding"].detach(), False)
        given = output.get("sparse_embedding", output["sentence_embedding"]).detach()
        vectors = self._add(task, given, self.counts_terms)
        self.width = vectors.shape[1]
        if self._ranking is not None:
            self._ranking.add(given, task)

    def _add(self, task: str, given: Tensor, counts_terms: bool) -> Tensor:
        """Add up the statistics of vectors [N, V] or [N, D], of token vectors [N, L, D], which become one a text."""
        vectors = given if given.ndim == 2 else F.normalize(given.sum(dim=1, dtype=torch.float32), dim=-1)
        # Neither makes a float32 copy of the vectors.
        found = {
            "vectors": vectors.sum(dim=0, dtype=torch.float32),
            "squares": torch.linalg.vector_norm(vectors, dtype=torch.float32).square(),
        }
        if counts_terms:
            is_active = vectors != 0
            active = is_active.sum(dim=1)
            found |= {"active": active.sum(dtype=torch.float32), "empty": (active == 0).sum(dtype=torch.float32)}
            used = F.pad(is_active.sum(dim=0), (0, 1), value=len(vectors))
            self.uses[task] = self.uses[task] + used if task in self.uses else used
        before = self._sums.get(task)
        self._sums[task] = found if before is None else {name: before[name] + value for name, value in found.items()}
        self.rows[task] = self.rows.get(task, 0) + len(vectors)
        return vectors


class Ranking:
    """How many queries of a batch find their positive, among all documents of the batch on this device.

    Queries are embedded before documents, and positives before negatives, as all losses do; the scores are computed
    again, documents by documents, so that nothing of them is kept.
    """

    def __init__(self) -> None:
        self._queries: list[Tensor] = []
        self._count = self._documents = 0
        self._own: Tensor | None = None  # [B] score of each query's positive
        self._best: Tensor | None = None  # [B] best score of any other document

    @property
    def is_complete(self) -> bool:
        """Whether every query's positive was seen."""
        return 0 < self._count <= self._documents

    def add(self, vectors: Tensor, task: str) -> None:
        """Look at queries or documents [N, V] or [N, L, D]."""
        if task == "query" and self._best is None:
            self._queries.append(vectors)
            self._count += len(vectors)
        elif task == "document" and self._queries:
            if self._best is None:
                self._queries = [cat_texts(self._queries)]
                self._best = vectors.new_full((self._count,), -math.inf, dtype=torch.float32)
                self._own = self._best.clone()
            self._rank(self._queries[0], vectors)

    def accuracy(self) -> Tensor:
        """Share of queries whose positive scores above every other document."""
        assert self._own is not None and self._best is not None
        return (self._own > self._best).float().mean()

    def forget_queries(self) -> None:
        """Let go of the queries' vectors."""
        self._queries = []

    def _rank(self, queries: Tensor, documents: Tensor) -> None:
        assert self._own is not None and self._best is not None
        scores = scores_of_columns(queries, [documents]).float()  # [B, N]
        first, self._documents = self._documents, self._documents + len(documents)
        positives = min(self._count, self._documents) - first
        if positives > 0:
            rows = torch.arange(first, first + positives, device=scores.device)
            self._own[rows] = scores[rows, rows - first]
            scores[rows, rows - first] = -math.inf
        torch.maximum(self._best, scores.amax(dim=1), out=self._best)


class CollapseGuard(TrainerCallback):
    """Ends a training that has collapsed, within 50 steps and before it writes a checkpoint.

    Looked for are a loss, a gradient or weights that are not finite; vectors of queries or of documents that are all
    empty or all identical; and, once the regularizer's weights have risen to their full, documents that activate nearly
    all terms and no fewer at each look. What a single step may show by chance has to be seen twice in a row.

    Looking costs one transfer from the device, and one small all-reduce, in 20 steps.

    Args:
        ramp: Callback that raises the regularizer's weights, with `warmup_steps`, such as sentence-transformers' of
            SPLADE; None if they do not rise.
        regularized: Whether the number of active terms is held down at all.
    """

    def __init__(self, ramp: Any = None, regularized: bool = False) -> None:
        self.ramp = ramp
        self.regularized = regularized
        # What the trainer shows of itself: its model, and the loss and vectors of the last step.
        self.model: nn.Module | None = None
        self.loss: Tensor | None = None
        self.statistics: VectorStatistics | None = None
        self._suspected: set[str] = set()
        self._terms_before = math.inf

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Look, every 20 steps."""
        if state.global_step % EVERY:
            return
        values = self._read()
        self._require_finite(values, state)
        self._require_fewer_terms(values, state)
        seen = self._useless_vectors(values)
        for name, problem in seen.items():
            if name in self._suspected:
                raise TrainingCollapsed(_describe(*problem, state))
        self._suspected = set(seen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the logged loss and norm of the gradient."""
        for name, words in (("loss", "loss"), ("grad_norm", "gradient's norm")):
            value = (logs or {}).get(name)
            # The scaling of float16 leaves out steps whose gradient overflows.
            if value is not None and not math.isfinite(float(value)) and not (args.fp16 and name == "grad_norm"):
                raise TrainingCollapsed(_describe(f"the {words} is {value}", NOT_FINITE, state))

    def require_sound(self, state: TrainerState) -> None:
        """Look now, before weights are written."""
        values = self._read()
        self._require_finite(values, state)
        for problem in self._useless_vectors(values).values():
            raise TrainingCollapsed(_describe(*problem, state))

    def _read(self) -> dict[str, float]:
        """Loss, norm of the trained weights and statistics of the last step, means over all processes."""
        assert self.model is not None
        trained = [_own(parameter).detach() for parameter in self.model.parameters() if parameter.requires_grad]
        norms = [torch.linalg.vector_norm(parameter, dtype=torch.float32) for parameter in trained]
        values = {"weights": torch.stack(norms).sum()}
        if self.loss is not None:
            values["loss"] = self.loss
        if self.statistics is not None:
            values |= self.statistics.means()
        mean = mean_across_ranks(torch.stack([value.float() for value in values.values()]))
        return dict(zip(values, mean.tolist(), strict=True))

    def _require_finite(self, values: dict[str, float], state: TrainerState) -> None:
        for name, words in (("loss", "loss"), ("weights", "norm of the weights")):
            if not math.isfinite(values.get(name, 0.0)):
                raise TrainingCollapsed(_describe(f"the {words} is {values[name]}", NOT_FINITE, state))

    def _useless_vectors(self, values: dict[str, float]) -> dict[str, tuple[str, str]]:
        """What was seen and what to change, by the statistic that shows it."""
        problems = {}
        for task, rows in (self.statistics.rows if self.statistics is not None else {}).items():
            if rows < FEW_TEXTS:
                continue
            if values.get(f"{task}_empty") == 1:
                remedy = f"Lower --{task}_regularizer_weight or --learning_rate"
                problems[f"{task}_empty"] = (f"all {task} vectors are empty", remedy)
            elif values[f"{task}_spread"] < IDENTICAL:
                remedy = "Lower --learning_rate, and look whether the texts differ"
                problems[f"{task}_spread"] = (f"all {task.replace('_', ' ')} vectors are the same", remedy)
        return problems

    def _require_fewer_terms(self, values: dict[str, float], state: TrainerState) -> None:
        terms = values.get("document_active_dims")
        ramp_end = 0 if self.ramp is None else self.ramp.warmup_steps or 0
        if terms is None or self.statistics is None or not self.regularized or state.global_step <= ramp_end:
            return
        before, self._terms_before = self._terms_before, terms
        if terms > max(NEARLY_ALL * self.statistics.width, FALLS * before):
            seen = (
                f"documents activate {terms:,.0f} of {self.statistics.width:,} terms, and {before:,.0f} of them "
                f"{EVERY} steps before, although the regularizers have their full weights"
            )
            remedy = "Raise --document_regularizer_weight, or lower --learning_rate"
            raise TrainingCollapsed(_describe(seen, remedy, state))


def _own(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)


def _describe(seen: str, remedy: str, state: TrainerState) -> str:
    return (
        f"The training has collapsed at step {state.global_step}: {seen}. {remedy}, and begin anew in another "
        "--output_dir. The checkpoints written before are as they were."
    )
