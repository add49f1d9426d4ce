"""A corpus read into lists of records, a shard's worth each, counting what is left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.data.fields import Task
from lion_st.data.files import file_kind
from lion_st.data.records import BadRecord, Corpus, Record, corpus_files, read_corpus
from lion_st.encoding.options import EncodingOptions

MAX_EXAMPLES = 20  # skipped records that the manifest names


@dataclass
class CorpusCounts:
    """What reading a corpus to its end found."""

    shards: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: list[str] = field(default_factory=list)  # the first skipped records


class ShardReader:
    """The usable records of a corpus in lists of `shard_documents`, counting what is skipped.

    Attributes:
        counts: Complete once the iteration has ended.
    """

    def __init__(self, corpus: Corpus, options: EncodingOptions) -> None:
        self.corpus = corpus
        self.options = options
        self.counts = CorpusCounts()

    def __iter__(self) -> Iterator[list[Record]]:
        earlier = _SeenIds()
        records: dict[str, Record] = {}
        for item in read_corpus(self.corpus, self.options.split, self.options.task):
            if isinstance(item, BadRecord):
                self._skip(item.reason, item.message)
            elif item.id in records or item.id in earlier:
                self._skip("duplicate id", item.id)
            else:
                records[item.id] = item
            if len(records) == self.options.shard_documents:
                yield self._shard(records)
                earlier.add(records)
                records = {}
        if records:
            yield self._shard(records)
        if not self.counts.documents:
            place = self.corpus if isinstance(self.corpus, str | Path) else f"of type {type(self.corpus).__name__}"
            example = f" The first: {self.counts.examples[0]}" if self.counts.examples else ""
            raise ValueError(
                f"The corpus {place} has no usable record; skipped: {dict(self.counts.skipped)}.{example[:400]}"
            )

    def _shard(self, records: dict[str, Record]) -> list[Record]:
        self.counts.shards += 1
        self.counts.documents += len(records)
        return list(records.values())

    def _skip(self, reason: str, message: str) -> None:
        if self.options.on_bad_record == "raise":
            raise ValueError(f"Bad record ({reason}): {message} Mend the corpus or pass on_bad_record='skip'.")
        self.counts.skipped[reason] += 1
        if len(self.counts.examples) < MAX_EXAMPLES:
            self.counts.examples.append(f"{reason}: {message}")


class _SeenIds:
    """A set of ids in 8 bytes each: their 64-bit hashes, sorted."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)

    def __contains__(self, identifier: str) -> bool:
        one = self._hash([identifier])[0]
        place = self._hashes.searchsorted(one)
        return bool(place < self._hashes.size and self._hashes[place] == one)

    def add(self, identifiers: Iterable[str]) -> None:
        hashes = np.sort(self._hash(identifiers))
        self._hashes = np.insert(self._hashes, self._hashes.searchsorted(hashes), hashes)

    @staticmethod
    def _hash(identifiers: Iterable[str]) -> np.ndarray:
        digests = b"".join(hashlib.blake2b(one.encode(), digest_size=8).digest() for one in identifiers)
        return np.frombuffer(digests, dtype=np.uint64)


def records_digest(records: Iterable[Record]) -> str:
    """SHA-256 over ids and texts, in their order."""
    digest = hashlib.sha256()
    for record in records:
        for part in record:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def progress_bar(corpus: Corpus, show: bool, task: Task = "document") -> Any:
    """A bar over the documents of a corpus, with a total where that is cheap to know."""
    from tqdm.auto import tqdm

    return tqdm(total=_count_documents(corpus, task) if show else None, desc="Encoding", unit="doc", disable=not show)


def _count_documents(corpus: Corpus, task: Task) -> int | None:
    """Lines or rows of plain files; None for compressed or remote ones, whose counting would read them twice."""
    files = corpus_files(corpus, task) if isinstance(corpus, str | Path) and str(corpus) != "-" else []
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            total += pyarrow.parquet.ParquetFile(file).metadata.num_rows
        elif file.suffix == file_kind(file):
            with file.open("rb") as lines:
                total += sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
        else:
            return None
    return total or None
