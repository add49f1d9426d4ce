"""mteb's search protocol over any of our retrievers: sparse vectors meet an index, never a dense [N, V] matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lion_st.evaluation.mteb_meta import model_meta
from lion_st.evaluation.trec import drop_self_matches
from lion_st.indexes import Hits
from lion_st.indexes.base import CAN_CHANGE
from lion_st.indexes.fusion import hits_to_run
from lion_st.retrieval.hybrid import HybridRetriever
from lion_st.retrieval.retriever import ModelRetriever, Retriever, require_retriever

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta

SelfMatches: TypeAlias = Literal["task", "keep", "drop_before_cut", "drop_after_cut"]
SELF_MATCHES: tuple[SelfMatches, ...] = ("task", "keep", "drop_before_cut", "drop_after_cut")


ROWS_AT_ONCE = 1000
QUERIES_AT_ONCE = 64  # re-ranked by an engine that cannot search among some documents alone


class MtebSearch:
    """A retriever as mteb's `SearchProtocol`.

    Tasks that re-rank get each query's candidates in the order of their scores. Prompts that a model has for a task or
    a kind of task, by mteb's names for them ("SciFact-query", "Retrieval-query", ...), take the place of its usual
    ones.

    Args:
        retriever: What searches.
        top_k: Documents per query in `runs`; mteb scores those of them that the task asks for.
        self_matches: What happens to a document with the id of its query: "drop_before_cut" fetches one more document
            so that top_k others remain, "drop_after_cut" drops it from the top_k, "keep" keeps it, and "task" does
            after the cut what mteb's task says. (mteb's own scores always follow the task: some tasks drop the
            document even where queries and documents have unrelated numbers for ids, as in MS MARCO.)
        meta: Result files are named after it.
        show_progress: Show progress bars.

    Attributes:
        runs: Scores by (task, subset, split), then query and document, of every search so far.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        top_k: int = 1000,
        self_matches: SelfMatches = "task",
        meta: ModelMeta | None = None,
        show_progress: bool = False,
    ) -> None:
        if self_matches not in SELF_MATCHES:
            raise ValueError(f"self_matches is one of {', '.join(SELF_MATCHES)}, got {self_matches!r}.")
        require_retriever(retriever)
        self.retriever = retriever
        self.top_k = top_k
        self.self_matches = self_matches
        self.show_progress = show_progress
        self.runs: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
        self._documents = 0
        self._meta = meta or model_meta(retriever)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and revision of the model for mteb."""
        return self._meta

    def index(self, corpus: Any, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, **kwargs: Any) -> None:
        """Index a task's corpus."""
        documents = document_texts(corpus)
        with task_prompts(self.retriever, task_metadata):
            self.retriever.index(documents, show_progress=self.show_progress)
        self._documents = len(documents)

    def search(
        self, queries: Any, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, top_k: int, **kwargs: Any
    ) -> dict[str, dict[str, float]]:
        """Search a task's queries."""
        texts = [query_text(row, task_metadata.name) for row in queries]
        ids = list(queries["id"])
        k = self.top_k + (self.self_matches == "drop_before_cut")
        with task_prompts(self.retriever, task_metadata):
            if top_ranked := kwargs.get("top_ranked"):
                hits = [one[:k] for one in self._reranked(texts, [top_ranked.get(query, ()) for query in ids])]
            else:
                hits = self.retriever.search(texts, k, self.show_progress)
        run = hits_to_run(ids, hits)
        if self.self_matches in ("drop_before_cut", "drop_after_cut"):
            run = drop_self_matches(run, self.top_k)
        self.runs[task_metadata.name, hf_subset, hf_split] = run
        return {query: dict(islice(hits.items(), top_k)) for query, hits in run.items()}  # mteb edits what it gets

    def _reranked(self, texts: list[str], candidates: Sequence[Sequence[str]]) -> list[Hits]:
        """Each query's candidates by falling score; those that were not found come last, with 0 or the least score."""
        for part in self.retriever.retrievers if isinstance(self.retriever, HybridRetriever) else [self.retriever]:
            if isinstance(part, ModelRetriever) and not part.documents.searches_among:
                raise ValueError(
                    f"The engine {part.engine!r} cannot score the given candidates that this task re-ranks, "
                    f"{CAN_CHANGE} can."
                )
        if isinstance(self.retriever, ModelRetriever):
            found = self.retriever.rerank(texts, candidates, self.show_progress)
        else:
            found = []
            for start in range(0, len(texts), QUERIES_AT_ONCE):
                block = texts[start : start + QUERIES_AT_ONCE]
                found += self.retriever.search(block, self._documents, self.show_progress)
        return [_among(hits, own) for hits, own in zip(found, candidates, strict=True)]


def _among(hits: Hits, candidates: Sequence[str]) -> Hits:
    wanted = dict.fromkeys(candidates)
    kept = {document: score for document, score in hits if document in wanted}
    last = min([0.0, *kept.values()])  # of a dense model's scores all may be below 0
    return [*kept.items(), *((document, last) for document in wanted if document not in kept)]


@contextmanager
def task_prompts(retriever: Retriever, task: TaskMetadata) -> Iterator[None]:
    """Have a retriever's models put the prompts in front of texts that they have for a task, as mteb's wrappers do."""
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    parts = retriever.retrievers if isinstance(retriever, HybridRetriever) else [retriever]
    models = [model for part in parts if isinstance(part, ModelRetriever) for model in (part.model, part.query_model)]
    with ExitStack() as before:
        for model in {id(model): model for model in models}.values():
            prompts: dict[str, Any] = dict(model.prompts)
            own: dict[str, str] = {}
            for kind in ("query", "document"):
                name = get_prompt_name(prompts, task, PromptType(kind))
                if name is not None and name != kind:
                    own[kind] = prompts[name]
            if own:
                before.callback(setattr, model, "prompts", model.prompts)
                model.prompts = {**prompts, **own}
        yield


def document_texts(corpus: Dataset) -> dict[str, str]:
    """The documents of a task by id, read in parts: row by row it takes 20 times as long."""
    documents: dict[str, str] = {}
    for part in corpus.iter(ROWS_AT_ONCE):
        titles = part.get("title", repeat(None))
        documents.update(zip(part["id"], map(document_text, titles, part["text"]), strict=True))
    return documents


def document_text(title: str | None, text: str) -> str:
    """Title and text joined by a space, as the paper, BEIR and mteb feed a document."""
    return f"{title or ''} {text}".strip()


def query_text(row: dict[str, Any], task: str) -> str:
    """A query, followed by its instruction where the task has one."""
    if not isinstance(row["text"], str):
        raise ValueError(f"{task} has conversations for queries: only text queries are supported.")
    return f"{row['text']} {row['instruction']}" if row.get("instruction") else row["text"]
