"""Work that goes on in threads while the caller's own thread keeps the model busy.

Threads suffice here: tokenizers, checksums and disks run without Python's lock, which tokenizing holds for an eighth of
its time. They are started for one encoding and have ended when it returns, whatever it returns or raises, so that a
process can be forked at any other time; processes of our own would have to be forked, which loses locks and the threads
of tokenizers, or started anew, which takes seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any, TypeVar

import torch
from scipy import sparse

Item = TypeVar("Item")
Result = TypeVar("Result")

_END: Any = object()


def computed_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The function's results in order; a thread computes the next one while one is in use.

    The items themselves are read by the caller's thread, which what they come from may insist on.
    """
    with ThreadPoolExecutor(1) as thread:
        coming: Future[Result] | None = None
        for item in items:
            following = thread.submit(function, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in order; a thread reads the next one while one is in use."""
    iterator = iter(items)
    for item in computed_ahead(lambda _: next(iterator, _END), repeat(None)):
        if item is _END:
            return
        yield item


@contextmanager
def done_behind() -> Iterator[Callable[..., None]]:
    """A function that has others called by a thread, one after the other, and waits while two are to be called.

    What they raise is raised by the next call, or in the end. All have returned when the block is left.

    Example:
        ::

            with done_behind() as behind:
                for number, vectors in enumerate(parts):
                    behind(write, number, vectors)
    """
    calls: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def behind(function: Callable[..., Any], *arguments: Any) -> None:
            while calls and (len(calls) > 1 or calls[0].done()):
                calls.popleft().result()
            calls.append(thread.submit(function, *arguments))

        yield behind
        for call in calls:
            call.result()


class HostCopy:
    """Vectors on their way to the host's memory.

    Those of a CUDA device are copied into pinned memory while the device goes on with what it is given next, and nobody
    waits before `get`, which any thread may call. On all other devices they are copied at once.

    Args:
        vectors: Dense or sparse [B, V].
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        self._shape = tuple(vectors.shape)
        self._is_sparse = vectors.layout == torch.sparse_csr
        parts = [vectors]
        if self._is_sparse:
            parts = [vectors.values(), vectors.col_indices(), vectors.crow_indices()]
        in_background = vectors.is_cuda and (self._is_sparse or vectors.layout == torch.strided)
        self._parts = [part.to("cpu", non_blocking=in_background) for part in parts]
        self._copied: torch.cuda.Event | None = None
        if in_background:
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record(torch.cuda.current_stream(vectors.device))

    def get(self) -> Any:
        """The vectors: a scipy CSR array of a CSR tensor, else a tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._is_sparse:
            return self._parts[0]
        values, *indices = self._parts
        parts = (values.float().numpy(), *(part.numpy() for part in indices))
        return sparse.csr_array(parts, shape=self._shape)
