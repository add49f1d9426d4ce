"""Exact and approximate search over LLM-vocabulary sparse vectors, every engine over the same vectors in one run.

    python benchmarks/search.py                                  # 20,000 documents of each kind
    python benchmarks/search.py --documents 200000 1000000 --kinds lion
    python benchmarks/search.py --kinds mini --documents 7250    # the bundled model's vectors, encoded first

Kinds: see `search_vectors.py`. "uniform" draws terms alike often, so that posting lists are short; "topical" draws 149
terms a document and 32 a query by a power law within 200 topics; "lion" has the widths and statistics of a trained
Lion-SP; "mini" are the bundled lion-sp-mini's vectors of the quickstart's texts, cached in --cache. --top-terms 400 40
prunes documents and queries to their heaviest terms.

Scores are inner products. Build time includes what the engine needs before its first search. Latency is the processor
time of one query at a time, since a busy machine lengthens any other; the rate is of batches of 1,000 (slow engines: of
as many queries as --seconds are expected to suffice for, at least 100; torch-coo: 100, whose scores are dense); each is
measured until --seconds have passed. "peak MiB" is the largest resident memory of the process, the vectors that it was
given included, and "load" the machine's average over a minute when the engine was done. Recall is against the scores of
the plain loop. Each engine has a process of its own, and a table is written after each, so that neither an interrupted
run nor an engine that runs out of memory or is not installed loses what was measured. An engine that takes longer than
--limit seconds in all is stopped, and not tried with more documents.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from common import RESULTS, in_process, peak_mib, report
from scipy import sparse
from search_vectors import KINDS, describe, make_vectors, mini_vectors

from lion_st.encoding.vectors import keep_top_terms
from lion_st.indexes import create_index

DEPTHS = (10, 100, 1000)
COO_DOCUMENTS = 50_000  # mteb's corpus_chunk_size
Search = Callable[[sparse.csr_array, int, int], np.ndarray]  # queries, k, threads -> rows [Q, k], -1 for none
Build = Callable[[sparse.csr_array], tuple[Search, int]]  # documents -> search, bytes


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


def build_bmp(documents: sparse.csr_array, folder: str) -> tuple[Search, int]:
    """Block-max pruning (Mallia et al., SIGIR 2024) without approximation, over weights of 8 bits as it takes them."""
    from bmp import Indexer, Searcher

    file = f"{folder}/index.bmp"
    step = 255 / documents.data.max()
    indexer = Indexer(file, bsize=32, compress_range=False)
    for row in range(documents.shape[0]):
        span = slice(documents.indptr[row], documents.indptr[row + 1])
        weights = np.maximum(1, documents.data[span] * step + 0.5).astype(int).tolist()
        indexer.add_document(str(row), dict(zip(map(str, documents.indices[span].tolist()), weights, strict=True)))
    indexer.finish()
    searcher = Searcher(file)

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        found = np.full((queries.shape[0], k), -1)
        for row in range(queries.shape[0]):
            span = slice(queries.indptr[row], queries.indptr[row + 1])
            terms = map(str, queries.indices[span].tolist())
            names, _ = searcher.search(dict(zip(terms, queries.data[span].tolist(), strict=True)), k, 1.0, 1.0)
            found[row, : len(names)] = [int(name) for name in names]
        return found

    return search, os.path.getsize(file)


def build_kannolo(documents: sparse.csr_array) -> tuple[Search, int]:
    """An HNSW graph over sparse vectors (Delfino et al., ECIR 2025); it takes terms below 65,536 alone."""
    from kannolo import SparsePlainHNSW

    offsets = documents.indptr.astype(np.int64)
    index = SparsePlainHNSW.build_from_arrays(documents.indices.astype(np.int32), documents.data, offsets)

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        found = np.full((queries.shape[0], k), -1)
        for row in range(queries.shape[0]):
            span = slice(queries.indptr[row], queries.indptr[row + 1])
            _, rows = index.search(queries.indices[span].astype(np.int32), queries.data[span], k, max(200, k))
            found[row, : len(rows)] = rows[:k]
        return found

    return search, index.space_usage_bytes()


class GivenVectors:
    """What splade-index takes for a model: its texts are the numbers of rows."""

    class tokenizer:
        get_vocab = staticmethod(dict)

    def __init__(self, documents: sparse.csr_array) -> None:
        self.documents = documents
        self.queries = documents[:1]

    def encode_document(self, texts: list[str], **options: Any) -> torch.Tensor:
        return to_coo(self.documents)

    def encode_query(self, texts: list[str], **options: Any) -> list[torch.Tensor]:
        return [to_coo(self.queries[[0 if text == "dummy query" else int(text)]])[0] for text in texts]


def build_splade_index(documents: sparse.csr_array) -> tuple[Search, int]:
    """splade-index with its numba backend; making tensors of the queries, which a model would do, counts as search."""
    from splade_index import SPLADE

    model = GivenVectors(documents)
    index = SPLADE(backend="numba")
    index.index(model, [""] * documents.shape[0], show_progress=False)

    def search(queries: sparse.csr_array, k: int, threads: int) -> np.ndarray:
        model.queries = queries
        rows = [str(row) for row in range(queries.shape[0])]
        return np.asarray(index.retrieve(rows, k=k, return_as="doc_ids", show_progress=False, n_threads=threads))

    return search, sum(index.scores[name].nbytes for name in ("data", "indices", "indptr"))


def all_engines(folder: str) -> dict[str, Build]:
    """By name, the fastest to build first; Milvus Lite keeps its file in the folder."""
    return {
        "exact": build_index("exact"),
        "exact-uint8": build_index("exact", quantization="uint8"),
        "torch": build_index("torch"),
        "loop": build_loop,
        "scipy": build_scipy,
        "torch-coo": build_torch_coo,
        "splade-index": build_splade_index,
        "milvus-lite": build_index("milvus", uri=f"{folder}/milvus.db"),
        "kannolo": build_kannolo,
        "bmp": lambda documents: build_bmp(documents, folder),
        "seismic": build_index("seismic"),
        "seismic-knn": build_index("seismic", neighbours=10),
    }


PACKAGES = {"splade-index": "splade_index", "milvus-lite": "milvus_lite", "kannolo": "kannolo", "bmp": "bmp",
            "seismic": "seismic", "seismic-knn": "seismic"}  # fmt: skip


def unusable(name: str, terms: int) -> str | None:
    """Why an engine cannot be measured here."""
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed"
    if name == "torch" and not torch.cuda.is_available():
        return "there is no GPU"
    return "refuses terms above 65,535" if name == "kannolo" and terms > 65_536 else None


def measure(search: Search, queries: sparse.csr_array, k: int, threads: int, block: int, seconds: float) -> np.ndarray:
    """Seconds per query of each block of queries, until the time is up: of the processor for single queries."""
    clock = time.process_time if block == 1 else time.perf_counter
    times: list[float] = []
    until = time.perf_counter() + seconds
    for start in range(0, queries.shape[0], block):
        part = queries[start : start + block]
        if time.perf_counter() > until:
            break
        began = clock()
        search(part, k, threads)
        times.append((clock() - began) / part.shape[0])
    return np.array(times)


def recall(found: np.ndarray, true: np.ndarray) -> float:
    shares = [len(set(a) & set(b[b >= 0])) / max(1, (b >= 0).sum()) for a, b in zip(found, true, strict=True)]
    return float(np.mean(shares))


def save_vectors(folder: Path, count: int, kind: str, options: argparse.Namespace) -> str:
    """Write documents, queries, and what exact search finds for the first queries, for each engine's process."""
    if kind == "mini":
        documents, queries = mini_vectors(count, options.queries, options.cache)
    else:
        own = [given or usual for given, usual in zip((options.terms, options.query_terms), KINDS[kind], strict=True)]
        documents = make_vectors(count, own[0], kind, seed=0)
        queries = make_vectors(options.queries, own[1], kind, seed=1, collection=count)
    if options.top_terms:
        documents, queries = map(keep_top_terms, (documents, queries), options.top_terms)
    sparse.save_npz(folder / "documents.npz", documents, compressed=False)
    sparse.save_npz(folder / "queries.npz", queries, compressed=False)
    search, _ = build_loop(documents)
    for k in DEPTHS:
        np.save(folder / f"found-{k}.npy", search(queries[:50], k, 1))
    return describe(documents, queries)


def measure_engine(name: str, folder: Path, threads: int, seconds: float) -> dict[str, Any]:
    """A row of the table, over the vectors of `save_vectors`."""
    documents, queries = (sparse.load_npz(folder / f"{what}.npz") for what in ("documents", "queries"))
    true = {k: np.load(folder / f"found-{k}.npy") for k in DEPTHS}
    if reason := unusable(name, documents.shape[1]):
        return {"note": reason}
    with tempfile.TemporaryDirectory() as scratch:  # reads compiled code, outside the timing
        all_engines(scratch)[name](documents[:100])
    build = all_engines(str(folder))[name]
    began = time.perf_counter()
    search, size = build(documents)
    built = time.perf_counter() - began
    search(queries[:2], 10, 1)
    single = {k: measure(search, queries, k, 1, 1, seconds) for k in DEPTHS}
    block = 100 if name == "torch-coo" else int(np.clip(seconds / np.median(single[10]), 100, 1000))
    batch = measure(search, queries, 10, 1, block, seconds)
    search(queries[:100], 10, threads)  # starts the threads
    threaded = measure(search, queries, 10, threads, block, seconds)
    latencies = {}
    for k, times in single.items():
        ordered = {"min": np.min(times), "p50": np.median(times), "p99": np.quantile(times, 0.99)}
        latencies |= {f"{which} ms, k={k}": 1000 * value for which, value in ordered.items()}
    return {
        "build s": built,
        "MB": size / 1e6,
        "peak MiB": peak_mib(),
        "load": os.getloadavg()[0],
        "queries/s": 1 / np.mean(batch),
        f"queries/s, {threads} threads": 1 / np.mean(threaded),
        **latencies,
    } | {f"recall@{k}": recall(search(queries[: found.shape[0]], k, 1), found) for k, found in true.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000])
    parser.add_argument("--kinds", nargs="+", default=["uniform", "topical", "lion"], choices=list(KINDS))
    parser.add_argument("--terms", type=int, help="of a document; by default those of the kind")
    parser.add_argument("--query-terms", type=int)
    parser.add_argument("--top-terms", type=int, nargs=2, help="prune documents and queries to so many")
    parser.add_argument("--cache", type=Path, default=Path("runs/search-benchmark"), help="of encoded texts")
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--engines", nargs="+")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, help="seconds that an engine may take to build and to be measured")
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
    stopped: dict[tuple[str, str], int] = {}  # kind and engine -> documents that took it too long
    for count, kind in itertools.product(sorted(options.documents), options.kinds):
        settings: dict[str, Any] = {"documents": count, "kind": kind}
        settings |= {name: getattr(options, name) for name in ("top_terms", "queries", "seconds", "limit")}
        pruned = "-pruned" if options.top_terms else ""
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            settings["vectors"] = save_vectors(Path(folder), count, kind, options)
            for name in options.engines or all_engines(""):
                arguments = ["--measure", name, folder, f"--threads={options.threads}", f"--seconds={options.seconds}"]
                if fewer := stopped.get((kind, name)):
                    row = {"note": f"took too long with {fewer:,} documents"}
                else:
                    row = in_process(__file__, arguments, options.limit)
                if row is not None and "stopped" in row:
                    stopped[kind, name] = count
                rows.append({"engine": name, **(row or {"build s": "does not fit in memory"})})
                title = f"{count:,} {kind}{pruned} documents: {settings['vectors']}"
                report(options.output, f"search-{kind}{pruned}-{count}", title, rows, settings)


if __name__ == "__main__":
    main()
