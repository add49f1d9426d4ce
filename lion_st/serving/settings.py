"""What a server is started with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lion_st.data.fields import TASKS, Task


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `serve`; limits are named as in text-embeddings-inference where it has them.

    Attributes:
        model: Checkpoint that encodes, a folder or a Hub repository.
        index: Folder of an index of its documents, for `/search`; it is read again when it is built anew. `serve` also
            takes the name of one on the Hub, `owner/name`, and stays with the commit that it then has.
        corpus: The documents, as `encode_corpus` reads them, whose texts `/search` answers with; they are read again
            with the index.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        workers: Processes, each with the model; they share an index and texts by memory mapping.
        default_task: What the texts of `/embed` and `/embed_sparse` are where a request has no `prompt_name`.
        auto_truncate: Cut long texts where a request does not say `truncate`; else they are refused.
        max_batch_tokens: Tokens of a forward pass, padding included.
        max_client_batch_size: Texts of one request.
        max_concurrent_requests: Texts that a worker holds at a time; further ones get 429.
        payload_limit: Bytes of a request's body; a longer one gets 413.
        max_k: Documents per query that a search may ask for.
        timeout: Seconds from which a request gets 504.
        api_key: Bearer token that requests need, but for `/health` and `/metrics`.
        reload_seconds: How often to look whether the index was built anew; 0 never does.
        search_threads: Searches at a time in a worker.
        allow_other_model: Search an index that a model of other weights made; its dimensions have to fit all the same.
        verify: Compare the checksums of the whole index when it is opened, and not of its small files alone.
        idf: Multiply the weights of the terms of what is searched for by how rare they are in the index, see
            `DocumentFrequencies.weigh`.
        load_options: Further arguments of `load_encoder`: device, dtype, revision, query_max_active_dims,
            document_max_active_dims.
        index_revision: Commit, tag or branch of an index on the Hub.

    Raises:
        ValueError: If a value is out of range.
    """

    model: str
    index: str | None = None
    corpus: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    default_task: Task = "document"
    auto_truncate: bool = True
    max_batch_tokens: int = 16_384
    max_client_batch_size: int = 32
    max_concurrent_requests: int = 512
    payload_limit: int = 2_000_000
    max_k: int = 1000
    timeout: float = 60.0
    api_key: str | None = field(default=None, repr=False)
    reload_seconds: float = 5.0
    search_threads: int = 1
    allow_other_model: bool = False
    verify: bool = True
    idf: bool = False
    load_options: Mapping[str, Any] = field(default_factory=dict)
    index_revision: str | None = None

    def __post_init__(self) -> None:
        counts = ("workers", "max_batch_tokens", "max_client_batch_size", "max_concurrent_requests", "payload_limit")
        for name in (*counts, "max_k", "search_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}.")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port is between 0 and 65535, got {self.port}.")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is a finite number of seconds above 0, got {self.timeout}.")
        if not 0 <= self.reload_seconds < math.inf:
            raise ValueError(f"reload_seconds is a finite number of at least 0, got {self.reload_seconds}.")
        if self.default_task not in TASKS:
            raise ValueError(f"default_task is 'query' or 'document', got {self.default_task!r}.")
        if self.max_client_batch_size > self.max_concurrent_requests:
            raise ValueError(
                f"A request of max_client_batch_size={self.max_client_batch_size} texts would never fit into "
                f"max_concurrent_requests={self.max_concurrent_requests}: raise the latter."
            )
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii() or " " in self.api_key):
            raise ValueError("api_key is ASCII without spaces, and not empty: leave it out to ask for none.")
        if self.corpus == "-":
            raise ValueError("corpus is read again with the index, and the standard input only once: give a file.")
        if self.corpus is not None and self.index is None:
            raise ValueError("corpus gives the texts of what a search finds: give an index with it.")
        if self.idf and self.index is None:
            raise ValueError("idf weighs the terms of a search by how rare they are in the index: give one with it.")
