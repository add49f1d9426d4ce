"""Hard negatives by id, from any indexes of ours together, for collections of any size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import xxhash

from lion_st.data.beir import require_queries
from lion_st.data.tuples import require_ranks
from lion_st.encoding.encode import encode_texts
from lion_st.encoding.fingerprints import model_fingerprint, model_name
from lion_st.errors import require_list, require_type
from lion_st.extras import require
from lion_st.indexes.base import Hits, Index, require_index
from lion_st.retrieval.search import warn_of_another_model
from lion_st.supervision.blocks import write_in_blocks

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

VERSION = 1  # part of the settings: raise it when the same settings shall give other negatives


@runtime_checkable
class Searcher(Protocol):
    """What finds negatives: an `IndexSearcher`, or any `lion_st.retrieval.Retriever` that has its documents."""

    name: str

    def fingerprint(self) -> str:
        """A string that changes whenever results may change."""
        ...

    def search(self, queries: Sequence[str], k: int = 10) -> list[Hits]:
        """Return for each query its k best documents as (id, score), best first."""
        ...


class IndexSearcher:
    """An index of documents and the model that encodes queries for it.

    Args:
        model: The model that encoded the documents, or a query encoder made for it.
        index: As `lion_st.indexes.load_index` opens it.
        threads: CPU threads of the search.

    Raises:
        TypeError: If the index is not one, but its path for example.

    Warns:
        UserWarning: If the index was built with another model, see `search_texts`.

    Example:
        ::

            searcher = IndexSearcher(lion_st.load("runs/lion-sp"), load_index("runs/index", memory_map=True))
    """

    def __init__(self, model: SentenceTransformer | SparseEncoder, index: Index, threads: int = 1) -> None:
        require_index(index)
        warn_of_another_model(model, index)
        self.model = model
        self.index = index
        self.threads = threads
        self.name = model_name(model)

    def fingerprint(self) -> str:
        """The model's fingerprint, and what the index says of its documents and itself."""
        stats = {name: value for name, value in self.index.stats().items() if name != "bytes"}
        return f"{model_fingerprint(self.model)},{self.index.source},{stats}"

    def search(self, queries: Sequence[str], k: int = 10) -> list[Hits]:
        """Return for each query its k best documents as (id, score), best first."""
        return self.index.search(encode_texts(self.model, queries, "query"), k, self.threads)


class Mined(NamedTuple):
    """What `mine_negatives` wrote."""

    path: Path
    tuples: int
    negatives: int  # of all tuples together
    without: int  # judged queries without a negative, which are left out


class _Query(NamedTuple):
    id: str
    text: str
    positives: list[str]


def mine_negatives(
    searchers: Sequence[Searcher],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    output: str | Path,
    *,
    negatives: int = 16,
    ranks: tuple[int, int] = (0, 100),
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    queries_at_once: int = 1024,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Mined:
    """Find hard negatives of judged queries and write training tuples of ids.

    The negatives of a query are taken from the searchers' rankings in turn, rank by rank, each document once. No
    document that is judged relevant to a query becomes its negative.

    With a margin, negatives are positive-aware (de Souza Moreira et al., NV-Retriever, 2024): a document stays out
    whose score in a ranking comes too close to that of the lowest positive there, whichever searcher found it. A
    ranking without a positive, whose documents all score higher, then offers none and keeps none out.

    The queries are searched in blocks; a run that was killed goes on where it stopped, and under torchrun each process
    takes its blocks, see `lion_st.supervision.blocks`. The collection lies in the indexes, whatever its size.

    For pairs of texts that fit into memory, with one model, `sentence_transformers.util.mine_hard_negatives` does it
    too; `load_tuples` reads what it gives.

    Args:
        searchers: One or more, over the same documents.
        queries: Texts by id. Those without a positive are left out.
        qrels: Grades by query and document; above 0 is relevant. Documents that no searcher has are left out.
        output: Parquet file of `query_id`, `positive_document_ids` (by falling grade) and `negative_document_ids`
            (hardest first), which `load_tuples` reads.
        negatives: Negatives of each query at most; `load_tuples(drop_short=True)` leaves out rows with fewer.
        ranks: Documents at these ranks of each ranking, positives not counted, are taken: [start, stop).
        absolute_margin: A negative scores at least this far below the positive.
        relative_margin: A negative scores at most (1 - this) times the positive.
        queries_at_once: Queries of a block.
        overwrite: Replace a file in `output`.
        show_progress: Show a progress bar.

    Returns:
        The file and its counts.

    Raises:
        TypeError: If a searcher is not one, but a path for example.
        ValueError: If a setting is out of range, there is no searcher, no query is judged, or one that is has no text.
        FileExistsError: If `output` was made with other settings or of other queries.
        StorageError: If an unfinished run had other settings or other queries.

    Warns:
        UserWarning: If queries are judged that have no text, or documents that no searcher has.

    Example:
        ::

            bm25 = Bm25Retriever()
            bm25.index(documents)
            sparse = IndexSearcher(model, load_index("runs/index"))
            mine_negatives([bm25, sparse], queries, qrels, "mined.parquet", relative_margin=0.05)
    """
    from tqdm.auto import tqdm

    require_list(searchers, "searchers")
    for searcher in searchers:
        require_type(searcher, Searcher, "A searcher", "pass an IndexSearcher(model, index) or a Bm25Retriever()")
    if not searchers:
        raise ValueError("There is nothing to search with: give at least one searcher.")
    _require_range(negatives, ranks, absolute_margin, relative_margin, queries_at_once)
    asked = _judged_queries(queries, qrels, _document_ids(searchers))
    margins = (absolute_margin, relative_margin)
    depth = ranks[1] + max(len(query.positives) for query in asked)
    settings = {
        "kind": "lion_st negatives",
        "version": VERSION,
        "searchers": [_described(one) for one in searchers],
        "negatives": negatives,
        "ranks": ranks,
        "absolute_margin": absolute_margin,
        "relative_margin": relative_margin,
        "queries_at_once": queries_at_once,
    }

    def blocks() -> Iterator[list[_Query]]:
        return (asked[start : start + queries_at_once] for start in range(0, len(asked), queries_at_once))

    with tqdm(total=len(asked), desc="Mine", unit=" queries", disable=not show_progress) as progress:

        def compute(block: list[_Query]) -> Any:
            rankings = [searcher.search([query.text for query in block], depth) for searcher in searchers]
            progress.update(len(block))
            return _tuples(block, rankings, negatives, ranks, margins)

        path = write_in_blocks(output, settings, blocks, compute, overwrite=overwrite)
    return _counts(path, len(asked))


def hard_negatives(
    rankings: Sequence[Hits],
    positives: Sequence[str],
    negatives: int,
    ranks: tuple[int, int] = (0, 100),
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
) -> list[str]:
    """Choose one query's negatives among its rankings; see `mine_negatives`.

    Example:
        >>> rankings = [[("a", 9.0), ("b", 8.9), ("c", 5.0)], [("d", 3.0), ("a", 2.0), ("e", 1.0)]]
        >>> hard_negatives(rankings, ["a"], 4)
        ['b', 'd', 'c', 'e']
        >>> hard_negatives(rankings, ["a"], 4, relative_margin=0.05)
        ['c', 'e']
    """
    relevant = set(positives)
    too_close: set[str] = set()
    offered: list[list[str]] = []
    for hits in rankings:
        others = [document for document, _ in hits if document not in relevant][slice(*ranks)]
        if absolute_margin is not None or relative_margin is not None:
            least = min((score for document, score in hits if document in relevant), default=None)
            if least is None:
                continue
            limit = least - max(absolute_margin or 0.0, (relative_margin or 0.0) * abs(least))
            too_close |= {document for document, score in hits if score > limit}
        offered.append(others)
    turns = [found[rank] for rank in range(max(map(len, offered), default=0)) for found in offered if rank < len(found)]
    return [document for document in dict.fromkeys(turns) if document not in too_close][:negatives]


def _tuples(
    block: list[_Query],
    rankings: list[list[Hits]],
    negatives: int,
    ranks: tuple[int, int],
    margins: tuple[float | None, float | None],
) -> Any:
    """The tuples of a block as a table, without queries that have no negative."""
    pyarrow = require("pyarrow")
    found = [
        hard_negatives(of_query, query.positives, negatives, ranks, *margins)
        for query, of_query in zip(block, zip(*rankings, strict=True), strict=True)
    ]
    kept = [number for number, documents in enumerate(found) if documents]
    ids = pyarrow.list_(pyarrow.string())
    return pyarrow.table(
        {
            "query_id": pyarrow.array([block[number].id for number in kept], pyarrow.string()),
            "positive_document_ids": pyarrow.array([block[number].positives for number in kept], ids),
            "negative_document_ids": pyarrow.array([found[number] for number in kept], ids),
        }
    )


def _described(searcher: Searcher) -> dict[str, str]:
    """What negatives depend on: name and fingerprint, and the documents where the fingerprint is not of them too."""
    described = {"name": searcher.name, "xxh3": xxhash.xxh3_128_hexdigest(searcher.fingerprint().encode())}
    documents = getattr(searcher, "documents_xxh3", None)
    return described if documents is None else described | {"documents_xxh3": documents}


def _document_ids(searchers: Sequence[Searcher]) -> list[str] | None:
    """The ids of the documents that are searched, None where no searcher has them at hand."""
    for searcher in searchers:
        documents = searcher.index if isinstance(searcher, IndexSearcher) else getattr(searcher, "documents", searcher)
        if ids := getattr(documents, "ids", None):
            return ids
    return None


def _judged_queries(
    queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]], documents: Sequence[str] | None
) -> list[_Query]:
    """The queries that have a positive, in their own order, with their positives by falling grade."""
    remedy = "pass what lion_st.data.trec.read_qrels(path) reads"
    require_type(queries, Mapping, "Queries by id", "pass texts by id, as lion_st.data.records.read_topics(path) reads")
    require_type(qrels, Mapping, "Judgements by query and document", remedy)
    positives = {
        query: [document for document, grade in sorted(of_query.items(), key=lambda item: -item[1]) if grade > 0]
        for query, of_query in qrels.items()
    }
    if documents is not None:
        missing = {document for relevant in positives.values() for document in relevant}.difference(documents)
        if missing:
            warnings.warn(
                f"{len(missing):,} documents that are judged relevant are not among the {len(documents):,} that are "
                f"searched, such as {min(missing)!r}: they are left out.",
                stacklevel=3,
            )
            positives = {query: [one for one in found if one not in missing] for query, found in positives.items()}
    asked = [_Query(query, text, positives[query]) for query, text in queries.items() if positives.get(query)]
    if not asked:
        raise ValueError(
            f"None of the {len(queries):,} queries has a document that is judged relevant: give the judgements of "
            "these queries."
        )
    require_queries(queries, [query.id for query in asked], "The mapping of queries")
    unknown = [query for query, relevant in positives.items() if relevant and query not in queries]
    if unknown:
        warnings.warn(
            f"{len(unknown):,} judged queries have no text, such as {unknown[0]!r}: they are left out.", stacklevel=3
        )
    return asked


def _require_range(
    negatives: int,
    ranks: tuple[int, int],
    absolute_margin: float | None,
    relative_margin: float | None,
    queries_at_once: int,
) -> None:
    for name, count in (("negatives", negatives), ("queries_at_once", queries_at_once)):
        if count < 1:
            raise ValueError(f"{name} is at least 1, got {count}.")
    require_ranks(ranks)
    if absolute_margin is not None and not 0 <= absolute_margin < float("inf"):
        raise ValueError(f"absolute_margin is a finite number of at least 0, got {absolute_margin}.")
    if relative_margin is not None and not 0 <= relative_margin < 1:
        raise ValueError(f"relative_margin is at least 0 and below 1, got {relative_margin}.")


def _counts(path: Path, asked: int) -> Mined:
    if not path.exists():  # the process that ends last of several will write it
        return Mined(path, 0, 0, 0)
    parquet = require("pyarrow.parquet")
    lists = parquet.read_table(path, columns=["negative_document_ids"]).column(0)
    return Mined(path, len(lists), sum(len(chunk.flatten()) for chunk in lists.chunks), asked - len(lists))
