"""Encoding a corpus on many machines with Ray: one actor per GPU, one task per shard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lion_st.retrieval.describe import limited
from lion_st.retrieval.encode import (
    Kind,
    ShardReader,
    claim_output,
    corpus_settings,
    encode_shard,
    finish_output,
    is_finished,
    progress_bar,
)
from lion_st.retrieval.records import Corpus, Record


def encode_corpus_on_ray(
    model: str | Path,
    corpus: Corpus,
    output: str | Path,
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    load_options: Mapping[str, Any] | None = None,
    kind: Kind = "document",
    split: str = "train",
    max_tokens: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    shard_documents: int = 4096,
    tokens_per_batch: int = 16_384,
    on_bad_record: Literal["skip", "raise"] = "skip",
    show_progress: bool = True,
) -> Path:
    """`encode_corpus` on a Ray cluster: the same shards, the same manifest, the same bytes.

    The driver reads the corpus and hands out shards, two per worker at a time, so that its memory stays flat; a worker
    writes each shard where `encode_corpus` would. A killed worker is started again with the shard it had; after a
    killed driver, run the same command, or `encode_corpus` on one machine, to go on from the shards that are there.

    Connects to the cluster of `RAY_ADDRESS`, or starts Ray on this machine. Actors are used rather than Ray Data, whose
    blocks are not the corpus in its own order: shards would not be the ones that one machine writes.

    Args:
        model: Path or Hub id that every machine can load with `lion_st.load`.
        corpus: Readable by the driver, see `read_corpus`.
        output: Folder on a file system that all machines share.
        workers: Actors; by default one per GPU of the cluster, or one where there is none.
        gpus_per_worker: By default 1 where the cluster has GPUs, else 0.
        cpus_per_worker: CPUs that each actor reserves; a fraction leaves room for other work on small machines.
        load_options: Further arguments of `lion_st.load`.
        kind: Whether the records are documents or queries.
        split: Split of a Hub dataset.
        max_tokens: Length to cut texts to, in place of the model's own.
        dtype: How values are stored.
        shard_documents: Documents per shard.
        tokens_per_batch: Padded tokens per batch.
        on_bad_record: "raise" stops at the first record that would be skipped.
        show_progress: Show documents/s and, where the size of the corpus is known, the time left.

    Raises:
        ImportError: If Ray is not installed.
        RuntimeError: If the workers load different models.
        StorageError: See `encode_corpus`.
    """
    ray = _require_ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    shape = (kind, dtype, shard_documents, tokens_per_batch)
    arguments = (str(model), dict(load_options or {}), max_tokens, shape)
    actors = _start_workers(arguments, workers, gpus_per_worker, cpus_per_worker)
    try:
        settings, *others = ray.get([actor.settings.remote() for actor in actors])
        if any(other != settings for other in others):
            raise RuntimeError(f"The workers loaded different models from {model}: put the same one on every machine.")
        output = Path(output).resolve()
        claim_output(output, settings)
        reader = ShardReader(corpus, split, shard_documents, on_bad_record)
        with progress_bar(corpus, show_progress) as progress:
            _feed(actors, reader, output, progress)
    finally:
        for actor in actors:
            ray.kill(actor)
    finish_output(output, settings, reader)
    return output


def _require_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Encoding on a cluster needs Ray: pip install 'lion-st[ray]'.") from error
    return ray


def _start_workers(
    arguments: tuple[Any, ...], workers: int | None, gpus_per_worker: float | None, cpus_per_worker: float
) -> list[Any]:
    ray = _require_ray()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    remote_worker = ray.remote(
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker if gpus_per_worker is not None else float(gpus > 0),
        max_restarts=-1,
        max_task_retries=-1,
    )(_ShardWorker)
    return [remote_worker.remote(*arguments) for _ in range(workers or max(1, gpus))]


def _feed(actors: list[Any], reader: ShardReader, output: Path, progress: Any) -> None:
    """Hand out the shards that are missing, two to an actor at a time: one at work, one waiting."""
    ray = _require_ray()
    idle = actors * 2
    running: dict[Any, tuple[Any, int]] = {}

    def collect() -> None:
        (done,), _ = ray.wait(list(running))
        actor, documents = running.pop(done)
        ray.get(done)
        idle.append(actor)
        progress.update(documents)

    for number, records in enumerate(reader):
        if is_finished(output, number, records):
            progress.update(len(records))
            continue
        while not idle:
            collect()
        actor = idle.pop(0)
        running[actor.encode.remote(records, str(output), number)] = (actor, len(records))
    while running:
        collect()


class _ShardWorker:
    """An actor: holds the model and writes shards."""

    def __init__(
        self, model: str, load_options: dict[str, Any], max_tokens: int | None, shape: tuple[Any, ...]
    ) -> None:
        import lion_st

        self.model = lion_st.load(model, **load_options)
        self.max_tokens = max_tokens
        self.kind = shape[0]
        with limited(self.model, self.kind, max_tokens):
            self._settings = corpus_settings(self.model, *shape)

    def settings(self) -> dict[str, Any]:
        return self._settings

    def encode(self, records: list[Record], output: str, number: int) -> None:
        if not is_finished(Path(output), number, records):  # a retried task may have written it before it was killed
            with limited(self.model, self.kind, self.max_tokens):
                encode_shard(self.model, records, Path(output), number, self._settings)
