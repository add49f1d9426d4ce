"""The whole road in small: search with a small retriever beside BM25, train one for a minute, reload, explain.

python training_scripts/quickstart.py

Scores lion-sp-mini, BM25, their hybrid and lion-ds-mini on parts of two test sets (`--full true`: on all of them),
fine-tunes lion-mini-base for a minute with contrastive loss and distillation (CL+KD) on the bundled tuples, and scores
it before and after. Everything is written to runs/quickstart; run again, it goes on where it stopped and reuses what is
finished. The results of a model and of BM25 lie in its checkpoint too, for its card.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is in the checkout
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
SHOW_PROGRESS = sys.stderr.isatty()  # a log file gets lines alone
if not SHOW_PROGRESS:
    os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)
for name in ("sentence_transformers", "bitsandbytes"):  # they advise against bfloat16 on a CPU, and to install kernels
    logging.getLogger(name).setLevel(logging.ERROR)

import torch
from sentence_transformers import SentenceTransformer
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

import lion_st
from lion_st.data import load_beir, save_beir
from lion_st.data.beir import quickstart_test_sets
from lion_st.evaluation import evaluate_retrieval, format_table, fuse_runs, open_retriever, read_run, write_run
from lion_st.evaluation.mteb_search import model_meta
from lion_st.files import atomic_write
from lion_st.hub.results import RESULTS_FOLDER
from lion_st.kernels.bfloat16 import multiplies_bfloat16
from lion_st.retrieval import explain_score, top_terms
from lion_st.training import get_recipe, retriever_arguments, train_retriever
from lion_st.training.progress.history import history_rows, read_history
from lion_st.training.recipes import adapted_backbone

MODEL, DENSE = "lion-sp-mini", "lion-ds-mini"
QUERY_TERMS, DOCUMENT_TERMS = 32, 256  # the largest ones that are kept, chosen on the dev set of training_scripts/mini
HYBRID = (MODEL, "bm25")
HYBRID_WEIGHTS = (0.45, 0.55)  # fitted on that dev set
PARTS = {"squad_dev": (800, 800), "scifact": (300, 100)}  # documents and queries of the quick evaluation
SMALL = (150, 150)  # of the evaluation before and after training
METRICS = ("nDCG@10", "MRR@10", "Recall@100")
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
# Of the weights in the evaluation: without instructions for bfloat16 a CPU takes five times as long with it.
DTYPE = torch.bfloat16 if multiplies_bfloat16() else torch.float32


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="runs/quickstart", metadata={"help": "Where everything is written."})
    full: bool = field(default=False, metadata={"help": "Evaluate on all of both test sets."})
    train_seconds: float = field(default=60.0, metadata={"help": "Seconds of the training."})
    objective: str = field(default="cl_kd", metadata={"help": "cl, kd or cl_kd."})
    seed: int = field(default=42, metadata={"help": "Seed of the training."})


def say(text: str) -> None:
    print(text, flush=True)


def part_of(source: Path, documents: int, queries: int) -> Path:
    """A BEIR folder of the first queries, with the documents that answer them and the first of the others."""
    target = source.with_name(f"{source.name}_{queries}_of_{documents}")
    if (target / "qrels" / "test.tsv").exists():
        return target
    corpus, asked, qrels = load_beir(source)
    if len(corpus) <= documents and len(qrels) <= queries:
        return source
    qrels = dict(islice(qrels.items(), queries))
    kept = dict.fromkeys(document for grades in qrels.values() for document in grades)
    kept |= dict.fromkeys(islice((key for key in corpus if key not in kept), max(0, documents - len(kept))))
    save_beir(
        target,
        {key: row for key, row in corpus.items() if key in kept},
        {key: asked[key] for key in qrels},
        qrels,
    )
    return target


def fetch(name: str, folder: Path) -> Path:
    """Copy a published model into the output folder, which then takes its results."""
    if not (folder / "modules.json").exists():
        source = adapted_backbone("mini").replace("lion-mini-base", name)
        if not Path(source).is_dir():
            from huggingface_hub import snapshot_download

            source = snapshot_download(source)
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def load_for_search(folder: Path) -> Any:
    """The model as it searches best: with its largest terms alone."""
    model = lion_st.load(folder, dtype=DTYPE, device="cpu")
    model[1].query_max_active_dims, model[1].document_max_active_dims = QUERY_TERMS, DOCUMENT_TERMS
    return model


def evaluate(
    arguments: QuickstartArguments, model: Any, data: Sequence[Path], **options: Any
) -> tuple[list[dict[str, Any]], Path]:
    """Rows of figures, read back where an earlier run left them, and the folder of mteb's results."""
    output = Path(arguments.output_dir) / "evaluation"
    retriever = open_retriever(model, tokens_per_batch=4096, threads=2, **options)
    rows = evaluate_retrieval(
        retriever, list(data), output_dir=output, top_k=100, metrics=METRICS, show_progress=SHOW_PROGRESS
    )
    for row in rows:
        row["index_megabytes"] = row["index_bytes"] / 1e6
        row["ms_per_query"] = (row.get("encode_ms_per_query") or 0.0) + row["search_ms_per_query"]
        row["dtype"] = None if model == "bm25" else str(DTYPE).removeprefix("torch.")
    meta = model_meta(retriever)
    return rows, output / "results" / meta.model_name_as_path() / str(meta.revision)


def hybrid(rows: Sequence[dict[str, Any]], data: Sequence[Path], output: Path) -> list[dict[str, Any]]:
    """Fuse the runs of two retrievers and score them."""
    found = []
    for folder in data:
        runs = [read_run(row["run"]) for name in HYBRID for row in rows if _is_of(row, name, folder)]
        path = write_run(output / f"hybrid.{folder.name}.trec", fuse_runs(runs, HYBRID_WEIGHTS, k=100), overwrite=True)
        (row,) = evaluate_retrieval(path, folder, top_k=100, metrics=METRICS)
        found.append(row | {"model": " + ".join(HYBRID)})
    return found


def _is_of(row: dict[str, Any], model: str, folder: Path) -> bool:
    return row["model"] == model and row["dataset"] == folder.name


def keep_results(checkpoint: Path, results: Sequence[Path], rows: Sequence[dict[str, Any]]) -> None:
    """Copy mteb's results to a checkpoint, where `lion-st card` looks for them, and how its vectors were made."""
    target = checkpoint / RESULTS_FOLDER
    for folder in results:
        shutil.rmtree(target / folder.parent.name, ignore_errors=True)  # those of an earlier model of this name
        shutil.copytree(folder, target / folder.parent.name / folder.name)
    kept = [{name: row.get(name) for name in KEPT} for row in rows]
    atomic_write(target / "rows.json", (json.dumps(kept, indent=1) + "\n"))


def train_for_a_minute(arguments: QuickstartArguments, data: Path) -> list[dict[str, Any]]:
    """Fine-tune the backbone and return its rows before and after."""
    recipe = get_recipe("mini", "sparse", arguments.objective)
    output = Path(arguments.output_dir) / "trained"
    untrained = lion_st.build(recipe.model, "sparse", dtype=DTYPE, document_length=recipe.document_length, device="cpu")
    before, _ = evaluate(arguments, untrained, [data], name="lion-mini-base, untrained")
    with redirect_stdout(StringIO()):  # long lines, of which the table below shows what counts
        folder = train_retriever(
            *retriever_arguments(
                recipe,
                output_dir=str(output),
                seed=arguments.seed,
                max_seconds=arguments.train_seconds,
                bf16=torch.cuda.is_available() or multiplies_bfloat16(),
                logging_steps=1,
            )
        )
    say(format_table(history_rows(read_history(output), most=6)))
    trained = lion_st.load(folder, dtype=DTYPE, device="cpu")
    after, _ = evaluate(arguments, trained, [data], name="lion-mini-base, after a minute")
    return before + after


def show_search(folder: Path, test_set: Path, passages: int = 64) -> None:
    """Search with nothing but sentence-transformers; show the query's expansion and why a passage was found."""
    corpus, queries, qrels = load_beir(test_set)
    texts = {key: document["text"] for key, document in islice(corpus.items(), passages)}
    question = next(queries[key] for key, relevant in qrels.items() if relevant.keys() & texts.keys())
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": DTYPE})
    query, documents = model.encode_query([question]), model.encode_document(list(texts.values()))
    say(f"\nSentenceTransformer({str(folder)!r}) over {passages} passages: {question}")
    say("  terms: " + ", ".join(f"{term} {weight:.2f}" for term, weight in top_terms(query, model.tokenizer, 16)))
    scores = model.similarity(query, documents)[0]
    for rank, place in enumerate(scores.argsort(descending=True)[:3].tolist(), 1):
        reasons = explain_score(query, documents[[place]], model.tokenizer)[:5]
        say(f"  {rank}. {scores[place]:.2f}  {list(texts.values())[place][:96]}...")
        say("     because of " + ", ".join(f"{reason.term.strip()} {reason.share:.0%}" for reason in reasons))


def main() -> None:
    (arguments,) = TrlParser((QuickstartArguments,)).parse_args_and_config()
    disable_progress_bar()
    start, output = time.monotonic(), Path(arguments.output_dir)
    whole = quickstart_test_sets(output / "test_sets")
    data = list(whole.values()) if arguments.full else [part_of(whole[name], *size) for name, size in PARTS.items()]
    say("Scoring BM25 and the published models...")
    rows, lexical = evaluate(arguments, "bm25", data)
    folder = fetch(MODEL, output / "lion-sp")
    own_rows, own = evaluate(arguments, load_for_search(folder), data, name=MODEL)
    keep_results(folder, [own, lexical], own_rows)
    rows += own_rows
    rows += hybrid(rows, data, output)
    dense = fetch(DENSE, output / "lion-ds")
    dense_rows, own = evaluate(arguments, lion_st.load(dense, dtype=DTYPE, device="cpu"), data, name=DENSE)
    keep_results(dense, [own, lexical], dense_rows)
    rows += dense_rows
    say(f"Training lion-mini-base for {arguments.train_seconds:.0f} seconds...")
    trained = train_for_a_minute(arguments, part_of(whole["squad_dev"], *SMALL))
    keys = ("model", "paradigm", "dataset", *COLUMNS.values(), "documents", "queries", "engine", "dtype")
    results = [{key: row.get(key) for key in keys} for row in rows + trained]
    atomic_write(output / "results.json", (json.dumps(results, indent=1) + "\n"))
    show_search(folder, whole["squad_dev"])
    for part in (rows, trained):
        table = [
            {"model": row["model"], "dataset": row["dataset"], "queries": row["queries"], "documents": row["documents"]}
            | {title: row.get(key) for title, key in COLUMNS.items()}
            for row in sorted(part, key=lambda row: row["dataset"])
        ]
        say(f"\n{format_table(table)}")
    say(f"\n{output / 'results.json'}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
