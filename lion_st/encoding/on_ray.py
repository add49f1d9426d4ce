"""Encoding a corpus on many machines with Ray Data: one actor per GPU, one task per shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lion_st.data.records import Corpus, Record
from lion_st.encoding.encode import corpus_settings, encode_shard
from lion_st.encoding.loading import load_encoder
from lion_st.encoding.options import EncodingOptions
from lion_st.encoding.reading import CorpusCounts, ShardReader, progress_bar
from lion_st.encoding.shards import SETTINGS, claim_output, finish_output, is_finished, locked_output
from lion_st.encoding.storage import StorageError
from lion_st.extras import require
from lion_st.files import read_json

# What the rows of the pipeline say in their column "what"; FINISHED ones carry no contents any more.
SHARD, FINISHED, COUNTS, ERROR = "shard", "finished", "counts", "error"
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (StorageError, ValueError, TypeError, FileNotFoundError, ImportError)
}


def encode_corpus_on_ray(
    model: str | Path,
    corpus: Corpus,
    output: str | Path,
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: float = 1.0,
    load_options: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Path:
    """`encode_corpus` on a Ray cluster: the same shards, the same manifest, the same bytes.

    A Ray Data pipeline: one task on the driver's machine reads the corpus in its own order and streams shards, no
    faster than they are taken; an actor for each GPU writes each shard where `encode_corpus` would. A killed worker is
    started again with the shard it had; after a killed driver, run the same command, or `encode_corpus` on one machine,
    to go on from the shards that are there.

    Connects to the cluster of `RAY_ADDRESS`, or starts Ray on this machine.

    Args:
        model: Path or Hub id that every machine can load with `lion_st.load`.
        corpus: Readable by the driver's machine, see `encode_corpus`; the standard input and iterators cannot be sent
            to a task.
        output: Folder on a file system that all machines share.
        workers: Actors; by default one per GPU of the cluster, or one where there is none.
        gpus_per_worker: By default 1 where the cluster has GPUs, else 0.
        cpus_per_worker: CPUs that each actor reserves; a fraction leaves room for other work on small machines.
        load_options: Further arguments of `load_encoder`.
        show_progress: Show documents/s and, where the size of the corpus is known, the time left.
        **options: Those of `encode_corpus`: `task`, `split`, `max_tokens`, `dtype`, `shard_documents`,
            `tokens_per_batch` and `on_bad_record`.

    Raises:
        ImportError: If Ray is not installed.
        ValueError: If the corpus cannot be sent to a task, or see `encode_corpus`.
        StorageError: If workers load different models, or see `encode_corpus`.
    """
    chosen = EncodingOptions(**options)
    require("ray.data")
    ray = require("ray")
    if str(corpus) == "-" or isinstance(corpus, Iterator):
        raise ValueError(
            f"A task on the cluster cannot read {'the standard input' if str(corpus) == '-' else repr(corpus)}: "
            "write the corpus to a file and give its path."
        )
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    output = Path(output).resolve()
    worker = {
        "model": str(model),
        "load_options": dict(load_options or {}),
        "output": output,
        "options": chosen,
    }
    with locked_output(output), ray.data.DataContext.current(_one_shard_a_block()):
        shards = ray.data.read_datasource(
            _source(ShardReader(corpus, chosen), output),
            num_cpus=0,  # else it could wait for the actors to end, and they for it
            override_num_blocks=1,
        ).map_batches(
            _ShardWorker,
            fn_constructor_kwargs=worker,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers or max(1, gpus)),
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker if gpus_per_worker is not None else float(gpus > 0),
        )
        with progress_bar(corpus, show_progress, chosen.task) as progress:
            for row in shards.iter_rows():
                contents = json.loads(row["contents"])
                if row["what"] == ERROR:
                    raise ERRORS.get(contents["type"], RuntimeError)(contents["message"])
                if row["what"] == COUNTS:
                    counts = CorpusCounts(**contents)
                progress.update(row["documents"])
        finish_output(output, read_json(output / SETTINGS), counts)
    return output


def _one_shard_a_block() -> Any:
    """A context in which Ray Data makes a block, and so a task, of each row, and leaves the progress bar to us."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    return context


def _source(reader: ShardReader, output: Path) -> Any:
    """What Ray Data reads: a row for each shard, and a last one of what reading found."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def rows() -> Iterator[Any]:
        try:
            for number, records in enumerate(reader):
                if is_finished(output, number, records):
                    yield _row(FINISHED, number, len(records))
                else:
                    yield _row(SHARD, number, len(records), records)
            yield _row(COUNTS, contents=vars(reader.counts))
        except Exception as error:
            yield _error_row(error)

    class ShardSource(Datasource):
        supports_distributed_reads = False  # the corpus lies on the driver's machine

        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            unknown: dict[str, Any] = dict(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(rows, BlockMetadata(**unknown))]

    return ShardSource()


def _row(what: str, number: int = -1, documents: int = 0, contents: Any = None) -> Any:
    pa = require("pyarrow")

    columns = {"what": what, "number": number, "documents": documents, "contents": json.dumps(contents)}
    return pa.table({name: [value] for name, value in columns.items()})


def _error_row(error: Exception) -> Any:
    """An error as a row: raised in a task, Ray would hand it on as one of its own, after several attempts."""
    return _row(ERROR, contents={"type": type(error).__name__, "message": str(error)})


class _ShardWorker:
    """An actor: holds the model and writes shards."""

    def __init__(self, model: str, load_options: dict[str, Any], output: Path, options: EncodingOptions) -> None:
        self.load = partial(load_encoder, model, **load_options)
        self.output = output
        self.options = options

    @cached_property
    def model(self) -> Any:
        return self.load()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Those of the output folder, which every worker claims."""
        settings = corpus_settings(self.model, self.options)
        claim_output(self.output, settings)
        return settings

    def __call__(self, row: Any) -> Any:
        what, number, documents, contents = (column[0].as_py() for column in row.columns)
        if what == ERROR:
            return row
        try:
            settings = self.settings
            if what != SHARD:
                return row
            records = [Record(*record) for record in json.loads(contents)]
            if not is_finished(self.output, number, records):  # else its worker was killed just after writing it
                encode_shard(self.model, records, self.output, number, settings)
        except Exception as error:
            return _error_row(error)
        return _row(FINISHED, number, documents)
