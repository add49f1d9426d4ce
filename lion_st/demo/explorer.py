"""Answers a query with what it becomes, what it finds, and why: plain data, without a page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from lion_st.data.fields import TASKS, Fields, Task
from lion_st.demo.collection import Collection, quickstart_collection, read_collection
from lion_st.demo.given_index import open_index
from lion_st.demo.terms import (
    Pieces,
    Reasons,
    Segment,
    cut,
    mark,
    read_text,
    read_words,
    reasons_of,
    word_reasons,
)
from lion_st.encoding import encode_texts
from lion_st.encoding.fingerprints import input_module, model_name, prompt_for, text_limit
from lion_st.extras import require
from lion_st.indexes import Hits
from lion_st.models import load, paradigm_of
from lion_st.retrieval import Bm25Retriever, ModelRetriever, explain_score
from lion_st.retrieval.explain import TextTerm, expanded_terms

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

Explained = tuple[Pieces, Reasons]  # a passage as it is read, and why it was found

HITS = 5  # shown of each ranking
DEPTH = 100  # searched, to say where the other ranking has a hit
TERMS = 20  # of the query
MOST_CHARACTERS = 10_000  # of a query: far more than any model's limit, far less than a pasted book


class QueryError(ValueError):
    """A query that cannot be answered; the message is for the person who typed it."""


class Hit(NamedTuple):
    """One found document."""

    document: Fields
    rank: int
    score: float
    reasons: Reasons
    title: list[Segment]
    text: list[Segment]
    elsewhere: int | None  # its rank in the other ranking; None if that does not have it
    relevant: bool  # judged so


@dataclass(frozen=True)
class Ranking:
    """What one retriever found.

    Attributes:
        name: The model, or BM25.
        paradigm: "sparse", "dense" or "lexical".
        hits: The best documents, best first. The reasons are parts of their scores, but for a dense ranking, whose
            scores have no parts: there they are parts of the sparse model's scores.
    """

    name: str
    paradigm: str
    hits: list[Hit]


@dataclass(frozen=True)
class Answer:
    """What is shown for a query.

    Attributes:
        query: The query.
        terms: Its heaviest terms.
        active_dims: How many it has in all.
        rankings: The sparse one and the one beside it.
        notes: What the reader should know, such as that the query was cut.
    """

    query: str
    terms: list[TextTerm]
    active_dims: int
    rankings: list[Ranking]
    notes: list[str]


class Explorer:
    """Searches a collection with a sparse model and, beside it, a dense one or BM25, and explains what it finds.

    Args:
        model: The sparse model.
        collection: What to search; it is encoded at once and held in memory.
        dense: A dense model to search beside it. BM25 can always be chosen.
        name: Name of the sparse model on the page; by default the model's own.
        dense_name: The same of the dense model.
        encoded: Read the sparse model's vectors of these very documents from this folder of `encode_corpus`.
        index: Search this exact index of these very documents: a folder, or a name on the Hub, see `load_index`.
        index_revision: Commit, tag or branch of an index on the Hub.
        encoded_dir: Keep the vectors here, and read them from here when they are of the same model and documents.
        show_progress: Show the progress of the encoding.

    Attributes:
        beside: Retrievers that can be shown beside the sparse model, by name, the default first.

    Raises:
        ValueError: If `model` is not sparse, `dense` not dense, or a tokenizer cannot say where its tokens stand.

    Example:
        ::

            explorer = Explorer(lion_st.load("runs/quickstart/lion-sp"), quickstart_collection())
            answer = explorer.answer("When did the oil crisis begin?")
            answer.terms  # [TextTerm(name, weight, in_text), ...], heaviest first
            answer.rankings[0].hits[0].reasons.listed  # [Reason(name, share, ...), ...]
    """

    def __init__(
        self,
        model: SentenceTransformer | SparseEncoder,
        collection: Collection,
        dense: SentenceTransformer | SparseEncoder | None = None,
        *,
        name: str | None = None,
        dense_name: str | None = None,
        encoded: str | Path | None = None,
        index: str | Path | None = None,
        index_revision: str | None = None,
        encoded_dir: str | Path | None = None,
        show_progress: bool = False,
    ) -> None:
        self.model = model
        self.name = name or model_name(model)
        _require(model, "sparse", self.name, "to show terms of; a dense one goes beside it")
        if dense is not None:
            dense_name = dense_name or model_name(dense)
            _require(dense, "dense", dense_name, "to go beside the sparse one")
        self.collection = collection
        self._check_offsets()
        texts = {key: document.content for key, document in collection.documents.items()}
        sparse = None if index is not None else ModelRetriever(model, encoded=encoded, encoded_dir=encoded_dir)
        self.beside: dict[str, ModelRetriever | Bm25Retriever] = {}
        if dense is not None and dense_name is not None:
            self.beside[f"{dense_name} (dense)" if dense_name == self.name else dense_name] = ModelRetriever(
                dense, encoded_dir=encoded_dir
            )
        self.beside["BM25"] = Bm25Retriever()
        self.index: Any  # with `vectors`
        if sparse is None:
            assert index is not None
            self.index = open_index(index, model, texts, index_revision)
        else:
            sparse.index(texts, show_progress)
            self.index = sparse.documents
        for retriever in self.beside.values():
            retriever.index(texts, show_progress)
        self._lock = Lock()  # a model is used by one thread at a time

    def answer(self, query: str, beside: str | None = None) -> Answer:
        """Search and explain.

        Args:
            query: What was typed.
            beside: Name of the retriever to show beside the sparse model, one of `self.beside`; its first by default.

        Raises:
            QueryError: If the query is blank, too long or not valid text.
            ValueError: If there is no retriever of this name.
        """
        query = checked_query(query)
        name = beside if beside is not None else next(iter(self.beside))
        if name not in self.beside:
            raise ValueError(f"There is no retriever {name!r}: choose one of {list(self.beside)}.")
        retriever = self.beside[name]
        with self._lock:
            vector: Any = encode_texts(self.model, [query], "query")
            found = self.index.search(vector, DEPTH)[0]
            compared = retriever.search([query], DEPTH)[0]
            read = self._read(query, "query")
            by_terms = partial(self._shared_terms, vector, read)
            by_words = partial(_shared_words, _word_scores(retriever, query))
            explain = by_words if retriever.paradigm == "lexical" else by_terms
            relevant = self.collection.relevant(query)
            rankings = [
                Ranking(self.name, "sparse", self._hits(found, compared, relevant, by_terms)),
                Ranking(name, retriever.paradigm, self._hits(compared, found, relevant, explain)),
            ]
            terms = expanded_terms(vector, query[: read.read_until], self._tokenizer("query"), TERMS)
        return Answer(query, terms, vector.nnz, rankings, self._notes(read))

    def _hits(
        self, found: Hits, other: Hits, relevant: frozenset[str], explain: Callable[[Fields], Explained]
    ) -> list[Hit]:
        elsewhere = {document: rank for rank, (document, _) in enumerate(other, 1)}
        hits = []
        for rank, (key, score) in enumerate(found[:HITS], 1):
            document = self.collection.documents[key]
            passage, reasons = explain(document)
            title, text = _marked(document, passage, reasons)
            hits.append(Hit(document, rank, score, reasons, title, text, elsewhere.get(key), key in relevant))
        return hits

    def _shared_terms(self, vector: Any, query: Pieces, document: Fields) -> Explained:
        """Why the sparse model finds a document, whatever it is that found it."""
        passage = self._read(document.content, "document")
        terms = explain_score(vector, self.index.vectors([document.id]), self._tokenizer("document"))
        return passage, reasons_of(terms, query.names, passage.names, words={**passage.words, **query.words})

    def _notes(self, read: Pieces) -> list[str]:
        limit = text_limit(self.model, "query")
        if read.tokens <= limit:
            return []
        return [f"The query has {read.tokens:,} tokens; {self.name} reads the first {limit:,} of them."]

    def _read(self, text: str, task: Task) -> Pieces:
        return read_text(text, self._tokenizer(task), text_limit(self.model, task), prompt_for(self.model, task) or "")

    def _tokenizer(self, task: Task) -> Any:
        return input_module(self.model, task).tokenizer

    def _check_offsets(self) -> None:
        for task in TASKS:
            tokenizer = self._tokenizer(task)
            if not tokenizer.is_fast:
                raise ValueError(
                    f"The tokenizer of {self.name}, a {type(tokenizer).__name__}, does not tell where its tokens stand "
                    "in a text: save the model with a fast tokenizer."
                )


def cache_folder() -> Path:
    """Where vectors are kept between starts: LION_ST_DEMO_CACHE, else lion_st/demo in the user's cache folder."""
    named = os.environ.get("LION_ST_DEMO_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lion_st/demo"


def load_explorer(
    model: str | Path,
    data: str | Path | None = None,
    dense: str | Path | None = None,
    *,
    encoded: str | Path | None = None,
    index: str | Path | None = None,
    index_revision: str | None = None,
    load_options: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Explorer:
    """Load models and documents, and encode the documents, or read their vectors where that was done before.

    Args:
        model: Sparse checkpoint, a folder or a Hub repository.
        data: Documents, see `read_collection`; by default `quickstart_collection()`.
        dense: Dense checkpoint.
        encoded: See `Explorer`.
        index: See `Explorer`.
        index_revision: See `Explorer`.
        load_options: Options of `lion_st.load` for both models; `revision` is that of the sparse one alone.
        show_progress: Show the progress of the encoding.

    Raises:
        FileNotFoundError: If a checkpoint or the documents cannot be reached.
        ValueError: See `Explorer`, `read_collection` and `lion_st.load`.
    """
    options = dict(load_options or {})
    collection = quickstart_collection() if data is None else read_collection(data)
    sparse_model = load(model, **options)
    dense_model = load(dense, **(options | {"revision": None})) if dense is not None else None
    return Explorer(
        sparse_model,
        collection,
        dense_model,
        name=Path(model).name,
        dense_name=Path(dense).name if dense is not None else None,
        encoded=encoded,
        index=index,
        index_revision=index_revision,
        encoded_dir=cache_folder(),
        show_progress=show_progress,
    )


def checked_query(query: str) -> str:
    """A query without white space around it."""
    query = query.strip()
    if not query:
        raise QueryError("Type a query first: a question, or a few words.")
    if len(query) > MOST_CHARACTERS:
        raise QueryError(
            f"The query has {len(query):,} characters, and {MOST_CHARACTERS:,} are the most: shorten it to a question "
            "or a paragraph."
        )
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"The query is not valid text ({error.reason}): copy it again.") from None
    return query


def _require(model: SentenceTransformer | SparseEncoder, paradigm: str, name: str, purpose: str) -> None:
    if paradigm_of(model) != paradigm:
        remedy = ": take one of the folders that lion_st.export writes" if paradigm_of(model) == "hybrid" else ""
        raise ValueError(f"{name} is a {paradigm_of(model)} model, and a {paradigm} one is needed {purpose}{remedy}.")


def _marked(document: Fields, passage: Pieces, reasons: Reasons) -> tuple[list[Segment], list[Segment]]:
    """A document's title and text, with the reasons marked where they stand."""
    segments = mark(document.content, passage.pieces, reasons.listed, passage.read_until)
    title, text = cut(segments, len(document.title.strip()))
    if title and text:
        between, *others = text
        text = [between._replace(text=between.text.lstrip()), *others] if between.text.strip() else others
    return title, text


def _word_scores(retriever: ModelRetriever | Bm25Retriever, query: str) -> dict[str, dict[str, float]]:
    """Each query word's part in the BM25 scores of all documents that have it; BM25 adds up over words."""
    if not isinstance(retriever, Bm25Retriever):
        return {}
    bm25s = require("bm25s")

    counts = Counter(bm25s.tokenize([query], show_progress=False, return_ids=False)[0])
    found = retriever.search(list(counts), len(retriever.ids)) if counts else []
    return {
        word: {document: count * score for document, score in hits}
        for (word, count), hits in zip(counts.items(), found, strict=True)
    }


def _shared_words(words: dict[str, dict[str, float]], document: Fields) -> Explained:
    """Why BM25 finds a document."""
    scores = {word: by_document[document.id] for word, by_document in words.items() if document.id in by_document}
    return read_words(document.content), word_reasons(scores)
