"""Exact search on a GPU: what sparse and dense vectors have in common.

Documents lie on the device in chunks. The scores of a batch of queries are first taken in low precision, with a bound
on how far they can be off. Documents that by this bound may be among the best are few, and these alone are scored
again, in float64. Results are therefore exact whatever the vectors are, and equal scores are ranked in the order in
which their documents were added.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from lion_st.errors import require_at_least
from lion_st.indexes.base import LocalIndex, Paradigm

logger = logging.getLogger(__name__)
_process = os.getpid()

DOCUMENTS = 262_144  # of a chunk
GROUP = 64  # documents of which the highest score alone is looked at first
WORKSPACE = 2**28  # bytes of a batch's scores
BATCH = 512  # queries of a batch, at most: sparse ones take a number for each term of the vocabulary
FREE_SHARE = 0.15  # of a GPU's memory that chunks leave free, by default
NONE = torch.iinfo(torch.int64).min  # the key of no document
ROUNDING = 2.0**-8  # share by which a number in bfloat16 is off at most
ADDING = 2.0**-23  # and each addition in float32, that of tensor cores included
MIXED_PRODUCTS = Version(torch.__version__) >= Version("2.8")  # of bfloat16, summed in float32


class Approximation(NamedTuple):
    """Scores in low precision.

    Attributes:
        scores: float32 [Q, columns], a column for each document of a chunk and more, in multiples of `GROUP`.
        relative: They are off by at most this share of the true ones, which are not negative,
        absolute: and float32 [Q, 1] besides.
    """

    scores: Tensor
    relative: float
    absolute: Tensor


class TorchIndex(LocalIndex):
    """Exact search by torch on a GPU.

    Args:
        paradigm: "sparse" or "dense".
        device: Torch device, "cuda:1" for example; None takes the GPU, under torchrun each process its own, or the CPU
            where there is none.
        memory_gb: Gigabytes (1e9 bytes) of the GPU's memory that documents may take; None leaves 15 % of it free. What
            does not fit stays in main memory and is copied to the GPU by each search, of any number of queries.

    Raises:
        ValueError: If there is no such device.
    """

    engine = "torch"
    parameters = ("device", "memory_gb")
    not_saved = ("device", "memory_gb")
    lowest = -torch.inf  # only documents with a score above it are found

    def __init__(self, paradigm: Paradigm, device: str | None = None, memory_gb: float | None = None) -> None:
        super().__init__(paradigm)
        require_at_least(0.0, memory_gb=0.0 if memory_gb is None else memory_gb)
        if device is not None:
            _usable(device)
        self.device = device
        self.memory_gb = memory_gb
        self._parts: list[Any] = []  # as they were added
        self._chunks: list[Any] = []
        self._place: torch.device | None = None

    def _search(self, queries: Any, k: int, threads: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        with self._lock, torch.inference_mode():
            chunks = self._ready()
            assert self._place is not None
            with _working_on(self._place, threads):
                best = self._search_chunks(chunks, queries, k, allowed, self._place)
        ordered = best >> 32
        bits = np.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).astype(np.int32)
        rows = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        return np.where(best == NONE, -1, rows), np.where(best == NONE, 0, bits.view(np.float32)).astype(np.float32)

    def _search_chunks(
        self, chunks: list[Any], queries: Any, k: int, allowed: np.ndarray | None, device: torch.device
    ) -> np.ndarray:
        count = queries.shape[0]
        best = torch.full((count, k), NONE, device=device)
        largest = max(chunk.size for chunk in chunks)
        step = max(1, min(BATCH, WORKSPACE // (4 * largest + 64 * min(k, largest))))
        parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
        there = self._queries(queries, device)
        only = self._batch(there, parts[0]) if len(parts) == 1 else None
        for chunk in chunks:
            own = None if allowed is None else allowed[chunk.first : chunk.first + chunk.size]
            if own is not None and not own.any():
                continue
            hidden = None if own is None else torch.tensor(~own, device=device)
            here = moved(chunk, device)
            for part in parts:
                batch = self._batch(there, part) if only is None else only
                scores, relative, absolute = self._approximate(here, batch)
                scores[:, chunk.size :] = -torch.inf
                if hidden is not None:
                    scores[:, : chunk.size].masked_fill_(hidden, -torch.inf)
                query, document = candidates(Approximation(scores, relative, absolute), best[part], self.lowest)
                if len(query):
                    keys = keys_of(self._exact(here, batch, query, document), document + chunk.first)
                    best[part] = merged(best[part], query, keys)
        return best.cpu().numpy()

    def _ready(self) -> list[Any]:
        """All chunks, once what was added last has its own."""
        place = _usable(self.device or _default_device())
        if place != self._place:
            if place.type == "cpu" and self.device is None:
                logger.warning("There is no GPU: the engine 'torch' searches on the CPU, where 'exact' is faster.")
            self._place, self._chunks = place, []
        done = sum(chunk.size for chunk in self._chunks)
        if done < len(self.ids) and self._chunks and self._chunks[-1].size < DOCUMENTS:
            done -= self._chunks.pop().size
        with torch.inference_mode(), _current(place):
            for first in range(done, len(self.ids), DOCUMENTS):
                chunk = self._make_chunk(first, min(first + DOCUMENTS, len(self.ids)), place)
                self._chunks.append(chunk if self._fits(chunk, place) else _in_main_memory(chunk))
        waiting = sum(chunk.size for chunk in self._chunks if not is_on(chunk, place))
        if waiting and done < len(self.ids):
            logger.warning(
                "%s of %s documents do not fit on %s and are copied there by each search: search many queries at once.",
                f"{waiting:,}",
                f"{len(self.ids):,}",
                place,
            )
        return self._chunks

    def _fits(self, chunk: Any, device: torch.device) -> bool:
        """Whether a chunk, which is on the device, may stay there."""
        if device.type != "cuda":
            return True
        if self.memory_gb is None:
            torch.cuda.empty_cache()  # of what making the chunk took
            free, total = torch.cuda.mem_get_info(device)
            return free >= FREE_SHARE * total
        taken = sum(size_of(one) for one in self._chunks if is_on(one, device))
        return taken + size_of(chunk) <= self.memory_gb * 1e9

    def _bytes(self) -> int | None:
        chunks = list(self._chunks)  # the first search makes them: a machine that builds an index need not hold them
        return sum(map(size_of, chunks)) if sum(chunk.size for chunk in chunks) == len(self.ids) else None

    @abstractmethod
    def _make_chunk(self, first: int, stop: int, device: torch.device) -> Any:
        """What is searched of the documents of some rows, on the device: a NamedTuple with `first` and `size`."""

    @abstractmethod
    def _queries(self, queries: Any, device: torch.device) -> Any:
        """All queries on the device, as they were given."""

    @abstractmethod
    def _batch(self, queries: Any, part: slice) -> Any:
        """Some of the queries that `_queries` returned, in the form that chunks are searched with."""

    @abstractmethod
    def _approximate(self, chunk: Any, batch: Any) -> Approximation:
        """Scores of a batch with a chunk; the columns that belong to no document may hold anything."""

    @abstractmethod
    def _exact(self, chunk: Any, batch: Any, query: Tensor, document: Tensor) -> Tensor:
        """Scores, float32 [P], of pairs of a batch's queries and a chunk's documents, summed in float64."""


def candidates(approximation: Approximation, best: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
    """The documents of a chunk that may be among the k best of each query.

    Args:
        approximation: Their scores.
        best: int64 [Q, k], keys of the best documents of earlier chunks, falling.
        lowest: Documents with scores no higher are not found.

    Returns:
        Queries and documents, int64 [P] each, by rising query.
    """
    scores, relative, absolute = approximation
    queries, columns = scores.shape
    k = best.shape[1]
    size = GROUP
    while size > 1 and columns // size < 4 * k:
        size //= 2
    grouped = scores.view(queries, -1, size)
    highest = grouped.amax(2)
    # k documents are known to score as high as the k-th of the groups' highest, and the k best of earlier chunks.
    floor = scores_of(best[:, -1:]) * (1 - relative) - absolute
    if highest.shape[1] >= k:
        floor = torch.maximum(floor, highest.topk(k).values[:, -1:] * (1 - 2 * relative) - 2 * absolute)
    if queries == 1:  # one look at the device's numbers in place of two, for which a single query mostly waits
        place, document = ((scores >= floor) & (scores > lowest)).nonzero(as_tuple=True)
        return place, document
    query, group = ((highest >= floor) & (highest > lowest)).nonzero(as_tuple=True)
    members = grouped[query, group]
    place, member = ((members >= floor[query]) & (members > lowest)).nonzero(as_tuple=True)
    return query[place], group[place] * size + member


def keys_of(scores: Tensor, rows: Tensor) -> Tensor:
    """One number for a score and a row: of a higher score it is larger, and of equal ones that of the earlier row."""
    bits = (scores + 0.0).view(torch.int32).long()  # of -0.0 there remains 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered << 32) | (0xFFFFFFFF - rows)


def scores_of(keys: Tensor) -> Tensor:
    """The scores of keys, -inf for that of no document."""
    ordered = keys >> 32
    bits = torch.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).int()
    return torch.where(keys == NONE, -torch.inf, bits.view(torch.float32))


def merged(best: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """The k largest keys of each query, falling: of those it had [Q, k], and those found for some, by rising query."""
    queries, k = best.shape
    if queries == 1:
        return torch.cat([keys[None], best], dim=1).topk(k).values
    starts = torch.searchsorted(query, torch.arange(queries + 1, device=best.device))
    width = int(starts.diff().max())
    table = torch.full((queries, width + k), NONE, device=best.device)
    table[:, width:] = best
    place = torch.arange(len(query), device=best.device) - starts[query]
    table[query, place] = keys
    return table.topk(k).values


def product(queries: Tensor, documents: Tensor) -> Tensor:
    """The inner products, float32 [Q, N], of bfloat16 [Q, D] and bfloat16 [N, D]."""
    if queries.is_cuda and MIXED_PRODUCTS:
        return torch.mm(queries, documents.T, out_dtype=torch.float32)
    return queries.float() @ documents.float().T


def padded(count: int) -> int:
    """Columns for so many documents."""
    return -(-count // GROUP) * GROUP


def moved(chunk: Any, device: torch.device) -> Any:
    """A chunk with all of its tensors on a device."""
    tensors = {name: one for name, one in chunk._asdict().items() if isinstance(one, Tensor)}
    return chunk._replace(**{name: one.to(device, non_blocking=True) for name, one in tensors.items()})


def is_on(chunk: Any, device: torch.device) -> bool:
    """Whether a chunk's tensors are on a device of this type."""
    return all(one.device.type == device.type for one in chunk if isinstance(one, Tensor))


def size_of(chunk: Any) -> int:
    """Bytes of a chunk's tensors."""
    return sum(one.nbytes for one in chunk if isinstance(one, Tensor))


def _in_main_memory(chunk: Any) -> Any:
    there = moved(chunk, torch.device("cpu"))
    torch.cuda.synchronize()  # of the current GPU, on which the chunk was made
    tensors = {name: one.pin_memory() for name, one in there._asdict().items() if isinstance(one, Tensor)}
    return there._replace(**tensors)


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"  # torchrun's


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is that of torch, such as 'cuda' or 'cuda:1', got {name!r}.") from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"The engine 'torch' searches on CUDA GPUs, got device={name!r}: use the engine 'exact'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} is not there, torch sees {torch.cuda.device_count()} GPUs: use the engine 'exact'."
        )
    return device


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one, on which Triton launches and which `torch.cuda` means."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _working_on(device: torch.device, threads: int) -> Iterator[None]:
    # Autocast of the caller would round what bounds on errors take for float32.
    with torch.autocast(device.type, enabled=False), _current(device):
        if device.type == "cuda":
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(threads if os.getpid() == _process else 1)  # a fork has none, and would wait for them
        try:
            yield
        finally:
            torch.set_num_threads(before)
