"""Dense search with FAISS: exact, by graph, or over compressed vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from lion_st.retrieval.indexes.base import LocalIndex, Paradigm

KINDS = ("flat", "hnsw", "ivf_pq")


class FaissIndex(LocalIndex):
    """A FAISS index by inner product.

    Args:
        paradigm: "dense".
        kind: "flat" is exact; "hnsw" walks a graph of neighbours; "ivf_pq" probes clusters of product-quantised
            vectors and is trained on the documents when the first search, save or `stats` asks for it.
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
        paradigm: Paradigm = "dense",
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
        self.kind = kind
        self.neighbours = neighbours
        self.ef_construction = ef_construction
        self.ef_search = ef_search
        self.clusters = clusters
        self.probes = probes
        self.code_bytes = code_bytes
        self._index: Any = None
        self._untrained: list[np.ndarray] = []

    def _add(self, vectors: np.ndarray) -> None:
        import faiss

        dimensions = vectors.shape[1]
        if self.kind == "ivf_pq" and self._index is None:
            if dimensions % self.code_bytes:
                raise ValueError(f"code_bytes={self.code_bytes} does not divide the {dimensions} dimensions.")
            self._untrained.append(vectors)
            return
        if self._index is None:
            if self.kind == "flat":
                self._index = faiss.IndexFlatIP(dimensions)
            else:
                self._index = faiss.IndexHNSWFlat(dimensions, self.neighbours, faiss.METRIC_INNER_PRODUCT)
                self._index.hnsw.efConstruction = self.ef_construction
        self._index.add(vectors)

    def _ready(self) -> Any:
        if self._untrained:
            import faiss

            vectors = np.concatenate(self._untrained)
            # FAISS warns below 39 training vectors per centroid, and product quantisation needs 256 of them.
            if len(vectors) < 256:
                raise ValueError(f"IVF-PQ is trained on 256 documents or more, got {len(vectors)}: use kind='flat'.")
            clusters = self.clusters or max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
            dimensions = vectors.shape[1]
            quantizer = faiss.IndexFlatIP(dimensions)
            self._index = faiss.IndexIVFPQ(
                quantizer, dimensions, clusters, self.code_bytes, 8, faiss.METRIC_INNER_PRODUCT
            )
            self._index.train(vectors)
            self._index.add(vectors)
            self._untrained = []
        return self._index

    def _search(self, queries: np.ndarray, k: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss

        index = self._ready()
        if self.kind == "hnsw":
            index.hnsw.efSearch = max(self.ef_search, k)
        elif self.kind == "ivf_pq":
            index.nprobe = self.probes
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            scores, rows = index.search(queries, k)
        finally:
            faiss.omp_set_num_threads(before)
        return rows, np.where(rows >= 0, scores, 0.0).astype(np.float32)

    def _bytes(self) -> int:
        import faiss

        return len(faiss.serialize_index(self._ready())) if self.ids else 0

    def _save_files(self, data: Path) -> None:
        import faiss

        if self.ids:
            faiss.write_index(self._ready(), str(data / "vectors.faiss"))

    def _load(self, data: Path, memory_map: bool) -> None:
        import faiss

        flags = faiss.IO_FLAG_MMAP_IFC if memory_map else 0
        self._index = faiss.read_index(str(data / "vectors.faiss"), flags)
