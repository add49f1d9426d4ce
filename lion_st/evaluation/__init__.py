"""Measuring retrieval: test sets, metrics, TREC files, and mteb.

The names below are imported on first use: a table or a metric is had without importing what encodes and searches.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.data.records import read_topics
    from lion_st.data.trec import read_qrels, read_run
    from lion_st.evaluation.compare import Comparison, compare_runs
    from lion_st.evaluation.evaluate import evaluate_retrieval, open_retriever
    from lion_st.evaluation.hybrid import fit_fusion, fit_hybrid, fit_run_weights, fuse_runs
    from lion_st.evaluation.metrics import METRICS, Qrels, Run, evaluate_queries, evaluate_run
    from lion_st.evaluation.mteb_search import MtebSearch, document_text
    from lion_st.evaluation.protocols import PROTOCOLS, Protocol
    from lion_st.evaluation.pruning import prune_report, trade_off_figure, write_prune_report
    from lion_st.evaluation.tasks import folder_task, get_task, get_task_groups, trec_task
    from lion_st.evaluation.trec import drop_self_matches, write_qrels, write_run
    from lion_st.indexes.fusion import hits_to_run
    from lion_st.tables import format_table

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
    "fit_fusion",
    "fit_hybrid",
    "fit_run_weights",
    "folder_task",
    "format_table",
    "fuse_runs",
    "get_task",
    "get_task_groups",
    "hits_to_run",
    "open_retriever",
    "prune_report",
    "read_qrels",
    "read_run",
    "read_topics",
    "trade_off_figure",
    "trec_task",
    "write_prune_report",
    "write_qrels",
    "write_run",
]

__getattr__, __dir__ = attach(__name__)
