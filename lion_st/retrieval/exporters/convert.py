"""An encoded corpus for another search engine, with what that loses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from lion_st.encoding.shards import EncodedCorpus, encoded_queries
from lion_st.encoding.vectors import keep_top_terms
from lion_st.files import atomic_folder
from lion_st.retrieval.exporters import ciff, engines
from lion_st.retrieval.exporters.base import EXAMPLE_TERMS, CorpusFacts, Exporter
from lion_st.retrieval.search import exact_hits, overlap, sampled_queries

FORMATS: dict[str, type[Exporter]] = {
    "anserini": engines.Anserini,
    "ciff": ciff.Ciff,
    "bmp": ciff.Bmp,
    "opensearch": engines.OpenSearch,
    "opensearch-sparse-vector": engines.OpenSearchSparseVector,
    "elasticsearch": engines.Elasticsearch,
    "qdrant": engines.Qdrant,
    "pgvector": engines.PgVector,
    "vespa": engines.Vespa,
    "milvus": engines.Milvus,
}
RECALL_AT = 10
LONGEST = 1000  # documents that stand for queries where what the engine can add up has to be known


@dataclass(frozen=True)
class Conversion:
    """What was written, and what the engine does not keep of it.

    Attributes:
        output: The folder.
        documents: Documents.
        terms: Non-zero weights of the encoded documents.
        dropped: Those of them that the engine does not get.
        largest_change: Largest difference of a weight, dropped ones included.
        mean_change: Sum of all differences, as a share of the sum of all weights.
        recall: Share of the exact search's first 10 documents that a search of what the engine keeps has among its
            own, None if nothing is lost or it was not measured.
        keeps: What the engine keeps, in words.
        scale: What a weight of 1 is as an integer, where it keeps integers.
    """

    output: Path
    documents: int
    terms: int
    dropped: int
    largest_change: float
    mean_change: float
    recall: float | None
    keeps: str
    scale: float

    @property
    def is_exact(self) -> bool:
        """Whether all weights are kept as they are."""
        return self.dropped == 0 and self.largest_change == 0


@dataclass
class _Loss:
    """Sums over the documents so far: of weights, and of how what is stored differs from them."""

    terms: int = 0
    kept: int = 0
    total: float = 0.0
    change: float = 0.0
    largest: float = 0.0

    def add(self, vectors: Any, stored: Any) -> None:
        difference = abs(vectors - stored)
        self.terms += vectors.nnz
        self.kept += stored.nnz
        self.total += float(vectors.sum(dtype=np.float64))
        self.change += float(difference.sum(dtype=np.float64))
        self.largest = max(self.largest, float(difference.max()) if difference.nnz else 0.0)


def convert_index(
    encoded: str | Path,
    output: str | Path,
    to: str,
    *,
    queries: str | Path | None = None,
    name: str = "lion",
    scale: float | None = None,
    sample: int = 200,
    overwrite: bool = False,
    revision: str | None = None,
    show_progress: bool = False,
) -> Conversion:
    """Write a sparse encoded corpus in the form that another engine reads, with its mapping, a query and commands.

    Terms are named by their ids in the model's vocabulary. What the engine will keep of the weights is computed as it
    does, and compared with the weights, and with exact search over them.

    Args:
        encoded: Folder of `encode_corpus`, or the name of one on the Hub, see `EncodedCorpus`.
        output: Folder to write; README.md in it has the commands.
        to: A key of `FORMATS`.
        queries: Folder of encoded queries, to write as well and to measure with; by default documents, cut to 32 terms,
            are measured with.
        name: Of the collection, index or table: letters, digits and underscores.
        scale: What a weight of 1 is as an integer, where the engine keeps integers; by default 100 for Anserini, CIFF
            and Vespa, and for BMP what makes the largest weight 255 or keeps all scores below 65,536.
        sample: Queries to measure with, at most; 0 measures none.
        overwrite: Replace what is in `output`.
        revision: Commit, tag or branch of an encoded corpus on the Hub.
        show_progress: Show the documents that were read, written, and searched for what was lost.

    Raises:
        ValueError: If the format is unknown, the corpus is dense or empty, or does not fit the engine (an id is too
            long for it, or the scale too large), or see `encoded_queries`.
        FileExistsError: If something is in `output` and `overwrite` is False.
        StorageError: If the corpus is incomplete or damaged.
    """
    if to not in FORMATS:
        raise ValueError(f"Unknown format {to!r}: choose one of {', '.join(FORMATS)}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is lower-case letters, digits and underscores, got {name!r}.")
    if scale is not None and not 0 < scale < np.inf:
        raise ValueError(f"scale is a finite number above 0, got {scale}.")
    corpus = EncodedCorpus(encoded, revision=revision)
    if corpus.paradigm != "sparse":
        raise ValueError(
            f"{corpus.path} was encoded by a {corpus.paradigm} model: what is converted are sparse vectors."
        )
    asked = None if queries is None else encoded_queries(queries, corpus)
    facts = _facts(corpus, show_progress)
    with atomic_folder(output, replace=overwrite) as folder:
        exporter = FORMATS[to](folder, name, facts, scale)
        query_ids, found = (None, sampled_queries(corpus, LONGEST, None)) if asked is None else asked.whole()
        query_vectors = sparse.csr_array(found)
        exporter.fit(query_vectors)
        loss = _Loss()
        example: Any = None
        for ids, encoded_part in corpus.shown("Write", show_progress):
            vectors: Any = encoded_part
            _require_short(ids, exporter.id_bytes, to)
            stored = exporter.store(vectors)
            exporter.add(ids, stored)
            loss.add(vectors, stored)
            if example is None and vectors.nnz:
                example = keep_top_terms(vectors[[int(np.argmax(np.diff(vectors.indptr)))]], EXAMPLE_TERMS)
        if query_ids is not None:
            exporter.write_queries(query_ids, exporter.store_queries(query_vectors))
            example = query_vectors[[int(np.argmax(np.diff(query_vectors.indptr) > 0))]]  # the first with a term
        example = exporter.store_queries(example)
        commands = exporter.finish(exporter.query(example.indices, example.data))
        _write_readme(folder, to, exporter, facts, commands)
    recall = None
    if sample and loss.largest > 0:
        measured = sampled_queries(corpus, sample) if asked is None else query_vectors[:sample]
        recall = _recall(corpus, exporter, measured, show_progress)
    return Conversion(
        output=Path(output),
        documents=len(corpus),
        terms=loss.terms,
        dropped=loss.terms - loss.kept,
        largest_change=loss.largest,
        mean_change=loss.change / loss.total if loss.total else 0.0,
        recall=recall,
        keeps=exporter.keeps,
        scale=exporter.scale,
    )


def _require_short(ids: Sequence[str], limit: int | None, to: str) -> None:
    longest = max(ids, key=lambda one: len(one.encode("utf-8", "replace")), default="")
    size = len(longest.encode("utf-8", "replace"))
    if limit is not None and size > limit:
        raise ValueError(
            f"An id for {to} has at most {limit} bytes, and {longest[:40]!r}... has {size:,}: encode the corpus with "
            "shorter ids."
        )


def _facts(corpus: EncodedCorpus, show_progress: bool) -> CorpusFacts:
    upper = np.zeros(int(corpus.manifest["dimensions"]), dtype=np.float32)
    counts = np.zeros(upper.size, dtype=np.int64)
    for _, vectors in corpus.shown("Read", show_progress):
        matrix: Any = vectors
        np.maximum.at(upper, matrix.indices, matrix.data)
        counts += np.bincount(matrix.indices, minlength=counts.size)
    if not upper.any():
        raise ValueError(f"{corpus.path} has no document with a term: check the model that encoded it.")
    return CorpusFacts(len(corpus), upper, counts)


def _recall(corpus: EncodedCorpus, exporter: Exporter, queries: Any, show_progress: bool) -> float:
    def stored() -> Iterator[tuple[list[str], Any]]:
        for ids, vectors in corpus.shown("Measure what is kept", show_progress):
            matrix: Any = vectors
            yield ids, exporter.store(matrix)

    true = exact_hits(corpus.shown("Measure", show_progress), queries, RECALL_AT)
    found = exact_hits(stored(), exporter.store_queries(sparse.csr_array(queries)), RECALL_AT)
    return float(np.mean([overlap(one, other) for one, other in zip(true, found, strict=True) if one]))


def _write_readme(folder: Path, to: str, exporter: Exporter, facts: CorpusFacts, commands: str) -> None:
    text = (
        f"# {exporter.name}: {facts.documents:,} documents for {to}\n\n"
        f"Terms are the model's token ids, 0 to {facts.dimensions - 1:,}; kept are {exporter.keeps}.\n\n"
        f"```bash\n{commands}\n```\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
