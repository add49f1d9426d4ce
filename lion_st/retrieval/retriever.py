"""A model and an index together: texts in, ranked documents out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import finalize

from lion_st.data.records import Record
from lion_st.encoding.encode import encode_corpus, encode_texts
from lion_st.encoding.fingerprints import (
    input_module,
    model_fingerprint,
    model_name,
    require_same_encoding,
    text_limit,
)
from lion_st.encoding.reading import records_digest
from lion_st.encoding.shards import EncodedCorpus
from lion_st.encoding.vectors import Vectors, active_dims
from lion_st.errors import require_type
from lion_st.indexes import Hits, Index, StorageError, create_index, present_engine
from lion_st.indexes.base import as_ids
from lion_st.indexes.frequencies import DocumentFrequencies
from lion_st.retrieval.texts import documents_digest, listed_queries, require_documents

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

DOCUMENTS_AT_ONCE = 65_536  # encoded before they go into the index: enough for batches of like length


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


def require_retriever(retriever: Any) -> None:
    """Raise a TypeError unless this has what a `Retriever` has, as a path or a model has not."""
    remedy = "pass a ModelRetriever(lion_st.load(path)) or a Bm25Retriever()"
    require_type(retriever, Retriever, "A retriever", remedy)


class ModelRetriever:
    """A sparse, dense, multi-vector or hybrid model searched through an index.

    Args:
        model: The encoder.
        query_model: Encodes the queries in place of `model`, such as a small query encoder made for it.
        engine: Engine of the index, see `create_index`.
        engine_parameters: Settings of the engine. For milvus `uri` is by default a temporary file, and `collection` a
            name of its own; the collection is deleted in the end, and one that holds documents is refused.
        query_length: Length to cut queries to, in place of the model's own.
        document_length: Length to cut documents to, in place of the model's own.
        idf: Multiply the weights of a sparse query's terms by how rare they are among the documents, see
            `DocumentFrequencies.weigh`: which terms of a new collection are common is what a model cannot know.
        tokens_per_batch: Padded tokens per batch when encoding.
        threads: CPU threads of the search.
        encoded: Read the documents' vectors from this folder of `encode_corpus` in place of encoding them: those of the
            very documents to index, by this model.
        encoded_dir: Keep the encoded corpora here, resumable, and reuse them for the same model, lengths and documents.
        name: Name in tables and result files; the model's own by default.
        commit: Hub commit that the model was loaded from and has not been changed since; results are filed below it.

    Attributes:
        documents_xxh3: Digest of the documents that were indexed last, ids and texts.

    Raises:
        TypeError: If a model is not one, but a path for example.
        ValueError: If the engine does not search such vectors, has no such setting, or cannot fuse by a hybrid model's
            weights, or the query model has vectors of another kind.

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
        query_model: SentenceTransformer | SparseEncoder | None = None,
        engine_parameters: Mapping[str, Any] | None = None,
        query_length: int | None = None,
        document_length: int | None = None,
        idf: bool = False,
        tokens_per_batch: int = 8192,
        threads: int = 1,
        encoded: str | Path | None = None,
        encoded_dir: str | Path | None = None,
        name: str | None = None,
        commit: str | None = None,
    ) -> None:
        from lion_st.models import paradigm_of

        self.model = model
        self.query_model = model if query_model is None else query_model
        for one in (self.model, self.query_model):
            input_module(one, "query")  # raises for a path
        self.paradigm: str = paradigm_of(model)
        if (kind := paradigm_of(self.query_model)) != self.paradigm:
            raise ValueError(f"query_model is {kind}, and the documents' model {self.paradigm}: give one made for it.")
        self.engine = present_engine(engine)
        self.engine_parameters = dict(engine_parameters or {}) if self.engine == engine else {}
        self.query_length = query_length
        self.document_length = document_length
        self.idf = idf
        if idf and self.paradigm != "sparse":
            raise ValueError(f"idf weighs terms of sparse models, and {model_name(model)!r} is {self.paradigm}.")
        self.tokens_per_batch = tokens_per_batch
        self.threads = threads
        self.encoded = EncodedCorpus(encoded) if encoded is not None else None
        self.encoded_dir = Path(encoded_dir) if encoded_dir is not None else None
        self.name = name or "+".join(dict.fromkeys(model_name(one) for one in (model, self.query_model)))
        self.commit = commit
        self.documents_xxh3: str | None = None
        self._figures: dict[str, Any] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._owns_collection = False
        self._blank: set[str] = set()
        self._index: Index = self._new_index()

    def fingerprint(self) -> str:
        """Checksums of the models' weights and settings, the lengths, and the engine's settings."""
        settings = {
            "query_length": self.query_length,
            "document_length": self.document_length,
            **self.engine_parameters,
        }
        if self.encoded is not None and (stored := self.encoded.manifest["settings"]["dtype"]) != "float32":
            settings["encoded"] = stored
        if self.idf:
            settings["idf"] = True
        models = dict.fromkeys(model_fingerprint(model) for model in (self.model, self.query_model))
        return f"{','.join(models)},{json.dumps(settings, sort_keys=True, default=str)}"

    def index(self, documents: Mapping[str, str], show_progress: bool = False) -> None:
        """Encode documents, text by id, and index them in place of any earlier ones.

        Raises:
            TypeError: If they are not texts by id.
            ValueError: If no document has a text.
            StorageError: If the vectors to read are of another model or of other documents.
        """
        require_documents(documents)
        self._blank = {key for key, text in documents.items() if not text.strip()}  # which are never found
        documents = {key: text for key, text in documents.items() if key not in self._blank}
        if not documents:
            raise ValueError("There is nothing to index: give at least one document with a text.")
        self._figures = {}  # no search finds what a failure leaves
        self._frequencies = DocumentFrequencies()
        self.documents_xxh3 = documents_digest(documents)
        self._index = self._new_index()
        encode_seconds = add_seconds = terms = 0.0
        started = perf_counter()
        for ids, vectors in self._encoded(documents, show_progress):
            encoded = perf_counter()
            self._index.add(ids, vectors)
            if self.idf:
                self._frequencies.add(vectors)
            terms += (active_dims(vectors) or 0) * len(ids)
            encode_seconds += encoded - started
            started = perf_counter()
            add_seconds += started - encoded
        size = self._index.stats()["bytes"]
        self._figures = {
            "document_terms": terms / len(documents) if self.paradigm in ("sparse", "hybrid") else None,
            "encode_ms_per_document": 1000 * encode_seconds / len(documents),
            "index_bytes": size,
            "index_seconds": add_seconds + perf_counter() - started,
        }

    @property
    def documents(self) -> Index:
        """The index of the documents."""
        return self._index

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        show_progress: bool = False,
        allowed: Collection[str] | None = None,
    ) -> list[Hits]:
        """Encode queries and return for each its k best documents as (id, score), best first; none for a blank one.

        Args:
            queries: Texts.
            k: Documents per query.
            show_progress: Show a bar while encoding.
            allowed: Find none but these documents, by id, see `Index.search`; a blank one is never found.

        Raises:
            TypeError: If the queries are one string, or one of them is not a text.
            ValueError: If none of the allowed documents was indexed.
            RuntimeError: If nothing was indexed.
        """
        queries = listed_queries(queries)
        self._require_indexed()
        hits: list[Hits] = [[] for _ in queries]
        asked = [row for row, query in enumerate(queries) if query.strip()]
        if not asked or self._are_blank(allowed):
            return hits
        vectors, seconds = self._encoded_queries([queries[row] for row in asked], show_progress)
        if "search_ms_per_query" not in self._figures:  # the first search compiles or builds, outside the timing
            self._index.search(vectors[:1], k, self.threads, allowed)
        ready = perf_counter()
        for row, found in zip(asked, self._index.search(vectors, k, self.threads, allowed), strict=True):
            hits[row] = found
        self._note_queries(vectors, seconds, perf_counter() - ready)
        return hits

    def rerank(
        self, queries: Sequence[str], candidates: Sequence[Collection[str]], show_progress: bool = False
    ) -> list[Hits]:
        """Encode queries and return for each its own candidates as (id, score), best first.

        Args:
            queries: Q texts.
            candidates: For each query, ids of documents.
            show_progress: Show a bar while encoding.

        Returns:
            Q lists. They lack blank candidates, and a sparse model's those that share no term with the query.

        Raises:
            TypeError: If the queries are one string, or one of them is not a text.
            ValueError: If there are not as many lists of candidates as queries, or none of a list was indexed.
            RuntimeError: If nothing was indexed.
            NotImplementedError: If the engine cannot search among some documents alone.
        """
        queries, candidates = listed_queries(queries), list(candidates)
        if len(queries) != len(candidates):
            raise ValueError(f"Got {len(candidates)} lists of candidates for {len(queries)} queries: give one a query.")
        hits: list[Hits] = [[] for _ in queries]
        asked = [
            row
            for row, (query, own) in enumerate(zip(queries, candidates, strict=True))
            if query.strip() and len(own) and not self._are_blank(own)
        ]
        if asked:
            self._require_indexed()
            vectors, seconds = self._encoded_queries([queries[row] for row in asked], show_progress)
            started = perf_counter()
            for place, row in enumerate(asked):
                own = candidates[row]
                (hits[row],) = self._index.search(vectors[[place]], len(own), self.threads, own)
            self._note_queries(vectors, seconds, perf_counter() - started)
        return hits

    def figures(self) -> dict[str, Any]:
        """Active terms per text, sizes and times of the last `index` and `search`.

        Encoding that was read back from `encoded_dir` counts with the time of reading it.
        """
        return dict(self._figures)

    def _are_blank(self, allowed: Any) -> bool:
        """Whether these are ids of documents, all of which were left out for being blank."""
        return isinstance(allowed, Collection) and len(allowed) > 0 and self._blank.issuperset(as_ids(allowed))

    def _require_indexed(self) -> None:
        if "index_bytes" not in self._figures:
            raise RuntimeError("Nothing is indexed yet: call index(documents) before search.")

    def _encoded_queries(self, queries: Sequence[str], show_progress: bool) -> tuple[Any, float]:
        """Vectors, and the seconds that they took."""
        started = perf_counter()
        vectors = encode_texts(
            self.query_model,
            queries,
            "query",
            max_tokens=self.query_length,
            tokens_per_batch=self.tokens_per_batch,
            show_progress=show_progress,
        )
        if self.idf:
            vectors = self._frequencies.weigh(vectors)
        return vectors, perf_counter() - started

    def _note_queries(self, vectors: Any, encode_seconds: float, search_seconds: float) -> None:
        self._figures |= {
            "query_terms": active_dims(vectors),
            "encode_ms_per_query": 1000 * encode_seconds / vectors.shape[0],
            "search_ms_per_query": 1000 * search_seconds / vectors.shape[0],
        }

    def _new_index(self) -> Index:
        paradigm: Any = self.paradigm
        if self.engine != "milvus":
            return create_index(self.engine, paradigm, **self.engine_parameters)
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="lion-st-")
        name = f"lion_st_scratch_{paradigm}_{self._folder.name.rpartition('-')[2]}"  # the cluster may be shared
        scratch = {"uri": f"{self._folder.name}/milvus.db", "collection": name}
        index: Any = create_index(self.engine, paradigm, **(scratch | self.engine_parameters))
        index.require_weights(getattr(list(self.query_model)[-1], "fusion_weights", None))
        if not self._owns_collection:
            if len(index):
                raise StorageError(
                    f"The collection {index.collection!r} at {index.uri} holds {len(index):,} documents, which this "
                    "would replace: name another one, leave the name out, or delete it."
                )
            finalize(self, index.delete_collection)
            self._owns_collection = True
        index.delete_collection()
        return index

    def _encoded(self, documents: Mapping[str, str], show_progress: bool) -> Iterator[tuple[list[str], Vectors]]:
        if self.encoded is not None:
            yield from self._read(self.encoded, documents)
            return
        if self.encoded_dir is None:
            ids = list(documents)
            for start in range(0, len(ids), DOCUMENTS_AT_ONCE):
                part = ids[start : start + DOCUMENTS_AT_ONCE]
                yield (
                    part,
                    encode_texts(
                        self.model,
                        [documents[one] for one in part],
                        "document",
                        max_tokens=self.document_length,
                        tokens_per_batch=self.tokens_per_batch,
                        show_progress=show_progress,
                    ),
                )
            return
        parts = [model_fingerprint(self.model), self.document_length, self.documents_xxh3]
        folder = encode_corpus(
            self.model,
            ({"id": key, "text": text} for key, text in documents.items()),
            self.encoded_dir / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24],
            max_tokens=self.document_length,
            tokens_per_batch=self.tokens_per_batch,
            show_progress=show_progress,
        )
        yield from EncodedCorpus(folder)

    def _read(self, encoded: EncodedCorpus, documents: Mapping[str, str]) -> Iterator[tuple[list[str], Vectors]]:
        settings = encoded.manifest["settings"]
        limit = self.document_length or text_limit(self.model, "document")
        require_same_encoding(encoded.path, settings, self.model, limit)
        if len(encoded) != len(documents):
            raise StorageError(
                f"{encoded.path} holds {len(encoded):,} documents, and {len(documents):,} are to be indexed: encode "
                "those."
            )
        for shard, (ids, vectors) in zip(encoded.manifest["shards"], encoded, strict=True):
            texts = [Record(one, documents.get(one, "")) for one in ids]
            if records_digest(texts) != shard["corpus_sha256"]:
                raise StorageError(
                    f"{encoded.path / shard['file']} holds other documents than those to index, from {ids[0]!r} on: "
                    "encode the documents of this data set."
                )
            yield ids, vectors
