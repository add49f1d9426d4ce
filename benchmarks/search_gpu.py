"""Search on a GPU beside the exact engine on the CPU and what torch has: vectors as wide as Lion-SP's, and dense.

    python benchmarks/search_gpu.py --documents 200000 1000000 --exact-up-to 200000 --dense 200000

Every figure is a line of JSON as soon as it is known, and all are in --output in the end. "same" compares rows and
scores with the exact engine's, or beyond --exact-up-to with those of a plain product in float64 for a few queries.
Sparse sides: engine "torch"; "exact" on all cores; "cusparse", the product of torch's CSR matrix [N, V] with 64 dense
queries at a time, then topk. Dense sides: engine "torch"; "exact"; "matmul", float32 on the GPU, then topk.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine_name
from scipy import sparse
from search_vectors import describe, lion_vectors

from lion_st.indexes import create_index

DEPTHS = (10, 100, 1000)
Search = Callable[[Any, int], Any]


class Findings:
    """Lines of JSON, kept for the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def seconds_of(call: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def speeds(search: Search, queries: Any, device: str, depths: tuple[int, ...], singles: int = 30) -> dict[str, float]:
    """Queries a second of all queries at once, and milliseconds of one at a time, each after an unmeasured run."""
    found = {}
    for k in depths:
        search(queries[:64], k)
        search(queries, k)
        found[f"queries/s, k={k}"] = queries.shape[0] / seconds_of(lambda k=k: search(queries, k), device)
        search(queries[:1], k)
        times = [seconds_of(lambda k=k, one=one: search(queries[one : one + 1], k), device) for one in range(singles)]
        found[f"p50 ms, k={k}"] = 1000 * float(np.median(times))
    return found


def built(engine: str, kind: str, documents: Any, **parameters: Any) -> tuple[Any, float]:
    """An index with its structure made, and the seconds that took without `add`, which checks what it is given."""
    index = create_index(engine, kind, **parameters)
    index.add([str(row) for row in range(documents.shape[0])], documents)
    began = time.perf_counter()
    index.search_rows(documents[:1], 1)
    return index, time.perf_counter() - began


def agreement(found: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    return {
        "same rows": float((found[0] == true[0]).mean()),
        "same scores": float((found[1] == true[1]).mean()),
    }


def brute_force(documents: Any, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows, scores = [], []
    for number in range(queries.shape[0]):
        query = queries[[number]].toarray()[0].astype(np.float64)
        own = (documents @ query).astype(np.float32)
        order = np.argsort(-own, kind="stable")[:k]
        rows.append(np.where(own[order] > 0, order, -1))
        scores.append(own[order])
    return np.array(rows), np.array(scores)


def cusparse(documents: sparse.csr_array, device: str) -> Search:
    parts = [
        torch.from_numpy(np.ascontiguousarray(part)) for part in (documents.indptr, documents.indices, documents.data)
    ]
    matrix = torch.sparse_csr_tensor(*parts, size=documents.shape).to(device)

    def search(queries: sparse.csr_array, k: int) -> None:
        for start in range(0, queries.shape[0], 64):
            block = torch.from_numpy(queries[start : start + 64].toarray()).to(device)
            torch.sparse.mm(matrix, block.T.contiguous()).T.topk(k, dim=1)

    return search


def measure_sparse(count: int, options: argparse.Namespace, findings: Findings) -> None:
    began = time.perf_counter()
    documents = lion_vectors(count, 300, 0, count, options.threads)
    queries = lion_vectors(options.queries, 200, 1, count, options.threads)
    drawn = time.perf_counter() - began
    about = {"documents": count, "kind": "sparse", "vectors": describe(documents, queries)}
    findings.add(**about, side="drawing", seconds=drawn)
    index, seconds = built("torch", "sparse", documents, device=options.device)
    index.search_rows(queries[:2], 10)  # compiles
    row = {**about, "side": "torch", "build s": seconds, "GB": index.stats()["bytes"] / 1e9}
    findings.add(**row, **speeds(index.search_rows, queries, options.device, DEPTHS))
    if count <= options.exact_up_to:
        exact, seconds = built("exact", "sparse", documents)
        asked = queries[:256]

        def search(queries: sparse.csr_array, k: int) -> Any:
            return exact.search_rows(queries, k, options.threads)

        row = {**about, "side": "exact", "threads": options.threads, "build s": seconds}
        findings.add(**row, **speeds(search, asked, "cpu", DEPTHS[::2]))
        for k in DEPTHS:
            same = agreement(index.search_rows(asked, k), search(asked, k))
            findings.add(**about, side="agreement with exact", k=k, queries=256, **same)
        other = cusparse(documents, options.device)
        findings.add(**about, side="cusparse", **speeds(other, queries[:256], options.device, DEPTHS[:1], 3))
    else:
        few = queries[:4]
        same = agreement(index.search_rows(few, 1000), brute_force(documents, few, 1000))
        findings.add(**about, side="agreement with a plain product", k=1000, queries=4, **same)


def measure_dense(count: int, options: argparse.Namespace, findings: Findings) -> None:
    generator = torch.Generator(options.device).manual_seed(0)

    def drawn(rows: int) -> np.ndarray:
        vectors = torch.randn(rows, options.dimensions, generator=generator, device=options.device)
        vectors[:, :32] *= 6  # so that some directions matter more, as in a model's vectors
        return torch.nn.functional.normalize(vectors).cpu().numpy()

    documents, queries = drawn(count), drawn(options.queries)
    about = {"documents": count, "kind": "dense", "vectors": f"{options.dimensions} dimensions"}
    index, seconds = built("torch", "dense", documents, device=options.device)
    row = {**about, "side": "torch", "build s": seconds, "GB": index.stats()["bytes"] / 1e9}
    findings.add(**row, **speeds(index.search_rows, queries, options.device, DEPTHS))
    matrix = torch.from_numpy(documents).to(options.device)

    def matmul(queries: np.ndarray, k: int) -> None:
        for start in range(0, len(queries), 256):
            (torch.from_numpy(queries[start : start + 256]).to(options.device) @ matrix.T).topk(k)

    findings.add(**about, side="matmul", **speeds(matmul, queries, options.device, DEPTHS))
    exact, seconds = built("exact", "dense", documents)

    def search(queries: np.ndarray, k: int) -> Any:
        return exact.search_rows(queries, k, options.threads)

    findings.add(**about, side="exact", threads=options.threads, **speeds(search, queries[:256], "cpu", DEPTHS[:1], 5))
    same = agreement(index.search_rows(queries[:256], 1000), search(queries[:256], 1000))
    findings.add(**about, side="agreement with exact, which sums in float32", k=1000, queries=256, **same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[200_000], help="sparse ones")
    parser.add_argument("--exact-up-to", type=int, default=200_000)
    parser.add_argument("--dense", type=int, nargs="*", default=[200_000], help="dense ones")
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()

    findings = Findings()
    try:
        for count in options.dense:
            measure_dense(count, options, findings)
        for count in options.documents:
            measure_sparse(count, options, findings)
    finally:
        if options.output:
            about = {"machine": machine_name(options.device), "torch": torch.__version__, "rows": findings.rows}
            options.output.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
