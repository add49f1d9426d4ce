"""Take so many mined tuples of each source, such as more questions than there are among all.

python training_scripts/mini/mix.py --data_dir runs/mini-data --output runs/mini-data/train_mixed.parquet \
    --take wikipedia_question=5500 arxiv_conclusion=3500 arxiv_title=2500 openstax_heading=2000 medquad=1500 \
    arxiv_sentence=1500 openstax_sentence=1000 openstax_glossary=700 medquad_sentence=500 wikipedia_sentence=500 \
    msdocs_heading=300
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("runs/mini-data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--take", nargs="+", required=True, metavar="SOURCE=COUNT")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    queries = pq.read_table(options.data_dir / "queries.parquet", columns=["query_id", "source"])
    sources = dict(zip(*(queries[name].to_pylist() for name in ("query_id", "source")), strict=True))
    tuples = pq.read_table(options.data_dir / "train.parquet")
    of_source: dict[str, list[int]] = {}
    for row, query in enumerate(tuples["query_id"].to_pylist()):
        of_source.setdefault(sources[query], []).append(row)
    generator, taken = random.Random(options.seed), []
    for wanted in options.take:
        source, _, count = wanted.partition("=")
        if source not in of_source:
            parser.error(f"There is no source {source!r}: choose of {', '.join(sorted(of_source))}.")
        taken += generator.sample(of_source[source], min(int(count), len(of_source[source])))
    generator.shuffle(taken)
    pq.write_table(tuples.take(pa.array(taken)), options.output)
    print(f"{options.output}: {len(taken):,} tuples")


if __name__ == "__main__":
    main()
