"""mteb's search protocol over any of our retrievers: sparse vectors meet an index, never a dense [N, V] matrix."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lion_st.evaluation.trec import drop_self_matches, hits_to_run
from lion_st.extras import require
from lion_st.retrieval.retriever import Retriever, require_retriever

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta

SelfMatches: TypeAlias = Literal["task", "keep", "drop_before_cut", "drop_after_cut"]
SELF_MATCHES: tuple[SelfMatches, ...] = ("task", "keep", "drop_before_cut", "drop_after_cut")


class MtebSearch:
    """A retriever as mteb's `SearchProtocol`.

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
        self._meta = meta or model_meta(retriever)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and revision of the model for mteb."""
        return self._meta

    def index(self, corpus: Any, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, **kwargs: Any) -> None:
        """Index a task's corpus."""
        documents = {row["id"]: document_text(row.get("title"), row["text"]) for row in corpus}
        self.retriever.index(documents, show_progress=self.show_progress)

    def search(
        self, queries: Any, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, top_k: int, **kwargs: Any
    ) -> dict[str, dict[str, float]]:
        """Search a task's queries."""
        if kwargs.get("top_ranked"):
            raise ValueError(f"{task_metadata.name} re-ranks given candidates: an index cannot be evaluated on it.")
        texts = [query_text(row, task_metadata.name) for row in queries]
        ids = list(queries["id"])
        k = self.top_k
        if self.self_matches == "drop_before_cut":
            run = drop_self_matches(hits_to_run(ids, self.retriever.search(texts, k + 1, self.show_progress)), k)
        else:
            run = hits_to_run(ids, self.retriever.search(texts, k, self.show_progress))
            if self.self_matches == "drop_after_cut":
                run = drop_self_matches(run)
        self.runs[task_metadata.name, hf_subset, hf_split] = run
        return {query: dict(islice(hits.items(), top_k)) for query, hits in run.items()}  # mteb edits what it gets


def document_text(title: str | None, text: str) -> str:
    """Title and text joined by a space, as the paper, BEIR and mteb feed a document."""
    return f"{title or ''} {text}".strip()


def query_text(row: dict[str, Any], task: str) -> str:
    """A query, followed by its instruction where the task has one."""
    if not isinstance(row["text"], str):
        raise ValueError(f"{task} has conversations for queries: only text queries are supported.")
    return f"{row['text']} {row['instruction']}" if row.get("instruction") else row["text"]


def model_meta(retriever: Retriever, **experiment: Any) -> ModelMeta:
    """Describe a retriever to mteb; its fingerprint is the revision, so that stale results are never reused.

    Args:
        retriever: A retriever.
        experiment: Settings that give their own result files.
    """
    import hashlib

    ModelMeta = require("mteb.models.model_meta").ModelMeta
    name = retriever.name if "/" in retriever.name else f"lion_st/{retriever.name}"
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": hashlib.sha256(retriever.fingerprint().encode()).hexdigest()[:40],
            "model_type": ["sparse" if retriever.paradigm in ("sparse", "lexical") else "dense"],
            "experiment_kwargs": {"engine": retriever.engine, **experiment},
        }
    )
