"""Score a checkpoint on BEIR folders with the exact index: nDCG@10, MRR@10 and Recall@100.

python training_scripts/gpu_run/evaluate.py CHECKPOINT FOLDER ... --query_terms 64 --document_terms 256
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import torch

import lion_st
from lion_st.data import load_beir
from lion_st.evaluation.metrics import evaluate_run
from lion_st.modules import SpladeHead
from lion_st.retrieval import ModelRetriever


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--output", default="evaluation.json")
    parser.add_argument("--runs", type=Path, help="where the ranked documents go, as gzipped JSON")
    parser.add_argument("--base", help="where an adapter's base is")
    parser.add_argument("--query_terms", type=int)
    parser.add_argument("--document_terms", type=int)
    parser.add_argument("--query_length", type=int)
    parser.add_argument("--document_length", type=int)
    options = parser.parse_args()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = lion_st.load(options.checkpoint, dtype=dtype, base=options.base)
    if isinstance(model[1], SpladeHead):
        model[1].query_max_active_dims = options.query_terms
        model[1].document_max_active_dims = options.document_terms
    rows, runs = [], {}
    for folder in options.folders:
        start = time.time()
        corpus, queries, qrels = load_beir(folder)
        retriever = ModelRetriever(
            model,
            query_length=options.query_length,
            document_length=options.document_length,
            tokens_per_batch=131_072 if torch.cuda.is_available() else 4096,
            threads=2,
        )
        retriever.index({key: f"{row['title']} {row['text']}".strip() for key, row in corpus.items()})
        judged = list(qrels)
        hits = retriever.search([queries[key] for key in judged], k=100)
        run = {key: dict(found) for key, found in zip(judged, hits, strict=True)}
        figures = evaluate_run(qrels, run, ("nDCG@10", "MRR@10", "Recall@100"))
        figures |= {"query_terms": options.query_terms, "document_terms": options.document_terms} | retriever.figures()
        rows.append(
            {"checkpoint": options.checkpoint, "dataset": Path(folder).name, **figures, "seconds": time.time() - start}
        )
        print(json.dumps(rows[-1]), flush=True)
        runs[Path(folder).name] = {
            query: {one: round(float(score), 5) for one, score in found.items()} for query, found in run.items()
        }
        Path(options.output).write_text(json.dumps(rows, indent=1) + "\n")
    if options.runs:
        with gzip.open(options.runs, "wt") as file:
            json.dump(runs, file)


if __name__ == "__main__":
    main()
