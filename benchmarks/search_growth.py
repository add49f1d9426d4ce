"""How exact search grows with the collection: one index to which Lion-like documents are added, measured at each size.

    python benchmarks/search_growth.py
    python benchmarks/search_growth.py --documents 20000 100000 --quantization uint8

The documents are the "lion" vectors of `search_vectors.py`, drawn and added in parts, so that no more than a part lies
beside the index. Queries are as they are and cut to their 40 heaviest terms. Times are processor time of one query at a
time on one core, since a busy machine lengthens any other: the least and the median of --queries. "build s" is the
processor time of adding and inverting all documents so far, "MB" the index, "peak MiB" the largest resident memory of
the process. The last rows extend a straight line through the medians of the two largest sizes to --extend documents,
which is said in them.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, peak_mib, report
from scipy import sparse
from search_vectors import describe, make_vectors

from lion_st.encoding.vectors import keep_top_terms
from lion_st.indexes import create_index

PART = 20_000
DEPTHS = (10, 1000)


def measure(index: Any, queries: sparse.csr_array, k: int) -> np.ndarray:
    """Milliseconds of processor time of each query, once two have been searched."""
    index.search_rows(queries[:2], k, 1)
    times = []
    for row in range(queries.shape[0]):
        began = time.process_time()
        index.search_rows(queries[[row]], k, 1)
        times.append(1000 * (time.process_time() - began))
    return np.array(times)


def extended(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """A row for a larger collection, by the line through the last two; what is not a time or a size is left out."""
    first, last = rows[-2:]
    share = (count - last["documents"]) / (last["documents"] - first["documents"])
    named = [name for name in last if name.startswith(("p50", "build", "MB"))]
    return {"documents": count, **{name: last[name] + share * (last[name] - first[name]) for name in named}} | {
        "note": "extended by a straight line"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--quantization", choices=["uint8", "uint16"])
    parser.add_argument("--extend", type=int, default=8_841_823, help="documents to extend to; MS MARCO has so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if any(count % PART for count in options.documents):
        parser.error(f"--documents are multiples of {PART:,}")

    largest = max(options.documents)
    wide = make_vectors(options.queries, 200, "lion", seed=1, collection=largest)
    kinds = {"": wide, ", 40 terms": keep_top_terms(wide, 40)}
    index: Any = create_index("exact", "sparse", quantization=options.quantization)
    rows: list[dict[str, Any]] = []
    built = 0.0
    for start in range(0, largest, PART):
        part = make_vectors(PART, 300, "lion", seed=1000 + start // PART, collection=largest)
        if not start:
            described = describe(part, wide)
            create_index("exact", "sparse", quantization=options.quantization).add(["0"], part[:1])  # reads kernels
        began = time.process_time()
        index.add([str(row) for row in range(start, start + PART)], part)
        built += time.process_time() - began
        if start + PART not in options.documents:
            continue
        began = time.process_time()
        index.search(wide[:1], 10)  # inverts what is left over
        row = {"documents": start + PART, "build s": built + time.process_time() - began}
        row |= {"MB": index.stats()["bytes"] / 1e6, "peak MiB": peak_mib(), "load": os.getloadavg()[0]}
        for name, queries in kinds.items():
            for k in DEPTHS:
                times = measure(index, queries, k)
                row |= {f"min ms, k={k}{name}": times.min(), f"p50 ms, k={k}{name}": np.median(times)}
        rows.append(row)
        shown = [*rows, extended(rows, options.extend)] if len(rows) > 1 and start + PART == largest else rows
        settings = {"queries": options.queries, "quantization": options.quantization, "vectors": described}
        kind = f"-{options.quantization}" if options.quantization else ""
        report(options.output, f"search-growth{kind}", f"exact search, {described}", shown, settings)


if __name__ == "__main__":
    main()
