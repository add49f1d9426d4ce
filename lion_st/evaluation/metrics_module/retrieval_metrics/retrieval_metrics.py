"""trec_eval's retrieval metrics as a Hugging Face `evaluate` module."""

import datasets
import evaluate

from lion_st.evaluation.metrics import METRICS, evaluate_run

_DESCRIPTION = """\
nDCG, MRR, Recall, MAP, precision and capped recall of ranked document lists, with trec_eval's treatment of equal
scores, of documents without judgements and of queries without results (give those an entry with empty lists).
A metric is named as nDCG@10, MRR@10, Recall@100, MAP or
R_cap@100."""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: one entry a query, {"query": id, "documents": [ids], "scores": [floats]}.
    references: one entry a query, {"query": id, "documents": [ids], "relevance": [whole numbers]}.
    metrics: names of metrics.
Returns:
    the mean of each metric over the queries of the references.
Examples:
    >>> metric = evaluate.load("lion_st/evaluation/metrics_module/retrieval_metrics")
    >>> metric.compute(
    ...     predictions=[{"query": "q", "documents": ["d2", "d1"], "scores": [2.0, 1.0]}],
    ...     references=[{"query": "q", "documents": ["d1"], "relevance": [1]}],
    ...     metrics=["MRR@10"],
    ... )
    {'MRR@10': 0.5}
"""

_CITATION = """\
@inproceedings{VanGysel2018pytreceval,
  title = {Pytrec\\_eval: An Extremely Fast Python Interface to trec\\_eval},
  author = {Van Gysel, Christophe and de Rijke, Maarten},
  booktitle = {SIGIR},
  year = {2018}
}"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalMetrics(evaluate.Metric):
    """Ranked lists against relevance judgements."""

    def _info(self):
        features = datasets.Features(
            {
                "predictions": {
                    "query": datasets.Value("string"),
                    "documents": datasets.Sequence(datasets.Value("string")),
                    "scores": datasets.Sequence(datasets.Value("float64")),
                },
                "references": {
                    "query": datasets.Value("string"),
                    "documents": datasets.Sequence(datasets.Value("string")),
                    "relevance": datasets.Sequence(datasets.Value("int64")),
                },
            }
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation=_CITATION, inputs_description=_KWARGS_DESCRIPTION, features=features
        )

    def _compute(self, predictions, references, metrics=METRICS):
        return evaluate_run(_by_query(references, "relevance"), _by_query(predictions, "scores"), metrics)


def _by_query(rows, column):
    found = {}
    for row in rows:
        values = dict(zip(row["documents"], row[column], strict=True))
        if row["query"] in found or len(values) < len(row["documents"]):
            raise ValueError(f"The query {row['query']!r}, or one of its documents, occurs twice: give each once.")
        found[row["query"]] = values
    return found
