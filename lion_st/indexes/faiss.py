"""Dense search with FAISS: exact, by graph, or over compressed vectors."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from lion_st.encoding.storage import StorageError, require_sound, require_whole
from lion_st.errors import require_at_least
from lion_st.extras import require
from lion_st.indexes.base import LocalIndex, Paradigm

KINDS = ("flat", "hnsw", "ivf_pq")
TRAINING_DOCUMENTS = 524_288  # of IVF-PQ at most, where 39 a cluster are not more
BLOCK = 65_536  # documents read back at a time

_process = os.getpid()


def _after_fork() -> None:
    if faiss := sys.modules.get("faiss"):
        faiss.omp_set_num_threads(1)  # the others stayed in the parent, and would be waited for


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class FaissIndex(LocalIndex):
    """A FAISS index by inner product.

    Equal scores are ranked in the order in which their documents were added; which of them are found where rank k
    divides them is FAISS's choice.

    Args:
        paradigm: "dense".
        kind: "flat" is exact; "hnsw" walks a graph of neighbours; "ivf_pq" probes clusters of product-quantised
            vectors. It is trained when the first search, save or `stats` asks for it, since the number of clusters is
            that of the documents: on all of them, or on at most 524,288 at even steps through the corpus. Until then
            the vectors lie in an unnamed file in the folder for temporary files (TMPDIR), 4 bytes a value.
        neighbours: HNSW: links per document.
        ef_construction: HNSW: candidates while building.
        ef_search: HNSW: candidates while searching, at least k.
        clusters: IVF-PQ: number of clusters; None takes 4 * sqrt(documents), with 39 documents or more in each.
        probes: IVF-PQ: clusters visited per query.
        code_bytes: IVF-PQ: bytes a vector is compressed to; must divide the dimensions.
    """

    engine = "faiss"
    paradigms = ("dense",)
    parameters = ("kind", "neighbours", "ef_construction", "ef_search", "clusters", "probes", "code_bytes")

    def __init__(
        self,
        paradigm: Paradigm,
        kind: Literal["flat", "hnsw", "ivf_pq"] = "flat",
        neighbours: int = 32,
        ef_construction: int = 200,
        ef_search: int = 128,
        clusters: int | None = None,
        probes: int = 32,
        code_bytes: int = 64,
    ) -> None:
        super().__init__(paradigm)
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}.")
        counts = {"ef_construction": ef_construction, "ef_search": ef_search}
        require_at_least(2, neighbours=neighbours)  # with fewer, FAISS ends the process
        require_at_least(
            1, **counts, probes=probes, code_bytes=code_bytes, clusters=1 if clusters is None else clusters
        )
        self.kind = kind
        self.neighbours = neighbours
        self.ef_construction = ef_construction
        self.ef_search = ef_search
        self.clusters = clusters
        self.probes = probes
        self.code_bytes = code_bytes
        self._index: Any = None
        self._untrained: IO[bytes] | None = None

    def _add(self, vectors: np.ndarray) -> None:
        faiss = require("faiss")

        dimensions = vectors.shape[1]
        if self.kind == "ivf_pq" and self._index is None:
            if dimensions % self.code_bytes:
                raise ValueError(f"code_bytes={self.code_bytes} does not divide the {dimensions} dimensions.")
            if self._untrained is None:
                self._untrained = tempfile.TemporaryFile(prefix="lion-st-")  # noqa: SIM115
                weakref.finalize(self, self._untrained.close)
            self._untrained.seek(len(self) * dimensions * vectors.itemsize)  # over what a failed write may have left
            self._untrained.write(vectors.data)
            self._untrained.flush()
            return
        if self._index is None:
            if self.kind == "flat":
                self._index = faiss.IndexFlatIP(dimensions)
            else:
                self._index = faiss.IndexHNSWFlat(dimensions, self.neighbours, faiss.METRIC_INNER_PRODUCT)
                self._index.hnsw.efConstruction = self.ef_construction
        self._require_whole()
        self._index.add(vectors)

    def _ready(self) -> Any:
        with self._lock:
            self._require_whole()
            return self._trained()

    def _require_whole(self) -> None:
        if self._index is not None:
            require_whole(self._index.ntotal, len(self.ids))

    def _trained(self) -> Any:
        if self._untrained is not None:
            faiss = require("faiss")

            assert self.dimensions is not None
            count, dimensions = len(self), self.dimensions
            # FAISS warns below 39 training vectors per centroid, and product quantisation needs 256 of them.
            if count < 256:
                raise ValueError(f"IVF-PQ is trained on 256 documents or more, got {count}: use kind='flat'.")
            vectors = np.memmap(self._untrained, dtype=np.float32, mode="r", shape=(count, dimensions))
            clusters = self.clusters or max(1, min(int(4 * count**0.5), count // 39))
            sample = min(count, max(39 * clusters, TRAINING_DOCUMENTS))
            quantizer = faiss.IndexFlatIP(dimensions)
            index = faiss.IndexIVFPQ(quantizer, dimensions, clusters, self.code_bytes, 8, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors[np.arange(sample) * count // sample])
            for start in range(0, count, BLOCK):
                index.add(vectors[start : start + BLOCK])
            self._index = index
            self._untrained.close()
            self._untrained = None
        return self._index

    def _search(
        self, queries: np.ndarray, k: int, threads: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss = require("faiss")

        index = self._ready()
        settings = None  # of this search, and not of the index, which other threads search
        if self.kind == "hnsw":
            settings = faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k))
        elif self.kind == "ivf_pq":
            settings = faiss.SearchParametersIVF(nprobe=self.probes)
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads if os.getpid() == _process else 1)
        try:
            scores, rows = index.search(queries, k, params=settings)
        finally:
            faiss.omp_set_num_threads(before)
        order = np.lexsort((rows, -scores))  # of equal scores, FAISS has the last row first
        rows, scores = (np.take_along_axis(found, order, axis=1) for found in (rows, scores))
        return rows, np.where(rows >= 0, scores, 0.0).astype(np.float32)

    def _bytes(self) -> int:
        """Vectors or codes and what finds them, counted and not written; FAISS's file has a small header besides."""
        if not self.ids:
            return 0
        assert self.dimensions is not None
        index, count, vector = self._ready(), len(self), 4 * self.dimensions
        if self.kind == "ivf_pq":  # codes and 8-byte ids; the clusters' and the product quantiser's centroids
            return count * (self.code_bytes + 8) + (index.nlist + 256) * vector
        if self.kind == "hnsw":  # a document's links, where they begin and its level
            return count * (vector + 12) + 4 * index.hnsw.offsets.at(count)
        return count * vector

    def _save_files(self, data: Path) -> None:
        faiss = require("faiss")

        if self.ids:
            faiss.write_index(self._ready(), str(data / "vectors.faiss"))

    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        faiss = require("faiss")

        flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
        try:
            self._index = faiss.read_index(str(data / "vectors.faiss"), flags)
        except RuntimeError as error:
            raise StorageError(f"{data / 'vectors.faiss'} cannot be read: build the index again.") from error
        kinds = {"flat": faiss.IndexFlat, "hnsw": faiss.IndexHNSW, "ivf_pq": faiss.IndexIVFPQ}
        require_sound(
            data,
            isinstance(self._index, kinds[self.kind]),
            self._index.ntotal == len(self.ids),
            self._index.d == self.dimensions,
        )
        if verify and self.kind == "ivf_pq":
            lists = self._index.invlists
            for number in range(self._index.nlist):
                if size := lists.list_size(number):
                    rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
                    require_sound(data, rows.min() >= 0, rows.max() < len(self.ids))
        if verify and self.kind == "hnsw":
            graph = self._index.hnsw
            links = faiss.vector_to_array(graph.neighbors)
            require_sound(
                data,
                -1 <= graph.entry_point < len(self.ids),
                graph.offsets.size() == len(self.ids) + 1,
                links.min(initial=-1) >= -1,
                links.max(initial=-1) < len(self.ids),
            )
