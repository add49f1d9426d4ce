"""From encoded shards to an index, and from an index to explained results."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lion_st.encoding.encode import encode_texts
from lion_st.encoding.fingerprints import encodes_alike, input_module, model_name
from lion_st.encoding.shards import EncodedCorpus
from lion_st.encoding.vectors import Vectors, keep_top_terms, kind_of, stack
from lion_st.errors import require_type
from lion_st.files import require_free
from lion_st.indexes import Hits, Index, StorageError, create_index
from lion_st.indexes.base import refuse_texts, require_index
from lion_st.indexes.fusion import hits_to_run
from lion_st.indexes.pruning import Pruning
from lion_st.retrieval.explain import SharedTerm, explain_score
from lion_st.retrieval.texts import listed_queries

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

QUERIES_AT_ONCE = 4096  # of a run
SAMPLE_TERMS = 32  # heaviest terms of a document that stand for a query when recall is sampled


@dataclass(frozen=True)
class IndexReport:
    """What `index_corpus` built."""

    index: Index
    seconds: float
    recall: dict[str, float]  # recall@k against exact search; empty where nothing can be lost or was sampled


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
    overwrite: bool = False,
    revision: str | None = None,
    show_progress: bool = False,
) -> IndexReport:
    """Build an index from the shards of `encode_corpus` and save it.

    An approximate, quantised or pruned index is measured against exact search over the vectors as they were encoded,
    shard by shard, so that nothing but the index itself grows with the corpus; its recall is part of the report. Hybrid
    search is not measured: fused scores of one shard do not compare with those of another.

    Args:
        encoded: Folder written by `encode_corpus`, or the name of one on the Hub, see `EncodedCorpus`.
        output: Folder of the index.
        engine: See `create_index`.
        engine_parameters: Settings of the engine.
        pruning: Prune sparse documents first.
        queries: Vectors to measure recall with. By default documents, sparse ones cut to their 32 heaviest terms, which
            are harder than real queries in being longer and easier in having themselves to find.
        recall_at: Depths of the recall.
        sample: Queries to measure recall with, at most; 0 measures nothing.
        overwrite: Replace an index in `output`, once the new one stands.
        revision: Commit, tag or branch of an encoded corpus on the Hub.
        show_progress: Show the documents that were read, and those that recall was measured on.

    Returns:
        The index, the seconds it took, and its recall.

    Raises:
        FileExistsError: If something is in `output` and `overwrite` is False.
        StorageError: If the encoded corpus is incomplete or damaged, `output` holds something else, or the engine's
            collection holds other documents.
        ValueError: If sparse pruning is asked of dense vectors, or the queries are of another model.
    """
    require_free(output, overwrite)
    require_type(pruning, Pruning | None, "A pruning", "pass lion_st.indexes.Pruning(top_terms=128)")
    refuse_texts(queries)
    corpus = EncodedCorpus(encoded, revision=revision)
    if pruning is not None and corpus.paradigm != "sparse":
        raise ValueError(
            f"Pruning drops terms of sparse vectors, and this corpus was encoded by a {corpus.paradigm} model."
        )
    if queries is not None and corpus.paradigm != "hybrid" and queries.shape[1] != corpus.manifest["dimensions"]:
        raise ValueError(
            f"The queries have {queries.shape[1]:,} dimensions and the documents {corpus.manifest['dimensions']:,}: "
            "encode both with one model."
        )
    started = perf_counter()
    index = create_index(engine, corpus.paradigm, **(engine_parameters or {}))
    shard_digests = [shard["corpus_sha256"] for shard in corpus.manifest["shards"]]
    index.source = {
        **corpus.manifest["settings"],
        "corpus_sha256": hashlib.sha256(json.dumps(shard_digests).encode()).hexdigest(),
        "pruning": str(pruning or Pruning()),
    }
    for ids, vectors in corpus.shown("Index", show_progress):
        index.add(ids, vectors if pruning is None else pruning.apply(vectors))
    if len(index) > len(corpus):
        raise StorageError(
            f"The index now holds {len(index):,} documents and the corpus has {len(corpus):,}: others were added to "
            "the collection. Name another one."
        )
    index.save(output, overwrite)
    seconds = perf_counter() - started
    if sample == 0 or corpus.paradigm == "hybrid" or (pruning is None and _is_exact(index)):
        return IndexReport(index, seconds, {})
    queries = sampled_queries(corpus, sample) if queries is None else queries[:sample]
    true = exact_hits(corpus.shown("Measure", show_progress), queries, max(recall_at))
    return IndexReport(index, seconds, _recalls(true, index.search(queries, max(recall_at)), recall_at))


def exact_hits(shards: Iterable[tuple[list[str], Vectors]], queries: Vectors, k: int) -> list[Hits]:
    """The k best documents of each query over shards of vectors, of which one at a time is in memory.

    Args:
        shards: Ids and vectors, such as an `EncodedCorpus`.
        queries: [Q, dimensions].
        k: Documents per query.
    """
    if kind_of(queries) == "hybrid":
        raise ValueError("Fused scores of several shards do not compare: search one index of the whole corpus.")
    best: list[Hits] = [[] for _ in range(queries.shape[0])]
    for ids, vectors in shards:
        part = create_index("exact", kind_of(vectors))
        part.add(ids, vectors)
        for row, hits in enumerate(part.search(queries, k)):
            best[row] = sorted(best[row] + hits, key=lambda hit: -hit[1])[:k]
    return best


def sampled_queries(corpus: EncodedCorpus, count: int, terms: int | None = SAMPLE_TERMS) -> Vectors:
    """Documents at even steps, at most `count`, that stand for queries, sparse ones cut to their heaviest terms."""
    step = max(1, -(-len(corpus) // count))
    parts: list[Any] = []
    first = 0
    for shard in corpus.manifest["shards"]:
        if first < shard["documents"]:  # others are not read
            parts.append(corpus.read(shard)[1][first::step])
        first = (first - shard["documents"]) % step
    rows = stack(parts)
    return rows if terms is None or corpus.paradigm != "sparse" else keep_top_terms(rows, terms)


def _is_exact(index: Index) -> bool:
    settings = {name: getattr(index, name) for name in index.parameters}
    if index.engine == "torch":
        return True
    if index.engine == "exact":
        return settings.get("quantization") is None and settings.get("dtype", "float32") == "float32"
    return index.engine == "faiss" and settings["kind"] == "flat"


def _recalls(true: Sequence[Hits], found: Sequence[Hits], recall_at: Sequence[int]) -> dict[str, float]:
    pairs = [(one, other) for one, other in zip(true, found, strict=True) if one]
    return {f"Recall@{k}": float(np.mean([overlap(one[:k], other[:k]) for one, other in pairs])) for k in recall_at}


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
    idf: bool = False,
    max_tokens: int | None = None,
    allowed: Collection[str] | None = None,
    show_progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Encode queries, text by id, search, and return the scores by query and document, as `write_run` takes them.

    Of `idf`, `max_tokens` and `allowed`, see `search_texts`; `show_progress` shows the time left.

    Raises:
        TypeError: If the model or index is a path, or the queries are not texts by id.
        ValueError: If idf is asked of an index that does not keep the documents' term weights.

    Warns:
        UserWarning: If the index was built with another model, see `search_texts`.
    """
    from tqdm.auto import tqdm

    input_module(model, "query")  # raises for a path
    require_index(index)
    require_type(
        queries, Mapping, "Queries by id", "pass texts by id, as lion_st.evaluation.read_topics(path) reads them"
    )
    texts = listed_queries(list(queries.values()))
    warn_of_another_model(model, index)
    keys = list(queries)
    run: dict[str, dict[str, float]] = {}
    with tqdm(total=len(texts), desc="Search", unit=" queries", disable=not show_progress) as progress:
        for start in range(0, max(1, len(texts)), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            vectors = _encoded_queries(model, index, texts[part], max_tokens, idf)
            run |= hits_to_run(keys[part], index.search(vectors, k, threads, allowed))
            progress.update(vectors.shape[0])
    return run


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
    idf: bool = False,
    max_tokens: int | None = None,
    allowed: Collection[str] | None = None,
) -> list[Result]:
    """Encode queries, search, and optionally explain each result by the terms it shares with its query.

    Args:
        model: The model that encoded the documents, or a query encoder made for it.
        index: What to search.
        queries: Texts.
        k: Documents per query.
        threads: CPU threads of the search.
        explain: Fill in each result's `terms`.
        idf: Multiply the weights of a query's terms by how rare they are in the index, see `DocumentFrequencies.weigh`.
        max_tokens: Length to cut queries to, in place of the model's own.
        allowed: Find none but these documents, by id, see `Index.search`.

    Raises:
        TypeError: If the model or index is a path, or the queries are not a list of texts.
        ValueError: If none of the allowed documents is in the index, an explanation or idf is asked of an index that
            does not keep the documents' term weights, or the model's vectors are of another kind or have other
            dimensions than the documents'.

    Warns:
        UserWarning: If weights, attention or head are not those that encoded the documents; a Router's query route is
            exempt.
    """
    input_module(model, "query")  # raises for a path
    require_index(index)
    queries = listed_queries(queries)
    warn_of_another_model(model, index)
    if explain:
        require_term_weights(index)
    vectors = _encoded_queries(model, index, queries, max_tokens, idf)
    tokenizer = input_module(model, "query").tokenizer
    results = []
    for row, (query, hits) in enumerate(zip(queries, index.search(vectors, k, threads, allowed), strict=True)):
        for rank, (document, score) in enumerate(hits, 1):
            terms: list[SharedTerm] = []
            if explain:
                stored: Any = index
                terms = explain_score(vectors[[row]], stored.vectors([document]), tokenizer)
            results.append(Result(query, rank, document, score, terms))
    return results


def _encoded_queries(model: Any, index: Index, texts: Sequence[str], max_tokens: int | None, idf: bool) -> Any:
    if idf:
        require_term_weights(index, "idf needs")
    vectors: Any = encode_texts(model, texts, "query", max_tokens=max_tokens)
    if kind_of(vectors) != index.paradigm:
        raise ValueError(
            f"The index holds {index.paradigm} vectors, and {model_name(model)!r} is a {kind_of(vectors)} model: give "
            "the model that encoded its documents, or a query encoder made for it."
        )
    return weighed_by_idf(vectors, index) if idf else vectors


def weighed_by_idf(queries: Any, index: Any) -> Any:
    """Sparse queries whose weights are multiplied by how rare their terms are in an index that keeps term weights."""
    return index.document_frequencies().weigh(queries)


def require_term_weights(index: Index, purpose: str = "Explanations need") -> None:
    """Raise a ValueError if an index does not keep the term weights that explain a score, and that idf counts."""
    require_index(index)
    if not hasattr(index, "vectors"):
        raise ValueError(
            f"{purpose} the term weights that the engines 'exact' and 'torch' keep for sparse vectors; this "
            f"index is of the engine {index.engine!r} for {index.paradigm} ones."
        )


def warn_of_another_model(model: SentenceTransformer | SparseEncoder, index: Index) -> None:
    """Warn if an index holds the vectors of a model with other weights, attention or head."""
    from sentence_transformers.base.modules import Router

    if index.source is None or isinstance(model[0], Router):
        return
    if not encodes_alike(model, index.source):
        warnings.warn(
            f"The index was built with {index.source['model']!r} and queries are encoded by {model_name(model)!r}, "
            "whose weights, their type, attention or head differ: unless one was made for the other, the results mean "
            "nothing.",
            stacklevel=3,
        )
