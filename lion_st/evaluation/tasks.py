"""Retrieval test sets as mteb tasks: BEIR folders of one's own, and those of mteb by name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.retrieval.storage import checksum

if TYPE_CHECKING:
    from mteb.abstasks.retrieval import AbsTaskRetrieval


def get_task(source: str | Path, split: str = "test") -> AbsTaskRetrieval:
    """Make an mteb retrieval task.

    Args:
        source: A folder in BEIR layout (`corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`) or the name of an mteb
            retrieval task, such as "SciFact" or "NanoMSMARCORetrieval".
        split: Split of a folder; mteb's tasks name their own.

    Raises:
        FileNotFoundError: If the source is neither.
        ValueError: If the mteb task is not a text retrieval task.
    """
    if Path(source).is_dir():
        return folder_task(source, split)
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    try:
        task = mteb.get_task(str(source))
    except KeyError as error:
        raise FileNotFoundError(
            f"{source} is neither a folder with corpus.jsonl, queries.jsonl and qrels/, nor an mteb task ({error})."
        ) from error
    if not isinstance(task, AbsTaskRetrieval) or task.metadata.modalities != ["text"]:
        raise ValueError(f"The mteb task {source!r} is of the type {task.metadata.type!r}: give a text retrieval task.")
    return task


def folder_task(folder: str | Path, split: str = "test") -> AbsTaskRetrieval:
    """Make an mteb task of a BEIR folder; the task takes the folder's name."""
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    root = Path(folder).resolve()
    files = [root / "corpus.jsonl", root / "queries.jsonl", root / "qrels" / f"{split}.tsv"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/*.tsv.")

    class BeirFolderTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=root.name,
            dataset={
                "path": str(root),
                "revision": hashlib.sha256("".join(checksum(file) for file in files).encode()).hexdigest()[:40],
            },
            description=f"The BEIR folder {root.name}.",
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            if not self.data_loaded:
                self.dataset = {"default": {split: split_data(root, split)}}
                self.data_loaded = True

    return BeirFolderTask()


def split_data(folder: Path, split: str) -> Any:
    """Read a BEIR folder into mteb's `RetrievalSplitData`, with the judged queries alone."""
    from datasets import Dataset

    from lion_st.data import load_beir

    corpus, queries, qrels = load_beir(folder, split=split)
    return {
        "corpus": Dataset.from_list(
            [{"id": key, "title": row.get("title") or "", "text": row["text"]} for key, row in corpus.items()]
        ),
        "queries": Dataset.from_list([{"id": key, "text": queries[key]} for key in qrels]),
        "relevant_docs": qrels,
        "top_ranked": None,
    }
