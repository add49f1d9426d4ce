"""Evaluation while a retriever trains: on test collections and on a held-out share of the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.multi_vector_encoder.evaluation import (
    MultiVectorInformationRetrievalEvaluator,
    MultiVectorNanoBEIREvaluator,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from sentence_transformers.sparse_encoder.evaluation import (
    SparseInformationRetrievalEvaluator,
    SparseNanoBEIREvaluator,
)
from transformers import EarlyStoppingCallback

from lion_st.data.beir import load_beir
from lion_st.data.held_out import HeldOut, hold_out
from lion_st.data.sources import parse_source
from lion_st.errors import UsageError
from lion_st.training.hybrid_evaluation import HybridInformationRetrievalEvaluator, HybridNanoBEIREvaluator
from lion_st.training.prompts import TaskPrompts
from lion_st.training.validation import as_sources, require_positive

if TYPE_CHECKING:
    from datasets import Dataset

    from lion_st.training.options.arguments import RetrieverTrainingArguments

MAIN_METRIC = "ndcg@10"
# paradigm -> evaluators of a collection and of NanoBEIR, and how they name the score in their metrics
EVALUATORS: dict[str, tuple[Any, Any, str]] = {
    "sparse": (SparseInformationRetrievalEvaluator, SparseNanoBEIREvaluator, "dot"),
    "dense": (InformationRetrievalEvaluator, NanoBEIREvaluator, "dot"),
    "multi_vector": (MultiVectorInformationRetrievalEvaluator, MultiVectorNanoBEIREvaluator, "maxsim"),
    "hybrid": (HybridInformationRetrievalEvaluator, HybridNanoBEIREvaluator, "dot"),
}
NANO_BEIR = "NanoBEIR"
HELD_OUT = "held_out"
SCORES_AT_ONCE = 10**8  # of queries and documents, 400 MB
NEEDS_EVALUATION = (
    "do_eval",
    "early_stopping_patience",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "load_best_model_at_end",
    "metric_for_best_model",
)


@dataclass
class EvaluationArguments:
    """On what a retriever is evaluated while it trains, and when that ends the training."""

    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "Test collections to search while training: BEIR folders, Hub data sets such as mteb/scifact, "
            "NanoBEIR, or some of it as NanoBEIR:msmarco,nq."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split of their judgements."})
    eval_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training queries to hold out and search instead, such as 0.01; what is trained on "
            "names none of them and none of their positives."
        },
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Steps from one evaluation to the next; by default those of --save_steps."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End the training after so many evaluations in a row without a better result."},
    )

    def complete_evaluation(self, arguments: Any) -> None:
        """Fill in when to evaluate and by what, before transformers checks it."""
        self.eval_data = as_sources(self.eval_data) or None
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise UsageError(f"--eval_share must be above 0 and below 1, got {self.eval_share}.")
        require_positive(self, "early_stopping_patience")
        if not self.eval_data and self.eval_share is None:
            for name in NEEDS_EVALUATION:
                value = getattr(arguments, name)
                if value and value != "no":
                    raise UsageError(f"--{name} needs something to evaluate on: give --eval_data or --eval_share.")
            if arguments.save_strategy == "best":
                raise UsageError("--save_strategy best needs something to evaluate on: give --eval_data.")
            return
        if arguments.eval_strategy == "no":
            arguments.eval_strategy = "steps"
        if arguments.eval_strategy == "steps" and arguments.eval_steps is None:
            arguments.eval_steps = arguments.save_steps
        if arguments.metric_for_best_model is None:
            arguments.metric_for_best_model = MAIN_METRIC
        # Else a resumed run would count the evaluations without a better result from 0.
        arguments.restore_callback_states_from_checkpoint = True

    def complete_schedule(self: Any) -> None:
        """Have schedules that follow the evaluations take a larger value for the better, once transformers is done."""
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            mode = {"mode": "min" if self.greater_is_better is False else "max"}
            vars(self)["lr_scheduler_kwargs"] = mode | (self.lr_scheduler_kwargs or {})


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which the run's record can tell from a run that broke off."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended the training."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class RetrievalEvaluator(SequentialEvaluator):
    """sentence-transformers' evaluators one after the other, with `ndcg@10`, the mean of theirs, as the result."""

    def __init__(self, evaluators: Sequence[BaseEvaluator], score: str = "dot") -> None:
        self.score = score
        super().__init__(evaluators, main_score_function=lambda scores: float(np.mean(scores)))

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate a model, see `SequentialEvaluator`."""
        results = super().__call__(*arguments, **options)
        results[MAIN_METRIC] = results.pop("sequential_score")
        self.primary_metric = MAIN_METRIC
        return {name: float(value) for name, value in results.items()}

    def require_metric(self, name: str) -> None:
        """Refuse a metric that is not among the results, before anything is trained."""
        names = [MAIN_METRIC]
        evaluators: list[Any] = self.evaluators
        for evaluator in evaluators:
            if isinstance(evaluator, NanoBEIREvaluator):
                names.append(f"{evaluator.name}_{self.score}_{MAIN_METRIC}")
                continue
            for metric in ("accuracy", "precision", "recall", "mrr", "ndcg", "map"):
                depths = getattr(evaluator, f"{metric}_at_k", None) or evaluator.precision_recall_at_k
                names += [f"{evaluator.name}_{self.score}_{metric}@{depth}" for depth in depths]
        if name.removeprefix("eval_") not in names:
            raise UsageError(f"--metric_for_best_model {name} is not measured: choose from {', '.join(names)}.")


def hold_out_share(
    sources: dict[str, Dataset], arguments: RetrieverTrainingArguments, prompts: Mapping[str, TaskPrompts]
) -> tuple[dict[str, Dataset], HeldOut | None]:
    """Hold out `eval_share` of the training data, see `hold_out`, and print what that leaves out.

    Raises:
        ValueError: See `hold_out`.
    """
    if arguments.eval_share is None:
        return sources, None
    rows = sum(map(len, sources.values()))
    sources, held_out = hold_out(sources, arguments.eval_share, arguments.seed, prompts if arguments.prompts else None)
    if arguments.process_index == 0:
        print(
            f"Held out {len(held_out.queries):,} queries; {held_out.left_out:,} of {rows:,} rows name one of their "
            "positives and do not train either."
        )
    return sources, held_out


def build_evaluator(
    arguments: RetrieverTrainingArguments, paradigm: str, held_out: HeldOut | None = None
) -> RetrievalEvaluator | None:
    """The evaluator of a run, None if nothing is to be evaluated.

    Raises:
        FileNotFoundError: If a test collection is not there.
        UsageError: If two have one name, or `metric_for_best_model` is not measured.
        ValueError: If one cannot be read or has no relevant document.
    """
    kind, _, score = EVALUATORS[paradigm]
    make = partial(_evaluator, kind, arguments.per_device_eval_batch_size)
    evaluators: dict[str, Any] = {}
    for source in arguments.eval_data or ():
        name, one = (
            _nano_beir(source, paradigm, arguments.per_device_eval_batch_size)
            if source.partition(":")[0] == NANO_BEIR
            else _collection(source, arguments.eval_split, make)
        )
        if name in (*evaluators, HELD_OUT):
            raise UsageError(f"--eval_data has two collections called {name}: rename one of them.")
        evaluators[name] = one
    if held_out is not None:
        given = {"query_prompt": "", "corpus_prompt": ""} if held_out.has_prompts else {}
        evaluators[HELD_OUT] = make(HELD_OUT, held_out.queries, held_out.corpus, held_out.relevant, **given)
    if not evaluators:
        return None
    evaluator = RetrievalEvaluator(list(evaluators.values()), score)
    if arguments.metric_for_best_model is not None:
        evaluator.require_metric(arguments.metric_for_best_model)
    if arguments.process_index == 0:
        for name, one in evaluators.items():
            if isinstance(one, InformationRetrievalEvaluator):
                size = f"{len(one.queries):,} queries, {len(one.corpus):,} documents"
                print(f"Each evaluation searches {name}: {size}.")
    return evaluator


def nano_beir_evaluator(
    names: Sequence[str] | None, paradigm: str, batch_size: int, dataset_id: str = "sentence-transformers/NanoBEIR-en"
) -> NanoBEIREvaluator:
    """sentence-transformers' evaluator of NanoBEIR."""
    kind = EVALUATORS[paradigm][1]
    try:
        return kind(names, dataset_id=dataset_id, batch_size=batch_size, write_csv=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error.__cause__, OSError | ValueError):
            raise
        raise FileNotFoundError(
            f"{NANO_BEIR} cannot be loaded from {dataset_id} ({error}): connect to the Hub once, or give BEIR folders "
            "as --eval_data."
        ) from error


def _nano_beir(source: str, paradigm: str, batch_size: int) -> tuple[str, NanoBEIREvaluator]:
    names = [name for name in source.partition(":")[2].split(",") if name]
    return NANO_BEIR, nano_beir_evaluator(names or None, paradigm, batch_size)


def _collection(source: str, split: str, make: Any) -> tuple[str, InformationRetrievalEvaluator]:
    corpus, queries, qrels = load_beir(source, split)
    whole = {key: f"{document['title']} {document['text']}".strip() for key, document in corpus.items()}
    texts = {key: text for key, text in whole.items() if text}  # a blank one is never found
    relevant = {query: {key for key, grade in row.items() if grade > 0} for query, row in qrels.items()}
    found = parse_source(source)
    place = found.repository if found.path is None else found.path.resolve().name
    name = "_".join(filter(None, (str(place).rpartition("/")[2], found.subset)))
    return name, make(name, queries, texts, relevant)


def _evaluator(
    kind: type,
    batch_size: int,
    name: str,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    relevant: Mapping[str, set[str]],
    **prompts: str,
) -> InformationRetrievalEvaluator:
    judged = {query: documents for query, documents in relevant.items() if documents}
    if not any(document in corpus for documents in judged.values() for document in documents):
        raise ValueError(f"{name} has no query with a relevant document to evaluate on: give another --eval_split.")
    return kind(
        {query: queries[query] for query in judged},
        dict(corpus),
        judged,
        corpus_chunk_size=max(1000, SCORES_AT_ONCE // len(judged)),
        batch_size=batch_size,
        name=name,
        write_csv=False,
        **prompts,
    )
