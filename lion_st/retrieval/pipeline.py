"""From encoded shards to an index, and from an index to explained results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from lion_st.retrieval.encode import EncodedCorpus, encode_texts
from lion_st.retrieval.explain import SharedTerm, explain_score
from lion_st.retrieval.indexes import Hits, Index, create_index
from lion_st.retrieval.indexes.exact import ExactSparseIndex
from lion_st.retrieval.prune import Pruning, keep_top_terms
from lion_st.retrieval.vectors import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

SAMPLE_TERMS = 32  # heaviest terms of a document that stand for a query when recall is sampled


@dataclass(frozen=True)
class IndexReport:
    """What `index_corpus` built."""

    index: Index
    seconds: float
    recall: dict[str, float]  # recall@k against exact search; empty for an exact engine


def index_corpus(
    encoded: str | Path,
    output: str | Path,
    engine: str = "exact",
    *,
    engine_parameters: Mapping[str, Any] | None = None,
    pruning: Pruning | None = None,
    queries: Vectors | None = None,
    recall_at: Sequence[int] = (10, 100),
    sample: int = 200,
) -> IndexReport:
    """Build an index from the shards of `encode_corpus` and save it.

    An approximate engine is measured against exact search over the same vectors and its recall is part of the report.

    Args:
        encoded: Folder written by `encode_corpus`.
        output: Folder of the index.
        engine: See `create_index`.
        engine_parameters: Settings of the engine.
        pruning: Prune sparse documents first, shard by shard.
        queries: Vectors to measure recall with. By default `sample` documents, sparse ones cut to their 32 heaviest
            terms, which are harder than real queries in being longer and easier in having themselves to find.
        recall_at: Depths of the recall.
        sample: Queries to measure recall with, at most.

    Returns:
        The index, the seconds it took, and its recall.
    """
    corpus = EncodedCorpus(encoded)
    if pruning is not None and corpus.paradigm == "dense":
        raise ValueError("Pruning drops terms of sparse vectors, and this corpus was encoded by a dense model.")
    started = perf_counter()
    index = create_index(engine, corpus.paradigm, **(engine_parameters or {}))
    is_exact = engine == "exact" or (engine == "faiss" and index.stats().get("kind") == "flat")
    exact = None if is_exact else create_index("exact", corpus.paradigm)
    samples: list[Any] = []
    per_shard = -(-sample // max(1, len(corpus.manifest["shards"])))
    for ids, vectors in corpus:
        kept = pruning.apply(vectors) if pruning is not None else vectors
        index.add(ids, kept)
        if exact is not None:
            exact.add(ids, kept)
            samples.append(kept[:: max(1, len(ids) // per_shard)][:per_shard])
    index.save(output)
    seconds = perf_counter() - started
    if exact is None:
        return IndexReport(index, seconds, {})
    if queries is None:
        queries = (
            np.concatenate(samples)
            if corpus.paradigm == "dense"
            else keep_top_terms(sparse.vstack(samples, format="csr"), SAMPLE_TERMS)
        )
    return IndexReport(index, seconds, recall_against(exact, index, queries[:sample], recall_at))


def recall_against(
    exact: Index, index: Index, queries: Vectors, recall_at: Sequence[int] = (10, 100)
) -> dict[str, float]:
    """Share of the exact search's first k documents that another index finds among its own first k.

    Queries for which the exact search finds nothing are left out.
    """
    depth = max(recall_at)
    pairs = list(zip(exact.search(queries, depth), index.search(queries, depth), strict=True))
    return {
        f"Recall@{k}": float(np.mean([overlap(true[:k], found[:k]) for true, found in pairs if true]))
        for k in recall_at
    }


def overlap(true: Hits, found: Hits) -> float:
    """Share of the true documents that were found."""
    return len(dict(true).keys() & dict(found).keys()) / len(true)


def search_run(
    model: SentenceTransformer | SparseEncoder,
    index: Index,
    queries: Mapping[str, str],
    k: int = 1000,
    *,
    threads: int = 1,
) -> dict[str, dict[str, float]]:
    """Encode queries, text by id, search, and return the scores by query and document, as `write_run` takes them."""
    hits = index.search(encode_texts(model, list(queries.values()), "query"), k, threads)
    return {query: dict(found) for query, found in zip(queries, hits, strict=True)}


class Result(NamedTuple):
    """One found document."""

    query: str
    rank: int
    document: str
    score: float
    terms: list[SharedTerm]  # what it shares with the query; empty unless asked for


def search_texts(
    model: SentenceTransformer | SparseEncoder,
    index: Index,
    queries: Sequence[str],
    k: int = 10,
    *,
    threads: int = 1,
    explain: bool = False,
) -> list[Result]:
    """Encode queries, search, and optionally explain each result by the terms it shares with its query.

    Raises:
        ValueError: If an explanation is asked of an index that does not keep the documents' term weights.
    """
    if explain and not isinstance(index, ExactSparseIndex):
        raise ValueError(
            f"Explanations need the term weights that engine='exact' keeps for sparse vectors, not {index.engine!r}."
        )
    vectors = encode_texts(model, queries, "query")
    results = []
    for row, (query, hits) in enumerate(zip(queries, index.search(vectors, k, threads), strict=True)):
        for rank, (document, score) in enumerate(hits, 1):
            terms: list[SharedTerm] = []
            if explain:
                assert isinstance(index, ExactSparseIndex)
                terms = explain_score(vectors[[row]], index.vectors([document]), model.tokenizer)
            results.append(Result(query, rank, document, score, terms))
    return results
