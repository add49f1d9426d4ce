"""Approximate sparse search with Seismic (Bruch et al., SIGIR 2024), in its large-vocabulary form."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from lion_st.encoding.storage import require_whole
from lion_st.errors import require_at_least
from lion_st.extras import require
from lion_st.indexes.base import LocalIndex, Paradigm

KEPT = 0.2  # of the documents' postings, by default
FEWEST_POSTINGS, MOST_POSTINGS = 100, 6000  # per term, by default
FILE = "vectors.index.seismic"  # its name begins with what `save` is given

_process: int | None = None  # which has Seismic's threads


def _require_threads() -> None:
    """Raise where Seismic would wait for ever for threads that stayed in the parent process."""
    global _process
    if _process not in (None, os.getpid()):
        raise RuntimeError(
            "This process was forked from one that had used Seismic, whose threads stayed there: fork before the first "
            "search, start processes by multiprocessing's 'spawn', or use the engine 'exact'."
        )
    _process = os.getpid()


class SeismicIndex(LocalIndex):
    """The `SeismicIndexLV` of pyseismic-lsr: 32-bit terms, since LLM vocabularies pass the 65,536 of the plain one.

    The index is built at the first search, save or `stats` after documents were added, and once saved it cannot grow.
    Seismic's own defaults (3,500 postings a term, a block for every 10 postings, 10 query terms) were chosen for BERT's
    vocabulary. Over one four times as large, lists are short: 3,500 postings prune nothing below millions of documents,
    and the summaries of the many small blocks take far more memory than the documents. LLM queries spread their weight
    over more terms.

    Args:
        paradigm: "sparse".
        n_postings: Mean number of postings kept per term, the heaviest ones; by default a fifth of what the documents
            have, between 100 and 6,000.
        max_fraction: No term keeps more than this many times `n_postings`.
        summary_energy: Share of a block's weight that its summary keeps.
        centroid_fraction: Blocks per posting.
        query_cut: Heaviest terms of a query whose lists are visited.
        heap_factor: Blocks are skipped if their summary stays below the k-th score over this factor; lower is faster,
            1 safer.
        neighbours: Nearest documents that a graph links each document with; a search then also looks at those of what
            it found. 0 builds none, which is faster.
    """

    engine = "seismic"
    not_portable = "whose file is searched without a check of what is in it"
    paradigms = ("sparse",)
    parameters = (
        "n_postings",
        "max_fraction",
        "summary_energy",
        "centroid_fraction",
        "query_cut",
        "heap_factor",
        "neighbours",
    )

    def __init__(
        self,
        paradigm: Paradigm,
        n_postings: int | None = None,
        max_fraction: float = 6.0,
        summary_energy: float = 0.4,
        centroid_fraction: float = 0.05,
        query_cut: int = 30,
        heap_factor: float = 0.9,
        neighbours: int = 0,
    ) -> None:
        super().__init__(paradigm)
        require_at_least(1, n_postings=1 if n_postings is None else n_postings, query_cut=query_cut)
        require_at_least(0, neighbours=neighbours)
        require_at_least(0.0, max_fraction=max_fraction, summary_energy=summary_energy)
        require_at_least(0.0, centroid_fraction=centroid_fraction, heap_factor=heap_factor)
        self.n_postings = n_postings
        self.max_fraction = max_fraction
        self.summary_energy = summary_energy
        self.centroid_fraction = centroid_fraction
        self.query_cut = query_cut
        self.heap_factor = heap_factor
        self.neighbours = neighbours
        self._dataset: Any = None
        self._postings = self._terms = 0
        self._filled = 0  # documents with terms, which alone Seismic counts
        self._index: Any = None
        self._file_bytes: int | None = None

    def _add(self, vectors: sparse.csr_array) -> None:
        seismic = require("seismic")

        if self.ids and self._dataset is None:
            raise ValueError(
                "A Seismic index that was saved or loaded cannot grow: build it again from the encoded corpus."
            )
        self._require_whole()
        if self._dataset is None:
            self._dataset = seismic.SeismicDatasetLV(dim=vectors.shape[1])
        rows = [str(row) for row in range(len(self), len(self) + vectors.shape[0])]
        self._dataset.add_documents_by_id(
            rows, vectors.indices.astype(np.int64), vectors.data, vectors.indptr.astype(np.int64)
        )
        self._filled += int(np.count_nonzero(np.diff(vectors.indptr)))
        self._postings += vectors.nnz
        self._terms = vectors.shape[1]
        self._index = self._file_bytes = None

    def _require_whole(self) -> None:
        if self._dataset is not None:
            require_whole(self._dataset.len, self._filled)

    def _build(self) -> Any:
        seismic = require("seismic")

        with self._lock:
            self._require_whole()
            _require_threads()
            return self._built(seismic)

    def _built(self, seismic: Any) -> Any:
        if self._index is None:
            kept = round(min(MOST_POSTINGS, max(FEWEST_POSTINGS, KEPT * self._postings / self._terms)))
            with _stdout_to_stderr():
                self._index = seismic.SeismicIndexLV.build_from_dataset(
                    self._dataset,
                    n_postings=kept if self.n_postings is None else self.n_postings,
                    max_fraction=self.max_fraction,
                    summary_energy=self.summary_energy,
                    centroid_fraction=self.centroid_fraction,
                    nknn=self.neighbours,
                )
        return self._index

    def _search(
        self, queries: sparse.csr_array, k: int, threads: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        seismic = require("seismic")

        rows = np.full((queries.shape[0], k), -1, dtype=np.int64)
        scores = np.zeros((queries.shape[0], k), dtype=np.float32)
        string = seismic.get_seismic_string()
        spans = {
            str(query): slice(queries.indptr[query], queries.indptr[query + 1])
            for query in range(queries.shape[0])
            if queries.indptr[query] < queries.indptr[query + 1]
        }
        if spans:
            found = self._build().batch_search(
                np.array(list(spans), dtype=string),
                [queries.indices[span].astype(string) for span in spans.values()],
                [queries.data[span] for span in spans.values()],
                k=k,
                query_cut=self.query_cut,
                heap_factor=self.heap_factor,
                n_knn=self.neighbours,
                num_threads=threads,
            )
            for hits in found:  # in the order in which the threads ended
                for place, (query, score, row) in enumerate(sorted(hits, key=lambda hit: (-hit[1], int(hit[2])))):
                    rows[int(query), place] = int(row)
                    scores[int(query), place] = score
        return rows, scores

    def _bytes(self) -> int:
        """Size of the file that `save` writes: of an index neither saved nor loaded it is written once to know it."""
        if not self.ids:
            return 0
        if self._file_bytes is None:
            with tempfile.TemporaryDirectory(prefix="lion-st-") as folder:
                self._save_files(Path(folder))
        assert self._file_bytes is not None
        return self._file_bytes

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the index into a folder; see `Index.save`. It cannot grow afterwards: the documents are let go."""
        saved = super().save(path, overwrite)
        self._dataset = None
        return saved

    def _save_files(self, data: Path) -> None:
        if self.ids:
            index = self._build()
            with _stdout_to_stderr():
                index.save(str(data / "vectors"))
            self._file_bytes = (data / FILE).stat().st_size

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        seismic = require("seismic")

        with _stdout_to_stderr():
            self._index = seismic.SeismicIndexLV.load(str(data / FILE))
        self._file_bytes = (data / FILE).stat().st_size


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Seismic reports its progress on the standard output, where users expect results alone."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
