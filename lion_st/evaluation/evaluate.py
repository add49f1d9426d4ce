"""Score retrievers on test sets, with result files that resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lion_st.evaluation.metrics import Run, evaluate_run, is_metric
from lion_st.evaluation.mteb_search import MtebSearch, SelfMatches, model_meta
from lion_st.evaluation.protocols import Protocol, get_protocol
from lion_st.evaluation.tasks import get_task_groups
from lion_st.evaluation.trec import drop_self_matches, read_run, write_run
from lion_st.retrieval.bm25 import Bm25Retriever
from lion_st.retrieval.describe import model_name
from lion_st.retrieval.indexes import engine_for
from lion_st.retrieval.retriever import ModelRetriever, Retriever
from lion_st.retrieval.storage import write_atomic

if TYPE_CHECKING:
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from sentence_transformers import SentenceTransformer, SparseEncoder

    Source: TypeAlias = str | Path | AbsTaskRetrieval

Row: TypeAlias = dict[str, Any]

DESCRIPTION = ("model", "engine", "dataset", "subset", "split", "documents", "queries")
FIGURES = ("document_terms", "query_terms", "index_bytes", "encode_ms_per_query", "search_ms_per_query")


def evaluate_retrieval(
    model: SentenceTransformer | SparseEncoder | Retriever | str | Path,
    data: Source | Sequence[Source],
    engine: str | Sequence[str] = "exact",
    output_dir: str | Path = "results",
    *,
    split: str = "test",
    protocol: str | Protocol = "model",
    top_k: int | None = None,
    self_matches: SelfMatches | None = None,
    metrics: Iterable[str] | None = None,
    engine_parameters: Mapping[str, Any] | None = None,
    tokens_per_batch: int = 8192,
    threads: int = 1,
    keep_encoded: bool = False,
    name: str | None = None,
    load_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> list[Row]:
    """Evaluate a model on retrieval test sets.

    Writes into `output_dir`: mteb's result objects (`results/`), TREC runs (`runs/`) and rows of figures (`rows/`).
    A test set whose files are there for the same weights, data and settings is read back instead of run again.

    Args:
        model: A loaded model, a path or Hub id for `load_encoder`, "bm25", the path of a TREC run file, which is scored
            as it is, or any `Retriever`, whose own engine and lengths then count.
        data: BEIR folders, mteb's task and benchmark names, and tasks, see `get_task_groups` and `trec_task`.
        engine: Index engine, see `create_index`; of several, the first that searches the model's kind of vectors.
        output_dir: Folder of the result files.
        split: Split of BEIR folders.
        protocol: "model" (the model's own lengths, 1000 documents), "msmarco", "trec-dl", "beir" or a `Protocol`.
        top_k: Documents retrieved per query, in place of the protocol's.
        self_matches: See `MtebSearch`; in place of the protocol's.
        metrics: See `evaluate_queries`; in place of the protocol's.
        engine_parameters: Settings of the engine.
        tokens_per_batch: Padded tokens per batch when encoding.
        threads: CPU threads of the search.
        keep_encoded: Keep encoded corpora in `output_dir`/encoded and reuse them between engines and tasks.
        name: Name of the model in tables and files.
        load_options: Further arguments of `load_encoder`.
        overwrite: Run again what is already there.
        show_progress: Show progress bars.

    Returns:
        One row per test set, subset and split: model, paradigm, engine, dataset, the metrics by name, `document_terms`
        and `query_terms` (mean active terms, sparse models alone), `index_bytes`, `search_ms_per_query`,
        `encode_ms_per_query`, and the path of the run file. A task that averages others is one more row.

    Example:
        >>> rows = evaluate_retrieval("runs/lion-sp", "data/scifact", output_dir="runs/eval")  # doctest: +SKIP
        >>> rows[0]["nDCG@10"]  # doctest: +SKIP
        0.41
    """
    protocol = adjusted_protocol(protocol, top_k, self_matches, metrics)
    sources = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    evaluation: _RunFile | _Evaluation
    if isinstance(model, str | Path) and Path(model).is_file():
        evaluation = _RunFile(Path(model), protocol)
    else:
        retriever = open_retriever(
            model,
            engine,
            protocol,
            engine_parameters=engine_parameters,
            tokens_per_batch=tokens_per_batch,
            threads=threads,
            encoded_dir=Path(output_dir) / "encoded" if keep_encoded else None,
            name=name,
            load_options=load_options,
        )
        evaluation = _Evaluation(retriever, protocol, Path(output_dir), overwrite, show_progress)
    rows: list[Row] = []
    for group in (group for source in sources for group in get_task_groups(source, split)):
        parts = [row for task in group.tasks for row in evaluation.rows(task)]
        rows += parts if group.name is None else [*parts, mean_row(group.name, parts)]
    return rows


def open_retriever(
    model: SentenceTransformer | SparseEncoder | Retriever | str | Path,
    engine: str | Sequence[str] = "exact",
    protocol: str | Protocol = "model",
    *,
    query_model: SentenceTransformer | SparseEncoder | str | Path | None = None,
    name: str | None = None,
    load_options: Mapping[str, Any] | None = None,
    engine_parameters: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Retriever:
    """Make the retriever that `evaluate_retrieval` evaluates.

    Args:
        model: A loaded model, a path or Hub id, "bm25", or a retriever, which is returned.
        engine: Index engine; of several, the first that searches the model's kind of vectors.
        protocol: Decides the lengths.
        query_model: Encodes the queries in place of the model; a loaded one, a path or a Hub id.
        name: Name in tables and files; by default that of the folder or the Hub name.
        load_options: Further arguments of `load_encoder`.
        engine_parameters: Settings of the engine.
        settings: Further arguments of `ModelRetriever`.

    Raises:
        ValueError: If no engine searches the model's vectors.
    """
    from lion_st.models import paradigm_of

    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if isinstance(model, Retriever):
        return model
    if model == "bm25":
        return Bm25Retriever()
    options = dict(load_options or {})
    encoder, found_name = _opened(model, options)
    query_encoder = None
    if query_model is not None:
        query_encoder, query_name = _opened(query_model, options | {"revision": None})
        found_name += f"+{query_name.split('/')[-1]}"
    return ModelRetriever(
        encoder,
        engine_for(engine, paradigm_of(encoder)),
        query_model=query_encoder,
        engine_parameters=engine_parameters,
        query_tokens=protocol.query_tokens,
        document_tokens=protocol.document_tokens,
        name=name or found_name,
        **settings,
    )


def _opened(model: Any, options: Mapping[str, Any]) -> tuple[Any, str]:
    """A model and its name: that of its folder, or of its Hub repository."""
    from lion_st.retrieval.loading import load_encoder

    if not isinstance(model, str | Path):
        return model, model_name(model)
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    return load_encoder(model, **options), name


def adjusted_protocol(
    protocol: str | Protocol,
    top_k: int | None = None,
    self_matches: SelfMatches | None = None,
    metrics: Iterable[str] | None = None,
) -> Protocol:
    """A protocol, by name or itself, with some settings replaced where they are not None."""
    changes: dict[str, Any] = {
        "top_k": top_k,
        "self_matches": self_matches,
        "metrics": tuple(metrics) if metrics else None,
    }
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    return replace(protocol, **{key: value for key, value in changes.items() if value is not None})


def table_columns(rows: Sequence[Row]) -> list[str]:
    """Columns for a table of rows: what tells them apart, every metric, and the sizes and times that were measured."""
    told_apart = [key for key in DESCRIPTION if key in ("model", "dataset") or len({row[key] for row in rows}) > 1]
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row) if is_metric(key)]
    return told_apart + metrics + [key for key in FIGURES if any(row.get(key) is not None for row in rows)]


def mean_row(name: str, rows: Sequence[Row]) -> Row:
    """The mean of every metric over test sets, as a row of its own."""
    same = {key: rows[0][key] for key in ("model", "paradigm", "engine", "subset", "split")}
    counts = {key: sum(row[key] for row in rows) for key in ("documents", "queries")}
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if is_metric(key)}
    return {**same, "dataset": name, **counts, **means, "run": None}


class _Evaluation:
    """One retriever under one protocol."""

    def __init__(
        self, retriever: Retriever, protocol: Protocol, output: Path, overwrite: bool, show_progress: bool
    ) -> None:
        import mteb

        self.retriever = retriever
        self.protocol = protocol
        self.output = output
        self.overwrite = overwrite
        self.show_progress = show_progress
        self.meta = model_meta(retriever, top_k=protocol.top_k, self_matches=protocol.self_matches)
        self.cache = mteb.ResultCache(output)

    def rows(self, task: AbsTaskRetrieval) -> list[Row]:
        """Evaluate one test set, or read back what an earlier run found."""
        import mteb

        settings = [self.meta.revision, task.metadata.revision, self.retriever.engine, asdict(self.protocol)]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        stem = f"{task.metadata.name}.{self.retriever.name.replace('/', '__')}.{self.retriever.engine}.{key}"
        row_file = self.output / "rows" / f"{stem}.json"
        result_file = self.cache.get_task_result_path(task.metadata.name, self.meta)
        if not self.overwrite and row_file.exists() and result_file.exists():
            return json.loads(row_file.read_text(encoding="utf-8"))
        search = MtebSearch(
            self.retriever,
            top_k=self.protocol.top_k,
            self_matches=self.protocol.self_matches,
            meta=self.meta,
            show_progress=self.show_progress,
        )
        all_depths = task.k_values
        # A metric that looks deeper than the search would be that of the search's depth under another name.
        task.k_values = [depth for depth in all_depths if depth <= max(10, self.protocol.top_k)]
        try:
            mteb.evaluate(
                search,
                task,
                cache=self.cache,
                overwrite_strategy="always",
                co2_tracker=False,
                show_progress_bar=False,
            )
        finally:
            task.k_values = all_depths
        task.load_data()
        rows = []
        for (_, subset, part), run in search.runs.items():
            run_file = self.output / "runs" / f"{stem}.{subset}.{part}.trec"
            write_run(run_file, run, tag=self.retriever.name.replace(" ", "_"))
            facts = {**self.retriever.figures(), "run": str(run_file)}
            rows.append(_row(self.retriever, self.protocol, task, subset, part, run) | facts)
        row_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(row_file, json.dumps(rows, indent=1).encode())
        return rows


class _RunFile:
    """A TREC run file in the place of a retriever: what it ranks is scored."""

    paradigm = engine = None

    def __init__(self, file: Path, protocol: Protocol) -> None:
        self.file = file
        self.name = file.name
        self.protocol = protocol
        self.run = read_run(file)

    def rows(self, task: AbsTaskRetrieval) -> list[Row]:
        """Score the run on a test set."""
        task.load_data()
        parts = [(subset, part) for subset, splits in task.dataset.items() for part in splits]
        if len(parts) > 1:
            raise ValueError(f"{task.metadata.name} has several parts {parts}, and a run file is for one.")
        if not self.run.keys() & task.dataset[parts[0][0]][parts[0][1]]["relevant_docs"].keys():
            raise ValueError(f"{self.file} has no query that {task.metadata.name} judges: is it of another test set?")
        run = self._cut(task)
        return [_row(self, self.protocol, task, *parts[0], run) | {"run": str(self.file)}]

    def _cut(self, task: AbsTaskRetrieval) -> dict[str, dict[str, float]]:
        depth, self_matches = self.protocol.top_k, self.protocol.self_matches
        if self_matches == "drop_before_cut":
            return drop_self_matches(self.run, depth)
        run = {
            query: dict(sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:depth])
            for query, hits in self.run.items()
        }
        return drop_self_matches(run) if self_matches == "drop_after_cut" else run


def _row(retriever: Any, protocol: Protocol, task: Any, subset: str, part: str, run: Run) -> Row:
    data = task.dataset[subset][part]
    if protocol.self_matches == "task" and task.ignore_identical_ids:
        run = drop_self_matches(run)
    return {
        "model": retriever.name,
        "paradigm": retriever.paradigm,
        "engine": retriever.engine,
        "dataset": task.metadata.name,
        "subset": subset,
        "split": part,
        "documents": len(data["corpus"]),
        "queries": len(data["queries"]),
        **evaluate_run(data["relevant_docs"], run, protocol.metrics, protocol.relevance_level),
    }
