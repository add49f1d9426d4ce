"""The evaluation settings of the Lion paper (arXiv 2502.15526, section 4.1 and the released code)."""

from __future__ import annotations

from dataclasses import dataclass

from lion_st.evaluation.metrics import METRICS
from lion_st.evaluation.mteb_search import SelfMatches


@dataclass(frozen=True)
class Protocol:
    """Lengths, depth and metrics of an evaluation.

    Attributes:
        query_length, document_length: Lengths to cut texts to; None leaves the model's own.
        top_k: Documents retrieved per query.
        self_matches: See `MtebSearch`. The released code drops a document that has its query's id after cutting the
            ranking, so that some rankings are one short; others ask for one more first.
        metrics: See `evaluate_queries`.
        relevance_level: Lowest relevant grade.
    """

    query_length: int | None = None
    document_length: int | None = None
    top_k: int = 1000
    self_matches: SelfMatches = "task"
    metrics: tuple[str, ...] = METRICS
    relevance_level: int = 1


PROTOCOLS = {
    "model": Protocol(),
    "msmarco": Protocol(64, 192, 1000, "keep", ("MRR@10", "Recall@1000", "nDCG@10")),
    "trec-dl": Protocol(64, 192, 1000, "keep", ("nDCG@10", "MAP", "MRR@10", "Recall@1000"), relevance_level=2),
    "beir": Protocol(512, 512, 100, "drop_after_cut", ("nDCG@10", "Recall@100", "R_cap@100", "MRR@10", "MAP")),
}


def get_protocol(name: str | Protocol) -> Protocol:
    """Look a protocol up by name; one that is given itself is returned."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
