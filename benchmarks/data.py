"""Training data of MS MARCO's size: memory and seconds until the first batch, cold and cached, and examples/s.

    python benchmarks/data.py                # 1/8 of it
    python benchmarks/data.py --scale 1      # 8.8 million passages, 500,000 queries

Makes a synthetic copy in the layout of lightonai/ms-marco-en-bge: passages of about 57 words, queries of about 6, and
tuples of a query, its positive and 16 negatives with a teacher's scores, 17 documents a row. Every start is a process
of its own, as each rank of a training is: "cold" with an empty cache of `datasets`, "cached" with the one that the
cold start left, "two ranks" with two such processes at once. A start reads batches of 128 queries with all their texts
as training does, put together by its own sampler; "steps" counts how many were read in --seconds. "anonymous" is what
a process holds for itself; the rest of "peak" are pages of mapped files, which all ranks share and the system may drop.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, in_process, peak_mib, report

PASSAGES, QUERIES, NEGATIVES = 8_841_823, 500_000, 16
WORDS = 30_000
BATCH = 128
PART = 100_000  # rows that are made at a time


def make_texts(path: Path, column: str, rows: int, median: int) -> None:
    """A table of ids and texts of made-up words, as frequent as words are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(rows)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, WORDS)], dtype=object)
    schema = pa.schema({column: pa.string(), "text": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, PART):
            count = min(PART, rows - start)
            lengths = np.clip(rng.lognormal(np.log(median), 0.4, count).astype(int), 2, 250)
            ranks = (WORDS ** rng.random(lengths.sum())).astype(int) - 1  # of about Zipf's law
            ends = np.cumsum(lengths)
            texts = [" ".join(words[ranks[end - size : end]]) for end, size in zip(ends, lengths, strict=True)]
            writer.write_table(pa.table([[str(n) for n in range(start, start + count)], texts], schema=schema))


def make_tuples(path: Path, queries: int, passages: int) -> None:
    """Tuples of random documents, with scores in [0, 1]."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    types = {"query_id": pa.int64(), "document_ids": pa.list_(pa.int64()), "scores": pa.list_(pa.float64())}
    with pq.ParquetWriter(path, pa.schema(types)) as writer:
        for start in range(0, queries, PART):
            count = min(PART, queries - start)
            offsets = pa.array(np.arange(count + 1) * (1 + NEGATIVES), pa.int32())
            documents = rng.integers(passages, size=count * (1 + NEGATIVES))
            scores = rng.random(len(documents))
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (documents, scores)]
            writer.write_table(pa.table([pa.array(np.arange(start, start + count)), *lists], schema=pa.schema(types)))


def make_collection(folder: Path, scale: float) -> dict[str, int]:
    """Write the data set; its size."""
    passages, queries = round(PASSAGES * scale), round(QUERIES * scale)
    card = ["---", "configs:"]
    for name in ("train", "queries", "documents"):
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}.parquet"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    make_texts(folder / "documents.parquet", "document_id", passages, 57)
    make_texts(folder / "queries.parquet", "query_id", queries, 6)
    make_tuples(folder / "train.parquet", queries, passages)
    return {"passages": passages, "queries": queries}


def anonymous_gib() -> float:
    """Memory that this process holds for itself now, mapped files not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 2**20


def start(folder: Path, seconds: float) -> dict[str, Any]:
    """Start as a rank does, and read batches for some seconds."""
    from torch.utils.data import DataLoader

    from lion_st.data import load_tuples
    from lion_st.training.sampling import NoFalseNegativesBatchSampler

    began = time.perf_counter()
    imported = anonymous_gib()
    tuples = load_tuples(folder, negatives=NEGATIVES, teacher_scores=True, drop_short=True)
    started = time.perf_counter() - began
    sampler = NoFalseNegativesBatchSampler(tuples, BATCH, True, ["label"])
    batches = chain.from_iterable(repeat(DataLoader(tuples, batch_sampler=sampler, collate_fn=list)))  # epochs
    next(batches)
    first = time.perf_counter()
    steps = 0
    while time.perf_counter() - first < seconds:
        next(batches)
        steps += 1
    rate = steps * BATCH / (time.perf_counter() - first)
    return {
        "start s": started,
        "first batch s": first - began,
        "examples/s": rate,
        "texts/s": rate * (2 + NEGATIVES),
        "peak GiB": peak_mib() / 2**10,
        "anonymous GiB": anonymous_gib(),
        "of it imports": imported,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.125, help="share of MS MARCO's size")
    parser.add_argument("--seconds", type=float, default=20, help="of reading batches, each time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        import datasets

        datasets.config.HF_DATASETS_CACHE = options.folder / "cache"
        datasets.disable_progress_bars()
        print(json.dumps(start(options.folder / "set", options.seconds)), flush=True)
        return

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "set").mkdir()
        size = make_collection(Path(name) / "set", options.scale)
        print(f"made {size['passages']:,} passages and {size['queries']:,} queries", flush=True)
        arguments = ["--folder", name, "--seconds", str(options.seconds)]
        rows = []
        for kind in ("cold", "cached"):
            rows.append({"start": kind, **(in_process(__file__, arguments) or {"failed": "out of memory"})})
            print(f"{kind}: done", flush=True)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: in_process(__file__, arguments), range(2)))
        rows += [{"start": f"two ranks, {n}", **(figures or {})} for n, figures in enumerate(both, 1)]
        cache = sum(file.stat().st_size for file in (Path(name) / "cache").rglob("*") if file.is_file())
    title = (
        f"{size['passages']:,} passages, {size['queries']:,} queries x {1 + NEGATIVES}, cache {cache / 2**30:.2f} GiB"
    )
    report(options.output, "data", title, rows, {"scale": options.scale, **size, "cache GiB": cache / 2**30})


if __name__ == "__main__":
    main()
