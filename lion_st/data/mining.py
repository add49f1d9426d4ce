"""Hard negatives and teacher scores for one's own pairs, from an encoder and BM25 together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class TeacherScores:
    """Scores of a block of queries for all documents, each array [queries, documents]."""

    start: int  # number of the block's first query
    cosine: np.ndarray
    coverage: np.ndarray

    def mixed(self, dense_weight: float) -> np.ndarray:
        """Weighted mean of both, [queries, documents]."""
        return dense_weight * self.cosine + (1 - dense_weight) * self.coverage


class EnsembleTeacher:
    """Scores documents by `scale * (dense_weight * cosine + (1 - dense_weight) * coverage)`.

    The cosine is an encoder's. The coverage is BM25 over the sum of the idf of the query's terms, which BM25 in
    Lucene's form cannot reach: the share of the query's information that the document holds, from 0 to below 1. All
    documents of a query are divided by the same number, so that they keep BM25's order.

    Args:
        encoder: Any encoder of sentence-transformers.
        dense_weight: Weight of the cosine, 0 to 1.
        scale: Factor of the scores. At 25, a softmax over a positive and four hard negatives gives the positive about
            three quarters.
        k1: BM25's saturation of the term frequency.
        b: BM25's length normalisation, 0 to 1.

    Example:
        >>> teacher = EnsembleTeacher(SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"))
        >>> teacher.index(["Lions hunt at night.", "Tigers hunt alone."])
        >>> mine_negatives(teacher, ["when do lions hunt"], [0], negatives=1)
        [MinedTuple(documents=[0, 1], scores=[16.23, 7.16])]
    """

    def __init__(
        self,
        encoder: SentenceTransformer,
        dense_weight: float = 0.5,
        scale: float = 25.0,
        k1: float = 0.9,
        b: float = 0.4,
    ) -> None:
        if not 0 <= dense_weight <= 1:
            raise ValueError(f"dense_weight is {dense_weight}: give a weight between 0 and 1.")
        self.encoder = encoder
        self.dense_weight = dense_weight
        self.scale = scale
        self.k1 = k1
        self.b = b

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, [texts, width]."""
        encoded = self.encoder.encode(list(texts), batch_size=64, show_progress_bar=True, convert_to_tensor=True)
        vectors = encoded.float().cpu().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)

    def index(self, documents: Sequence[str], vectors: np.ndarray | None = None) -> None:
        """Take the documents to score; `vectors` spares encoding them."""
        import bm25s
        from scipy.sparse import csc_matrix

        self.vectors = self.encode(documents) if vectors is None else vectors
        bm25 = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        bm25.index(bm25s.tokenize(list(documents), show_progress=False), show_progress=False)
        values, rows, starts = (bm25.scores[part] for part in ("data", "indices", "indptr"))
        self.vocabulary: dict[str, int] = bm25.vocab_dict
        self.terms = csc_matrix((values, rows, starts), shape=(len(documents), len(starts) - 1)).T.tocsr()
        frequency = np.diff(starts)
        self.idf = np.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))

    def score(
        self, queries: Sequence[str], vectors: np.ndarray | None = None, block_size: int = 256
    ) -> Iterator[TeacherScores]:
        """Score all documents for blocks of queries."""
        import bm25s
        from scipy.sparse import csr_matrix
        from tqdm import tqdm

        vectors = self.encode(queries) if vectors is None else vectors
        tokens = bm25s.tokenize(list(queries), return_ids=False, show_progress=False)
        for start in tqdm(range(0, len(queries), block_size), desc="Score"):
            terms = [
                sorted({self.vocabulary[token] for token in row if token in self.vocabulary})
                for row in tokens[start : start + block_size]
            ]
            rows = np.repeat(np.arange(len(terms)), [len(row) for row in terms])
            columns = np.array([column for row in terms for column in row], dtype=np.int64)
            weights = csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(terms), len(self.idf)))
            ceiling = np.array([max(self.idf[row].sum(), 1e-6) for row in terms], dtype=np.float32)
            yield TeacherScores(
                start,
                vectors[start : start + block_size] @ self.vectors.T,
                (weights @ self.terms).toarray() / ceiling[:, None],
            )


@dataclass(frozen=True)
class MinedTuple:
    """Rows of the positive and of its negatives by falling score, and the teacher's scores of them."""

    documents: list[int]
    scores: list[float]


def mine_negatives(
    teacher: EnsembleTeacher,
    queries: Sequence[str],
    positives: Sequence[int],
    *,
    negatives: int = 4,
    relative_margin: float = 0.05,
    positive_rank: int = 20,
    depth: int = 20,
    query_vectors: np.ndarray | None = None,
) -> list[MinedTuple | None]:
    """Find hard negatives of each query among the teacher's documents.

    They are taken in turn from the encoder's and from BM25's ranking, best first, past documents whose score comes so
    close to the positive's that they may well answer the query too.

    Args:
        teacher: A teacher that has indexed the documents.
        queries: The queries.
        positives: Row of the relevant document of each query. A query with several stands there as often; none of
            them becomes its negative.
        negatives: Negatives of each query.
        relative_margin: A negative scores at most (1 - this) times the positive.
        positive_rank: Queries whose positive the teacher ranks lower are left out as unanswerable.
        depth: Ranks of either ranking to choose from.
        query_vectors: Unit vectors of the queries, [queries, width]; spares encoding them.

    Returns:
        For each query its tuple, or None where the positive ranks too low or too few negatives are left.
    """
    if len(queries) != len(positives):
        raise ValueError(f"{len(queries)} queries have {len(positives)} positives: give one for each.")
    relevant: dict[str, list[int]] = {}
    for query, positive in zip(queries, positives, strict=True):
        relevant.setdefault(query.strip(), []).append(positive)
    mined: list[MinedTuple | None] = []
    for block in teacher.score(queries, query_vectors):
        mixed = block.mixed(teacher.dense_weight)
        for offset, positive in enumerate(positives[block.start : block.start + len(mixed)]):
            score = mixed[offset]
            allowed = score <= (1 - relative_margin) * score[positive]
            allowed[relevant[queries[block.start + offset].strip()]] = False
            rankings = [
                np.where(allowed, view[offset], -1).argsort()[::-1][:depth] for view in (block.cosine, block.coverage)
            ]
            hardest = dict.fromkeys(int(row) for ranks in zip(*rankings, strict=True) for row in ranks if allowed[row])
            chosen = sorted(list(hardest)[:negatives], key=lambda row: -score[row])
            if (score > score[positive]).sum() >= positive_rank or len(chosen) < negatives:
                mined.append(None)
                continue
            documents = [positive, *chosen]
            mined.append(MinedTuple(documents, [round(float(teacher.scale * score[row]), 2) for row in documents]))
    return mined


def first_of_near_duplicates(vectors: np.ndarray, similarity: float = 0.95, block_size: int = 512) -> np.ndarray:
    """Mask of the texts that resemble no earlier one, [texts].

    Args:
        vectors: Unit vectors, [texts, width].
        similarity: Least cosine of a near-duplicate.
        block_size: Texts compared at once.
    """
    keep = np.ones(len(vectors), dtype=bool)
    for start in range(0, len(vectors), block_size):
        close = vectors[start : start + block_size] @ vectors[: start + block_size].T >= similarity
        keep[start : start + block_size] = ~np.tril(close, start - 1).any(axis=1)
    return keep
