r"""Score small retrievers beside BM25: limits and fusion chosen on the dev set, then test sets as they are.

python training_scripts/mini/evaluate.py --models runs/lion-sp-mini runs/lion-ds-mini --dev runs/mini-data/dev \
    --test_sets EVAL/squad_dev EVAL/scifact --output_dir runs/mini-evaluation

Texts are encoded once and kept, so that it may be interrupted; the largest terms of queries and documents are tried
afterwards. A hybrid's weights are those that rank the dev set best. "BM25, same text" reads what the models read:
documents cut to `--document_length` of their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from transformers import HfArgumentParser

import lion_st
from lion_st.data import load_beir
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.evaluation import evaluate_run, fit_run_weights, format_table, fuse_runs
from lion_st.files import atomic_write
from lion_st.indexes import create_index
from lion_st.indexes.frequencies import DocumentFrequencies
from lion_st.indexes.pruning import Pruning
from lion_st.kernels.bfloat16 import multiplies_bfloat16
from lion_st.retrieval import Bm25Retriever

METRICS = ("nDCG@10", "MRR@10", "Recall@100")
LIMITS = ((8, 64), (16, 128), (32, 128), (32, 256), (64, 256), (None, None))  # terms of a query, of a document
DEPTH = 100
DTYPE = torch.bfloat16 if multiplies_bfloat16() else torch.float32
Run = Mapping[str, Mapping[str, float]]


@dataclass
class Arguments:
    models: list[str] = field(metadata={"help": "Checkpoints, sparse or dense."})
    dev: str = field(metadata={"help": "BEIR folder on which limits and fusion are chosen."})
    test_sets: list[str] = field(metadata={"help": "BEIR folders."})
    output_dir: str = field(default="runs/mini-evaluation", metadata={"help": "Where vectors and figures are kept."})
    query_length: int | None = field(default=None, metadata={"help": "In place of the models' own."})
    document_length: int = field(default=384, metadata={"help": "Tokens of a document that are read."})
    tokens_per_batch: int = field(default=4096, metadata={"help": "Padded tokens a batch."})
    limits: list[int] = field(
        default_factory=list, metadata={"help": "Terms of a query and of a document; chosen on the dev set by default."}
    )
    idf: bool = field(default=False, metadata={"help": "Weigh terms of sparse queries by idf in the collection."})
    bm25_stemmer: str | None = field(default=None, metadata={"help": "Of BM25: porter, english; none by default."})


@dataclass
class TestSet:
    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]

    @classmethod
    def read(cls, folder: str | Path) -> TestSet:
        corpus, queries, qrels = load_beir(folder)
        documents = {key: f"{row['title']} {row['text']}".strip() for key, row in corpus.items()}
        return cls(
            Path(folder).name,
            {key: text for key, text in documents.items() if text},
            {key: queries[key] for key in qrels},
            qrels,
        )


def vectors(model: Any, texts: Mapping[str, str], folder: Path, arguments: Arguments, task: str) -> tuple[list, Any]:
    """Ids and vectors of texts, encoded unless they are there."""
    encode_corpus(
        model,
        ({"id": key, "text": text} for key, text in texts.items()),
        folder,
        task=task,  # type: ignore[arg-type]
        max_tokens=arguments.query_length if task == "query" else arguments.document_length,
        tokens_per_batch=arguments.tokens_per_batch,
        show_progress=False,
    )
    ids, parts = [], []
    for keys, part in EncodedCorpus(folder):
        ids += keys
        parts.append(part)
    return ids, np.concatenate(parts) if isinstance(parts[0], np.ndarray) else sparse.csr_array(sparse.vstack(parts))


def search(queries: tuple[list, Any], documents: tuple[list, Any]) -> dict[str, dict[str, float]]:
    index = create_index("exact", "dense" if isinstance(documents[1], np.ndarray) else "sparse")
    index.add(*documents)
    return {key: dict(hits) for key, hits in zip(queries[0], index.search(queries[1], DEPTH, 2), strict=True)}


def runs_of(name: str, model: Any, data: TestSet, arguments: Arguments) -> dict[tuple[int | None, int | None], Run]:
    """A run for each pair of limits; of a dense model, one."""
    folder = Path(arguments.output_dir) / "vectors" / name / data.name
    queries = vectors(model, data.queries, folder / "queries", arguments, "query")
    documents = vectors(model, data.documents, folder / "documents", arguments, "document")
    if isinstance(documents[1], np.ndarray):
        return {(None, None): search(queries, documents)}
    runs: dict[tuple[int | None, int | None], Run] = {}
    for few, many in [tuple(arguments.limits)] if arguments.limits else LIMITS:
        asked, held = Pruning(top_terms=few).apply(queries[1]), Pruning(top_terms=many).apply(documents[1])
        if arguments.idf:
            frequencies = DocumentFrequencies()
            frequencies.add(held)
            asked = frequencies.weigh(asked)
        runs[few, many] = search((queries[0], asked), (documents[0], held))
    return runs


def bm25_run(data: TestSet, documents: Mapping[str, str], stemmer: str | None) -> Run:
    bm25 = Bm25Retriever(stemmer=stemmer)
    bm25.index(documents)
    hits = bm25.search(list(data.queries.values()), DEPTH)
    return {key: dict(found) for key, found in zip(data.queries, hits, strict=True)}


def cut(data: TestSet, tokenizer: Any, length: int) -> dict[str, str]:
    """The documents as far as the models read them."""
    short = {}
    for key, text in data.documents.items():
        ends = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True)["offset_mapping"]
        short[key] = text[: max(end for _, end in ends)]
    return short


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output, rows = Path(arguments.output_dir), []
    models = {Path(folder).name: lion_st.load(folder, dtype=DTYPE, device="cpu") for folder in arguments.models}
    dev = TestSet.read(arguments.dev)
    dev_runs = {name: runs_of(name, model, dev, arguments) for name, model in models.items()}
    lexical = bm25_run(dev, dev.documents, arguments.bm25_stemmer)
    chosen, weights = {}, {}
    for name, runs in dev_runs.items():
        scores = {limits: evaluate_run(dev.qrels, run, METRICS) for limits, run in runs.items()}
        chosen[name] = max(scores, key=lambda limits: scores[limits]["nDCG@10"])
        weights[name] = fit_run_weights([runs[chosen[name]], lexical], dev.qrels)
        rows += [row(name, dev, limits, found) for limits, found in scores.items()]
        fused = fuse_runs([runs[chosen[name]], lexical], weights[name], DEPTH)
        rows.append(row(f"{name} + BM25", dev, chosen[name], evaluate_run(dev.qrels, fused, METRICS)))
    rows.append(row("BM25", dev, (None, None), evaluate_run(dev.qrels, lexical, METRICS)))
    print(json.dumps({"chosen": chosen, "weights": weights}), flush=True)
    tokenizer, length = next(iter(models.values())).tokenizer, arguments.document_length
    for folder in arguments.test_sets:
        data = TestSet.read(folder)
        found: list[tuple[str, Sequence[int | None], Run]] = [
            (name, (None, None), bm25_run(data, documents, arguments.bm25_stemmer))
            for name, documents in (("BM25", data.documents), ("BM25, same text", cut(data, tokenizer, length)))
        ]
        for name, model in models.items():
            runs = runs_of(name, model, data, arguments)
            found += [(name, limits, run) for limits, run in runs.items() if limits in (chosen[name], (None, None))]
            fused = fuse_runs([runs[chosen[name]], found[0][2]], weights[name], DEPTH)
            found.append((f"{name} + BM25", chosen[name], fused))
        rows += [row(name, data, limits, evaluate_run(data.qrels, run, METRICS)) for name, limits, run in found]
        table = format_table([one for one in rows if one["dataset"] == data.name])
        print(table, flush=True)
        record = {"arguments": vars(arguments), "chosen": chosen, "weights": weights, "rows": rows}
        atomic_write(output / "figures.json", json.dumps(record, indent=1) + "\n")
    print(format_table(rows))


def row(name: str, data: TestSet, limits: Sequence[int | None], figures: Mapping[str, float]) -> dict[str, Any]:
    return {"model": name, "dataset": data.name, "query terms": limits[0], "document terms": limits[1], **figures}


if __name__ == "__main__":
    main()
