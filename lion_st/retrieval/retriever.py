"""A model and an index together: texts in, ranked documents out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lion_st.retrieval.encode import encode_texts
from lion_st.retrieval.indexes import Hits, Index, create_index
from lion_st.retrieval.vectors import active_terms

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
        batch_size: Texts per batch when encoding.
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
        batch_size: int = 32,
        threads: int = 1,
        name: str | None = None,
    ) -> None:
        from lion_st.models import paradigm_of

        self.model = model
        self.paradigm = paradigm_of(model)
        self.engine = engine
        self.engine_parameters = dict(engine_parameters or {})
        self.batch_size = batch_size
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
        vectors = encode_texts(
            self.model, list(documents.values()), "document", batch_size=self.batch_size, show_progress=show_progress
        )
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
        """Encode queries and return for each its k best documents as (id, score), best first."""
        started = perf_counter()
        vectors = encode_texts(self.model, queries, "query", batch_size=self.batch_size, show_progress=show_progress)
        self._index.search_rows(vectors[:1], k, self.threads)  # compiles or warms up, outside the timing
        encoded = perf_counter()
        hits = self._index.search(vectors, k, self.threads)
        self._figures |= {
            "query_terms": active_terms(vectors) if self.paradigm == "sparse" else None,
            "encode_ms_per_query": 1000 * (encoded - started) / len(queries),
            "search_ms_per_query": 1000 * (perf_counter() - encoded) / len(queries),
        }
        return hits

    def figures(self) -> dict[str, Any]:
        """Active terms per text, sizes and times of the last `index` and `search`."""
        return dict(self._figures)


def model_name(model: SentenceTransformer | SparseEncoder) -> str:
    """The Hub id or folder name that a model was loaded from, else its backbone's name."""
    card = model.model_card_data
    name = card.model_id or card.base_model or getattr(model[0], "model_name_or_path", None) or "unnamed"
    parts = str(name).rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) == 2 and not str(name).startswith((".", "/")) else parts[-1]


def model_fingerprint(model: SentenceTransformer | SparseEncoder) -> str:
    """SHA-256 over everything that decides a model's vectors: weights, module settings, prompts and lengths."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    settings: dict[str, Any] = {
        "modules": [(type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in model],
        "prompts": dict(model.prompts),
        "max_seq_length": model.max_seq_length,
        "tokenizer": tokenizer_contract(model.tokenizer),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def tokenizer_contract(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer adds to and does with a text: special tokens, sides, and the ids of a probe."""
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "padding_side": tokenizer.padding_side,
        "probe": tokenizer("The maned lion's 1st roar, naïve or not?")["input_ids"],
    }
