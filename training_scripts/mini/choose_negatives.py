"""Choose the negatives of mined and scored tuples, and label them with both teachers together.

python training_scripts/mini/choose_negatives.py --data_dir runs/mini-data

Reads `scored.parquet`, which `lion-st mine` and `lion-st teach` left there as the README says, and writes
`train.parquet` (query_id, document_ids with the positive first and the negatives by falling score, scores). The
teachers' score is `scale * (dense_weight * cosine + (1 - dense_weight) * coverage)`. The coverage is BM25 over the sum
of the idf of the query's terms: the share of the query's information that the document holds, from 0 to below 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lion_st.data.teachers import TeacherMixture


def choose(
    rows: pa.Table, mixture: TeacherMixture, negatives: int, relative_margin: float, positive_rank: int
) -> Iterator[tuple[str, list[str], list[float]]]:
    """Yield query, documents and scores of the tuples with enough negatives that are clearly below the positive."""
    for row in rows.to_pylist():
        documents = [*row["positive_document_ids"], *row["negative_document_ids"]]
        scores = mixture.combine([row["scores"][name] for name in mixture.weights], draw="")
        if sum(score > scores[0] for score in scores) >= positive_rank:
            continue
        clear = [place for place, score in enumerate(scores) if place and score <= (1 - relative_margin) * scores[0]]
        places = [0, *sorted(clear[:negatives], key=lambda place: -scores[place])]  # the hardest ones are mined first
        if len(places) > negatives:
            yield row["query_id"], [documents[place] for place in places], [scores[place] for place in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("runs/mini-data"))
    parser.add_argument("--negatives", type=int, default=8, help="Of a query.")
    parser.add_argument(
        "--positive_rank", type=int, default=10, help="Queries with so many candidates above the positive are left out."
    )
    parser.add_argument(
        "--relative_margin", type=float, default=0.05, help="A negative scores at most (1 - this) times the positive."
    )
    parser.add_argument("--dense_weight", type=float, default=0.5, help="Of the cosine; BM25's coverage has the rest.")
    parser.add_argument("--scale", type=float, default=25.0, help="Scores are multiplied by this.")
    options = parser.parse_args()
    mixture = TeacherMixture({"dense": options.dense_weight, "bm25": 1 - options.dense_weight}, "weighted")
    scored = pq.read_table(options.data_dir / "scored.parquet")
    chosen = list(choose(scored, mixture, options.negatives, options.relative_margin, options.positive_rank))
    if not chosen:
        parser.error(f"No tuple of {len(scored):,} has {options.negatives} negatives: mine more, or lower the margin.")
    queries, documents, scores = zip(*chosen, strict=True)
    labels = np.round(options.scale * np.array(scores), 2)
    table = {
        "query_id": queries,
        "document_ids": documents,
        "scores": pa.array(labels.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), options.data_dir / "train.parquet", compression="zstd", compression_level=19)
    figures = {
        "tuples": len(chosen),
        "of mined": len(scored),
        "mean positive": float(labels[:, 0].mean()),
        "mean margin": float((labels[:, :1] - labels[:, 1:]).mean()),
        "mean softmax of the positive": float((np.exp(labels[:, 0]) / np.exp(labels).sum(1)).mean()),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
