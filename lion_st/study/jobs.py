"""One job of a study, in a process of its own: an MNTP stage, or a cell's training and evaluation.

python -m lion_st.study.jobs FOLDER

Several processes that share the batches of a training are torchrun's, see `train`; they end before the evaluation.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.data.beir import Corpus, Qrels, Queries
from lion_st.errors import one_line_errors
from lion_st.files import atomic_write, lock_folder, read_json
from lion_st.study.settings import TestSet

JOB, ROWS, LOG, LOCK = "job.json", "rows.json", "log.txt", ".job.lock"
TRAINING = "training"  # the second word of a process that trains and does no more
SEED = 0
ENTROPY = "contrastive entropy"
FIGURES = ("query_terms", "document_terms", "index_bytes", "encode_ms_per_query", "search_ms_per_query")


def run_job(folder: Path) -> None:
    """Do what a folder's `job.json` says; what an interrupted process has finished is not done again.

    A process that a killed study has left behind finishes its job; one that is to do the same waits for it.

    Raises:
        ValueError: Of the training or the evaluation, as they say.
    """
    with lock_folder(folder, name=LOCK):
        if not (folder / ROWS).exists():
            _run_job(folder)


def _run_job(folder: Path) -> None:
    job = read_json(folder / JOB)
    if job["processes"] == 1:
        train(job)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job["processes"])]
        command = [sys.executable, *launcher, "-m", "lion_st.study.jobs", str(folder), TRAINING]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        launched = subprocess.Popen(command)
        try:
            code = launched.wait()
        finally:
            launched.terminate()  # and it ends its processes; nothing if it has ended
            launched.wait()
        if code:  # one of them has said why
            raise SystemExit(code)
    trained = Path(job["options"]["output_dir"])
    if job["stage"] == "mntp":
        for checkpoint in folder.rglob("checkpoint-*"):  # of a finished run, which nobody goes on with
            shutil.rmtree(checkpoint, ignore_errors=True)
        return
    record = read_json(trained / "training.json")
    rows = evaluate_cell(trained, job, folder)
    cost = {
        "steps": record["steps"],
        "flops": record["floating_point_operations"],
        "training_seconds": record["seconds"],
    }
    described = [job["description"] | cost | row for row in rows]
    atomic_write(folder / ROWS, json.dumps(described, indent=1) + "\n")
    if not job["keep_weights"]:
        shutil.rmtree(trained)


def train(job: Mapping[str, Any]) -> None:
    """Do the training of a job, in this process or with the others of torchrun."""
    if job["stage"] == "mntp":
        from lion_st.study.grid import read_mntp_options
        from lion_st.training.mntp import adapt_mntp

        adapt_mntp(*read_mntp_options(job["options"], job["name"]))
    else:
        from lion_st.study.grid import read_options
        from lion_st.training.retriever import train_retriever

        train_retriever(*read_options(job["options"], job["name"]))


def evaluate_cell(model: Path, job: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row for each test set and metric; runs and values of single queries are left in the cell's folder."""
    settings = job["evaluation"]
    weights: tuple[float, float] | None = None
    rows: list[dict[str, Any]] = []
    for test in (TestSet(**values) for values in settings["tests"]):
        output = folder / "evaluation" / test.name
        if not (output / ROWS).exists():
            shutil.rmtree(output, ignore_errors=True)
            retriever = _retriever(model, job, output / "encoded")
            if retriever.paradigm == "hybrid" and settings.get("dev") is not None:
                weights = weights or _fitted(retriever.model, settings["dev"], folder / "evaluation")
                retriever.model[1].fusion_weights = weights
            found = _evaluated(retriever, test, job, folder)
            atomic_write(output / ROWS, json.dumps(found, indent=1) + "\n")
        rows += read_json(output / ROWS)
    return rows


def _retriever(model: Path, job: Mapping[str, Any], encoded: Path) -> Any:
    from lion_st.evaluation.evaluate import open_retriever

    settings = job["evaluation"]
    return open_retriever(
        model,
        settings["engine"],
        encoded_dir=encoded,
        name=job["name"],
        load_options={"dtype": settings["dtype"]},
    )


def _evaluated(retriever: Any, test: TestSet, job: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows of one test set; the vectors of its documents are removed once they have been used."""
    from lion_st.evaluation.evaluate import evaluate_retrieval
    from lion_st.study.data import load_test

    settings, source, output = job["evaluation"], job["tests"][test.name], folder / "evaluation" / test.name
    (figures,) = evaluate_retrieval(
        retriever,
        source,
        output_dir=output,
        split=test.split,
        top_k=settings["top_k"],
        metrics=settings["metrics"],
    )
    entropies = contrastive_entropies(
        retriever.model,
        next((output / "encoded").iterdir()),
        *load_test(source, test.split),
        negatives=settings["entropy_negatives"],
        temperature=job["temperature"],
        dense_temperature=job["dense_temperature"],
    )
    shutil.rmtree(output / "encoded")
    atomic_write(output / "entropies.json", json.dumps(entropies) + "\n")
    shared = {
        "test_set": test.name,
        "domain": test.domain,
        "documents": figures["documents"],
        "queries": figures["queries"],
        **{name: figures.get(name) for name in FIGURES},
        **{name: Path(figures[name]).relative_to(folder).as_posix() for name in ("run", "qrels")},
    }
    values = {metric: figures[metric] for metric in settings["metrics"]}
    values[ENTROPY] = float(np.mean(list(entropies.values())))
    return [{**shared, "metric": metric, "value": value} for metric, value in values.items()]


def _fitted(model: Any, dev: Sequence[str], folder: Path) -> tuple[float, float]:
    """Weights of a hybrid model's scores that are best on a development set, which are left in the folder too."""
    from lion_st.evaluation import fit_fusion
    from lion_st.study.data import local

    weights = fit_fusion(model, local(dev[0]), dev[1])
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "fusion_weights.json", json.dumps(weights) + "\n")
    return weights


def contrastive_entropies(
    model: Any,
    encoded: Path,
    corpus: Corpus,
    queries: Queries,
    qrels: Qrels,
    negatives: int = 256,
    temperature: float = 1.0,
    dense_temperature: float = 1.0,
    seed: int = SEED,
) -> dict[str, float]:
    """How surprised a model is, in nats, that a relevant document is the relevant one among random others.

    -log of the softmax of the best graded document against documents that are drawn from the collection, of the scores
    as the model is trained on them. Unlike a metric of rankings it changes smoothly with every improvement.

    Args:
        model: Encodes the queries.
        encoded: Folder of `encode_corpus` with the documents' vectors.
        corpus: The documents.
        queries: The queries.
        qrels: The judgements.
        negatives: Documents drawn, the same for all queries; those that are relevant to a query are left out of its.
        temperature: Divisor of the scores.
        dense_temperature: That of the dense scores of a hybrid model, whose entropy is the mean of those of both
            scores, as its loss is their sum.
        seed: Of the draw.

    Returns:
        The entropy of each query with a relevant document in the collection.

    References:
        Fang et al., Scaling Laws For Dense Retrieval, SIGIR 2024, section 3.3: https://arxiv.org/abs/2403.18684.
    """
    from scipy.special import logsumexp

    from lion_st.encoding.encode import encode_texts
    from lion_st.encoding.shards import EncodedCorpus
    from lion_st.encoding.vectors import HybridVectors

    # Documents without a text have no vector.
    there = [one for one, row in corpus.items() if f"{row.get('title') or ''} {row['text']}".strip()]
    encodable = set(there)
    drawn = np.random.default_rng(seed).permutation(len(there))[:negatives]
    best = {
        query: max(sorted(found), key=lambda one: grades[one])
        for query, grades in qrels.items()
        if (found := [one for one, grade in grades.items() if grade > 0 and one in encodable])
    }
    needed = list(dict.fromkeys([*(there[place] for place in drawn), *best.values()]))
    rows = {one: number for number, one in enumerate(needed)}
    vectors = _rows_of(EncodedCorpus(encoded), rows)
    asked = encode_texts(model, [queries[query] for query in best], "query")
    if isinstance(asked, HybridVectors):
        sides = [(asked.sparse, vectors.sparse, temperature), (asked.dense, vectors.dense, dense_temperature)]
    else:
        sides = [(asked, vectors, temperature)]
    entropies: dict[str, list[float]] = {query: [] for query in best}
    for queries_of_side, documents_of_side, divisor in sides:
        scores = _scores(queries_of_side, documents_of_side) / divisor
        for number, (query, document) in enumerate(best.items()):
            relevant = {one for one, grade in qrels[query].items() if grade > 0}
            others = [rows[there[place]] for place in drawn if there[place] not in relevant]
            own = scores[number, rows[document]]
            entropies[query].append(float(logsumexp([own, *scores[number, others]]) - own))
    return {query: float(np.mean(of_sides)) for query, of_sides in entropies.items()}


def _scores(queries: Any, documents: Any) -> np.ndarray:
    """Scores [Q, N] of vectors of one kind."""
    from lion_st.encoding.vectors import TokenVectors, max_sim

    product: Any = max_sim(queries, documents) if isinstance(queries, TokenVectors) else queries @ documents.T
    return np.asarray(product if isinstance(product, np.ndarray) else product.toarray(), dtype=np.float64)


def _rows_of(encoded: Any, rows: Mapping[str, int]) -> Any:
    """Vectors of some documents of an encoded corpus, in the order of `rows`."""
    from lion_st.encoding.vectors import stack

    parts: list[Any] = []
    order: list[int] = []
    for ids, vectors in encoded:
        chosen: Sequence[int] = [place for place, one in enumerate(ids) if one in rows]
        parts.append(vectors[chosen])
        order += [rows[ids[place]] for place in chosen]
    return stack(parts)[np.argsort(order)]


if __name__ == "__main__":
    with one_line_errors("job"):
        if sys.argv[2:] == [TRAINING]:
            from lion_st.training.runs import end_program

            train(job := read_json(Path(sys.argv[1]) / JOB))
            end_program(f"{job['name']} is trained.")
        else:
            run_job(Path(sys.argv[1]))
