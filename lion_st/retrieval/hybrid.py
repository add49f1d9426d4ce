"""Several retrievers fused into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lion_st.errors import require_list
from lion_st.indexes import Hits
from lion_st.indexes.fusion import convex_fusion, reciprocal_rank_fusion, require_weights
from lion_st.retrieval.retriever import Retriever, require_retriever
from lion_st.retrieval.texts import listed_queries


class HybridRetriever:
    """Several retrievers fused, such as Lion-SP with Lion-DS, each over its own engine.

    Args:
        retrievers: Two or more.
        weights: One weight each for `convex_fusion`, see `fit_convex_weights`; None fuses by reciprocal rank.
        depth: Documents taken from each, at least k.
        name: Name in tables and result files.

    Raises:
        TypeError: If one of them is not a retriever, but a path for example.
        ValueError: If there are fewer than two, or the weights do not fit.
    """

    paradigm = "hybrid"

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        weights: Sequence[float] | None = None,
        depth: int = 1000,
        name: str | None = None,
    ) -> None:
        require_list(retrievers, "retrievers")
        for retriever in retrievers:
            require_retriever(retriever)
        if len(retrievers) < 2:
            raise ValueError(f"Fusion needs two retrievers or more, got {len(retrievers)}.")
        if weights is not None:
            require_weights(weights, len(retrievers))
        self.retrievers = list(retrievers)
        self.weights = [float(weight) for weight in weights] if weights is not None else None
        self.depth = depth
        self.name = name or "+".join(retriever.name.split("/")[-1] for retriever in retrievers)
        self.engine = "+".join(retriever.engine for retriever in retrievers)

    def fingerprint(self) -> str:
        """The parts' fingerprints and the fusion's settings."""
        return ";".join([*(one.fingerprint() for one in self.retrievers), f"{self.weights},{self.depth}"])

    def index(self, documents: Mapping[str, str], show_progress: bool = False) -> None:
        """Index documents with every part."""
        for retriever in self.retrievers:
            retriever.index(documents, show_progress)

    def search(self, queries: Sequence[str], k: int = 10, show_progress: bool = False) -> list[Hits]:
        """Search with every part and fuse."""
        queries = listed_queries(queries)
        rankings = [retriever.search(queries, max(k, self.depth), show_progress) for retriever in self.retrievers]
        if self.weights is None:
            return reciprocal_rank_fusion(rankings, k)
        return convex_fusion(rankings, self.weights, k)

    def figures(self) -> dict[str, Any]:
        """Sums over the parts of what adds up."""
        parts = [retriever.figures() for retriever in self.retrievers]
        summed = ("index_bytes", "index_seconds", "search_ms_per_query", "encode_ms_per_query")
        return {key: sum(part.get(key) or 0 for part in parts) for key in summed}
