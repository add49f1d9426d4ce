"""A model and an index as a server holds them: admits texts, encodes them in common batches, and searches."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from lion_st.data.fields import TASKS, Task
from lion_st.encoding.batches import BatchEncoder
from lion_st.encoding.fingerprints import (
    PROMPT_NAMES,
    encodes_alike,
    input_module,
    model_name,
    model_revision,
    text_limit,
)
from lion_st.encoding.loading import load_encoder
from lion_st.encoding.vectors import HybridVectors, Vectors
from lion_st.indexes import Hits, Index, StorageError
from lion_st.models import paradigm_of
from lion_st.modules.tokenizing import check_texts
from lion_st.retrieval.explain import SharedTerm, explain_score
from lion_st.retrieval.search import require_term_weights, weighed_by_idf
from lion_st.serving.batching import EncodingQueue
from lion_st.serving.errors import RequestError, invalid, too_large
from lion_st.serving.live_index import LiveIndex, TextStore
from lion_st.serving.metrics import Metrics
from lion_st.serving.settings import ServerSettings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

logger = logging.getLogger("lion_st.serving")
Value = TypeVar("Value")
READERS = 2  # threads that tokenize, and write answers, while the model runs


class EncodedRequest(NamedTuple):
    """Vectors of a request's texts, and what they cost."""

    vectors: Vectors  # CSR [N, V], array [N, D], both, or those of tokens, float32
    tokens: int
    tokenization_seconds: float
    queue_seconds: float
    inference_seconds: float


class FoundDocument(NamedTuple):
    """One document of an answer."""

    id: str
    score: float
    text: str | None
    reasons: list[SharedTerm]


class Service:
    """What the routes of a server call, from one event loop.

    Args:
        model: The encoder.
        settings: Limits and the index.
        texts: Folder for the texts of the settings' corpus, which processes share; needed with it.

    Raises:
        StorageError: If the index holds vectors of another model, or cannot be opened.
        ValueError: If a prompt leaves no token for a text, or idf is asked of an index without term weights.
    """

    def __init__(
        self, model: SentenceTransformer | SparseEncoder, settings: ServerSettings, texts: str | Path | None = None
    ) -> None:
        self.model: Any = model
        self.settings = settings
        self.name = model_name(model)
        self.paradigm = paradigm_of(model)
        self.fusion_weights = getattr(list(model)[-1], "fusion_weights", None)  # of a hybrid model
        self.metrics = Metrics()
        self.encoders = {
            task: BatchEncoder(model, task, text_limit(model, task), settings.max_batch_tokens) for task in TASKS
        }
        self.live: LiveIndex | None = None
        if settings.index is not None:
            self._probe = self.encoders["query"].encode(["a"]).vectors
            self.live = LiveIndex(settings.index, self._check_index, settings.verify, settings.corpus, texts)
            self.metrics.documents.set(len(self.live.index))
        self.queue = EncodingQueue(settings.max_batch_tokens, self._count_batch)
        self.readers = ThreadPoolExecutor(READERS, "lion-st-reading")
        self._searchers = ThreadPoolExecutor(settings.search_threads, "lion-st-search")
        self._texts_inside = 0

    @classmethod
    def open(cls, settings: ServerSettings, texts: str | Path | None = None) -> Service:
        """Load the model, the index and its texts."""
        return cls(load_encoder(settings.model, **settings.load_options), settings, texts)

    def close(self) -> None:
        """Encode and search what is under way, and end all threads."""
        self.queue.close()
        self.readers.shutdown()
        self._searchers.shutdown()

    def info(self) -> dict[str, Any]:
        """What `/info` answers: the model, the limits, and the index."""
        from lion_st import __version__

        dtype = next(self.model.parameters()).dtype
        settings = self.settings
        index = self.live.index if self.live is not None else None
        return {
            "model_id": self.name,
            "model_sha": model_revision(self.model),
            "model_dtype": str(dtype).removeprefix("torch."),
            "model_type": {"embedding": {"pooling": self._pooling()}},
            "paradigm": self.paradigm,
            "fusion_weights": self.fusion_weights,
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_input_length": self.encoders[settings.default_task].limit,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": settings.max_client_batch_size,
            "auto_truncate": settings.auto_truncate,
            "tokenization_workers": READERS,
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "prompt_names": {task: list(PROMPT_NAMES[task]) for task in PROMPT_NAMES},
            "index": None
            if index is None
            else {
                "engine": index.engine,
                "paradigm": index.paradigm,
                "documents": len(index),
                "idf": settings.idf,
            },
        }

    def dimensions(self, side: Literal["sparse", "dense"]) -> int:
        """Those of the model's vectors, and so of the index's, which not every engine can tell."""
        probe: Any = getattr(self._probe, side) if isinstance(self._probe, HybridVectors) else self._probe
        return int(probe.shape[1])

    def _pooling(self) -> str | None:
        """As text-embeddings-inference names it; of a hybrid model that of the dense vector; tokens have none."""
        if self.paradigm in ("sparse", "multi_vector"):
            return "splade" if self.paradigm == "sparse" else None
        heads = [getattr(module, "dense", module) for module in self.model]
        modes = [str(getattr(head, "mode", None) or getattr(head, "pooling_mode", "")) for head in heads]
        return "last_token" if {"last_token", "lasttoken"} & set(modes) else "mean"

    def task_of(self, prompt_name: str | None) -> Task:
        """What texts are whose request names a prompt."""
        if prompt_name is None:
            return self.settings.default_task
        for task, names in PROMPT_NAMES.items():
            if prompt_name in names:
                return task
        known = [name for names in PROMPT_NAMES.values() for name in names]
        raise invalid(f"`prompt_name` is one of {', '.join(known)}, got {prompt_name!r}.")

    async def encode(self, texts: Sequence[str], task: Task, truncate: bool | None = None) -> EncodedRequest:
        """Encode a request's texts, in a batch with those of others.

        Raises:
            RequestError: If there are too many, one is empty or too long, the server is full, or the time is over.
        """
        limit = self.settings.max_client_batch_size
        if len(texts) > limit:
            raise too_large(f"batch size {len(texts)} > maximum allowed batch size {limit}: send fewer at a time.")
        if not texts or not all(text.strip() for text in texts):
            raise RequestError(400, "Empty", "`inputs` cannot be empty.")
        try:
            check_texts(texts)
        except ValueError as error:
            raise invalid(str(error)) from error
        if self._texts_inside + len(texts) > self.settings.max_concurrent_requests:
            raise RequestError(429, "Overloaded", "Model is overloaded: try again later.", {"Retry-After": "1"})
        self._texts_inside += len(texts)
        try:
            return await self.within_time(self._encode(texts, task, truncate))
        finally:
            self._texts_inside -= len(texts)

    async def _encode(self, texts: Sequence[str], task: Task, truncate: bool | None) -> EncodedRequest:
        encoder = self.encoders[task]
        started = perf_counter()
        tokenized = await self.in_thread(encoder.tokenize, texts)
        tokenization = perf_counter() - started
        may_cut = self.settings.auto_truncate if truncate is None else truncate
        if tokenized.truncated and not may_cut:
            raise too_large(
                f"`inputs` must have at most {encoder.limit} tokens, and {tokenized.truncated} of {len(texts)} have "
                'more: send `"truncate": true` to cut them.'
            )
        tokens = int(tokenized.lengths.sum())
        try:
            future = self.queue.submit(encoder, texts, tokenized)
            self.metrics.queue.set(len(self.queue))
            encoded = await asyncio.wrap_future(future)
        except Exception as error:
            logger.exception("Encoding failed")
            raise RequestError(424, "Backend", f"Encoding failed: {type(error).__name__}: {error}") from error
        self.metrics.tokenization.observe(tokenization)
        self.metrics.queueing.observe(encoded.queue_seconds)
        self.metrics.inference.observe(encoded.inference_seconds)
        self.metrics.input_length.observe(tokens)
        return EncodedRequest(encoded.vectors, tokens, tokenization, encoded.queue_seconds, encoded.inference_seconds)

    async def search(self, vectors: Vectors, k: int, reasons: int, with_texts: bool) -> list[list[FoundDocument]]:
        """Search the index as it is when the search begins.

        Args:
            vectors: [Q, dimensions] of the index.
            k: Documents per query.
            reasons: Terms to name for each document, at most.
            with_texts: Answer with the documents' texts, where they are known.

        Raises:
            RequestError: If the vectors do not fit the index, or it does not keep what explains a score.
        """
        index, texts = self._opened()
        if k > self.settings.max_k:
            raise invalid(f"`k` is at most {self.settings.max_k}, got {k}.")
        if reasons:
            try:
                require_term_weights(index)
            except ValueError as error:
                raise invalid(str(error)) from error
        shown = texts if with_texts else None
        return await self.within_time(self.in_thread(self._search, index, shown, vectors, k, reasons, search=True))

    def searched(self) -> Index:
        """The index.

        Raises:
            RequestError: If the server has none.
        """
        return self._opened()[0]

    def _opened(self) -> tuple[Index, TextStore | None]:
        if self.live is None:
            raise RequestError(424, "Backend", "This server has no index: start it with --index DIR.")
        return self.live.opened

    def _search(
        self, index: Index, texts: TextStore | None, vectors: Vectors, k: int, reasons: int
    ) -> list[list[FoundDocument]]:
        vectors = self._weighed(vectors, index)
        with self.metrics.search.time():
            found = index.search(vectors, k)
        tokenizer = input_module(self.model, "query").tokenizer

        def explained(row: int, document: str) -> list[SharedTerm]:
            explainable: Any = index
            return explain_score(vectors[[row]], explainable.vectors([document]), tokenizer)[:reasons]

        def documents(row: int, hits: Hits) -> list[FoundDocument]:
            return [
                FoundDocument(
                    one, score, None if texts is None else texts.get(one), explained(row, one) if reasons else []
                )
                for one, score in hits
            ]

        return [documents(row, hits) for row, hits in enumerate(found)]

    async def watch_index(self) -> None:
        """Look every now and then whether the index was built anew, and search that one from then on."""
        while self.live is not None and self.settings.reload_seconds:
            await asyncio.sleep(self.settings.reload_seconds)
            try:
                is_new = await self.in_thread(self._reload)
            except (StorageError, ValueError, OSError, RuntimeError) as error:
                self.metrics.reloads.labels("failure").inc()
                logger.error("The new index is not served, and the earlier one still is: %s", error)
                continue
            if is_new:
                self.metrics.reloads.labels("success").inc()
                self.metrics.documents.set(len(self.live.index))

    def _reload(self) -> bool:
        assert self.live is not None
        return self.live.reload()

    async def in_thread(self, function: Callable[..., Value], *arguments: Any, search: bool = False) -> Value:
        """Call a function in a thread, one of those that search or one of those that do all else."""
        pool = self._searchers if search else self.readers
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    async def within_time(self, work: Awaitable[Value]) -> Value:
        """Wait for work as long as a request may take.

        Raises:
            RequestError: When the time is over.
        """
        try:
            return await asyncio.wait_for(work, self.settings.timeout)
        except asyncio.TimeoutError:
            message = f"The request took more than {self.settings.timeout:g} s: try again later, or with fewer texts."
            raise RequestError(504, "Timeout", message) from None

    def _check_index(self, index: Index) -> None:
        from sentence_transformers.base.modules import Router

        assert self.settings.index is not None
        place = self.settings.index
        if index.paradigm != self.paradigm:
            raise StorageError(f"{place} holds {index.paradigm} vectors, and {self.name} is a {self.paradigm} model.")
        dimensions, own = getattr(index, "dimensions", None), self._probe.shape[1]
        if dimensions is not None and dimensions != own:
            raise StorageError(
                f"{place} holds vectors of {dimensions:,} dimensions, and those of {self.name} have {own:,}: give the "
                "model that encoded its documents."
            )
        is_exempt = self.settings.allow_other_model or isinstance(self.model[0], Router)
        if index.source is not None and not is_exempt and not encodes_alike(self.model, index.source):
            raise StorageError(
                f"{place} was built with {index.source['model']!r}, and {self.name!r} has other weights, holds them in "
                "another type, or has another attention or head: give the model that encoded its documents, or pass "
                "allow_other_model=True if one was made for the other."
            )
        if self.settings.idf:
            require_term_weights(index, "idf needs")
        if len(index):  # compiles and counts what the first query would wait for
            index.search(self._weighed(self._probe, index), 1)

    def _weighed(self, vectors: Vectors, index: Index) -> Vectors:
        return weighed_by_idf(vectors, index) if self.settings.idf else vectors

    def _count_batch(self, texts: int, tokens: int) -> None:
        self.metrics.batch_texts.observe(texts)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.queue.set(len(self.queue))


def log_to_standard_error() -> None:
    """Show what goes wrong while serving, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s lion-st serve: %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
