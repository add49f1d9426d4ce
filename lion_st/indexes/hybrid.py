"""A sparse and a dense index searched as one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lion_st.encoding.storage import StorageError, read_folder
from lion_st.encoding.vectors import HybridVectors, to_hybrid
from lion_st.errors import require_at_least
from lion_st.indexes import create_index, load_index
from lion_st.indexes.base import KIND, VERSION, Hits, Index, Paradigm, as_ids, refuse_texts
from lion_st.indexes.fusion import convex_fusion, reciprocal_rank_fusion, require_weights

SIDES: tuple[Paradigm, Paradigm] = ("sparse", "dense")


class HybridIndex(Index):
    """Exact search of both vectors of each text, whose rankings are fused.

    Each query's best documents by either score are taken, and fused by `convex_fusion` with weights, else by
    `reciprocal_rank_fusion`: the result is that of a `HybridRetriever` over an index of each kind. Queries that
    `lion_st.encoding.encode_texts` made bring the weights of their model along.

    Args:
        paradigm: "hybrid", whose vectors and queries are `HybridVectors` or pairs (sparse [N, V], dense [N, D]).
        weights: Of the sparse and the dense score, in place of those of the queries.
        candidates: Documents taken from each side for fusion, at least k.
        settings: Of both sides' indexes.

    Raises:
        ValueError: If the weights are not two finite numbers of at least 0, one of them above, or a setting is wrong.
    """

    engine = "exact"
    paradigms = ("hybrid",)
    parameters: ClassVar[tuple[str, ...]] = ("weights", "candidates")

    def __init__(
        self,
        paradigm: Paradigm,
        weights: Sequence[float] | None = None,
        candidates: int = 1000,
        **settings: Any,
    ) -> None:
        super().__init__(paradigm)
        if weights is not None:
            require_weights(weights, len(SIDES))
        require_at_least(1, candidates=candidates)
        self.weights = None if weights is None else [float(weight) for weight in weights]
        self.candidates = candidates
        self.sides = [create_index(self.engine, side, **settings) for side in SIDES]

    def __len__(self) -> int:
        return len(self.sides[0])

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Add documents; see `Index.add`."""
        ids, both = as_ids(ids), _checked(vectors)
        sparse: Any = self.sides[0]
        dimensions = sparse.dimensions
        if dimensions not in (None, both.sparse.shape[1]):
            raise ValueError(
                f"The index has {dimensions} terms and got vectors of {both.sparse.shape[1]}: use one model for all."
            )
        self.sides[1].add(ids, both.dense)  # which checks ids and dimensions; nothing is left for the other to refuse
        try:
            sparse.add(ids, both.sparse)
        except BaseException:  # an interruption: both sides hold the same documents
            self.sides[1].delete(ids)
            raise

    def delete(self, ids: Sequence[str]) -> None:
        """Take documents out of the index; see `Index.delete`."""
        ids = as_ids(ids)
        for side in self.sides:
            side.delete(ids)

    def search(self, queries: Any, k: int = 10, threads: int = 1, allowed: Collection[str] | None = None) -> list[Hits]:
        """Find the k best documents by both scores; see `Index.search`."""
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}.")
        both = _checked(queries)
        rankings = self.search_sides(both, max(k, self.candidates), threads, allowed)
        weights = both.weights if self.weights is None else self.weights
        return reciprocal_rank_fusion(rankings, k) if weights is None else convex_fusion(rankings, weights, k)

    def search_sides(
        self, queries: Any, k: int, threads: int = 1, allowed: Collection[str] | None = None
    ) -> list[list[Hits]]:
        """The k best documents of each query by the sparse score, and those by the dense one."""
        both = _checked(queries)
        return [
            side.search(vectors, k, threads, allowed)
            for side, vectors in zip(self.sides, (both.sparse, both.dense), strict=True)
        ]

    @property
    def searches_among(self) -> bool:
        """Whether `search` takes `allowed`, and `delete` works."""
        return all(side.searches_among for side in self.sides)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the index into a folder; see `Index.save`."""

        def write(data: Path) -> None:
            for name, side in zip(SIDES, self.sides, strict=True):
                side.save(data / name)

        return self._write(path, overwrite, {}, {}, write)

    @classmethod
    def load(cls, path: str | Path, *, memory_map: bool = False, verify: bool = True) -> HybridIndex:
        """Read a saved index; see `Index.load`."""

        def read(metadata: dict[str, Any], data: Path) -> HybridIndex:
            index = cls._opened(path, metadata)
            index.sides = [load_index(data / name, memory_map=memory_map, verify=verify) for name in SIDES]
            kinds = [(side.engine, side.paradigm) for side in index.sides]
            ids = [getattr(side, "ids", None) for side in index.sides]
            if (
                kinds != [(cls.engine, name) for name in SIDES]
                or ids[0] != ids[1]
                or len(index) != metadata["documents"]
            ):
                raise StorageError(f"The two sides of {path} do not fit each other: build the index again.")
            dense: Any = index.sides[1]
            dense.ids = list(ids[0] or ())  # the same strings, once in memory
            return index

        return read_folder(path, KIND, VERSION, read, verify)

    def _bytes(self) -> int | None:
        sizes = [side.stats()["bytes"] for side in self.sides]
        return None if None in sizes else sum(sizes)


class TorchHybridIndex(HybridIndex):
    """The same search on a GPU, see `TorchIndex`.

    Args:
        paradigm: "hybrid".
        weights: See `HybridIndex`.
        candidates: See `HybridIndex`.
        device: Torch device.
        memory_gb: Gigabytes that the documents of each side may take of it.
    """

    engine = "torch"
    parameters = ("weights", "candidates", "device", "memory_gb")
    not_saved = ("device", "memory_gb")

    def __init__(
        self,
        paradigm: Paradigm,
        weights: Sequence[float] | None = None,
        candidates: int = 1000,
        device: str | None = None,
        memory_gb: float | None = None,
    ) -> None:
        super().__init__(paradigm, weights, candidates, device=device, memory_gb=memory_gb)
        self.device = device
        self.memory_gb = memory_gb


def _checked(vectors: Any) -> HybridVectors:
    for part in vectors if isinstance(vectors, tuple) else (vectors,):
        refuse_texts(part)
    return to_hybrid(vectors)
