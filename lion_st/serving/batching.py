"""Texts of many requests through one model: a thread that encodes whatever waits, up to a budget of tokens, at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter
from traceback import clear_frames
from typing import NamedTuple

import torch

from lion_st.encoding.batches import MAX_TEXTS_PER_BATCH, BatchEncoder, TokenizedTexts
from lion_st.encoding.vectors import Vectors


class Encoded(NamedTuple):
    """Vectors of one request, and how long they took."""

    vectors: Vectors  # in the order of the texts
    queue_seconds: float
    inference_seconds: float


@dataclass
class _Job:
    encoder: BatchEncoder
    texts: Sequence[str]
    tokenized: TokenizedTexts
    tokens: int
    future: Future[Encoded] = field(default_factory=Future)
    submitted: float = field(default_factory=perf_counter)


class EncodingQueue:
    """Encodes texts of requests in the order they came, those of one kind that wait together in one pass.

    Nothing waits for company: what comes while the model is busy makes up the next batch.

    Args:
        max_batch_tokens: Tokens of a batch; a longer request goes alone, and is cut into passes of so many.
        on_batch: Called in the queue's thread with the texts and tokens of each batch.
    """

    def __init__(
        self, max_batch_tokens: int, on_batch: Callable[[int, int], None] = lambda texts, tokens: None
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._gpu_is_lost = False
        self._thread = threading.Thread(target=self._work, name="lion-st-encoding", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Texts that wait."""
        with self._changed:
            return sum(len(job.texts) for job in self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the thread that encodes is there, and its GPU."""
        return self._thread.is_alive() and not self._gpu_is_lost

    def submit(self, encoder: BatchEncoder, texts: Sequence[str], tokenized: TokenizedTexts) -> Future[Encoded]:
        """Have texts encoded; cancelling the future before its turn takes them out of the queue.

        Raises:
            RuntimeError: If the queue is closed.
        """
        job = _Job(encoder, texts, tokenized, int(tokenized.lengths.sum()))
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The server is shutting down.")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Encode what waits, and end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next_batch():
            started = perf_counter()
            self._on_batch(sum(len(job.texts) for job in jobs), sum(job.tokens for job in jobs))
            try:
                self._encode(jobs, started)
            except Exception as error:
                if len(jobs) == 1:
                    self._fail(jobs[0], error)
                    continue
                _let_go_of_tensors(error)
                for job in jobs:  # what one request does to the model is no error of the others
                    self._encode_alone(job)

    def _encode_alone(self, job: _Job) -> None:
        try:
            self._encode([job], perf_counter())
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: _Job, error: Exception) -> None:
        _let_go_of_tensors(error)
        self._gpu_is_lost = is_lost(job.encoder.model.device)
        job.future.set_exception(error)

    def _next_batch(self) -> list[_Job]:
        """The jobs to encode together, once there are any; none once the queue is closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._is_closed)
                batch: list[_Job] = []
                others: deque[_Job] = deque()
                texts = tokens = 0
                for job in self._jobs:
                    fits = not batch or (
                        job.encoder is batch[0].encoder
                        and tokens + job.tokens <= self.max_batch_tokens
                        and texts + len(job.texts) <= MAX_TEXTS_PER_BATCH
                    )
                    if not fits:
                        others.append(job)
                    elif job.future.set_running_or_notify_cancel():
                        batch.append(job)
                        texts += len(job.texts)
                        tokens += job.tokens
                self._jobs = others
                if batch or self._is_closed:
                    return batch

    def _encode(self, jobs: list[_Job], started: float) -> None:
        encoder = jobs[0].encoder
        if len(jobs) == 1:
            tokenized = jobs[0].tokenized
        else:
            tokenized = encoder.tokenize([text for job in jobs for text in job.texts])
        vectors = encoder.collect(tokenized, encoder.run(tokenized)).vectors
        seconds = perf_counter() - started
        first = 0
        for job in jobs:
            rows = vectors[first : first + len(job.texts)]
            job.future.set_result(Encoded(rows, started - job.submitted, seconds))
            first += len(job.texts)


def is_lost(device: torch.device) -> bool:
    """Whether a GPU fails at all that it is asked, as after an illegal access: it is of use to a new process alone."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _let_go_of_tensors(error: Exception) -> None:
    """Free what an error's traceback holds, which is memory that the next pass may need."""
    clear_frames(error.__traceback__)
