"""Retrieval test sets as mteb tasks: BEIR folders, TREC files, and those of mteb by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lion_st.data.beir import beir_files, load_beir
from lion_st.data.fields import Task
from lion_st.data.records import corpus_files, read_texts, read_topics
from lion_st.data.sources import dataset_commit, parse_source
from lion_st.data.trec import read_qrels
from lion_st.evaluation.metrics import Qrels
from lion_st.extras import require
from lion_st.files import checksum

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb import Benchmark
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.retrieval import AbsTaskRetrieval

ROWS_AT_ONCE = 10_000  # of a table's part


def get_task(source: str | Path | AbsTaskRetrieval, split: str = "test") -> AbsTaskRetrieval:
    """Make an mteb retrieval task.

    Args:
        source: A folder in BEIR layout (`corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`) or a data set of the Hub
            with such files, such as "mteb/scifact", see `load_beir`; the name of an mteb retrieval task, such as
            "SciFact", "NanoMSMARCORetrieval" or "TRECDL2019"; or a task, which is returned.
        split: Split of a folder; mteb's tasks name their own.

    Raises:
        FileNotFoundError: If the source is neither.
        TypeError: If it is of another type.
        ValueError: If the mteb task is not a text retrieval task.
    """
    AbsTaskRetrieval = require("mteb.abstasks.retrieval").AbsTaskRetrieval

    if isinstance(source, str | Path) and _is_collection(source):
        return folder_task(source, split)
    task = _mteb_task(str(source)) if isinstance(source, str | Path) else source
    if not hasattr(task, "metadata"):
        raise TypeError(f"A folder, a name or a task of mteb expected, got {task!r}: of several, give a list.")
    if not isinstance(task, AbsTaskRetrieval) or task.metadata.modalities != ["text"]:
        raise ValueError(f"{source} is of the type {task.metadata.type!r}: give a text retrieval task.")
    return task


class TaskGroup(NamedTuple):
    """Tasks that are evaluated one by one, and the name under which their scores are averaged, if they are."""

    name: str | None
    tasks: list[AbsTaskRetrieval]


def get_task_groups(
    source: str | Path | AbsTaskRetrieval | AbsTaskAggregate | Benchmark, split: str = "test"
) -> list[TaskGroup]:
    """Like `get_task`, and also for benchmarks and tasks that average others.

    Args:
        source: As for `get_task`; or an mteb benchmark, itself or its name, such as "BEIR", "NanoBEIR" or
            "MTEB(eng, v2)", in whatever case, of which the text retrieval tasks are taken; or an average, such as
            "CQADupstackRetrieval".
        split: Split of a folder.

    Raises:
        FileNotFoundError: If the source is none of these.
        TypeError: If it is of another type.
        ValueError: If it has no text retrieval task.
    """
    mteb = require("mteb")
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    meant: Any = source
    if isinstance(source, str) and not _is_collection(source):
        benchmarks = {benchmark.name.lower(): benchmark for benchmark in mteb.get_benchmarks()}
        meant = benchmarks.get(source.lower()) or _mteb_task(source)
    if isinstance(meant, mteb.Benchmark):
        found: list[Any] = [task for task in meant.tasks if _is_retrieval(task)]
    elif isinstance(meant, AbsTaskAggregate):
        found = [meant]
    else:
        return [TaskGroup(None, [get_task(meant, split)])]
    groups = []
    for task in found:
        parts: list[Any] = list(task.tasks) if isinstance(task, AbsTaskAggregate) else [task]
        name = task.metadata.name if isinstance(task, AbsTaskAggregate) else None
        groups.append(TaskGroup(name, [get_task(part) for part in parts]))
    return groups


@contextmanager
def loaded(task: AbsTaskRetrieval) -> Iterator[Any]:
    """Load a task's data in mteb's present format, and unload it afterwards unless it had been loaded before.

    (Some of mteb's tasks load an older format, which mteb converts only while it evaluates.)

    Args:
        task: A task.

    Yields:
        Its data by subset and split.
    """
    was_loaded = task.data_loaded
    if not was_loaded:
        task.load_data()
    try:
        task.convert_v1_dataset_format_to_v2(num_proc=None)
        yield task.dataset
    finally:
        if not was_loaded:
            task.unload_data()


def origin_of(task: AbsTaskRetrieval) -> str | None:
    """Digest of where a local test set's parts lie, which tells it from its namesakes; None for tasks of mteb."""
    return getattr(task, "origin", None)


def _mteb_task(name: str) -> Any:
    mteb = require("mteb")

    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise FileNotFoundError(f"{name} is neither a BEIR folder nor an mteb task or benchmark ({error}).") from error


def _is_collection(source: str | Path) -> bool:
    """Whether a source is a folder or a data set of the Hub, and not the name of one of mteb's tasks."""
    return Path(source).is_dir() or "/" in str(source)


def _is_retrieval(task: Any) -> bool:
    return task.metadata.type == "Retrieval" and task.metadata.modalities == ["text"]


def folder_task(folder: str | Path, split: str = "test") -> AbsTaskRetrieval:
    """Make an mteb task of a BEIR folder; it takes the folder's name."""
    source = parse_source(folder)
    files = beir_files(folder, split)
    name = source.subset or (source.path.resolve().name if source.path is not None else source.place.split("/")[-1])

    def load() -> tuple[Iterator[dict[str, str]], dict[str, str], Qrels]:
        corpus, queries, qrels = load_beir(folder, split=split)
        return ({"id": key, **row} for key, row in corpus.items()), queries, qrels

    return _local_task(name, files, load, split)


def trec_task(
    corpus: str | Path, topics: str | Path, qrels: str | Path, name: str, split: str = "test"
) -> AbsTaskRetrieval:
    """Make an mteb task of TREC files.

    Args:
        corpus: See `read_corpus`. A malformed record is an error here.
        topics: See `read_topics`; those without judgements are left out.
        qrels: See `read_qrels`.
        name: Name of the task.
        split: Name of the split.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: When the task is loaded, if a record of the corpus is unusable, an id occurs twice or a judged
            topic is missing.
    """

    def load() -> tuple[Iterator[dict[str, str]], dict[str, str], Qrels]:
        documents = read_texts(corpus)
        queries = read_topics(topics)
        rows = (fields._asdict() for fields in documents.values())
        return rows, queries, read_qrels(qrels, queries, documents)

    files: list[Path] = []
    data_sets: dict[str, str] = {}
    texts: dict[Task, str | Path] = {"document": corpus, "query": topics}
    for kind, given in texts.items():
        own = corpus_files(given, kind)
        if not own:
            source = parse_source(given)
            own = [] if source.path is None else sorted(one for one in source.path.rglob("*") if one.is_file())
            data_sets[str(source)] = "" if own else dataset_commit(source)
        files += own
    return _local_task(name, [*files, Path(qrels)], load, split, data_sets)


def _local_task(
    name: str,
    files: Sequence[Path],
    load: Callable[[], tuple[Iterator[dict[str, str]], dict[str, str], Qrels]],
    split: str,
    data_sets: Mapping[str, str] = MappingProxyType({}),
) -> AbsTaskRetrieval:
    """A task of files and of data sets, whose names come with their commits where they are on the Hub."""
    require("mteb")
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the task {name} needs it.")

    class LocalRetrievalTask(AbsTaskRetrieval):
        origin = _digest("\n".join([*(str(file.resolve()) for file in files), *data_sets]))[:8]
        metadata = TaskMetadata(
            name=name,
            dataset={
                "path": str(files[0].parent),
                "revision": _digest("".join([*map(checksum, files), *data_sets.values()]))[:40],
            },
            description=f"The test collection {name} from local files.",
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            if self.data_loaded:
                return
            documents, queries, qrels = load()
            judged = ({"id": key, "text": queries[key]} for key in qrels)
            self.dataset = {
                "default": {
                    split: {
                        "corpus": _table(documents),
                        "queries": _table(judged),
                        "relevant_docs": {query: dict(grades) for query, grades in qrels.items()},
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return LocalRetrievalTask()


def _table(rows: Iterator[dict[str, str]]) -> Dataset:
    """Rows as a table of parts: Arrow counts the bytes of a column's part to 2 GiB, and MS MARCO's passages have 3."""
    from datasets import Dataset, concatenate_datasets

    parts = []
    while part := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(Dataset.from_list(part))
    return concatenate_datasets(parts) if parts else Dataset.from_list([])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
