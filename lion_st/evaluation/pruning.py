"""What static pruning costs and saves, measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from scipy import sparse

from lion_st.encoding.shards import EncodedCorpus
from lion_st.encoding.vectors import active_dims, to_csr
from lion_st.errors import require_type
from lion_st.evaluation.metrics import Qrels, evaluate_run, require_metrics
from lion_st.extras import require
from lion_st.files import atomic_file, atomic_write, require_free
from lion_st.indexes import create_index
from lion_st.indexes.fusion import hits_to_run
from lion_st.indexes.pruning import Pruning
from lion_st.tables import format_table

DEFAULT_SETTINGS = (
    Pruning(),
    *(Pruning(top_terms=count) for count in (256, 128, 64, 32, 16)),
    *(Pruning(threshold=weight) for weight in (0.2, 0.4, 0.6, 0.8)),
)


def prune_report(
    documents: EncodedCorpus | tuple[Sequence[str], sparse.csr_array],
    queries: tuple[Sequence[str], sparse.csr_array],
    qrels: Qrels,
    settings: Sequence[Pruning] = DEFAULT_SETTINGS,
    metrics: Sequence[str] = ("nDCG@10", "Recall@100"),
    k: int = 100,
) -> list[dict[str, Any]]:
    """Score, size and latency of the exact index for each pruning of the documents.

    Args:
        documents: An encoded corpus, read shard by shard for each pruning so that memory holds no more than one index;
            or ids and vectors [N, V].
        queries: Ids and vectors [Q, V].
        qrels: Relevance judgements.
        settings: Prunings of the documents.
        metrics: See `evaluate_queries`.
        k: Documents per query.

    Returns:
        One row per pruning: `documents` (the setting as text), `document_terms`, `query_terms` (mean active terms),
        `index_bytes`, `ms_per_query` (one thread, one query at a time), and the metrics.

    Raises:
        ValueError: If a metric is unknown or looks deeper than `k`.
    """
    require_metrics(metrics, k)
    remedy = "lion_st.encoding.EncodedCorpus(folder)"
    require_type(documents, EncodedCorpus | tuple | list, "Ids and vectors of documents", f"{remedy} reads them")
    require_type(queries, tuple | list, "Ids and vectors of queries", f"{remedy}.whole() reads them")
    parts: Any = documents if isinstance(documents, EncodedCorpus) else [documents]
    query_ids, query_vectors = list(queries[0]), to_csr(queries[1])
    rows = []
    for pruning in settings:
        index, terms = create_index("exact", "sparse"), 0
        for ids, vectors in parts:
            pruned = pruning.apply(vectors)
            index.add(ids, pruned)
            terms += pruned.nnz
        index.search(query_vectors[:1], k)  # builds the postings, outside the timing
        started = perf_counter()
        hits = [index.search(query_vectors[[row]], k)[0] for row in range(len(query_ids))]
        seconds = perf_counter() - started
        rows.append(
            {
                "documents": str(pruning),
                "document_terms": terms / max(1, len(index)),
                "query_terms": active_dims(query_vectors),
                "index_bytes": index.stats()["bytes"],
                "ms_per_query": 1000 * seconds / len(query_ids),
                **evaluate_run(qrels, hits_to_run(query_ids, hits), metrics),
            }
        )
    return rows


def write_prune_report(
    folder: str | Path,
    documents: EncodedCorpus | tuple[Sequence[str], sparse.csr_array],
    queries: tuple[Sequence[str], sparse.csr_array],
    qrels: Qrels,
    *,
    metrics: Sequence[str] = ("nDCG@10", "Recall@100"),
    overwrite: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write what `prune_report` measures into a folder: a table, its rows, and two figures.

    The files are `report.md`, `report.json`, `quality-size.svg` and `quality-latency.svg`; the figures show the first
    metric against the size of the index and against the milliseconds a query takes.

    Args:
        folder: Folder of the files.
        documents: See `prune_report`.
        queries: Ids and vectors [Q, V].
        qrels: Relevance judgements.
        metrics: See `evaluate_queries`.
        overwrite: Replace earlier files.
        options: Further arguments of `prune_report`.

    Returns:
        The rows.

    Raises:
        FileExistsError: If one of the files is there and `overwrite` is False.
    """
    folder = Path(folder)
    for name in ("report.md", "report.json", "quality-size.svg", "quality-latency.svg"):
        require_free(folder / name, overwrite)
    rows = prune_report(documents, queries, qrels, metrics=metrics, **options)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "report.md", f"{format_table(rows)}\n")
    atomic_write(folder / "report.json", json.dumps(rows, indent=1))
    trade_off_figure(rows, folder / "quality-size.svg", "index_bytes", metrics[0], overwrite)
    trade_off_figure(rows, folder / "quality-latency.svg", "ms_per_query", metrics[0], overwrite)
    return rows


def trade_off_figure(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    x: str = "index_bytes",
    y: str = "nDCG@10",
    overwrite: bool = False,
) -> Path:
    """Draw one column of rows such as `prune_report` returns against another as an SVG file, with names of the points.

    Raises:
        FileExistsError: If the file is there and `overwrite` is False.
    """
    require_free(path, overwrite)
    figure = require("matplotlib.figure").Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        label = "unpruned" if row["documents"] == "none" else row["documents"]
        axes.plot(row[x], row[y], "o", color="#b5541c")
        axes.annotate(label, (row[x], row[y]), (5, 3), textcoords="offset points", fontsize=8)
    axes.set(xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path
