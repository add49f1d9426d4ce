"""Measuring retrieval: test sets, metrics, TREC files, and mteb."""

from __future__ import annotations

from pathlib import Path

from lion_st.evaluation.compare import Comparison, compare_runs
from lion_st.evaluation.evaluate import evaluate_retrieval
from lion_st.evaluation.metrics import METRICS, Qrels, Run, evaluate_queries, evaluate_run
from lion_st.evaluation.mteb_search import MtebSearch, document_text
from lion_st.evaluation.protocols import PROTOCOLS, Protocol
from lion_st.evaluation.pruning import prune_report, trade_off_figure
from lion_st.evaluation.tables import format_table
from lion_st.evaluation.tasks import folder_task, get_task, trec_task
from lion_st.evaluation.trec import drop_self_matches, hits_to_run, read_qrels, read_run, read_topics, write_run

# A Hugging Face metric module: evaluate.load(str(METRICS_MODULE))
METRICS_MODULE = Path(__file__).parent / "metrics_module" / "retrieval_metrics"

__all__ = [
    "METRICS",
    "METRICS_MODULE",
    "PROTOCOLS",
    "Comparison",
    "MtebSearch",
    "Protocol",
    "Qrels",
    "Run",
    "compare_runs",
    "document_text",
    "drop_self_matches",
    "evaluate_queries",
    "evaluate_retrieval",
    "evaluate_run",
    "folder_task",
    "format_table",
    "get_task",
    "hits_to_run",
    "prune_report",
    "read_qrels",
    "read_run",
    "read_topics",
    "trade_off_figure",
    "trec_task",
    "write_run",
]
