"""Score retrievers on test sets, with result files that resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lion_st.evaluation.metrics import METRICS, evaluate_run
from lion_st.evaluation.mteb_search import MtebSearch, SelfMatches, model_meta
from lion_st.evaluation.tasks import get_task
from lion_st.evaluation.trec import write_run
from lion_st.retrieval.bm25 import Bm25Retriever
from lion_st.retrieval.retriever import ModelRetriever, Retriever
from lion_st.retrieval.storage import write_atomic

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

Row: TypeAlias = dict[str, Any]


def evaluate_retrieval(
    model: SentenceTransformer | SparseEncoder | Retriever | str | Path,
    data: str | Path | Sequence[str | Path],
    engine: str = "exact",
    output_dir: str | Path = "results",
    *,
    split: str = "test",
    top_k: int = 1000,
    self_matches: SelfMatches = "keep",
    metrics: Iterable[str] = METRICS,
    engine_parameters: Mapping[str, Any] | None = None,
    tokens_per_batch: int = 8192,
    threads: int = 1,
    name: str | None = None,
    overwrite: bool = False,
    show_progress: bool = False,
) -> list[Row]:
    """Evaluate a model on retrieval test sets.

    Writes into `output_dir`: mteb's result objects (`results/`), TREC runs (`runs/`) and rows of figures (`rows/`).
    A test set whose files are there for the same weights, data and settings is read back instead of run again.

    Args:
        model: A loaded model, a path or Hub id for `lion_st.load`, "bm25", or any `Retriever`.
        data: BEIR folders and mteb task names, see `get_task`.
        engine: Index engine, see `create_index`.
        output_dir: Folder of the result files.
        split: Split of BEIR folders.
        top_k: Documents retrieved per query.
        self_matches: See `MtebSearch`.
        metrics: See `evaluate_queries`.
        engine_parameters: Settings of the engine.
        tokens_per_batch: Padded tokens per batch when encoding.
        threads: CPU threads of the search.
        name: Name of the model in tables and files.
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
    import mteb

    retriever = _retriever(model, engine, engine_parameters, tokens_per_batch, threads, name)
    metrics = list(metrics)
    output = Path(output_dir)
    experiment = {"top_k": top_k, "self_matches": self_matches, **(engine_parameters or {})}
    meta = model_meta(retriever, **experiment)
    cache = mteb.ResultCache(output)
    sources = [data] if isinstance(data, str | Path) else list(data)
    rows: list[Row] = []
    for source in sources:
        task = get_task(source, split)
        settings = [meta.revision, task.metadata.revision, retriever.engine, experiment, metrics]
        key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        stem = f"{task.metadata.name}.{retriever.name.replace('/', '__')}.{retriever.engine}.{key}"
        row_file = output / "rows" / f"{stem}.json"
        result_file = cache.get_task_result_path(task.metadata.name, meta)
        if not overwrite and row_file.exists() and result_file.exists():
            rows += json.loads(row_file.read_text(encoding="utf-8"))
            continue
        search = MtebSearch(retriever, top_k=top_k, self_matches=self_matches, meta=meta, show_progress=show_progress)
        mteb.evaluate(
            search, task, cache=cache, overwrite_strategy="always", co2_tracker=False, show_progress_bar=False
        )
        task.load_data()
        new = []
        for (_, subset, part), run in search.runs.items():
            run_file = output / "runs" / f"{stem}.{subset}.{part}.trec"
            write_run(run_file, run, tag=retriever.name.replace(" ", "_"))
            split_data = task.dataset[subset][part]
            new.append(
                {
                    "model": retriever.name,
                    "paradigm": retriever.paradigm,
                    "engine": retriever.engine,
                    "dataset": task.metadata.name,
                    "subset": subset,
                    "split": part,
                    "documents": len(split_data["corpus"]),
                    "queries": len(split_data["queries"]),
                    **evaluate_run(split_data["relevant_docs"], run, metrics),
                    **retriever.figures(),
                    "run": str(run_file),
                }
            )
        row_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(row_file, json.dumps(new, indent=1).encode())
        rows += new
    return rows


def _retriever(
    model: Any,
    engine: str,
    engine_parameters: Mapping[str, Any] | None,
    tokens_per_batch: int,
    threads: int,
    name: str | None,
) -> Retriever:
    if isinstance(model, Retriever):
        return model
    if model == "bm25":
        return Bm25Retriever(**(engine_parameters or {}))
    if isinstance(model, str | Path):
        from lion_st.models import load

        name = name or str(model).rstrip("/").split("/")[-1]
        model = load(model)
    return ModelRetriever(
        model,
        engine,
        engine_parameters=engine_parameters,
        tokens_per_batch=tokens_per_batch,
        threads=threads,
        name=name,
    )
