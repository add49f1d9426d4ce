"""Exact and approximate search over LLM-vocabulary sparse vectors, every engine over the same vectors in one run.

    python benchmarks/search.py                                  # 20,000 documents
    python benchmarks/search.py --documents 200000 1000000 --kinds topical

The vectors are synthetic: 149 active terms a document and 32 a query out of 128,256. "uniform" draws terms alike often,
so that posting lists are short; "topical" draws them by a power law within 200 topics, as real texts do. Scores are
inner products. Build time includes what the engine needs before its first search. Latency is one query at a time, the
rate is of batches of 1,000 (slow engines: of as many queries as --seconds are expected to suffice for, at least 100;
torch-coo: 100, whose scores are dense); each is measured until --seconds have passed. Recall is against the scores of
the plain loop. Each engine has a process of its own, and a table is written after each, so that neither an interrupted
run nor an engine that runs out of memory loses what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from common import RESULTS, in_process, report
from scipy import sparse

from lion_st.indexes import create_index

VOCABULARY = 128_256
COO_DOCUMENTS = 50_000  # mteb's corpus_chunk_size
Search = Callable[[sparse.csr_array, int, int], np.ndarray]  # queries, k, threads -> rows [Q, k], -1 for none
Build = Callable[[sparse.csr_array], tuple[Search, int]]  # documents -> search, bytes


def make_vectors(count: int, terms: int, kind: str, seed: int) -> sparse.csr_array:
    """Random term weights [count, VOCABULARY]."""
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, count, 50_000):
        rows = min(50_000, count - start)
        if kind == "uniform":
            columns = rng.integers(0, VOCABULARY, size=(rows, terms))
        else:
            # Zipf's law with a flattened head: a document hardly draws a term twice
            ranks = (100 * (VOCABULARY / 100) ** rng.random((rows, terms)) - 100).astype(np.int64)
            topic = rng.integers(0, 200, size=(rows, 1))
            is_topical = rng.random((rows, terms)) < 0.6
            columns = np.where(
                is_topical, (ranks * 2_654_435_761 + topic * 40_503) % VOCABULARY, ranks * 7919 % VOCABULARY
            )
        weights = rng.lognormal(-0.7, 0.6, size=(rows, terms)).astype(np.float32)
        indptr = np.arange(rows + 1) * terms
        part = sparse.csr_array((weights.ravel(), columns.ravel().astype(np.int32), indptr), shape=(rows, VOCABULARY))
        part.sum_duplicates()
        parts.append(part)
    return sparse.vstack(parts, format="csr")


@numba.njit(cache=True)
def plain_loop(indptr, documents, values, count, query_starts, query_terms, query_weights, k):
    """The obvious inverted index: accumulate into an array of all documents, then take the k best."""
    found = np.full((query_starts.size - 1, k), -1)
    for query in range(query_starts.size - 1):
        scores = np.zeros(count, dtype=np.float32)
        for place in range(query_starts[query], query_starts[query + 1]):
            for posting in range(indptr[query_terms[place]], indptr[query_terms[place] + 1]):
                scores[documents[posting]] += query_weights[place] * values[posting]
        rows = np.flatnonzero(scores > 0)
        if rows.size > k:
            floor = np.partition(scores[rows], rows.size - k)[rows.size - k]
            rows = rows[scores[rows] >= floor]
        best = rows[np.argsort(-scores[rows])][:k]
        found[query, : best.size] = best
    return found


def build_loop(documents: sparse.csr_array) -> tuple[Search, int]:
    columns = documents.tocsc()

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        return plain_loop(
            columns.indptr, columns.indices, columns.data, documents.shape[0], queries.indptr, queries.indices,
            queries.data, k,
        )  # fmt: skip

    return search, columns.data.nbytes + columns.indices.nbytes + columns.indptr.nbytes


def build_scipy(documents: sparse.csr_array) -> tuple[Search, int]:
    transposed = documents.T.tocsr()

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        product = (queries @ transposed).tocsr()
        found = np.full((queries.shape[0], k), -1)
        for row in range(queries.shape[0]):
            span = slice(product.indptr[row], product.indptr[row + 1])
            best = np.argsort(-product.data[span])[:k]
            found[row, : best.size] = product.indices[span][best]
        return found

    return search, transposed.data.nbytes + transposed.indices.nbytes + transposed.indptr.nbytes


def build_torch_coo(documents: sparse.csr_array) -> tuple[Search, int]:
    """What mteb does with a SparseEncoder: the product of two COO tensors, made dense, then topk, chunk by chunk."""
    starts = range(0, documents.shape[0], COO_DOCUMENTS)
    chunks = [to_coo(documents[start : start + COO_DOCUMENTS]) for start in starts]

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        asked = to_coo(queries)
        values, rows = [], []
        for start, chunk in zip(starts, chunks, strict=True):
            scores = torch.mm(asked, chunk.transpose(0, 1)).to_dense()
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            values.append(best.values)
            rows.append(best.indices + start)
        best = torch.cat(values, 1).topk(min(k, documents.shape[0]), dim=1)
        found = torch.cat(rows, 1).gather(1, best.indices)
        return np.where(best.values.numpy() > 0, found.numpy(), -1)

    return search, sum(part.nbytes for chunk in chunks for part in (chunk.indices(), chunk.values()))


def to_coo(matrix: sparse.csr_array) -> torch.Tensor:
    coo = matrix.tocoo()
    indices = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    return torch.sparse_coo_tensor(indices, torch.from_numpy(coo.data), matrix.shape).coalesce()


def build_index(engine: str, **parameters: Any) -> Build:
    def build(documents: sparse.csr_array) -> tuple[Search, int]:
        index = create_index(engine, "sparse", **parameters)
        index.add([str(row) for row in range(documents.shape[0])], documents)
        index.search(documents[:1], 10)

        def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
            if engine != "milvus":
                return index.search_rows(queries, k, threads)[0]
            found = np.full((queries.shape[0], k), -1)
            for row, hits in enumerate(index.search(queries, k)):
                found[row, : len(hits)] = [int(document) for document, _ in hits]
            return found

        return search, index.stats()["bytes"]

    return build


def all_engines(folder: str) -> dict[str, Build]:
    """By name, the fastest to build first; Milvus Lite keeps its file in the folder."""
    return {
        "exact": build_index("exact"),
        "exact-uint8": build_index("exact", quantization="uint8"),
        "loop": build_loop,
        "scipy": build_scipy,
        "torch-coo": build_torch_coo,
        "milvus-lite": build_index("milvus", uri=f"{folder}/milvus.db"),
        "seismic": build_index("seismic"),
    }


def measure(search: Search, queries: sparse.csr_array, k: int, threads: int, block: int, seconds: float) -> np.ndarray:
    """Seconds per query of each block of queries, until the time is up."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    for start in range(0, queries.shape[0], block):
        part = queries[start : start + block]
        began = time.perf_counter()
        if began > until:
            break
        search(part, k, threads)
        times.append((time.perf_counter() - began) / part.shape[0])
    return np.array(times)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    shares = [len(set(a) & set(b[b >= 0])) / max(1, (b >= 0).sum()) for a, b in zip(found, true, strict=True)]
    return float(np.mean(shares))


def save_vectors(folder: Path, count: int, kind: str, terms: int, query_terms: int, asked: int) -> None:
    """Write documents, queries, and what exact search finds for the first queries, for each engine's process."""
    documents, queries = make_vectors(count, terms, kind, seed=0), make_vectors(asked, query_terms, kind, seed=1)
    sparse.save_npz(folder / "documents.npz", documents, compressed=False)
    sparse.save_npz(folder / "queries.npz", queries, compressed=False)
    search, _ = build_loop(documents)
    for k in (10, 1000):
        np.save(folder / f"found-{k}.npy", search(queries[:50], k, 1))


def measure_engine(name: str, folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """A row of the table, over the vectors of `save_vectors`."""
    documents, queries = (sparse.load_npz(folder / f"{what}.npz") for what in ("documents", "queries"))
    true = {k: np.load(folder / f"found-{k}.npy") for k in (10, 1000)}
    with tempfile.TemporaryDirectory() as scratch:  # reads compiled code, outside the timing
        all_engines(scratch)[name](documents[:100])
    build = all_engines(str(folder))[name]
    began = time.perf_counter()
    search, size = build(documents)
    built = time.perf_counter() - began
    search(queries[:2], 10, 1)
    single = measure(search, queries, 10, 1, 1, seconds)
    block = 100 if name == "torch-coo" else int(np.clip(seconds / np.median(single), 100, 1000))
    batch = measure(search, queries, 10, 1, block, seconds)
    search(queries[:100], 10, threads)  # starts the threads
    threaded = measure(search, queries, 10, threads, block, seconds)
    deep = measure(search, queries, 1000, 1, 50, seconds)
    return {
        "build s": built,
        "MB": size / 1e6,
        "queries/s": 1 / np.mean(batch),
        f"queries/s, {threads} threads": 1 / np.mean(threaded),
        "queries/s, k=1000": 1 / np.mean(deep),
        "p50 ms": 1000 * np.median(single),
        "p99 ms": 1000 * np.quantile(single, 0.99),
    } | {f"recall@{k}": recall(search(queries[: found.shape[0]], k, 1), found) for k, found in true.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000])
    parser.add_argument("--kinds", nargs="+", default=["uniform", "topical"])
    parser.add_argument("--terms", type=int, default=149)
    parser.add_argument("--query-terms", type=int, default=32)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # an engine and the folder of vectors
    options = parser.parse_args()

    if options.measure:
        engine, folder = options.measure
        print(json.dumps(measure_engine(engine, Path(folder), options.threads, options.seconds)))
        return
    unknown = set(options.engines or []) - set(all_engines(""))
    if unknown:
        parser.error(f"unknown engines {sorted(unknown)}: choose from {list(all_engines(''))}")
    for count, kind in itertools.product(options.documents, options.kinds):
        settings: dict[str, Any] = {"documents": count, "kind": kind}
        settings |= {name: getattr(options, name) for name in ("terms", "query_terms", "queries", "seconds")}
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            save_vectors(Path(folder), count, kind, options.terms, options.query_terms, options.queries)
            for name in options.engines or all_engines(""):
                arguments = ["--measure", name, folder, f"--threads={options.threads}", f"--seconds={options.seconds}"]
                row = in_process(__file__, arguments)
                rows.append({"engine": name, **(row or {"build s": "does not fit in memory"})})
                title = f"{count:,} documents, {kind} terms"
                report(options.output, f"search-{kind}-{count}", title, rows, settings)


if __name__ == "__main__":
    main()
