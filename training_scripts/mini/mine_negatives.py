r"""Find hard negatives of pairs and score them with a teacher: an encoder and BM25 together.

python training_scripts/mini/mine_negatives.py --data_dir runs/mini-data

Reads `queries.parquet` and `documents.parquet` as collect_pairs.py writes them, adds `train.parquet` (query_id,
document_ids with the positive first, scores). Each of the three stages leaves its result in `--work_dir` and is not
run again; `--stages dense` alone needs nothing but torch and sentence-transformers, and is quick on a GPU.

The teacher's score is `scale * (dense_weight * cosine + (1 - dense_weight) * coverage)`. The coverage is BM25 over the
sum of the idf of the query's terms: the share of the query's information that the document holds, from 0 to below 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import HfArgumentParser

STAGES = ("lexical", "dense", "select")


@dataclass
class Arguments:
    data_dir: str = field(metadata={"help": "Folder of queries.parquet and documents.parquet."})
    teacher: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Encoder of sentence-transformers."}
    )
    work_dir: str = field(default="runs/mini-candidates", metadata={"help": "Where the stages leave their results."})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "lexical, dense, select."})
    depth: int = field(
        default=12, metadata={"help": "Candidates from each of both rankings, the positive not counted."}
    )
    negatives: int = field(default=8, metadata={"help": "Hard negatives a query."})
    positive_rank: int = field(
        default=10, metadata={"help": "Queries are left out where this many candidates are above the positive."}
    )
    relative_margin: float = field(
        default=0.05, metadata={"help": "A negative scores at most (1 - this) times the positive's teacher score."}
    )
    dense_weight: float = field(default=0.5, metadata={"help": "Weight of the cosine; BM25 coverage has the rest."})
    scale: float = field(default=25.0, metadata={"help": "Teacher scores are multiplied by this."})
    k1: float = field(default=0.9, metadata={"help": "BM25's saturation of the term frequency."})
    b: float = field(default=0.4, metadata={"help": "BM25's length normalisation."})


class Pairs:
    """Texts, and for each query the row of its positive."""

    def __init__(self, folder: Path) -> None:
        documents = pq.read_table(folder / "documents.parquet")
        queries = pq.read_table(folder / "queries.parquet")
        self.document_ids: list[str] = documents["document_id"].to_pylist()
        self.documents: list[str] = documents["text"].to_pylist()
        self.query_ids: list[str] = queries["query_id"].to_pylist()
        self.queries: list[str] = queries["text"].to_pylist()
        rows = {key: row for row, key in enumerate(self.document_ids)}
        self.positives = np.array([rows[key] for key in queries["positive"].to_pylist()], dtype=np.int32)


def lexical_matrices(pairs: Pairs, k1: float, b: float) -> tuple:
    """CSR matrices: terms of queries [Q, V], divided by the sum of their idf, and BM25 weights of documents [N, V]."""
    import bm25s
    from scipy.sparse import csc_array, csr_array

    bm25 = bm25s.BM25(k1=k1, b=b, method="lucene")
    bm25.index(bm25s.tokenize(pairs.documents, show_progress=False), show_progress=False)
    values, rows, starts = (bm25.scores[part] for part in ("data", "indices", "indptr"))
    documents = csc_array((values, rows, starts), shape=(len(pairs.documents), len(starts) - 1)).tocsr()
    frequency = np.diff(starts)
    idf = np.log(1 + (len(pairs.documents) - frequency + 0.5) / (frequency + 0.5))
    tokens = bm25s.tokenize(pairs.queries, return_ids=False, show_progress=False)
    terms = [sorted({bm25.vocab_dict[token] for token in row if token in bm25.vocab_dict}) for row in tokens]
    counts = np.array([len(row) for row in terms])
    columns = np.array([column for row in terms for column in row], dtype=np.int32)
    ceiling = np.array([max(idf[row].sum(), 1e-6) for row in terms], dtype=np.float32)
    weights = np.repeat(1 / ceiling, counts).astype(np.float32)
    bounds = np.concatenate([[0], counts.cumsum()])
    return csr_array((weights, columns, bounds), shape=(len(terms), documents.shape[1])), documents


def lexical(pairs: Pairs, arguments: Arguments) -> dict[str, np.ndarray]:
    """The best documents of each query by BM25 [Q, depth], the positive left out."""
    from lion_st.indexes import create_index

    queries, documents = lexical_matrices(pairs, arguments.k1, arguments.b)
    index = create_index("exact", "sparse")
    index.add([str(row) for row in range(len(pairs.documents))], documents.astype(np.float32))
    found = np.full((len(pairs.queries), arguments.depth), -1, dtype=np.int32)
    for start in range(0, len(pairs.queries), 4096):
        hits, _ = index.search_rows(queries[start : start + 4096], k=arguments.depth + 1)
        for offset, hit in enumerate(hits):
            rows = hit[(hit >= 0) & (hit != pairs.positives[start + offset])][: arguments.depth]
            found[start + offset, : len(rows)] = rows
    return {"rows": found}


def encode(teacher, texts: list[str]) -> torch.Tensor:
    """Unit vectors on the teacher's device, [texts, width]."""
    vectors = teacher.encode(texts, batch_size=512, convert_to_tensor=True, show_progress_bar=False)
    return torch.nn.functional.normalize(vectors.float(), dim=1).to(teacher.dtype)


@torch.inference_mode()
def dense(pairs: Pairs, arguments: Arguments, lexical_rows: np.ndarray) -> dict[str, np.ndarray]:
    """The encoder's best documents [Q, depth] and cosines of positive, lexical and dense candidates."""
    from sentence_transformers import SentenceTransformer

    teacher = SentenceTransformer(arguments.teacher)
    if teacher.device.type == "cuda":
        teacher.half()
    documents, queries = encode(teacher, pairs.documents), encode(teacher, pairs.queries)
    positives = torch.from_numpy(pairs.positives).to(documents.device).long()
    others = torch.from_numpy(lexical_rows).to(documents.device).long()
    parts: list[dict[str, torch.Tensor]] = []
    for rows in torch.arange(len(queries), device=documents.device).split(2048):
        scores = queries[rows] @ documents.T  # [block, N]
        positive = scores.gather(1, positives[rows, None])
        candidates = scores.gather(1, others[rows].clamp_min(0))
        scores.scatter_(1, positives[rows, None], -2.0)
        best, found = scores.topk(arguments.depth)
        parts.append({"positive": positive[:, 0], "lexical": candidates, "dense": best, "rows": found.int()})
    joined = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return {name: (part if name == "rows" else part.half()).numpy() for name, part in joined.items()}


def pair_scores(queries, documents, query_rows: np.ndarray, document_rows: np.ndarray) -> np.ndarray:
    """Inner products of pairs of sparse rows."""
    blocks = [
        queries[query_rows[start : start + 65_536]].multiply(documents[document_rows[start : start + 65_536]]).sum(1)
        for start in range(0, len(query_rows), 65_536)
    ]
    return np.concatenate(blocks)


def select(
    pairs: Pairs, arguments: Arguments, lexical_rows: np.ndarray, found: dict[str, np.ndarray]
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Yield query, documents (the positive, then negatives by falling score) and the teacher's scores of them."""
    queries, documents = lexical_matrices(pairs, arguments.k1, arguments.b)
    rows = np.concatenate([pairs.positives[:, None], lexical_rows, found["rows"]], axis=1)  # [Q, 1 + 2 depth]
    cosine = np.concatenate([found["positive"][:, None], found["lexical"], found["dense"]], axis=1).astype(np.float32)
    count, width = rows.shape
    coverage = pair_scores(queries, documents, np.repeat(np.arange(count), width), rows.ravel().clip(min=0))
    mixed = arguments.dense_weight * cosine + (1 - arguments.dense_weight) * coverage.reshape(rows.shape)
    mixed[rows < 0] = -np.inf
    # In turn from the encoder's and from BM25's ranking, best first.
    turns = np.arange(1, width).reshape(2, -1)[::-1].T.ravel()
    for query in range(count):
        score = mixed[query]
        if (score[1:] > score[0]).sum() >= arguments.positive_rank:
            continue
        allowed = score <= (1 - arguments.relative_margin) * score[0]
        hardest = {
            int(rows[query, turn]): float(score[turn]) for turn in turns if allowed[turn] and rows[query, turn] >= 0
        }
        chosen = sorted(list(hardest.items())[: arguments.negatives], key=lambda item: -item[1])
        if len(chosen) == arguments.negatives:
            scores = [arguments.scale * value for value in (float(score[0]), *(value for _, value in chosen))]
            yield query, [int(rows[query, 0]), *(row for row, _ in chosen)], [round(value, 2) for value in scores]


def main() -> None:
    (arguments,) = HfArgumentParser((Arguments,)).parse_args_into_dataclasses()
    data, work = Path(arguments.data_dir), Path(arguments.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    pairs = Pairs(data)

    def stage(name: str, compute) -> dict[str, np.ndarray]:
        file = work / f"{name}.npz"
        if not file.exists() and name in arguments.stages:
            np.savez_compressed(file.with_suffix(".part.npz"), **compute())
            file.with_suffix(".part.npz").rename(file)
        return dict(np.load(file))

    lexical_rows = stage("lexical", lambda: lexical(pairs, arguments))["rows"]
    if arguments.stages == ["lexical"]:
        return
    found = stage("dense", lambda: dense(pairs, arguments, lexical_rows))
    if "select" not in arguments.stages:
        return
    tuples = list(select(pairs, arguments, lexical_rows, found))
    table = {
        "query_id": [pairs.query_ids[query] for query, _, _ in tuples],
        "document_ids": [[pairs.document_ids[row] for row in rows] for _, rows, _ in tuples],
        "scores": pa.array([scores for _, _, scores in tuples], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), data / "train.parquet", compression="zstd", compression_level=19)
    labels = np.array([scores for _, _, scores in tuples])
    figures = {
        "tuples": len(tuples),
        "of pairs": len(pairs.queries),
        "mean positive": float(labels[:, 0].mean()),
        "mean margin": float((labels[:, :1] - labels[:, 1:]).mean()),
        "mean softmax of the positive": float((np.exp(labels[:, 0]) / np.exp(labels).sum(1)).mean()),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
