r"""Build hub_uploads/datasets/lion-quickstart: tuples with hard negatives and teacher scores, and two test sets.

python training_scripts/build_quickstart_data.py --sources SOURCES --test_sets EVAL \
    --teacher sentence-transformers/all-MiniLM-L6-v2

SOURCES holds `<name>.jsonl.xz` files of {"query", "pos"} rows, named as the readers below name them; EVAL holds BEIR
folders. Negatives are mined with an encoder and BM25 together, and scored by both; the label is the weighted mean of
the cosine and of BM25's coverage. The same sources and teacher give the same files, and a killed run goes on. The
published data set was made before `lion_st.supervision` was, by the same steps but for the margin, which was that of
the mean in both rankings; its figures are in its README.md.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from trl import TrlParser

from lion_st.data import load_beir
from lion_st.data.beir import Corpus, Qrels, Queries
from lion_st.data.quickstart import TEST_SETS
from lion_st.data.teachers import TeacherMixture
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.evaluation.metrics import evaluate_run
from lion_st.indexes import create_index
from lion_st.kernels.bfloat16 import multiplies_bfloat16
from lion_st.retrieval import Bm25Retriever, HybridRetriever, ModelRetriever
from lion_st.supervision import Bm25, Encoder, IndexSearcher, mine_negatives, teach

QUESTION_LINES = 7938  # squadshifts' Wikipedia part, the only one of its three that may be passed on, comes first
GENERIC_HEADING = re.compile(
    r"introduction|preface|learning objectives|review|short answer|question|problem|exercise|critical thinking|homework"
    r"|quiz|thinking ahead|figuring|fill in|video|article|website|errata|customization|coverage|openstax|practice test"
    r"|exam|summary|key (terms|concepts|equations)|glossary|references|bringing it together|formula|self-check|multiple"
    r"|collaborative|further research|group activit|for further|test prep|answer|chapter|step \d|solution",
    re.IGNORECASE,
)
LIFE_SCIENCE = re.compile(
    r"\b(cells?|proteins?|genes?|genom\w+|patients?|diseases?|brain|clinical|cancer|tumou?rs?|drugs?|virus\w*|infect\w+"
    r"|bacteri\w+|neur\w+|biolog\w+|medic\w+|blood|immun\w+|dna|rna|mutations?|species|epidemi\w+|heart|cardi\w+"
    r"|therap\w+|diet\w*|health\w*|enzym\w+|metabol\w+|mice|tissues?|molecul\w+)\b",
    re.IGNORECASE,
)
MEDQUAD_LIMIT = {"What is": 2200, "What are the symptoms": 600, "What are the treatments": 500, "What causes": 700}


@dataclass
class DataArguments:
    sources: str = field(metadata={"help": "Folder of the {query, pos} files (.jsonl.xz)."})
    test_sets: str = field(metadata={"help": "Folder of BEIR folders named squad_dev and scifact."})
    teacher: str = field(metadata={"help": "Encoder of sentence-transformers that scores beside BM25."})
    output_dir: str = field(default="hub_uploads/datasets/lion-quickstart", metadata={"help": "Folder to write."})
    work_dir: str = field(default="runs/quickstart-data", metadata={"help": "Where vectors and steps are kept."})
    negatives: int = field(default=4, metadata={"help": "Hard negatives a query."})
    ranks: int = field(default=20, metadata={"help": "Ranks to mine from, within which the positive must be too."})
    relative_margin: float = field(
        default=0.05, metadata={"help": "A negative scores at most (1 - this) times the positive's teacher score."}
    )
    dense_weight: float = field(default=0.5, metadata={"help": "Weight of the cosine; BM25 coverage has the rest."})
    label_scale: float = field(default=25.0, metadata={"help": "Teacher scores are multiplied by this."})
    max_words: int = field(default=115, metadata={"help": "Longer passages end at the last sentence within this."})
    seed: int = field(default=0, metadata={"help": "Seed of every sampling."})


@dataclass
class Pair:
    source: str
    query: str
    passage: str


@dataclass
class Scored:
    """A pair with the rows of its passage and of its negatives by falling score, and their labels."""

    pair: Pair
    documents: list[str]
    scores: list[float]


def read_pairs(folder: Path, name: str) -> list[tuple[str, str]]:
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(" ".join(row["query"].split()), " ".join(row["pos"].split())) for row in rows]


def shorten(text: str, max_words: int) -> str:
    """The first words of a text, up to the last end of a sentence where that keeps two thirds of them."""
    words = text.split()
    if len(words) <= max_words:
        return text
    ends = [i for i, word in enumerate(words[:max_words]) if i > max_words * 2 / 3 and word[-1] in ".?!"]
    return " ".join(words[: ends[-1] + 1 if ends else max_words])


def collect(folder: Path, max_words: int, seed: int) -> Iterator[Pair]:
    """Yield the cleaned pairs of every source, the most useful source first."""
    generator = random.Random(seed)

    for query, passage in read_pairs(folder, "squadshifts")[:QUESTION_LINES]:
        yield Pair("squadshifts_new_wiki", query, shorten(passage, 2 * max_words))

    taken: dict[str, int] = {}
    medquad = read_pairs(folder, "medquad")
    generator.shuffle(medquad)
    for query, passage in medquad:
        query = query.replace("What is (are)", "What is").replace("what research (or clinical trials)", "what research")
        query = re.sub(r"\s+\?", "?", query)
        template = next((start for start in MEDQUAD_LIMIT if query.startswith(start)), query.split()[0])
        boilerplate = passage.startswith(("These resources", "This condition is inherited", "What are the signs"))
        taken[template] = taken.get(template, 0) + (not boilerplate)
        if not boilerplate and taken[template] <= MEDQUAD_LIMIT.get(template, 500):
            answer = re.sub(
                r"^(What|How|Is|Are|Who|Do|Does|Can|Why)\b[^.?]{3,150}\? ", "", passage
            )  # the question again
            yield Pair("medquad", query, shorten(answer, max_words))

    for query, passage in read_pairs(folder, "openstax_heading"):
        if not GENERIC_HEADING.search(query) and not passage.startswith("By the end of this section"):
            yield Pair("openstax_heading", query, shorten(passage, max_words))

    glossary = [pair for pair in read_pairs(folder, "openstax_glossary") if len(pair[1].split()) >= 10]
    for query, passage in sorted(generator.sample(glossary, min(3000, len(glossary)))):
        yield Pair("openstax_glossary", query, passage)

    plain = [pair for pair in read_pairs(folder, "arxiv_title_abstract") if not re.search(r"[$\\^_]", " ".join(pair))]
    generator.shuffle(plain)
    plain.sort(key=lambda pair: -min(4, len(LIFE_SCIENCE.findall(" ".join(pair)))))  # life sciences first
    for query, abstract in plain[:12_000]:
        passage = shorten(abstract, max_words)
        yield Pair("arxiv_title", query, passage)
        conclusion = re.split(r"(?<=[.?!]) (?=[A-Z])", abstract)[-1].removeprefix("Conclusions: ")
        if conclusion not in passage and 8 <= len(conclusion.split()) <= 35:
            yield Pair("arxiv_conclusion", conclusion, passage)


def normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str, width: int = 10) -> set[int]:
    words = normalise(text).split()
    return {hash(tuple(words[i : i + width])) for i in range(len(words) - width + 1)}


def without_overlap(pairs: Iterator[Pair], test_sets: dict[str, tuple]) -> list[Pair]:
    """Drop repeated queries, whatever shares ten words in a row with a test item, and unasked pairs sharing no word."""
    forbidden: set[int] = set()
    questions: set[str] = set()
    for corpus, queries, _ in test_sets.values():
        for row in corpus.values():
            forbidden |= shingles(f"{row['title']} {row['text']}")
        for text in queries.values():
            forbidden |= shingles(text)
            questions.add(normalise(text))
    kept = []
    for pair in pairs:
        key = normalise(pair.query)
        words = {word for word in key.split() if len(word) > 3} & set(normalise(pair.passage).split())
        related = words or pair.source == "squadshifts_new_wiki"  # its questions were written for their passages
        seen = key in questions or shingles(pair.query) & forbidden or shingles(pair.passage) & forbidden
        if related and not seen and len(pair.passage.split()) >= 10:
            questions.add(key)
            kept.append(pair)
    return kept


def first_of_near_duplicates(vectors: np.ndarray, similarity: float = 0.95, block_size: int = 512) -> np.ndarray:
    """Mask of the texts whose unit vectors [texts, width] have no earlier one at this cosine or above, [texts]."""
    keep = np.ones(len(vectors), dtype=bool)
    for start in range(0, len(vectors), block_size):
        close = vectors[start : start + block_size] @ vectors[: start + block_size].T >= similarity
        keep[start : start + block_size] = ~np.tril(close, start - 1).any(axis=1)
    return keep


def unique_passages(encoder: SentenceTransformer, passages: list[str], work_dir: Path) -> tuple[dict, IndexSearcher]:
    """Ids by passage, without near-duplicates, and a search of them by their vectors."""
    records = ({"id": f"d{row}", "text": passage} for row, passage in enumerate(passages))
    encoded = EncodedCorpus(encode_corpus(encoder, records, work_dir / "passages"))
    _, vectors = encoded.whole()
    kept = np.flatnonzero(first_of_near_duplicates(vectors))
    ids = {passages[row]: f"d{number}" for number, row in enumerate(kept)}
    index = create_index("exact", "dense")
    index.add(list(ids.values()), vectors[kept])
    index.source = {**encoded.manifest["settings"], "shards": [one["xxh3"] for one in encoded.manifest["shards"]]}
    return ids, IndexSearcher(encoder, index)


def scored_tuples(pairs: list[Pair], scored: Path, arguments: DataArguments) -> list[Scored]:
    """The tuples whose hardest negatives are clearly below the positive for both teachers together."""
    mixture = TeacherMixture({"dense": arguments.dense_weight, "bm25": 1 - arguments.dense_weight}, "weighted")
    tuples = []
    for row in pq.read_table(scored).to_pylist():
        documents = [*row["positive_document_ids"], *row["negative_document_ids"]]
        scores = mixture.combine([row["scores"][name] for name in mixture.weights], draw="")
        clear = [place for place, score in enumerate(scores) if score <= (1 - arguments.relative_margin) * scores[0]]
        chosen = sorted(clear[: arguments.negatives], key=lambda place: -scores[place])
        if len(chosen) == arguments.negatives:
            places = [0, *chosen]
            labels = [round(arguments.label_scale * scores[place], 2) for place in places]
            tuples.append(Scored(pairs[int(row["query_id"][1:])], [documents[place] for place in places], labels))
    return tuples


def teacher_quality(
    encoder: SentenceTransformer, test_sets: dict[str, tuple], dense_weight: float, work_dir: Path
) -> dict[str, dict[str, float]]:
    """nDCG@10 of ranking each test set by the encoder, by BM25 and by both."""
    both = [ModelRetriever(encoder, encoded_dir=work_dir, name="dense"), Bm25Retriever()]
    retrievers = [*both, HybridRetriever(both, [dense_weight, 1 - dense_weight], depth=100, name="both")]
    quality: dict[str, dict[str, float]] = {}
    for name, (corpus, queries, qrels) in test_sets.items():
        retrievers[-1].index({key: f"{row['title']} {row['text']}".strip() for key, row in corpus.items()})
        for retriever in retrievers:
            hits = retriever.search([queries[key] for key in qrels], 20)
            run = {key: dict(found) for key, found in zip(qrels, hits, strict=True)}
            quality.setdefault(name, {})[retriever.name] = evaluate_run(qrels, run, ["nDCG@10"])["nDCG@10"]
    return quality


def label_figures(tuples: list[Scored]) -> dict[str, float]:
    labels = np.array([one.scores for one in tuples])
    return {
        "mean_positive": float(labels[:, 0].mean()),
        "mean_margin": float((labels[:, :1] - labels[:, 1:]).mean()),
        "mean_smallest_margin": float((labels[:, 0] - labels[:, 1:].max(1)).mean()),
        "mean_softmax_of_positive": float((np.exp(labels[:, 0]) / np.exp(labels).sum(1)).mean()),
    }


def write(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"document_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32()), "score": pa.int32()}
    table = pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()})
    pq.write_table(table, path, compression="zstd", compression_level=22, row_group_size=len(table))


def write_tuples(folder: Path, tuples: list[Scored], ids: dict[str, str]) -> int:
    """Write the training part; return the number of its documents."""
    used = {document for one in tuples for document in one.documents}
    query_ids = [f"q{number}" for number in range(len(tuples))]
    columns = {
        "query_id": query_ids,
        "document_ids": [one.documents for one in tuples],
        "scores": [one.scores for one in tuples],
        "source": [one.pair.source for one in tuples],
    }
    write(folder / "train.parquet", columns)
    write(folder / "queries.parquet", {"query_id": query_ids, "text": [one.pair.query for one in tuples]})
    texts = {document: passage for passage, document in ids.items() if document in used}
    write(folder / "documents.parquet", {"document_id": list(texts), "text": list(texts.values())})
    return len(used)


def write_test_set(folder: Path, corpus: Corpus, queries: Queries, qrels: Qrels) -> None:
    texts = {part: [row[part] for row in corpus.values()] for part in ("title", "text")}
    write(folder / "corpus.parquet", {"_id": list(corpus), **texts})
    write(folder / "queries.parquet", {"_id": list(qrels), "text": [queries[key] for key in qrels]})
    judged = [(query, document, grade) for query, row in qrels.items() for document, grade in row.items()]
    columns = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*judged, strict=True)), strict=True))
    write(folder / "qrels.parquet", columns)


def main() -> None:
    (arguments,) = TrlParser((DataArguments,)).parse_args_and_config()
    output, work_dir = Path(arguments.output_dir), Path(arguments.work_dir)
    test_sets = {name: load_beir(Path(arguments.test_sets) / name) for name in TEST_SETS}
    pairs = without_overlap(collect(Path(arguments.sources), arguments.max_words, arguments.seed), test_sets)
    dtype = torch.bfloat16 if torch.cuda.is_available() or multiplies_bfloat16() else torch.float32
    encoder = SentenceTransformer(arguments.teacher, model_kwargs={"dtype": dtype})
    ids, dense = unique_passages(encoder, list(dict.fromkeys(pair.passage for pair in pairs)), work_dir)
    pairs = [pair for pair in pairs if pair.passage in ids]
    bm25 = Bm25Retriever()
    bm25.index({document: passage for passage, document in ids.items()})
    queries = {f"q{number}": pair.query for number, pair in enumerate(pairs)}
    qrels = {f"q{number}": {ids[pair.passage]: 1} for number, pair in enumerate(pairs)}
    # More than are needed: some are too close to the positive for both teachers together.
    mined = mine_negatives(
        [dense, bm25],
        queries,
        qrels,
        work_dir / "mined.parquet",
        negatives=3 * arguments.negatives,
        ranks=(0, arguments.ranks),
        relative_margin=arguments.relative_margin,
        show_progress=True,
    )
    texts = {"queries": work_dir / "queries.parquet", "documents": work_dir / "documents.parquet"}
    write(texts["queries"], {"query_id": list(queries), "text": list(queries.values())})
    write(texts["documents"], {"document_id": list(ids.values()), "text": list(ids)})
    teachers = {"dense": Encoder(encoder), "bm25": Bm25(coverage=True)}
    scored = teach(mined.path, work_dir / "scored.parquet", teachers, **texts, show_progress=True).path
    tuples = scored_tuples(pairs, scored, arguments)
    random.Random(arguments.seed).shuffle(tuples)

    documents = write_tuples(output, tuples, ids)
    for name, test_set in test_sets.items():
        write_test_set(output / name, *test_set)
    figures = {
        "tuples": Counter(one.pair.source for one in tuples),
        "documents": documents,
        "labels": label_figures(tuples),
        "teacher_ndcg_at_10": teacher_quality(encoder, test_sets, arguments.dense_weight, work_dir),
        "bytes": sum(file.stat().st_size for file in output.rglob("*.parquet")),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
