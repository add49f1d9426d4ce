"""The whole road in small: fine-tune a sparse and a dense micro retriever, score them beside BM25, reload, search.

python training_scripts/quickstart.py

Starts from lion-micro-base, a causal language model that MNTP made bidirectional, and trains with contrastive loss and
distillation (CL+KD) on the bundled pairs. Everything is written to runs/quickstart; run again, it goes on where it
stopped and reuses what is finished. The results of a model and of BM25 lie in its checkpoint too, for its card.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is in the checkout

from sentence_transformers import SentenceTransformer
from trl import TrlParser

from lion_st.data import load_beir
from lion_st.data.quickstart import quickstart_test_sets
from lion_st.evaluation import evaluate_retrieval, format_table, open_retriever
from lion_st.evaluation.mteb_search import model_meta
from lion_st.files import atomic_write
from lion_st.hub.results import RESULTS_FOLDER
from lion_st.retrieval import top_terms
from lion_st.training import get_recipe, retriever_arguments, train_retriever

DTYPE = "bfloat16"  # of the weights in the evaluation
MODELS = {"lion-sp": "sparse", "lion-ds": "dense"}
COLUMNS = {
    "nDCG@10": "nDCG@10",
    "MRR@10": "MRR@10",
    "Recall@100": "Recall@100",
    "terms/query": "query_terms",
    "terms/document": "document_terms",
    "index MB": "index_megabytes",
    "ms/query": "ms_per_query",
}
KEPT = ("model", "engine", "dtype", "dataset", "subset", "split", "query_terms", "document_terms")


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    objective: str = field(default="cl_kd", metadata={"help": "cl, kd or cl_kd."})
    max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps, in place of the recipe's."})
    seed: int = field(default=42, metadata={"help": "Seed of the training."})


def train(arguments: QuickstartArguments, name: str, paradigm: str) -> Path:
    """Train one model, or leave it if it is finished."""
    overrides: dict[str, Any] = {} if arguments.max_steps is None else {"max_steps": arguments.max_steps}
    recipe = get_recipe("micro", paradigm, arguments.objective)
    folder = Path(arguments.output_dir) / name
    return train_retriever(*retriever_arguments(recipe, output_dir=str(folder), seed=arguments.seed, **overrides))


def evaluate(
    arguments: QuickstartArguments, model: str | Path, objective: str | None
) -> tuple[list[dict[str, Any]], Path]:
    """Rows of figures on both test sets, read back where an earlier run left them, and the folder of mteb's results."""
    output = Path(arguments.output_dir)
    retriever = open_retriever(model, tokens_per_batch=4096, load_options={"dtype": DTYPE})
    rows = evaluate_retrieval(
        retriever,
        list(quickstart_test_sets(output / "test_sets").values()),
        output_dir=output / "evaluation",
        top_k=100,  # no metric looks deeper
        metrics=("nDCG@10", "MRR@10", "Recall@100"),
        show_progress=True,
    )
    for row in rows:
        row["objective"] = objective
        row["dtype"] = None if model == "bm25" else DTYPE
        row["index_megabytes"] = row["index_bytes"] / 1e6
        row["ms_per_query"] = (row.get("encode_ms_per_query") or 0.0) + row["search_ms_per_query"]
    meta = model_meta(retriever)
    return rows, output / "evaluation" / "results" / meta.model_name_as_path() / str(meta.revision)


def keep_results(checkpoint: Path, results: list[Path], rows: list[dict[str, Any]]) -> None:
    """Copy mteb's results to a checkpoint, where `lion-st card` looks for them, and how its vectors were made."""
    target = checkpoint / RESULTS_FOLDER
    for folder in results:
        shutil.rmtree(target / folder.parent.name, ignore_errors=True)  # those of an earlier model of this name
        shutil.copytree(folder, target / folder.parent.name / folder.name)
    kept = [{name: row.get(name) for name in KEPT} for row in rows]
    atomic_write(target / "rows.json", (json.dumps(kept, indent=1) + "\n"))


def show_search(folder: Path, test_set: Path, passages: int = 64) -> None:
    """Search with nothing but sentence-transformers, and show what the query was expanded to."""
    corpus, queries, qrels = load_beir(test_set)
    texts = {key: document["text"] for key, document in islice(corpus.items(), passages)}
    question = next(queries[key] for key, relevant in qrels.items() if relevant.keys() & texts.keys())
    model = SentenceTransformer(str(folder), device="cpu")
    query, documents = model.encode_query([question]), model.encode_document(list(texts.values()))
    print(f"\nSentenceTransformer({str(folder)!r}) over {passages} passages: {question}")
    print("  terms:", ", ".join(f"{term} {weight:.2f}" for term, weight in top_terms(query, model.tokenizer, 16)))
    scores = model.similarity(query, documents)[0]
    for rank, place in enumerate(scores.argsort(descending=True)[:3].tolist(), 1):
        print(f"  {rank}. {scores[place]:.2f}  {list(texts.values())[place][:96]}...")


def main() -> None:
    (arguments,) = TrlParser((QuickstartArguments,)).parse_args_and_config()
    start, output = time.monotonic(), Path(arguments.output_dir)
    folders = {name: train(arguments, name, paradigm) for name, paradigm in MODELS.items()}
    rows, lexical = evaluate(arguments, "bm25", None)
    for folder in folders.values():
        own_rows, own = evaluate(arguments, folder, arguments.objective)
        keep_results(folder, [own, lexical], own_rows)
        rows += own_rows
    keys = ("model", "paradigm", "objective", "dataset", *COLUMNS.values(), "documents", "queries", "engine", "dtype")
    results = [{key: row.get(key) for key in keys} for row in rows]
    atomic_write(output / "results.json", (json.dumps(results, indent=1) + "\n"))
    show_search(folders["lion-sp"], output / "test_sets" / "squad_dev")
    table = [
        {"model": row["model"], "dataset": row["dataset"]} | {title: row.get(key) for title, key in COLUMNS.items()}
        for row in sorted(results, key=lambda row: row["dataset"])
    ]
    print(f"\n{format_table(table)}\n\n{output / 'results.json'}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
