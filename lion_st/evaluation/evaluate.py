"""Score retrievers on test sets, with result files that resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lion_st.evaluation.metrics import evaluate_run, is_metric
from lion_st.evaluation.mteb_search import MtebSearch, SelfMatches, model_meta
from lion_st.evaluation.protocols import Protocol, get_protocol
from lion_st.evaluation.tasks import get_task
from lion_st.evaluation.trec import drop_self_matches, write_run
from lion_st.retrieval.bm25 import Bm25Retriever
from lion_st.retrieval.retriever import ModelRetriever, Retriever
from lion_st.retrieval.storage import write_atomic

if TYPE_CHECKING:
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from sentence_transformers import SentenceTransformer, SparseEncoder

Row: TypeAlias = dict[str, Any]

DESCRIPTION = ("model", "engine", "dataset", "subset", "split", "documents", "queries")
FIGURES = ("document_terms", "query_terms", "index_bytes", "encode_ms_per_query", "search_ms_per_query")


def table_columns(rows: Sequence[Row]) -> list[str]:
    """Columns for a table of rows: what tells them apart, every metric, and the sizes and times that were measured."""
    told_apart = [key for key in DESCRIPTION if key in ("model", "dataset") or len({row[key] for row in rows}) > 1]
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row) if is_metric(key)]
    return told_apart + metrics + [key for key in FIGURES if any(row.get(key) is not None for row in rows)]


def evaluate_retrieval(
    model: SentenceTransformer | SparseEncoder | Retriever | str | Path,
    data: str | Path | AbsTaskRetrieval | Sequence[str | Path | AbsTaskRetrieval],
    engine: str = "exact",
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
        model: A loaded model, a path or Hub id for `lion_st.load`, "bm25", or any `Retriever`.
        data: BEIR folders, mteb task names and tasks, see `get_task` and `trec_task`.
        engine: Index engine, see `create_index`.
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
        load_options: Further arguments of `lion_st.load`.
        overwrite: Run again what is already there.
        show_progress: Show progress bars.

    Returns:
        One row per test set, subset and split: model, paradigm, engine, dataset, the metrics by name, `document_terms`
        and `query_terms` (mean active terms, sparse models alone), `index_bytes`, `search_ms_per_query`,
        `encode_ms_per_query`, and the path of the run file.

    Example:
        >>> rows = evaluate_retrieval("runs/lion-sp", "data/scifact", output_dir="runs/eval")  # doctest: +SKIP
        >>> rows[0]["nDCG@10"]  # doctest: +SKIP
        0.41
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    changes: dict[str, Any] = {
        "top_k": top_k,
        "self_matches": self_matches,
        "metrics": tuple(metrics) if metrics else None,
    }
    protocol = replace(protocol, **{key: value for key, value in changes.items() if value is not None})
    retriever = _retriever(
        model,
        engine,
        protocol,
        engine_parameters=engine_parameters,
        tokens_per_batch=tokens_per_batch,
        threads=threads,
        encoded_dir=Path(output_dir) / "encoded" if keep_encoded else None,
        name=name,
        load_options=dict(load_options or {}),
    )
    sources = list(data) if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    evaluation = _Evaluation(retriever, protocol, Path(output_dir), overwrite, show_progress)
    return [row for source in sources for row in evaluation.rows(source, split)]


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

    def rows(self, source: Any, split: str) -> list[Row]:
        """Evaluate one test set, or read back what an earlier run found."""
        import mteb

        task = get_task(source, split)
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
        mteb.evaluate(
            search,
            task,
            cache=self.cache,
            overwrite_strategy="always",
            co2_tracker=False,
            show_progress_bar=False,
        )
        task.load_data()
        rows = [
            self._row(task, subset, part, run, self.output / "runs" / f"{stem}.{subset}.{part}.trec")
            for (_, subset, part), run in search.runs.items()
        ]
        row_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(row_file, json.dumps(rows, indent=1).encode())
        return rows

    def _row(self, task: Any, subset: str, part: str, run: dict[str, dict[str, float]], run_file: Path) -> Row:
        write_run(run_file, run, tag=self.retriever.name.replace(" ", "_"))
        data = task.dataset[subset][part]
        if task.ignore_identical_ids:  # as mteb scores it
            run = drop_self_matches(run)
        return {
            "model": self.retriever.name,
            "paradigm": self.retriever.paradigm,
            "engine": self.retriever.engine,
            "dataset": task.metadata.name,
            "subset": subset,
            "split": part,
            "documents": len(data["corpus"]),
            "queries": len(data["queries"]),
            **evaluate_run(data["relevant_docs"], run, self.protocol.metrics, self.protocol.relevance_level),
            **self.retriever.figures(),
            "run": str(run_file),
        }


def _retriever(model: Any, engine: str, protocol: Protocol, load_options: dict[str, Any], **settings: Any) -> Retriever:
    if isinstance(model, Retriever):
        return model
    if model == "bm25":
        return Bm25Retriever(**(settings["engine_parameters"] or {}))
    if isinstance(model, str | Path):
        from lion_st.models import load

        settings["name"] = settings["name"] or str(model).rstrip("/").split("/")[-1]
        model = load(model, **load_options)
    return ModelRetriever(
        model, engine, query_tokens=protocol.query_tokens, document_tokens=protocol.document_tokens, **settings
    )
