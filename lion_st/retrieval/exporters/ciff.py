"""The Common Index File Format (Lin et al., 2020), which Lucene, PISA, OldDog, Terrier, JASS and BMP read.

A file is a sequence of protocol buffers, each after its length: a header, a list of postings for each term in the order
of the terms' names, and a record for each document in the order of their numbers. Numbers of documents are written as
differences. The buffers are written here, a term's postings at once: protobuf's own classes take a call for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy import sparse

from lion_st.retrieval.exporters.base import CorpusFacts, IntegerWeights, to_json

BMP_LEVELS, BMP_SCORES = 255, 65_535
BMP_QUERY = 34  # more than it makes of a query's largest weight
_VARINT, _BYTES = 0, 2  # wire types
_DOCUMENT, _COUNT, _POSTING = 0x08, 0x10, 0x22  # keys of a posting's two numbers, and of a posting in its list


class Ciff(IntegerWeights):
    """One file `index.ciff`, of integer weights; all postings, of 8 bytes each, are in memory until it is written."""

    def __init__(self, output: Path, name: str, facts: CorpusFacts, scale: float | None = None) -> None:
        super().__init__(output, name, facts, scale)
        self._ids: list[str] = []
        self._lengths: list[np.ndarray] = []  # sums of the documents' integers
        self._starts = np.cumsum(facts.counts) - facts.counts  # of each term's postings, int64 [V]
        self._ends = self._starts.copy()  # how far they are filled, as weights that round to 0 are left out
        self._documents = np.empty(int(facts.counts.sum()), dtype=np.int32)
        self._levels = np.empty_like(self._documents)

    def add(self, ids: Sequence[str], stored: sparse.csr_array) -> None:
        """Put documents' postings behind those of earlier ones."""
        levels = self.integers(stored.data).astype(np.int32)
        rows = sparse.csr_array((levels, stored.indices, stored.indptr), shape=stored.shape)
        columns = rows.tocsc()
        counts = np.diff(columns.indptr)
        places = np.repeat(self._ends - columns.indptr[:-1], counts) + np.arange(columns.nnz)
        self._documents[places] = columns.indices + len(self._ids)
        self._levels[places] = columns.data
        self._ends += counts
        self._lengths.append(rows.sum(axis=1, dtype=np.int64))
        self._ids.extend(ids)

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """Terms and integers, as JSON."""
        pairs = zip(terms.tolist(), self.integers(weights).tolist(), strict=True)
        return to_json({str(term): count for term, count in pairs})

    def finish(self, example: str) -> str:
        """Write the file; see `Exporter.finish`."""
        lengths = np.concatenate(self._lengths)
        used = sorted(np.flatnonzero(self._ends > self._starts).tolist(), key=str)
        with (self.output / "index.ciff").open("wb") as file:
            _write_message(file, _header(len(used), len(self._ids), int(lengths.sum())))
            for term in used:
                part = slice(self._starts[term], self._ends[term])
                _write_message(file, _postings(str(term), self._documents[part], self._levels[part]))
            for number, (one, length) in enumerate(zip(self._ids, lengths.tolist(), strict=True)):
                record = _number(1, number) + _text(2, one) + _number(3, length)
                _write_message(file, record)
        (self.output / "query.json").write_text(f"{example}\n", encoding="utf-8")
        return "# Terms are named by their ids, so that queries are lists of ids: query.json.\nciff_dump index.ciff"


class Bmp(Ciff):
    """CIFF with weights up to 255, which is what BMP (Mallia et al., 2024) keeps of them.

    BMP makes a query's largest weight 32 or so and adds scores up in 16 bits. Those of wide vectors would wrap around
    there without a word, so the scale is no larger than what keeps even the sum of all terms' largest weights below.
    """

    keeps = "integer weights whose sums BMP's 16 bits hold"

    def __init__(self, output: Path, name: str, facts: CorpusFacts, scale: float | None = None) -> None:
        super().__init__(output, name, facts, scale)
        self._given = scale

    def fit(self, queries: sparse.csr_array) -> None:
        """Find the scale; see `Exporter.fit`."""
        peaks = queries.max(axis=1).toarray().ravel()
        sums = (queries @ self.facts.upper)[peaks > 0] / peaks[peaks > 0]
        most = min(BMP_LEVELS / self.facts.largest, BMP_SCORES / (BMP_QUERY * float(sums.max(initial=1e-9))))
        if self._given is not None and self._given > most:
            raise ValueError(
                f"scale={self._given:g} would make scores that BMP's 16 bits do not hold: give at most {most:.2f}."
            )
        self.scale = most if self._given is None else self._given

    def store(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """Integers of the scale, 255 at most."""
        return self.rounded(vectors, BMP_LEVELS)

    def store_queries(self, vectors: sparse.csr_array) -> sparse.csr_array:
        """Queries keep their weights."""
        return vectors

    def query(self, terms: np.ndarray, weights: np.ndarray) -> str:
        """Terms and weights, as JSON."""
        return to_json({str(term): float(weight) for term, weight in zip(terms.tolist(), weights, strict=True)})

    def finish(self, example: str) -> str:
        """See `Exporter.finish`."""
        super().finish(example)
        return (
            "pip install bmp\n"
            "python -c \"import bmp; bmp.ciff2bmp('index.ciff', 'index.bmp', 32, False)\"\n"
            "python -c \"import bmp, json; print(bmp.Searcher('index.bmp')"
            ".search(json.load(open('query.json')), 10, 1.0, 1.0))\""
        )


def _write_message(file: BinaryIO, message: bytes) -> None:
    file.write(_varint(len(message)))
    file.write(message)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _text(field: int, value: str) -> bytes:
    encoded = value.encode("utf-8", "replace")
    return _varint(field << 3 | _BYTES) + _varint(len(encoded)) + encoded


def _header(terms: int, documents: int, occurrences: int) -> bytes:
    mean = np.float64(occurrences / documents).tobytes()
    counts = [1, terms, documents, terms, documents, occurrences]
    numbers = b"".join(_number(field, value) for field, value in enumerate(counts, 1))
    return numbers + bytes([7 << 3 | 1]) + mean + _text(8, "Impacts of a learned sparse retriever, by lion_st")


def _postings(term: str, documents: np.ndarray, weights: np.ndarray) -> bytes:
    """A term's list of postings: name, documents, sum of weights, then differences and weights."""
    gaps = np.diff(documents.astype(np.int64), prepend=0)
    head = _text(1, term) + _number(2, len(documents)) + _number(3, int(weights.sum()))
    gap_bytes, weight_bytes = _byte_counts(gaps), _byte_counts(weights)
    sizes = 4 + gap_bytes + weight_bytes
    starts = np.cumsum(sizes) - sizes
    out = np.zeros(int(sizes.sum()), dtype=np.uint8)
    out[starts] = _POSTING
    out[starts + 1] = 2 + gap_bytes + weight_bytes
    out[starts + 2] = _DOCUMENT
    _fill(out, starts + 3, gaps, gap_bytes)
    out[starts + 3 + gap_bytes] = _COUNT
    _fill(out, starts + 4 + gap_bytes, weights.astype(np.int64), weight_bytes)
    return head + out.tobytes()


def _byte_counts(values: np.ndarray) -> np.ndarray:
    """Bytes that each number takes as a varint."""
    return np.select([values < 1 << 7 * count for count in range(1, 5)], range(1, 5), 5).astype(np.int64)


def _fill(out: np.ndarray, starts: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
    """Write numbers as varints at their places."""
    for byte in range(int(counts.max(initial=0))):
        rest = counts > byte
        follows = np.where(counts[rest] > byte + 1, 0x80, 0)
        out[starts[rest] + byte] = (values[rest] >> 7 * byte & 0x7F) | follows
