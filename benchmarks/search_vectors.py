"""Vectors to search among: random ones of three kinds, and those of the bundled lion-sp-mini.

"lion" vectors have the statistics of a trained Lion-SP over 128,256 terms: documents of about 300 terms and queries of
about 200, of which 80 are shared with the best document and 8 to 10 with any; document frequencies from 36 % down by a
power law, so that terms in more than a tenth of the documents are two thirds of what a query touches; weights
log1p-like, most below .3 and few above 1. They are drawn from a tree of topics: 40 fields, 2,000 subjects and an event
for every 8 documents, each with terms and weights of its own. The bundled model's vectors, over 20,480 terms, share
alike: 78 terms with the best document and 22 with any, of a query's 220.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
from scipy import sparse

VOCABULARY = 128_256
KINDS = {"uniform": (149, 32), "topical": (149, 32), "lion": (300, 200), "mini": (0, 0)}  # terms a document and a query
# Of each level of topics, from all texts to one event: share of the draws, size of a topic's profile, weight.
LEVELS = np.array([[0.2, 0, 0.10], [0.15, 1500, 0.14], [0.25, 220, 0.2], [0.4, 110, 0.3]])


def make_vectors(count: int, terms: int, kind: str, seed: int, collection: int | None = None) -> sparse.csr_array:
    """Random term weights [count, VOCABULARY]; "lion" ones of a collection of as many documents."""
    if kind == "lion":
        repeated = 1.45 if terms > 250 else 1.3  # a text draws terms again, more so the longer it is
        drawn = draw_lion(count, round(terms * repeated), VOCABULARY, max(1, (collection or count) // 8), seed, LEVELS)
        return sparse.csr_array(drawn, shape=(count, VOCABULARY))
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, count, 50_000):
        rows = min(50_000, count - start)
        if kind == "uniform":
            columns = rng.integers(0, VOCABULARY, size=(rows, terms))
        else:
            # Zipf's law with a flattened head: a document hardly draws a term twice
            ranks = (100 * (VOCABULARY / 100) ** rng.random((rows, terms)) - 100).astype(np.int64)
            topic = rng.integers(0, 200, size=(rows, 1))
            is_topical = rng.random((rows, terms)) < 0.6
            columns = np.where(
                is_topical, (ranks * 2_654_435_761 + topic * 40_503) % VOCABULARY, ranks * 7919 % VOCABULARY
            )
        weights = rng.lognormal(-0.7, 0.6, size=(rows, terms)).astype(np.float32)
        indptr = np.arange(rows + 1) * terms
        part = sparse.csr_array((weights.ravel(), columns.ravel().astype(np.int32), indptr), shape=(rows, VOCABULARY))
        part.sum_duplicates()
        parts.append(part)
    return sparse.vstack(parts, format="csr")


@numba.njit(cache=True)
def mix(number):
    """A 64-bit number of which every bit depends on all bits of the given one."""
    number = (number ^ (number >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def draw_lion(count, draws, vocabulary, events, seed, levels):
    """Weights, terms and row starts of `count` texts; a topic's terms and mean weights are hashes of its number."""
    np.random.seed(seed)
    indptr = np.zeros(count + 1, np.int64)
    terms = np.empty(count * draws, np.int32)
    weights = np.empty(count * draws, np.float32)
    drawn = np.empty(draws, np.int64)
    strengths = np.empty(draws, np.float64)
    top = (1 + vocabulary / 60) ** 0.1  # the share of texts with the r-th term falls like (1 + r / 60) ** -.9
    fill = 0
    for text in range(count):
        event = np.int64(events * np.random.random() ** 1.5)
        subject = event * 7919 % 2000
        nodes = (0, subject % 40, subject, event)
        place = 0
        for level in range(4):
            stop = draws if level == 3 else min(draws, place + round(levels[level, 0] * draws))
            while place < stop:
                uniform = np.random.random()
                slot = np.int64(uniform * 2**40) if level == 0 else np.int64(levels[level, 1] / 8 * (9.0**uniform - 1))
                topic = np.uint64((nodes[level] + 1) * 4 + level)
                number = mix(np.uint64(slot) + topic * np.uint64(0x9E3779B97F4A7C15))
                popular = 60 * ((1 + np.float64(number >> np.uint64(24)) / 2**40 * (top - 1)) ** 10 - 1)
                drawn[place] = min(vocabulary - 1, np.int64(popular))
                mean = -np.log(1 - 0.98 * np.float64(number & np.uint64(0xFFFFF)) / 2**20)
                strengths[place] = levels[level, 2] * mean * np.exp(0.5 * np.random.normal()) + 1e-3
                place += 1
        last = -1
        for place in np.argsort(drawn):
            if drawn[place] != last:
                last = drawn[place]
                terms[fill] = last
                weights[fill] = 0
                fill += 1
            weights[fill - 1] += strengths[place]
        indptr[text + 1] = fill
    return np.log1p(weights[:fill]), terms[:fill].copy(), indptr


def lion_vectors(count: int, terms: int, seed: int, collection: int, threads: int) -> sparse.csr_array:
    """ "lion" vectors drawn by several threads, other ones than `make_vectors` draws."""
    sizes = [len(part) for part in np.array_split(np.arange(count), threads)]
    seeds = range(1000 * seed, 1000 * seed + threads)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(lambda size, own: make_vectors(size, terms, "lion", own, collection), sizes, seeds)
        return sparse.vstack(list(parts), format="csr")


def mini_vectors(count: int, asked: int, cache: Path) -> tuple[sparse.csr_array, sparse.csr_array]:
    """What lion-sp-mini makes of the quickstart's texts, encoded once: of at most 33,272 documents, and of queries, 7
    in 10 of SQuAD and 3 of SciFact, which has 300."""
    from lion_st.data.quickstart import quickstart_data
    from lion_st.encoding import encode_texts
    from lion_st.extras import require
    from lion_st.models import load

    parquet = require("pyarrow.parquet")
    files = [cache / f"{what}-{number}.npz" for what, number in (("documents", count), ("queries", asked))]
    if not all(file.exists() for file in files):
        data = quickstart_data()

        def texts(*names: str) -> list[str]:
            rows = [row for name in names for row in parquet.read_table(data / name).to_pylist()]
            found = [f"{row.get('title') or ''} {row['text']}".strip() for row in rows]
            random.Random(0).shuffle(found)
            return found

        model = load(data.parents[1] / "models" / "lion-sp-mini")
        documents = texts("squad_dev/corpus.parquet", "scifact/corpus.parquet") + texts("documents.parquet")
        queries = texts("squad_dev/queries.parquet")[: asked * 7 // 10]
        queries += texts("scifact/queries.parquet")[: asked - len(queries)]
        random.Random(0).shuffle(queries)
        cache.mkdir(parents=True, exist_ok=True)
        for file, rows, task in zip(files, (documents[:count], queries), ("document", "query"), strict=True):
            sparse.save_npz(file, encode_texts(model, rows, task))
    documents, queries = map(sparse.load_npz, files)
    return documents, queries


def describe(documents: sparse.csr_array, queries: sparse.csr_array) -> str:
    """Terms of a document and a query, and how many of a query's a document has on average."""
    counts = np.bincount(documents.indices, minlength=documents.shape[1])
    shared = counts[queries.indices].sum() / queries.shape[0] / documents.shape[0]
    terms = (part.nnz / part.shape[0] for part in (documents, queries))
    return "{:.0f} terms a document, {:.0f} a query, {:.1f} shared".format(*terms, shared)
