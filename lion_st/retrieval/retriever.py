"""A model and an index together: texts in, ranked documents out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lion_st.retrieval.describe import model_fingerprint, model_name
from lion_st.retrieval.encode import encode_texts
from lion_st.retrieval.indexes import Hits, Index, create_index
from lion_st.retrieval.vectors import Vectors, active_terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


@runtime_checkable
class Retriever(Protocol):
    """What the evaluation searches with: a model over an index, BM25, or several of them fused."""

    name: str
    paradigm: str
    engine: str

    def fingerprint(self) -> str:
        """A string that changes whenever results may change."""
        ...

    def index(self, documents: Mapping[str, str], show_progress: bool = False) -> None:
        """Index documents, text by id, in place of any earlier ones."""
        ...

    def search(self, queries: Sequence[str], k: int = 10, show_progress: bool = False) -> list[Hits]:
        """Return for each query its k best documents as (id, score), best first."""
        ...

    def figures(self) -> dict[str, Any]:
        """Sizes and times of the last `index` and `search`."""
        ...


class ModelRetriever:
    """A sparse or dense model searched through an index.

    Args:
        model: The encoder.
        engine: Engine of the index, see `create_index`.
        engine_parameters: Settings of the engine.
        tokens_per_batch: Padded tokens per batch when encoding.
        threads: CPU threads of the search.
        name: Name in tables and result files; the model's own by default.

    Example:
        >>> retriever = ModelRetriever(lion_st.load("runs/quickstart/lion-sp"))  # doctest: +SKIP
        >>> retriever.index({"d1": "maned lions hunt at night", "d2": "tigers hunt alone"})  # doctest: +SKIP
        >>> retriever.search(["when do lions hunt"], k=1)  # doctest: +SKIP
        [[('d1', 4.2)]]
    """

    def __init__(
        self,
        model: SentenceTransformer | SparseEncoder,
        engine: str = "exact",
        *,
        engine_parameters: Mapping[str, Any] | None = None,
        tokens_per_batch: int = 8192,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        from lion_st.models import paradigm_of

        self.model = model
        self.paradigm = paradigm_of(model)
        self.engine = engine
        self.engine_parameters = dict(engine_parameters or {})
        self.tokens_per_batch = tokens_per_batch
        self.threads = threads
        self.name = name or model_name(model)
        self._figures: dict[str, Any] = {}
        self._index: Index = create_index(engine, self.paradigm, **self.engine_parameters)

    def fingerprint(self) -> str:
        """Checksum of the model's weights and settings, and the engine's settings."""
        return f"{model_fingerprint(self.model)},{json.dumps(self.engine_parameters, sort_keys=True)}"

    def index(self, documents: Mapping[str, str], show_progress: bool = False) -> None:
        """Encode documents, text by id, and index them in place of any earlier ones."""
        started = perf_counter()
        documents = {key: text for key, text in documents.items() if text.strip()}  # a blank one is never found
        vectors = self._encode(list(documents.values()), "document", show_progress)
        encoded = perf_counter()
        self._index = create_index(self.engine, self.paradigm, **self.engine_parameters)
        self._index.add(list(documents), vectors)
        self._figures = {
            "document_terms": active_terms(vectors) if self.paradigm == "sparse" else None,
            "encode_ms_per_document": 1000 * (encoded - started) / len(documents),
            "index_bytes": self._index.stats()["bytes"],
            "index_seconds": perf_counter() - encoded,
        }

    def search(self, queries: Sequence[str], k: int = 10, show_progress: bool = False) -> list[Hits]:
        """Encode queries and return for each its k best documents as (id, score), best first; none for a blank one."""
        started = perf_counter()
        asked = [row for row, query in enumerate(queries) if query.strip()]
        vectors = self._encode([queries[row] for row in asked], "query", show_progress)
        self._index.search(vectors[:1], k, self.threads)  # compiles or warms up, outside the timing
        encoded = perf_counter()
        hits: list[Hits] = [[] for _ in queries]
        for row, found in zip(asked, self._index.search(vectors, k, self.threads), strict=True):
            hits[row] = found
        self._figures |= {
            "query_terms": active_terms(vectors) if self.paradigm == "sparse" else None,
            "encode_ms_per_query": 1000 * (encoded - started) / len(queries),
            "search_ms_per_query": 1000 * (perf_counter() - encoded) / len(queries),
        }
        return hits

    def _encode(self, texts: list[str], kind: Literal["query", "document"], show_progress: bool) -> Vectors:
        return encode_texts(
            self.model, texts, kind, tokens_per_batch=self.tokens_per_batch, show_progress=show_progress
        )

    def figures(self) -> dict[str, Any]:
        """Active terms per text, sizes and times of the last `index` and `search`."""
        return dict(self._figures)
