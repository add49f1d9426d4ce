"""What all forms share: what is known of a corpus, how weights are rounded, and files of JSON."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import select_entries

BULK = 2000  # documents of one file,
BULK_TERMS = 1_000_000  # and their terms, some 20 MB: Qdrant takes 32 MB at a time, Elasticsearch 100
LARGEST_SUM = 2**31 - 1  # of a text's integers: Lucene and CIFF count them in 32 bits
EXAMPLE_TERMS = 8  # of a document that stands for a query in an example
DEFAULT_SCALE = 100.0  # weight 1 as an integer, as SPLADE's published indexes have it


@dataclass(frozen=True)
class CorpusFacts:
    """What a form may have to know before the first document.

    Attributes:
        documents: Their number.
        upper: Each term's largest weight [V].
        counts: In how many documents each term is active, int64 [V].
    """

    documents: int
    upper: np.ndarray
    counts: np.ndarray

    @property
    def dimensions(self) -> int:
        """Terms of the vocabulary."""
        return len(self.upper)

    @property
    def largest(self) -> float:
        """The largest weight."""
        return float(self.upper.max())

    @cached_property
    def used(self) -> np.ndarray:
        """Terms that some document has, ascending."""
        return np.flatnonzero(self.upper)


class Exporter(ABC):
    """Writes the documents of a corpus for one engine, with its mapping and a query.

    Args:
        output: A folder that is there.
        name: Of the collection, index or table.
        facts: Of the corpus.
        scale: What a weight of 1 is as an integer, where the engine keeps integers; None takes the form's own.
    """

    keeps: ClassVar[str] = "float32 weights"
    id_bytes: ClassVar[int | None] = None  # of a document's id, at most

    def __init__(self, output: Path, name: str, facts: CorpusFacts, scale: float | None = None) -> None:
        self.output = output
        self.name = name
        self.facts = facts
        self.scale = DEFAULT_SCALE if scale is None else scale

    def fit(self, queries: sparse.csr_array) -> None:
        """Learn from queries, before the first document, what the engine can add up."""
        return

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """What the engine keeps of documents, as weights of the model's scale."""
        return vectors

    def store_queries(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """What the engine reads of queries."""
        return vectors

    @abstractmethod
    def add(self, ids: Sequence[str], stored: sparse.csr_array) -> None:
        """Write documents, which `store` has made."""

    @abstractmethod
    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """A query as the engine takes it, on one line or several."""

    @abstractmethod
    def finish(self, example: str) -> str:
        """Write all else.

        Returns:
            How to load the files and to search.
        """

    def write_queries(self, ids: Sequence[str], stored: sparse.csr_array) -> None:
        """Write queries, one a line: id, tab, query."""
        with (self.output / "queries.tsv").open("w", encoding="utf-8") as file:
            for one, terms, weights in rows(ids, stored):
                file.write(f"{one}\t{' '.join(self.query(terms, weights).split())}\n")

    def integers(self, weights: np.ndarray) -> np.ndarray:
        """Weights that `store` rounded, as the integers they stand for."""
        return np.rint(weights.astype(np.float64) * self.scale).astype(np.int64)

    def rounded(self, vectors: sparse.csr_array, most: int | None = None) -> sparse.csr_array:
        """Weights as integers of the scale hold them, those that round to 0 dropped."""
        sums = self.scale * vectors.sum(axis=1, dtype=np.float64)
        if vectors.shape[0] and sums.max() > LARGEST_SUM:
            raise ValueError(
                f"scale={self.scale:g} would make integers that come to {sums.max():,.0f} in a text, and engines count "
                f"to {LARGEST_SUM:,}: give at most {self.scale * LARGEST_SUM / sums.max():,.0f}."
            )
        levels = self.integers(vectors.data)
        if most is not None:
            levels = np.minimum(levels, most)
        weights = (levels / self.scale).astype(np.float32)
        kept = sparse.csr_array((weights, vectors.indices, vectors.indptr), shape=vectors.shape)
        return select_entries(kept, levels > 0)


class IntegerWeights(Exporter):
    """A form whose weights are integers of the scale, of documents and of queries."""

    keeps = "integer weights"

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """Integers of the scale."""
        return self.rounded(vectors)

    store_queries = store


def nine_bits(vectors: sparse.csr_array) -> sparse.csr_array:
    """Weights as Lucene's feature fields keep them: cut to nine significant bits."""
    cut = (vectors.data.astype(np.float32).view(np.uint32) >> np.uint32(15) << np.uint32(15)).view(np.float32)
    return sparse.csr_array((cut, vectors.indices, vectors.indptr), shape=vectors.shape)


def rows(ids: Sequence[str], vectors: sparse.csr_array) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Id, terms and weights of each row."""
    for place, one in enumerate(ids):
        part = slice(vectors.indptr[place], vectors.indptr[place + 1])
        yield one, vectors.indices[part], vectors.data[part]


def decimals(weights: np.ndarray) -> list[float]:
    """float32 weights as the shortest decimals that are read as the same float32."""
    return [float(text) for text in weights.astype(np.float32).astype("U24")]


def named(terms: Iterable[int], values: Iterable[Any]) -> dict[str, Any]:
    """Terms, which every engine names by text, with their values."""
    return {str(term): value for term, value in zip(terms, values, strict=True)}


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class JsonLines(Exporter):
    """Documents as JSON, some lines each, in files of at most `BULK` documents and, of several, `BULK_TERMS` terms."""

    suffix: ClassVar[str] = "jsonl"
    _files = 0
    _documents = 0

    @abstractmethod
    def lines(self, one: str, row: int, terms: np.ndarray, weights: np.ndarray) -> list[Any]:
        """The JSON values of a document, a line each."""

    def add(self, ids: Sequence[str], stored: sparse.csr_array) -> None:
        """Write documents; see `Exporter.add`."""
        start = 0
        while start < len(ids):
            stop = int(np.searchsorted(stored.indptr, stored.indptr[start] + BULK_TERMS, side="right")) - 1
            part = slice(start, min(max(stop, start + 1), start + BULK, len(ids)))
            lines = [
                to_json(line)
                for row, (one, terms, weights) in enumerate(rows(ids[part], stored[part]))
                for line in self.lines(one, self._documents + row, terms, weights)
            ]
            self._documents += len(ids[part])
            self.write_file(lines)
            self._files += 1
            start = part.stop

    def write_file(self, lines: list[str]) -> None:
        """Write one file of documents."""
        folder = self.output / "documents"
        folder.mkdir(exist_ok=True)
        (folder / f"{self._files:06d}.{self.suffix}").write_text("".join(f"{line}\n" for line in lines), "utf-8")
