"""What can be chosen when a corpus is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Literal

from lion_st.data.fields import TASKS, Task


@dataclass(frozen=True)
class EncodingOptions:
    """The options that `encode_corpus`, which describes them, shares with `encode_corpus_on_ray`."""

    task: Task = "document"
    split: str = "train"
    max_tokens: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    shard_documents: int = 4096
    tokens_per_batch: int = 16_384
    on_bad_record: Literal["skip", "raise"] = "skip"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is 'query' or 'document', got {self.task!r}.")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is 'float32' or 'float16', got {self.dtype!r}.")
        if self.on_bad_record not in ("skip", "raise"):
            raise ValueError(f"on_bad_record is 'skip' or 'raise', got {self.on_bad_record!r}.")
        for name in ("max_tokens", "shard_documents", "tokens_per_batch"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, index(getattr(self, name)))  # numpy's are not JSON
        for name in ("shard_documents", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)!r}.")
