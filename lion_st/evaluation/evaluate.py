"""Score retrievers on test sets, with result files that resume."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lion_st.data.fields import TASKS
from lion_st.data.trec import read_run
from lion_st.encoding.fingerprints import model_name, model_revision, term_limit
from lion_st.engines import engine_settings, require_settings
from lion_st.errors import require_list
from lion_st.evaluation.metrics import Qrels, Run, evaluate_run, is_metric, metric_depth, warn_of_missing
from lion_st.evaluation.mteb_meta import is_standard, model_meta
from lion_st.evaluation.mteb_search import MtebSearch, SelfMatches
from lion_st.evaluation.options import EvaluationOptions, RetrieverOptions, require_known
from lion_st.evaluation.protocols import Protocol, get_protocol
from lion_st.evaluation.tasks import get_task_groups, loaded, origin_of
from lion_st.evaluation.trec import check_ids, drop_self_matches, write_qrels, write_run
from lion_st.extras import require
from lion_st.files import atomic_write, read_json
from lion_st.indexes import engine_for
from lion_st.retrieval.bm25 import Bm25Retriever
from lion_st.retrieval.retriever import ModelRetriever, Retriever

if TYPE_CHECKING:
    from mteb import Benchmark
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.models.model_meta import ModelMeta
    from mteb.results import ModelResult, TaskResult
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from typing_extensions import Unpack

    Source: TypeAlias = str | Path | AbsTaskRetrieval | AbsTaskAggregate | Benchmark

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
    keep_encoded: bool = False,
    overwrite: bool = False,
    show_progress: bool = False,
    **settings: Unpack[EvaluationOptions],
) -> list[Row]:
    """Evaluate a model on retrieval test sets.

    Writes into `output_dir`: mteb's result objects (`results/`), TREC runs and the judgements of each test set
    (`runs/`), and rows of figures (`rows/`). Results of a checkpoint on the Hub with its own lengths, exact search and
    the depth of 1000 lie below its commit, as mteb's leaderboards take them; others below a digest and the settings.
    Splits and subsets of a task of mteb gather in one result; each split of a folder has a result of its own.
    A test set whose files are there for the same weights, data and settings is read back instead of run again.

    Args:
        model: A loaded model, a path or Hub id for `load_encoder`, "bm25", the path of a TREC run file, which is scored
            as it is, or any `Retriever`, whose own engine and lengths then count.
        data: BEIR folders, mteb's tasks and benchmarks or their names, see `get_task_groups` and `trec_task`.
        engine: Index engine, see `create_index`; of several, the first that searches the model's kind of vectors.
        output_dir: Folder of the result files.
        split: Split of BEIR folders.
        protocol: "model" (the model's own lengths, 1000 documents), "msmarco", "trec-dl", "beir" or a `Protocol`.
        top_k: Documents retrieved per query, in place of the protocol's. Metrics of the protocol that look deeper are
            left out.
        self_matches: See `MtebSearch`; in place of the protocol's.
        metrics: See `evaluate_queries`; in place of the protocol's.
        keep_encoded: Keep encoded corpora in `output_dir`/encoded and reuse them between engines and tasks.
        overwrite: Run again what is already there.
        show_progress: Show progress bars.
        settings: See `EvaluationOptions`, such as `threads`, or `encoded`, a folder of `encode_corpus` with the vectors
            of the one test set's documents.

    Returns:
        One row per test set, subset and split: model, paradigm, engine, dataset, the metrics by name, `document_terms`
        and `query_terms` (mean active terms, sparse models alone), `index_bytes`, `search_ms_per_query`,
        `encode_ms_per_query`, and the paths of the run file and of the judgements. A task that averages others is one
        more row, and so is the mean over a benchmark's test sets.

    Raises:
        FileNotFoundError: If there is no such test set.
        TypeError: If there is no such setting.
        ValueError: If a metric that was asked for, or the main score of a task, looks deeper than the search.

    Example:
        >>> rows = evaluate_retrieval("runs/lion-sp", "data/scifact", output_dir="runs/eval")  # doctest: +SKIP
        >>> rows[0]["nDCG@10"]  # doctest: +SKIP
        0.41
    """
    protocol = adjusted_protocol(protocol, top_k, self_matches, metrics)
    sources = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    asked = [(source, get_task_groups(source, split)) for source in sources]
    require_known(settings, EvaluationOptions)
    evaluation: _RunFile | _Evaluation
    if isinstance(model, str | Path) and Path(model).is_file():
        evaluation = _RunFile(Path(model), protocol, settings.get("name"))
    else:
        for task in (task for _, groups in asked for group in groups for task in group.tasks):
            _check_depth(task, protocol.top_k)
        retriever = open_retriever(
            model,
            engine,
            protocol,
            encoded_dir=Path(output_dir) / "encoded" if keep_encoded else None,
            **settings,
        )
        evaluation = _Evaluation(retriever, protocol, Path(output_dir), overwrite, show_progress)
    rows: list[Row] = []
    for source, groups in asked:
        of_groups: list[Row] = []  # one a test set
        for group in groups:
            parts = [row for task in group.tasks for row in evaluation.rows(task)]
            rows += parts
            of_groups.append(parts[0] if len(parts) == 1 else mean_row(group.name or parts[0]["dataset"], parts))
            if group.name is not None:
                rows.append(of_groups[-1])
        if len(groups) > 1:
            rows.append(mean_row(getattr(source, "name", str(source)), of_groups))
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
    **settings: Unpack[RetrieverOptions],
) -> Retriever:
    """Make the retriever that `evaluate_retrieval` evaluates.

    Args:
        model: A loaded model, a path or Hub id, "bm25", or a retriever, which is returned.
        engine: Index engine; of several, the first that searches the model's kind of vectors.
        protocol: Decides the lengths.
        query_model: Encodes the queries in place of the model; a loaded one, a path or a Hub id.
        name: Name in tables and files; by default that of the folder or the Hub name. With `idf`, "-idf" is added.
        load_options: Further arguments of `load_encoder`.
        engine_parameters: Settings of the engine; of several engines, each takes those that it has.
        settings: See `RetrieverOptions`.

    Raises:
        TypeError: If there is no such argument, also where nothing reads them: of a retriever, a run or BM25.
        ValueError: If no engine searches the model's vectors.
    """
    from lion_st.models import paradigm_of

    require_known(settings, RetrieverOptions)
    protocol = get_protocol(protocol)
    if isinstance(model, Retriever):
        return model
    if model == "bm25":
        return Bm25Retriever()
    options = dict(load_options or {})
    encoder, found_name = _opened(model, options)
    query_encoder = commit = None
    if query_model is None and isinstance(model, str) and options.get("dtype") in (None, "auto"):
        limited = options.get("query_max_active_dims") or options.get("document_max_active_dims")
        commit = None if limited else model_revision(encoder)
    if query_model is not None:
        query_encoder, query_name = _opened(query_model, options | {"revision": None})
        found_name += f"+{query_name.split('/')[-1]}"
    paradigm = paradigm_of(encoder)
    chosen = engine_for(engine, paradigm)
    parameters = dict(engine_parameters or {})
    if not isinstance(engine, str) and len(engine) > 1:
        require_settings(engine, parameters)
        own = engine_settings(chosen, paradigm)
        parameters = {key: value for key, value in parameters.items() if key in own}
    return ModelRetriever(
        encoder,
        chosen,
        query_model=query_encoder,
        engine_parameters=parameters,
        query_length=protocol.query_length,
        document_length=protocol.document_length,
        name=(name or found_name) + ("-idf" if settings.get("idf") else ""),
        commit=commit,
        **settings,
    )


def _opened(model: Any, options: Mapping[str, Any]) -> tuple[Any, str]:
    """A model and its name: that of its folder, or of its Hub repository."""
    from lion_st.encoding.loading import load_encoder

    if not isinstance(model, str | Path):
        return model, model_name(model)
    name = Path(model).resolve().name if Path(model).exists() else str(model)
    limits = [
        f"{task[0]}{options[f'{task}_max_active_dims']}" for task in TASKS if options.get(f"{task}_max_active_dims")
    ]
    return load_encoder(model, **options), "-".join([name, *limits])


def adjusted_protocol(
    protocol: str | Protocol,
    top_k: int | None = None,
    self_matches: SelfMatches | None = None,
    metrics: Iterable[str] | None = None,
) -> Protocol:
    """A protocol, by name or itself, with some settings replaced where they are not None.

    Metrics that nobody asked for are left out where they look deeper than the new `top_k`.
    """
    require_list(metrics, "metrics")
    changes: dict[str, Any] = {
        "top_k": top_k,
        "self_matches": self_matches,
        "metrics": tuple(metrics) if metrics else None,
    }
    protocol = get_protocol(protocol)
    protocol = replace(protocol, **{key: value for key, value in changes.items() if value is not None})
    fitting = tuple(metric for metric in protocol.metrics if (metric_depth(metric) or 0) <= protocol.top_k)
    if fitting != protocol.metrics and (metrics or top_k is None or not fitting):
        deepest = max(protocol.metrics, key=lambda metric: metric_depth(metric) or 0)
        raise ValueError(
            f"{deepest} looks deeper than the {protocol.top_k} documents that are retrieved per query: set top_k to "
            f"{metric_depth(deepest)} or more, or choose metrics of at most @{protocol.top_k}."
        )
    return replace(protocol, metrics=fitting)


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
    return {**same, "dataset": name, **counts, **means, "run": None, "qrels": None}


def _check_depth(task: AbsTaskRetrieval, top_k: int) -> None:
    main_score = task.metadata.main_score
    depth = re.search(r"_at_(\d+)$", main_score)
    if depth and int(depth[1]) > top_k:
        raise ValueError(
            f"{task.metadata.name} is scored by {main_score}, which looks deeper than the {top_k} documents that are "
            f"retrieved per query: set top_k to {depth[1]} or more."
        )


class _Evaluation:
    """One retriever under one protocol."""

    def __init__(
        self, retriever: Retriever, protocol: Protocol, output: Path, overwrite: bool, show_progress: bool
    ) -> None:
        mteb = require("mteb")

        self.retriever = retriever
        self.protocol = protocol
        self.output = output
        self.overwrite = overwrite
        self.show_progress = show_progress
        self.digest = hashlib.sha256(retriever.fingerprint().encode()).hexdigest()[:40]
        settings = {"engine": retriever.engine, "top_k": protocol.top_k, "self_matches": protocol.self_matches}
        if isinstance(retriever, ModelRetriever):
            limits = {
                "query_max_active_dims": term_limit(retriever.query_model, "query"),
                "document_max_active_dims": term_limit(retriever.model, "document"),
            }
            settings |= {name: limit for name, limit in limits.items() if limit is not None}
            settings |= {"idf": True} if retriever.idf else {}
        is_plain = is_standard(retriever) and protocol.top_k >= 1000 and protocol.self_matches == "task"
        self.meta = model_meta(retriever) if is_plain else model_meta(retriever, self.digest, settings)
        self.cache = mteb.ResultCache(output)

    def rows(self, task: AbsTaskRetrieval) -> list[Row]:
        """Evaluate one test set, or read back what an earlier run found."""
        name, origin = task.metadata.name, origin_of(task)
        meta = self._meta(origin)
        parts = [sorted(task.eval_splits), sorted(task.hf_subsets)]
        settings = [self.digest, task.metadata.revision, parts, self.retriever.engine, asdict(self.protocol)]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        stem = f"{name}.{self.retriever.name.replace('/', '__')}.{self.retriever.engine}.{key}"
        row_file = self.output / "rows" / f"{stem}.json"
        earlier = self._earlier(task, meta)
        is_complete = earlier is not None and not earlier.get_missing_evaluations(task)
        if not self.overwrite and row_file.exists() and is_complete:
            return read_json(row_file)
        search = MtebSearch(
            self.retriever,
            top_k=self.protocol.top_k,
            self_matches=self.protocol.self_matches,
            meta=meta,
            show_progress=self.show_progress,
        )
        with loaded(task) as dataset:
            for part in (part for splits in dataset.values() for part in splits.values()):
                for ids in (part["queries"]["id"][:], part["corpus"]["id"][:], part["relevant_docs"]):
                    check_ids(ids)  # before hours of encoding, and not when the run is written
            (result,) = self._evaluate(search, task).task_results
            rows = [self._part_row(task, subset, part, run, stem) for (_, subset, part), run in search.runs.items()]
        self.cache.save_to_cache(_gathered(earlier, result), meta)
        row_file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(row_file, json.dumps(rows, indent=1))
        return rows

    def _meta(self, origin: str | None) -> ModelMeta:
        """Name of the result files: of local test sets with the same name, each has its own."""
        if origin is None:
            return self.meta
        experiment = {**(self.meta.experiment_kwargs or {}), "data": origin}
        return self.meta.model_copy(update={"experiment_kwargs": experiment})

    def _earlier(self, task: AbsTaskRetrieval, meta: ModelMeta) -> TaskResult | None:
        """What earlier runs found on this data, perhaps on other splits or subsets."""
        try:
            result = self.cache.load_task_result(task.metadata.name, meta)
        except ValueError as error:
            file = self.cache.get_task_result_path(task.metadata.name, meta)
            raise ValueError(f"{file} is damaged ({error}): remove it and evaluate again.") from error
        return result if result is not None and result.is_mergeable(task) else None

    def _evaluate(self, search: MtebSearch, task: AbsTaskRetrieval) -> ModelResult:
        mteb = require("mteb")

        all_depths = task.k_values
        # A metric that looks deeper than the search would be that of the search's depth under another name.
        task.k_values = [depth for depth in all_depths if depth <= self.protocol.top_k]
        try:
            return mteb.evaluate(search, task, cache=None, co2_tracker=False, show_progress_bar=False)
        finally:
            task.k_values = all_depths

    def _part_row(self, task: AbsTaskRetrieval, subset: str, part: str, run: Run, stem: str) -> Row:
        """Write the run and the judgements of one split of a subset, and score the run."""
        if self.protocol.self_matches == "task" and task.ignore_identical_ids:
            run = drop_self_matches(run)
        run_file = self.output / "runs" / f"{stem}.{subset}.{part}.trec"
        write_run(run_file, run, tag=self.retriever.name, overwrite=True)
        names = [task.metadata.name, origin_of(task), subset, part]
        qrels_file = self.output / "runs" / ".".join([*filter(None, names), "qrels"])
        write_qrels(qrels_file, _judgements(task, subset, part), overwrite=True)
        files = {"run": str(run_file), "qrels": str(qrels_file)}
        return _row(self.retriever, self.protocol, task, subset, part, run) | self.retriever.figures() | files


def _gathered(earlier: TaskResult | None, result: TaskResult) -> TaskResult:
    """A result with the earlier scores of other splits and subsets."""

    def parts(one: TaskResult) -> set[tuple[str, str]]:
        return {(split, scores["hf_subset"]) for split, subsets in one.scores.items() for scores in subsets}

    return result if earlier is None or parts(earlier) <= parts(result) else earlier.merge(result)


class _RunFile:
    """A TREC run file in the place of a retriever: what it ranks is scored."""

    paradigm = engine = None

    def __init__(self, file: Path, protocol: Protocol, name: str | None = None) -> None:
        self.file = file
        self.name = name or file.name
        self.protocol = protocol
        self.run = read_run(file)

    def rows(self, task: AbsTaskRetrieval) -> list[Row]:
        """Score the run on a test set."""
        with loaded(task) as dataset:
            parts = [(subset, part) for subset, splits in dataset.items() for part in splits]
            if len(parts) > 1:
                raise ValueError(f"{task.metadata.name} has several parts {parts}, and a run file is for one.")
            judged = _judgements(task, *parts[0])
            if not self.run.keys() & judged.keys():
                raise ValueError(
                    f"{self.file} has no query that {task.metadata.name} judges: is it of another test set?"
                )
            warn_of_missing(str(self.file), self.run, judged)
            return [_row(self, self.protocol, task, *parts[0], self._cut(task)) | {"run": str(self.file)}]

    def _cut(self, task: AbsTaskRetrieval) -> dict[str, dict[str, float]]:
        depth, self_matches = self.protocol.top_k, self.protocol.self_matches
        if self_matches == "drop_before_cut":
            return drop_self_matches(self.run, depth)
        run = {
            query: dict(sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:depth])
            for query, hits in self.run.items()
        }
        follows_task = self_matches == "task" and task.ignore_identical_ids
        return drop_self_matches(run) if self_matches == "drop_after_cut" or follows_task else run


def _judgements(task: AbsTaskRetrieval, subset: str, part: str) -> Qrels:
    """Grades of the queries that have any, as mteb scores them."""
    return {query: grades for query, grades in task.dataset[subset][part]["relevant_docs"].items() if grades}


def _row(retriever: Any, protocol: Protocol, task: Any, subset: str, part: str, run: Run) -> Row:
    data = task.dataset[subset][part]
    return {
        "model": retriever.name,
        "paradigm": retriever.paradigm,
        "engine": retriever.engine,
        "dataset": task.metadata.name,
        "subset": subset,
        "split": part,
        "documents": len(data["corpus"]),
        "queries": len(data["queries"]),
        **evaluate_run(_judgements(task, subset, part), run, protocol.metrics, protocol.relevance_level),
    }
