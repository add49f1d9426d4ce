"""Small query encoders beside the full model: quality kept, and what a query costs on a CPU.

    python benchmarks/query_encoders.py                           # what make quickstart left in runs/
    python benchmarks/query_encoders.py --model runs/lion-sp --data data/scifact

All encoders search one index of the full model's documents. "idf" and "static" run no network: a weight for each token
of the query, from document frequencies or learned; "n layers" keeps the model's first layers and learns. Both learn by
distillation from the full model on the training tuples of --tuples (the bundled ones by default). Latency is one query
at a time from text to vector, in milliseconds; quality is nDCG@10, and its share of the full model's.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, report

import lion_st
from lion_st.data import load_beir, load_tuples, quickstart_data
from lion_st.encoding import encode_texts
from lion_st.evaluation import evaluate_run, hits_to_run
from lion_st.evaluation.mteb_search import document_text
from lion_st.indexes import create_index
from lion_st.training.query_distillation import distill_query_encoder, make_distillation_targets
from lion_st.training.query_encoders import (
    idf_weights,
    static_query_encoder,
    truncated_query_encoder,
)

QUICKSTART = Path("runs/quickstart")


def latencies(model: Any, queries: list[str], count: int) -> np.ndarray:
    """Milliseconds to encode each of the first queries alone, after a warm-up."""
    encode_texts(model, queries[:3], "query")
    times = []
    for query in queries[:count]:
        began = time.perf_counter()
        encode_texts(model, [query], "query")
        times.append(1000 * (time.perf_counter() - began))
    return np.array(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"{QUICKSTART}/lion-sp", help="Sparse Lion checkpoint.")
    parser.add_argument(
        "--data", type=Path, default=QUICKSTART / "test_sets/squad_dev", help="BEIR folder to score on."
    )
    parser.add_argument("--tuples", help="Training tuples; the bundled ones by default.")
    parser.add_argument("--split", default="train")
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--max-tuples", type=int, default=2000, help="Learn from a random sample of this many.")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Of the layers; token weights learn at 1e-2.")
    parser.add_argument("--timed-queries", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    full = lion_st.load(options.model, device="cpu")
    corpus, queries, qrels = load_beir(options.data)
    queries = {query: queries[query] for query in qrels}
    index = create_index("exact", "sparse")
    texts = [document_text(row["title"], row["text"]) for row in corpus.values()]
    documents = encode_texts(full, texts, "document", show_progress=True)
    index.add(list(corpus), documents)

    source = options.tuples or quickstart_data()
    tuples = load_tuples(source, split=options.split, negatives=options.negatives, sampling="first", drop_short=True)
    if len(tuples) > options.max_tuples:
        tuples = tuples.shuffle(seed=0).select(range(options.max_tuples))
    targets = make_distillation_targets(full, tuples, show_progress=True)
    idf = idf_weights([([], documents)])
    students = {"full": full, "idf": static_query_encoder(full, idf)}
    learners = {"static": static_query_encoder(full, idf)}
    learners |= {f"{count} layers": truncated_query_encoder(full, count) for count in options.layers}
    with tempfile.TemporaryDirectory() as folder:
        for name, student in learners.items():
            rate = None if name == "static" else options.learning_rate
            settings = {"epochs": options.epochs, "learning_rate": rate}
            students[name] = distill_query_encoder(student, targets, f"{folder}/{name}", **settings)

    rows: list[dict[str, Any]] = []
    for name, student in students.items():
        vectors = encode_texts(student, list(queries.values()), "query")
        run = hits_to_run(queries, index.search(vectors, 1000))
        quality = evaluate_run(qrels, run, ["nDCG@10", "Recall@100"])
        times = latencies(student, list(queries.values()), options.timed_queries)
        rows.append(
            {
                "query encoder": name,
                "weights": sum(parameter.numel() for parameter in student.parameters()),
                **quality,
                "kept": quality["nDCG@10"] / (rows[0]["nDCG@10"] if rows else quality["nDCG@10"]),
                "terms/query": vectors.nnz / len(queries),
                "p50 ms": float(np.median(times)),
                "p99 ms": float(np.quantile(times, 0.99)),
            }
        )
    name = options.data.name
    settings = {"dataset": name, "model": Path(options.model).name, "epochs": options.epochs, "tuples": len(tuples)}
    report(options.output, f"query-encoders-{name}", f"{name}, {len(corpus):,} documents", rows, settings)


if __name__ == "__main__":
    main()
