"""Queries that no network encodes, trained together with the encoder of the documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import Tensor

from lion_st.encoding.fingerprints import text_limit
from lion_st.errors import UsageError
from lion_st.losses.regularizers import term_idf
from lion_st.modules.checks import evaluating
from lion_st.modules.query_table import QueryTable
from lion_st.modules.tokenizing import special_ids
from lion_st.training.validation import require_positive

if TYPE_CHECKING:
    from datasets import Dataset

    from lion_st.training.options.arguments import RetrieverArguments

QueryEncoderName: TypeAlias = Literal["full", "static", "idf"]
IDF_DOCUMENTS = 10_000
TOKENS_AT_ONCE = 1024


@dataclass
class QueryEncoderArguments:
    """What encodes queries: the model, or a table of their tokens."""

    query_encoder: QueryEncoderName = field(
        default="full",
        metadata={
            "help": "full: the model encodes queries too. static: a weight (dense: a vector) for each token of the "
            "query, learned together with the encoder of the documents; idf: weights that stay at inverse document "
            "frequencies. Neither runs a network for a query; the result is a Router."
        },
    )
    query_encoder_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the table of --query_encoder static."}
    )

    def require_query_encoder(self: Any) -> None:
        """Refuse settings that make no query encoder."""
        require_positive(self, "query_encoder_learning_rate")
        if self.query_encoder == "full":
            return
        if self.paradigm not in ("sparse", "dense"):
            raise UsageError(
                f"--query_encoder is of sparse and dense models, this one is {self.paradigm}: leave it out."
            )
        if self.query_encoder == "idf" and self.paradigm == "dense":
            raise UsageError("--query_encoder idf weighs the terms of a sparse model: --paradigm sparse, or static.")
        if self.preset is not None:
            raise UsageError(f"--preset {self.preset} is the released code, which encodes queries: leave it out.")
        if self.query_max_active_dims is not None:
            raise UsageError(
                "--query_max_active_dims limits what a network adds to a query: leave it out, a table adds nothing."
            )
        if self.document_max_active_dims is not None and self.document_max_active_dims < self.query_length:
            raise UsageError(
                f"--document_max_active_dims {self.document_max_active_dims} would be the Router's limit of queries "
                f"too, which have up to --query_length {self.query_length} terms: keep as many of a document at least."
            )


def attach_query_table(model: Any, arguments: RetrieverArguments, sources: dict[str, Dataset]) -> None:
    """Have a table encode the queries of a model that is to be trained.

    A sparse one begins with inverse document frequencies among the positives, in the mean 1; a dense one with the
    vectors that the model gives each token alone. A table that the model has already is trained on.
    """
    trainable = arguments.query_encoder == "static"
    if model.query_table is not None:
        model.query_table.requires_grad_(trainable)
        return
    tokenizer, terms = model.tokenizer, model[-1].get_embedding_dimension()
    tokens = len(tokenizer.get_vocab())
    if arguments.paradigm == "dense":
        weight = _token_vectors(model, tokens)
    elif tokens != terms:
        raise ValueError(
            f"The model has {terms} terms and its tokenizer {tokens} tokens: a stock SparseStaticEmbedding has one "
            "weight for each token. Train with --query_encoder full."
        )
    else:
        weight = training_idf(model, sources.values())
        weight = weight / weight.mean()
    model[-1].query_table = QueryTable(weight, trainable).to(model.device)


def training_idf(model: Any, sources: Iterable[Dataset]) -> Tensor:
    """Inverse document frequencies [V] of terms among the first positives of each source."""
    sources = list(sources)
    share = IDF_DOCUMENTS // len(sources) or 1
    rows = (row for tuples in sources for row in islice(tuples, share))
    texts = [[text for name, text in row.items() if name != "label"][1] for row in rows]  # whatever its column's name
    limit = model[0].token_limit("document")
    encoded = model.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=limit)
    return term_idf(encoded["input_ids"], len(texts), len(model[0].lm_head.weight))


@torch.no_grad()
def _token_vectors(model: Any, tokens: int) -> Tensor:
    """What the model makes of each token alone, between the special tokens of a text, [tokens, D] in float32."""
    before, after = special_ids(model.tokenizer)
    parts = []
    with evaluating(model):
        for part in torch.arange(tokens).split(TOKENS_AT_ONCE):
            ids = torch.tensor([[*before, number, *after] for number in part.tolist()], device=model.device)
            features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            parts.append(model(features)["sentence_embedding"].float())
    return torch.cat(parts)


def router_limit(student: Any, model: Any) -> int | None:
    """The limit of active terms that a Router has for queries and documents together, without effect on the former."""
    if getattr(model[1], "thresholds", None) is not None:
        raise ValueError(
            "The model has learned thresholds, for which the stock modules of a Router have no place: make query "
            "encoders of a model that was trained without --learn_thresholds."
        )
    limit = model[1].active_dims("document")
    if isinstance(student[0], SparseStaticEmbedding):
        holds = limit is None or limit >= text_limit(student, "query")  # a query has no more terms than tokens
    else:
        holds = limit == student[1].active_dims("query")
    if not holds:
        raise ValueError(
            f"A stock Router has one limit of active terms, and documents are to keep {limit or 'all'} of theirs, "
            "queries another number. Set the same one, or none, for both: query_max_active_dims and "
            "document_max_active_dims of model[1] and of the student's; `lion-st export --all-terms` drops those of a "
            "checkpoint."
        )
    return limit
