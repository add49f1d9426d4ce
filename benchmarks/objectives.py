"""Objectives, teachers, regularizers and query encoders side by side: same data, same tokens, same seeds.

    python benchmarks/objectives.py                                    # all tables, some 25 minutes on one core
    python benchmarks/objectives.py --groups teachers --teacher minilm=cross-encoder/ms-marco-MiniLM-L6-v2

Every run starts from the bundled lion-micro-base, trains all of its weights on the same tuples of the bundled data set,
in batches of the same texts, and ranks the same questions of SQuAD dev. What is not part of a comparison is as in the
recipe cl_kd. Each setting is trained with each seed, which decides on the order of the tuples: a difference below the
spread over seeds says nothing. So small a budget ranks settings by how fast they learn, not by where they end.

Teachers are "bundled" (the scores in the data set, BM25 and an encoder mixed by hand) and those
of --teacher NAME=MODEL, as `lion-st teach` takes them. Their scores are brought to one scale, so that one teacher and
several are learned from in the same way. Those that no asked-for group learns from are not loaded.

A hybrid model is measured by each of its vectors and by both fused, beside two models of one vector each that saw the
same texts, and so cost twice as much to train and to encode with. Weights of fusion are fitted on other questions of
SQuAD dev, of other paragraphs.

Rows are added to results/objectives.json one by one, and a run that is repeated goes on behind them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch
from common import RESULTS, machine_name
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from lion_st.data import load_beir, load_tuples, quickstart_data, quickstart_test_sets
from lion_st.encoding import encode_texts
from lion_st.evaluation import evaluate_run, format_table, hits_to_run, prune_report, trade_off_figure
from lion_st.evaluation.mteb_search import document_text
from lion_st.exporting import single_models
from lion_st.files import atomic_write
from lion_st.indexes import create_index
from lion_st.indexes.pruning import Pruning
from lion_st.retrieval import convex_fusion, fit_convex_weights, reciprocal_rank_fusion
from lion_st.supervision import Bm25, load_teacher, teach
from lion_st.training import (
    RetrieverArguments,
    RetrieverTrainingArguments,
    build_trainer,
    get_recipe,
    retriever_arguments,
)
from lion_st.training.query_distillation import distill_query_encoder, make_distillation_targets
from lion_st.training.query_encoders import (
    idf_weights,
    static_query_encoder,
)
from lion_st.training.retriever import load_training_tuples
from lion_st.training.starting import build_model

ROOT = Path(__file__).parents[1]
METRICS = ("nDCG@10", "Recall@100")
TASKS = ("query", "document")
OBJECTIVES = ("cl", "kd", "cl_kd", "kl", "margin_mse_kl", "listwise", "rank")
# One scale for all teachers' scores: a row's span 10, about as the bundled ones do. Listwise labels are grades.
ONE_SCALE = {"combine": "zscore", "teacher_normalization": "minmax", "teacher_temperature": 0.1}
BUNDLED = {"teachers": ["bundled"]}
FLOPS = {"query_regularizer_weight": 0.05, "document_regularizer_weight": 0.04}


def runs(teachers: list[str]) -> list[dict[str, Any]]:
    """Every setting: its table, paradigm, name, and the options that it has beside those of all.

    Args:
        teachers: Names beside "bundled", two at least.
    """
    found: list[dict[str, Any]] = []

    def add(group: str, paradigm: str, name: str, **options: Any) -> None:
        found.append({"group": group, "paradigm": paradigm, "name": name, "options": options})

    for paradigm in ("sparse", "dense"):
        add("objectives", paradigm, "untrained", steps=0)
        for objective in OBJECTIVES:
            scale = {"listwise": {"teacher_normalization": "minmax"}}.get(objective, {})
            add(
                "objectives", paradigm, objective, objective=objective, **({} if objective == "cl" else BUNDLED | scale)
            )
        add("objectives", paradigm, "cl_kd, self-distilled", self_distillation=True)
        pool = [*teachers, "bundled"]
        for names in [["bundled"], *([name] for name in teachers), pool[:2], pool[:3]]:
            add("teachers", paradigm, " + ".join(names), teachers=names, **ONE_SCALE)
        for combine in ("separate", "random"):
            name = f"{' + '.join(pool[:3])}, {combine}"
            add("teachers", paradigm, name, teachers=pool[:3], **ONE_SCALE | {"combine": combine})
    for factor in (0.1, 0.3, 1, 3, 10):
        weights = {name: factor * weight for name, weight in FLOPS.items()}
        add("regularizers", "sparse", f"flops x {factor:g}", **BUNDLED, **weights)
    add("regularizers", "sparse", "l1 / 100", regularizer="l1", **BUNDLED, **{n: w / 100 for n, w in FLOPS.items()})
    add("regularizers", "sparse", "df_flops", regularizer="df_flops", **BUNDLED)
    add("regularizers", "sparse", "idf_flops", regularizer="idf_flops", **BUNDLED)
    for steps in (1, 4):
        # Weights decide on the way to the target alone, which few steps have to go fast.
        add("regularizers", "sparse", "target 32 / 256" + (f", {steps} x the steps" if steps > 1 else ""),
            regularizer="target", query_target_terms=32, document_target_terms=256, steps=steps,
            **BUNDLED, **{name: 10 * weight for name, weight in FLOPS.items()})  # fmt: skip
    for objective in ("cl", "cl_kd"):  # a dense model has hardly begun when a sparse one has learned
        add("objectives", "dense", f"{objective}, 4 x the steps", objective=objective, steps=4,
            **({} if objective == "cl" else BUNDLED))  # fmt: skip
    for name, weight in (("cl_kd", 1.0), ("cl_kd, dense loss x 0.1", 0.1)):
        add("hybrid", "hybrid", name, dense_weight=weight, **BUNDLED)
    add("hybrid", "hybrid", "cl", objective="cl")
    add("query encoders", "sparse", "full", **BUNDLED)
    for paradigm, kind in (("sparse", "static"), ("sparse", "idf"), ("dense", "static")):
        add("query encoders", paradigm, f"{kind}, trained together", query_encoder=kind, **BUNDLED)
    return sorted(found, key=lambda run: run["paradigm"] == "dense")


def prepare_tuples(folder: Path, count: int, negatives: int, teachers: Mapping[str, str]) -> Path:
    """A sample of the bundled tuples, with the scores of every teacher beside the bundled ones."""
    sample, scored = folder / "tuples.jsonl", folder / "scored.parquet"
    if not sample.exists():
        tuples = load_tuples(
            quickstart_data(), negatives=negatives, teacher_scores=True, sampling="first", drop_short=True
        )
        chosen = torch.randperm(len(tuples), generator=torch.Generator().manual_seed(0))[:count]
        rows = [tuples[int(row)] for row in chosen]
        lines = (
            {
                "query": row["query"],
                "pos": [row["positive"]],
                "neg": [row[name] for name in row if name.startswith("negative")],
                "scores": {"bundled": row["label"]},
            }
            for row in rows
        )
        atomic_write(sample, "".join(json.dumps(line) + "\n" for line in lines))
    if not teachers:
        return sample
    models = {
        name: Bm25() if model == "bm25" else load_teacher(model, device="cpu") for name, model in teachers.items()
    }
    teach(sample, scored, models)
    return scored


def read_test_set(folder: Path, count: int, part: int = 0) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Questions of SQuAD dev about different paragraphs, these paragraphs, and the judgements.

    Args:
        folder: Where the test set lies, or is put.
        count: How many.
        part: 0 for the first ones, 1 for those after them.
    """
    corpus, queries, qrels = load_beir(quickstart_test_sets(folder)["squad_dev"])
    seen: set[str] = set()
    different = [query for query, judged in qrels.items() if not seen & judged.keys() and not seen.update(judged)]
    chosen = {query: qrels[query] for query in different[part * count : (part + 1) * count]}
    documents = {
        name: document_text(corpus[name]["title"], corpus[name]["text"])
        for judged in chosen.values()
        for name in judged
    }
    return documents, {query: queries[query] for query in chosen}, chosen


def arguments_of(
    run: Mapping[str, Any], seed: int, options: argparse.Namespace, tuples: Path
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """The arguments of a setting's training."""
    settings = {"objective": "cl_kd"} | run["options"]
    steps = max(1, options.steps * settings.pop("steps", 1))
    return retriever_arguments(
        get_recipe("micro", run["paradigm"], settings["objective"]),
        **{
            "train_data": [str(tuples)], "negatives": options.negatives, "sampling": "first", "seed": seed,
            "batch_size": options.batch_size, "max_steps": steps, "query_length": 24, "document_length": 64,
            "batch_sampler": "no_duplicates", "save_strategy": "no", "logging_steps": max(1, steps // 4),
            "disable_tqdm": True, "output_dir": tempfile.mkdtemp(),
        },
        **settings,
    )  # fmt: skip


def train(run: Mapping[str, Any], seed: int, options: argparse.Namespace, tuples: Path) -> tuple[Any, dict[str, Any]]:
    """The trained model of a setting, and what its training took."""
    arguments, training = arguments_of(run, seed, options, tuples)
    set_seed(seed)
    model = build_model(arguments, "cpu")
    if run["options"].get("steps") == 0:
        return model.eval(), {"steps": 0, "TFLOP": 0.0}
    began = time.perf_counter()
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, seed))
    trainer.train()
    logged = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    return trainer.whole_model().eval(), {
        "steps": training.max_steps,
        "TFLOP": trainer.state.total_flos / 1e12,
        "training seconds": round(time.perf_counter() - began, 1),
        "loss": logged["loss"],
        **{f"trained terms/{task}": logged[f"{task}_active_dims"] for task in TASKS if f"{task}_active_dims" in logged},
    }


def distilled(model: Any, tuples: Path, negatives: int) -> dict[str, Any]:
    """Query encoders that are made of a trained model afterwards, of the same tuples."""
    rows = load_tuples(tuples, negatives=negatives, sampling="first")
    targets = make_distillation_targets(model, rows)
    weights = idf_weights([([], targets.document_vectors)])
    student = static_query_encoder(model, weights)
    distill_query_encoder(student, targets, tempfile.mkdtemp(), epochs=4, disable_tqdm=True)
    return {"static, distilled afterwards": student, "idf, afterwards": static_query_encoder(model, weights)}


def measure(
    model: Any,
    paradigm: str,
    test_set: Any,
    prunings: Mapping[str, tuple[Pruning, Pruning]] = MappingProxyType({}),
    query_model: Any = None,
) -> list[dict[str, Any]]:
    """Quality, and of sparse vectors terms, index size and latency, without and with prunings of both sides."""
    documents, queries, qrels = test_set
    vectors = [
        encode_texts(query_model or model, list(queries.values()), "query"),
        encode_texts(model, list(documents.values()), "document"),
    ]
    if paradigm == "dense":
        index = create_index("exact", "dense")
        index.add(list(documents), vectors[1])
        return [evaluate_run(qrels, hits_to_run(queries, index.search(vectors[0], 100)), METRICS)]
    rows = []
    for query_pruning, document_pruning in ((Pruning(), Pruning()), *prunings.values()):
        (row,) = prune_report(
            (list(documents), vectors[1]),
            (list(queries), query_pruning.apply(vectors[0])),
            qrels,
            [document_pruning],
            METRICS,
        )
        rows.append(
            {metric: row[metric] for metric in METRICS}
            | {"terms/query": row["query_terms"], "terms/document": row["document_terms"]}
            | {"index MB": row["index_bytes"] / 1e6, "ms/query": row["ms_per_query"]}
        )
    return rows


def measure_both(models: tuple[Any, Any], test_set: Any, dev_set: Any) -> dict[str, dict[str, Any]]:
    """Quality of a sparse and of a dense model, or of the two parts of a hybrid one, and of both fused."""
    found = {name: measure(model, name, test_set)[0] for name, model in zip(("sparse", "dense"), models, strict=True)}
    rankings = []
    for documents, queries, _ in (dev_set, test_set):
        sides = []
        for paradigm, model in zip(found, models, strict=True):
            index = create_index("exact", paradigm)
            index.add(list(documents), encode_texts(model, list(documents.values()), "document"))
            sides.append(index.search(encode_texts(model, list(queries.values()), "query"), len(documents)))
        rankings.append(sides)
    judged = dev_set[2]
    weights, _ = fit_convex_weights(
        rankings[0], list(dev_set[1]), lambda run: evaluate_run(judged, run, METRICS)[METRICS[0]]
    )
    _, queries, qrels = test_set
    fused = {
        "fused": convex_fusion(rankings[1], weights, 100),
        "fused by ranks": reciprocal_rank_fusion(rankings[1], 100),
    }
    rows = {name: evaluate_run(qrels, hits_to_run(queries, hits), METRICS) for name, hits in fused.items()}
    rows["fused"]["weight of sparse"] = weights[0]
    return found | rows


def prunings() -> dict[str, tuple[Pruning, Pruning]]:
    """What is done to the vectors of a trained model, of queries and of documents."""
    top = {
        f"top-k {q} / {d}": (Pruning(top_terms=q), Pruning(top_terms=d))
        for q, d in ((8, 32), (16, 64), (32, 128), (40, 400))
    }
    return top | {f"threshold {t}": (Pruning(threshold=t), Pruning(threshold=t)) for t in (0.2, 0.4, 0.6, 0.8)}


def means(rows: list[dict[str, Any]], group: str, paradigm: str) -> list[dict[str, Any]]:
    """A row for each setting of a table: means over seeds, and half the range of nDCG@10 over them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if (row["group"], row["paradigm"]) == (group, paradigm):
            found.setdefault(row["name"], []).append(row)
    table = []
    for name, of_seeds in found.items():
        scores = [row["nDCG@10"] for row in of_seeds]
        numbers = {
            key: mean(row[key] for row in of_seeds) for key in of_seeds[0] if isinstance(of_seeds[0][key], float)
        }
        spread = {"±": (max(scores) - min(scores)) / 2} if len(scores) > 1 else {}
        line = {group.removesuffix("s"): name, "nDCG@10": mean(scores)} | spread | numbers
        table.append({key: value for key, value in line.items() if key not in ("loss", "training seconds")})
    return table


def show(rows: list[dict[str, Any]], folder: Path) -> str:
    """All tables in Markdown, and the figure of what sparsity costs."""
    parts, points = [], []
    groups = dict.fromkeys((row["group"], row["paradigm"]) for row in rows)
    for group, paradigm in groups:
        table = means(rows, group, paradigm)
        parts.append(f"**{group}, {paradigm}**\n\n{format_table(table)}")
        if group in ("regularizers", "pruning"):
            points += [{"documents": next(iter(row.values()))} | row for row in table]
    if points:
        trade_off_figure(points, folder / "objectives.svg", "index MB", "nDCG@10", overwrite=True)
    return "\n\n".join(parts)


def keep(rows: list[Any], measured: Mapping[str, Any], of: Mapping[str, Any], settings: Any, file: Path) -> None:
    """Add the rows of one setting, and write all of them."""
    rows += [{"name": name} | of | figures for name, figures in measured.items()]
    contents = {"machine": machine_name(), "torch": torch.__version__, "settings": settings, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(contents, indent=1) + "\n")
    print(json.dumps(rows[-len(measured)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = ["bm25=bm25", f"sp-mini={ROOT}/hub_uploads/models/lion-sp-mini"]
    parser.add_argument("--teacher", action="append", metavar="NAME=MODEL", help=f"By default {' and '.join(bundled)}.")
    parser.add_argument("--groups", nargs="+", help="Tables to fill; all by default.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--negatives", type=int, default=3)
    parser.add_argument("--queries", type=int, default=300, help="Test questions, and as many paragraphs.")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="Folder of tuples and test set.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()

    teachers = dict(one.split("=", 1) for one in options.teacher or bundled)
    if len(teachers) < 2:
        parser.error("Give two teachers at least: one is compared with two and with three.")
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in runs(list(teachers)) if not options.groups or run["group"] in options.groups]
    read = {name for run in chosen for name in run["options"].get("teachers", ())}
    used = {name: model for name, model in teachers.items() if name in read}
    tuples = prepare_tuples(options.work, options.steps * options.batch_size, options.negatives, used)
    test_set, dev_set = (read_test_set(options.work / "test_sets", options.queries, part) for part in (0, 1))
    file = options.output / "objectives.json"
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "negatives", "queries")}
    settings["teachers"] = {name: Path(model).name for name, model in teachers.items()}
    rows: list[dict[str, Any]] = []
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["settings"] != settings:
            raise SystemExit(
                f"{file} has rows of other settings, {kept['settings']}: give another --output, or remove it."
            )
        rows = kept["rows"]
    done = {(row["group"], row["paradigm"], row["name"].partition(": ")[0], row["seed"]) for row in rows}

    for seed in options.seeds:
        for run in chosen:
            key = (run["group"], run["paradigm"], run["name"], seed)
            if key in done:
                continue
            model, spent = train(run, seed, options, tuples)
            of = {"group": run["group"], "paradigm": run["paradigm"], "seed": seed}
            if run["group"] == "hybrid":
                both = measure_both(single_models(model), test_set, dev_set)
                measured = {f"{run['name']}: {part}": figures | spent for part, figures in both.items()}
                if run["name"] == "cl_kd":
                    alone = [
                        train(run | {"paradigm": one, "options": BUNDLED}, seed, options, tuples)[0]
                        for one in ("sparse", "dense")
                    ]
                    both = measure_both((alone[0], alone[1]), test_set, dev_set)
                    measured |= {f"cl_kd of two models: {part}": figures for part, figures in both.items()}
                keep(rows, measured, of, settings, file)
                continue
            pruned = prunings() if run["name"] == "flops x 1" else {}
            measured = {
                name: figures | ({"group": "pruning"} if name in pruned else spent)
                for name, figures in zip(
                    [run["name"], *pruned], measure(model, run["paradigm"], test_set, pruned), strict=True
                )
            }
            if run["name"] == "full":
                for name, student in distilled(model, tuples, options.negatives).items():
                    (measured[name],) = measure(model, run["paradigm"], test_set, query_model=student)
            keep(rows, measured, of, settings, file)
    print(show(rows, options.output))


if __name__ == "__main__":
    main()
