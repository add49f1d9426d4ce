"""What sparsity costs: quality against terms, index size and latency, by how a model is made sparse.

    python benchmarks/sparsity.py                                                        # some 15 minutes on one core
    python benchmarks/sparsity.py --groups pruned --model hub_uploads/models/lion-sp-mini

**trained**: lion-micro-base trains with the recipe cl_kd on the bundled tuples, the same texts in the same order for
every row, at several FLOPS weights; with learned thresholds of terms and learned numbers of terms beside them; and
towards a target. The vectors of `flops x 1` are also pruned afterwards, to their largest terms and by a threshold.
**pruned**: the same is done to the vectors of a trained model, `--model`, on each of `--test-sets`.

Terms are means of a text. Postings are those that a query's terms have in the index, in the mean, which is what an
exact search reads and does not depend on the machine; milliseconds are one query at a time on one thread. Rows are
added to results/sparsity.json one by one, and a run that is repeated goes on behind them; the figure is
docs/sparsity.svg.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine_name
from objectives import BUNDLED, FLOPS, ROOT, prepare_tuples, train
from transformers.utils import logging as transformers_logging

import lion_st
from lion_st.data import load_beir, quickstart_test_sets
from lion_st.encoding import encode_texts
from lion_st.evaluation import format_table, prune_report
from lion_st.evaluation.mteb_search import document_text
from lion_st.files import atomic_write
from lion_st.indexes.pruning import Pruning

METRIC = "nDCG@10"
TOP_K = ((4, 16), (8, 32), (16, 64), (32, 128), (32, 256))
THRESHOLDS = (0.1, 0.2, 0.4, 0.6, 0.8)
METHODS = {
    "flops": ("FLOPS weight", "#0072B2", "o"),
    "top-k": ("top-k, afterwards", "#D55E00", "s"),
    "threshold": ("threshold, afterwards", "#CC79A7", "v"),
    "learned thresholds": ("learned thresholds", "#009E73", "^"),
    "learned top-k": ("learned top-k", "#E69F00", "D"),
    "learned both": ("learned thresholds and top-k", "#000000", "P"),
    "target": ("target", "#56B4E9", "X"),
    "none": ("all terms", "#999999", "*"),
}
AXES = {"terms/document": "terms of a document", "index MB": "index, MB", "postings/query": "postings a query reads",
        "ms/query": "ms a query"}  # fmt: skip
TestSet = tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]


def runs() -> list[dict[str, Any]]:
    """Every training: its method, what is varied, and its options."""
    found = []

    def add(method: str, factor: float, **options: Any) -> None:
        weights = {name: factor * weight for name, weight in FLOPS.items()}
        options = BUNDLED | weights | options
        found.append({"method": method, "name": f"{method} x {factor:g}", "options": options, "paradigm": "sparse"})

    thresholds = {"learn_thresholds": True, "threshold_learning_rate": 0.05}
    limits = {
        "learn_top_k": True,
        "query_max_active_dims": 32,
        "document_max_active_dims": 128,
        "threshold_learning_rate": 0.05,
    }
    for factor in (1, 3, 10):
        add("flops", factor)
    for factor in (1, 3, 10):
        add("learned thresholds", factor, **thresholds)
    for factor in (1, 3, 10):
        add("learned top-k", factor, **limits)
    add("learned both", 3, **thresholds | limits)
    for query, document in ((32, 128), (16, 64)):
        add("target", 1, regularizer="target", query_target_terms=query, document_target_terms=document)
        found[-1]["name"] = f"target {query} / {document}"
    return found


def prunings() -> dict[str, tuple[str, Pruning, Pruning]]:
    """What is done to vectors afterwards: method, of queries and of documents."""
    top = {f"top-k {q} / {d}": ("top-k", Pruning(top_terms=q), Pruning(top_terms=d)) for q, d in TOP_K}
    return top | {
        f"threshold {one:g}": ("threshold", Pruning(threshold=one), Pruning(threshold=one)) for one in THRESHOLDS
    }


def read_test_set(folder: Path, queries: int, documents: int) -> TestSet:
    """The first judged queries, all documents that are relevant to them, and others up to a number, drawn once."""
    corpus, texts, qrels = load_beir(folder)
    chosen = dict(list(qrels.items())[:queries])
    relevant = {name: None for judged in chosen.values() for name, grade in judged.items() if grade > 0}
    others = sorted(corpus.keys() - relevant.keys())
    drawn = np.random.default_rng(0).permutation(len(others))[: max(0, documents - len(relevant))]
    names = [*relevant, *(others[place] for place in drawn)]
    found = {name: document_text(corpus[name]["title"], corpus[name]["text"]) for name in names}
    return {name: text for name, text in found.items() if text}, {name: texts[name] for name in chosen}, chosen


def measure(model: Any, test_set: TestSet, pruned: Mapping[str, tuple[str, Pruning, Pruning]]) -> list[dict[str, Any]]:
    """Quality, terms, index size, postings and latency of a model's vectors as they are, and pruned."""
    documents, queries, qrels = test_set
    vectors = {
        task: encode_texts(model, list(texts.values()), task)
        for task, texts in (("query", queries), ("document", documents))
    }
    rows = []
    for _, of_queries, of_documents in (("", Pruning(), Pruning()), *pruned.values()):
        kept = of_queries.apply(vectors["query"]), of_documents.apply(vectors["document"])
        found = (list(documents), kept[1]), (list(queries), kept[0])
        (row,) = prune_report(*found, qrels, [Pruning()], [METRIC, "Recall@100"])
        lists = np.asarray((kept[1] != 0).sum(axis=0)).ravel()  # documents of each term
        rows.append(
            {METRIC: row[METRIC], "Recall@100": row["Recall@100"]}
            | {"terms/query": row["query_terms"], "terms/document": row["document_terms"]}
            | {"index MB": row["index_bytes"] / 1e6, "ms/query": row["ms_per_query"]}
            | {"postings/query": float(((kept[0] != 0) @ lists).mean())}
        )
    return rows


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row of panels for each test set and model, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    from lion_st.study.figures import STYLE

    places = list(dict.fromkeys((row["model"], row["test set"]) for row in rows))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            len(places), len(AXES), figsize=(3.4 * len(AXES), 3 * len(places)), sharey="row", squeeze=False
        )
        for line, place in zip(panels, places, strict=True):
            for panel, (axis, label) in zip(line, AXES.items(), strict=True):
                for method, (title, colour, marker) in METHODS.items():
                    own = [row for row in rows if (row["model"], row["test set"]) == place and row["method"] == method]
                    points = sorted((row[axis], row[METRIC]) for row in own)
                    if points:  # latencies are too noisy to be joined
                        style = "none" if axis == "ms/query" else "-"
                        panel.plot(
                            *zip(*points, strict=True), linestyle=style, marker=marker, color=colour, label=title
                        )
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
                panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
                panel.xaxis.set_minor_formatter(ticker.NullFormatter())
                panel.set_xlabel(label)
            line[0].set_ylabel(METRIC)
            line[0].set_title(f"{place[0]}, {place[1]}", loc="left")
        handles: dict[str, Any] = {}
        for line in panels:
            of_line, titles = line[0].get_legend_handles_labels()
            handles |= dict(zip(titles, of_line, strict=True))
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4)
        figure.tight_layout(rect=(0, 0.16 / len(places), 1, 1))
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=("trained", "pruned"), default=["trained", "pruned"])
    parser.add_argument("--steps", type=int, default=30, help="Of each training, of 8 queries with a negative each.")
    parser.add_argument("--model", default=str(ROOT / "hub_uploads" / "models" / "lion-sp-mini"), help="To be pruned.")
    parser.add_argument("--test-sets", nargs="+", default=["squad_dev", "scifact"], help="Of the pruned model.")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--documents", type=int, default=400, help="Sample of a test set, with all relevant ones.")
    parser.add_argument("--work", type=Path, default=Path("runs/sparsity"), help="Folder of tuples and test sets.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "sparsity.svg")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    options.work.mkdir(parents=True, exist_ok=True)
    options.batch_size, options.negatives = 8, 1
    test_sets = quickstart_test_sets(options.work / "test_sets")
    file = options.output / "sparsity.json"
    settings = {name: getattr(options, name) for name in ("steps", "queries", "documents")}
    kept = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": []}
    if kept["settings"] != settings:
        raise SystemExit(f"{file} has rows of other settings, {kept['settings']}: give another --output, or remove it.")
    rows: list[dict[str, Any]] = kept["rows"]

    def add(found: Sequence[Mapping[str, Any]], names: Mapping[str, str], **of: Any) -> None:
        rows.extend(
            {"name": name, "method": method} | of | row
            for (name, method), row in zip(names.items(), found, strict=True)
        )
        contents = {"machine": machine_name(), "torch": torch.__version__, "settings": settings, "rows": rows}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(contents, indent=1) + "\n")
        print(json.dumps(rows[-len(names)]), flush=True)

    afterwards = {name: method for name, (method, *_) in prunings().items()}
    if "trained" in options.groups:
        tuples = prepare_tuples(options.work, options.steps * options.batch_size, options.negatives, {"bm25": "bm25"})
        test_set = read_test_set(test_sets["squad_dev"], options.queries, options.documents)
        for run in runs():
            of = {"model": "lion-micro", "test set": "squad_dev"}
            if any(row["name"] == run["name"] and row["model"] == of["model"] for row in rows):
                continue
            model, _ = train(run, 0, options, tuples)
            pruned = prunings() if run["name"] == "flops x 1" else {}
            names = {run["name"]: run["method"]} | (afterwards if pruned else {})
            add(measure(model, test_set, pruned), names, **of)
    if "pruned" in options.groups:
        model = lion_st.load(options.model, device="cpu")
        for test in options.test_sets:
            of = {"model": Path(options.model).name, "test set": test}
            if any((row["model"], row["test set"]) == (of["model"], test) for row in rows):
                continue
            test_set = read_test_set(test_sets[test], options.queries, options.documents)
            add(measure(model, test_set, prunings()), {"all terms": "none"} | afterwards, **of)
    for place in dict.fromkeys((row["model"], row["test set"]) for row in rows):
        columns = ("name", METRIC, "Recall@100", "terms/query", "terms/document", *list(AXES)[1:])
        own = [{name: row[name] for name in columns} for row in rows if (row["model"], row["test set"]) == place]
        print(f"\n**{place[0]}, {place[1]}**\n\n{format_table(own)}")
    draw(rows, options.figure)


if __name__ == "__main__":
    main()
