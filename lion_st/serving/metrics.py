"""Prometheus metrics, named as those of text-embeddings-inference where it has them."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # folder in which the workers of a server add up what they count
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = tuple(4**power for power in range(2, 9))


class Metrics:
    """What a server counts and measures; all durations are seconds."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        self.requests = Counter("te_request_count", "Requests.", ["method"], registry=registry)
        self.successes = Counter("te_request_success", "Requests that were answered.", ["method"], registry=registry)
        self.failures = Counter("te_request_failure", "Requests that got an error.", ["err"], registry=registry)
        self.duration = histogram("te_request_duration", "From a request to its answer.")
        self.tokenization = histogram("te_request_tokenization_duration", "Tokenizing a request's texts.")
        self.queueing = histogram("te_request_queue_duration", "Waiting for the model.")
        self.inference = histogram("te_request_inference_duration", "The batch in which a request was encoded.")
        self.input_length = histogram("te_request_input_length", "Tokens of a request.", TOKENS)
        self.batch_texts = histogram("te_batch_next_size", "Texts of a batch.", COUNTS)
        self.batch_tokens = histogram("te_batch_next_tokens", "Tokens of a batch.", TOKENS)
        self.queue = Gauge(
            "te_queue_size", "Texts that wait for the model.", registry=registry, multiprocess_mode="livesum"
        )
        self.search = histogram("lion_st_search_duration", "Searching the index, without encoding.")
        self.documents = Gauge(
            "lion_st_index_documents", "Documents of the index.", registry=registry, multiprocess_mode="livemostrecent"
        )
        self.reloads = Counter(
            "lion_st_index_reloads", "Indexes that were opened while serving.", ["result"], registry=registry
        )

    def text(self) -> bytes:
        """All metrics, of all workers, in Prometheus' text format."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
