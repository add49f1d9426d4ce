r"""Collect the (query, passage) pairs that lion-sp-mini and lion-ds-mini learn from, and a dev set cut from them.

python training_scripts/mini/collect_pairs.py --sources SOURCES --test_sets EVAL --output_dir runs/mini-data

SOURCES holds `<name>.jsonl.xz` files of {"query", "pos"} rows, all of a licence that lets them be passed on; EVAL holds
BEIR folders, whose texts are kept out of the pairs. Writes `queries.parquet` (query_id, text, the id of the
positive, source), `documents.parquet` (document_id, text), `qrels.tsv` with the same positives, and `dev`, a BEIR
folder of passages that no training pair has, among others as distractors.
"""

from __future__ import annotations

import json
import lzma
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from trl import TrlParser

from lion_st.data.beir import QRELS_HEADER, load_beir, save_beir

WIKIPEDIA_LINES = 7938  # squadshifts' Wikipedia part comes first; the other two may not be passed on
MEDQUAD_LIMIT = 2500  # pairs of one question template, such as "What are the symptoms"
SAMPLES = {"msdocs_heading": 8000, "wordnet_gloss": 16_000, "tldr_example": 3000}
DEV_QUERIES = 250  # of each source
DEV_SOURCES = ("wikipedia_question", "medquad", "openstax_heading", "arxiv_title", "arxiv_conclusion")
GENERIC_HEADING = re.compile(
    r"introduction|preface|objectives|review|question|problem|exercise|critical thinking|homework|quiz|thinking ahead"
    r"|figuring|fill in|video|website|errata|customization|coverage|openstax|practice test|exam|summary|glossary"
    r"|key (terms|concepts|equations)|references|bringing it together|formula|self-check|multiple|collaborative"
    r"|further research|group activit|for further|test prep|answer|chapter|step \d|solution",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z])")


@dataclass
class Arguments:
    sources: str = field(metadata={"help": "Folder of the {query, pos} files (.jsonl.xz)."})
    test_sets: str = field(metadata={"help": "Folder of BEIR folders whose texts are kept out."})
    output_dir: str = field(default="runs/mini-data", metadata={"help": "Folder to write."})
    max_words: int = field(default=220, metadata={"help": "Longer passages end at the last sentence within this."})
    dev_share: float = field(default=0.03, metadata={"help": "Share of the passages held out for the dev set."})
    distractors: int = field(default=8000, metadata={"help": "Training passages beside them in the dev corpus."})
    seed: int = field(default=0, metadata={"help": "Seed of every sampling."})


class Pair(NamedTuple):
    source: str
    query: str
    passage: str


def read(folder: Path, name: str) -> list[tuple[str, str]]:
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


def keep_words(sentence: str, share: float, generator: random.Random) -> str:
    """A share of a sentence's words, in their order: a query that names what a passage says in fewer words."""
    words = sentence.rstrip(".").split()
    kept = sorted(generator.sample(range(len(words)), max(3, round(share * len(words)))))
    return " ".join(words[i] for i in kept)


def sentence_query(passage: str, generator: random.Random) -> str | None:
    """Words of one sentence of a passage that has several."""
    sentences = [part for part in SENTENCE_END.split(passage) if 8 <= len(part.split()) <= 32]
    if len(sentences) < 3:
        return None
    return keep_words(generator.choice(sentences), generator.uniform(0.4, 0.8), generator)


def collect(folder: Path, max_words: int, generator: random.Random) -> Iterator[Pair]:
    """Yield the pairs of every source."""
    passages: dict[str, str] = {}  # those that sentences are drawn from, and their source
    for query, passage in read(folder, "squadshifts")[:WIKIPEDIA_LINES]:
        passages[shorten(passage, max_words)] = "wikipedia_sentence"
        yield Pair("wikipedia_question", query, shorten(passage, max_words))

    taken: Counter[str] = Counter()
    medquad = read(folder, "medquad")
    generator.shuffle(medquad)
    for query, passage in medquad:
        query = query.replace("What is (are)", "What is").replace("what research (or clinical trials)", "what research")
        query = re.sub(r"\s+\?", "?", query)
        template = " ".join(query.split()[:3])
        boilerplate = passage.startswith(("These resources", "This condition is inherited", "What are the signs"))
        taken[template] += not boilerplate
        if not boilerplate and taken[template] <= MEDQUAD_LIMIT:
            answer = re.sub(r"^(What|How|Is|Are|Who|Do|Does|Can|Why)\b[^.?]{3,150}\? ", "", passage)  # the question
            passages[shorten(answer, max_words)] = "medquad_sentence"
            yield Pair("medquad", query, shorten(answer, max_words))

    for query, passage in read(folder, "openstax_heading"):
        if not GENERIC_HEADING.search(query) and not passage.startswith("By the end of this section"):
            passages[shorten(passage, max_words)] = "openstax_sentence"
            yield Pair("openstax_heading", query, shorten(passage, max_words))
    for query, passage in read(folder, "openstax_glossary"):
        if len(passage.split()) >= 8:
            yield Pair("openstax_glossary", query, passage)
    for name, count in SAMPLES.items():
        rows = [row for row in read(folder, name) if len(row[1].split()) >= (2 if name == "tldr_example" else 8)]
        for query, passage in sorted(generator.sample(rows, min(count, len(rows)))):
            yield Pair(name, query, shorten(passage, max_words))

    for title, abstract in read(folder, "arxiv_title_abstract"):
        if len(re.findall(r"[$\\^_]", title + abstract)) > 4:
            continue
        sentences = SENTENCE_END.split(abstract)
        conclusion = re.sub(r"^(Conclusions?|In conclusion|Finally|Thus|Therefore|Here|Hence)\W+", "", sentences[-1])
        hidden = len(sentences) >= 5 and generator.random() < 0.5  # the passage then lacks what the query says
        passage = shorten(" ".join(sentences[:-1]) if hidden else abstract, max_words)
        passages[passage] = "arxiv_sentence"
        yield Pair("arxiv_title", title, passage)
        if 8 <= len(conclusion.split()) <= 35 and len(sentences) >= 3:
            query = conclusion if hidden else keep_words(conclusion, generator.uniform(0.4, 0.8), generator)
            yield Pair("arxiv_conclusion", query, passage)

    for passage, source in passages.items():
        query = sentence_query(passage, generator)
        if query is not None:
            yield Pair(source, query, passage)


def normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str, width: int = 10) -> set[int]:
    words = normalise(text).split()
    return {hash(tuple(words[i : i + width])) for i in range(len(words) - width + 1)}


def without_overlap(pairs: Iterator[Pair], test_sets: Path) -> list[Pair]:
    """Drop repeated pairs, and whatever shares a query or ten words in a row with a test item."""
    forbidden: set[int] = set()
    seen: set[object] = set()
    for folder in sorted(test_sets.iterdir()):
        corpus, queries, _ = load_beir(folder)
        for row in corpus.values():
            forbidden |= shingles(f"{row['title']} {row['text']}")
        for text in queries.values():
            forbidden |= shingles(text)
            seen.add(normalise(text))
    overlaps: dict[str, bool] = {}
    kept = []
    for pair in pairs:
        key = normalise(pair.query)
        if pair.passage not in overlaps:
            overlaps[pair.passage] = bool(shingles(pair.passage) & forbidden)
        if key in seen or (key, pair.passage) in seen or overlaps[pair.passage] or shingles(pair.query) & forbidden:
            continue
        seen.add((key, pair.passage))
        kept.append(pair)
    return kept


def write(path: Path, columns: dict[str, list[str]]) -> None:
    pq.write_table(pa.table(columns), path, compression="brotli", compression_level=9, row_group_size=2**20)


def main() -> None:
    (arguments,) = TrlParser((Arguments,)).parse_args_and_config()
    generator = random.Random(arguments.seed)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    pairs = without_overlap(collect(Path(arguments.sources), arguments.max_words, generator), Path(arguments.test_sets))
    held_out = {
        pair.passage
        for pair in pairs
        if pair.source in DEV_SOURCES and zlib.crc32(pair.passage.encode()) % 1000 < 1000 * arguments.dev_share
    }
    dev = [pair for pair in pairs if pair.source in DEV_SOURCES and pair.passage in held_out]
    training = [pair for pair in pairs if pair.passage not in held_out]
    generator.shuffle(training)
    generator.shuffle(dev)
    taken: Counter[str] = Counter()
    judged = [pair for pair in dev if not taken.update([pair.source]) and taken[pair.source] <= DEV_QUERIES]
    others = generator.sample(sorted({pair.passage for pair in training}), arguments.distractors)
    ids = {passage: f"d{row}" for row, passage in enumerate([*sorted(held_out), *others])}
    save_beir(
        output / "dev",
        {key: {"title": "", "text": passage} for passage, key in ids.items()},
        {f"{pair.source}-{row}": pair.query for row, pair in enumerate(judged)},
        {f"{pair.source}-{row}": {ids[pair.passage]: 1} for row, pair in enumerate(judged)},
    )
    training = [pair for pair in training if pair.query.strip()]
    passages = list(dict.fromkeys(pair.passage for pair in training))
    rows = {passage: f"d{row}" for row, passage in enumerate(passages)}
    write(output / "documents.parquet", {"document_id": list(rows.values()), "text": passages})
    columns = {
        "query_id": [f"q{row}" for row in range(len(training))],
        "text": [pair.query for pair in training],
        "positive": [rows[pair.passage] for pair in training],
        "source": [pair.source for pair in training],
    }
    write(output / "queries.parquet", columns)
    judged_pairs = zip(columns["query_id"], columns["positive"], strict=True)
    with (output / "qrels.tsv").open("w", encoding="utf-8") as qrels:
        qrels.writelines(f"{line}\n" for line in [QRELS_HEADER, *(f"{one}\t{other}\t1" for one, other in judged_pairs)])
    figures = {
        "pairs": Counter(pair.source for pair in training),
        "passages": len(passages),
        "dev queries": Counter(pair.source for pair in judged),
        "dev passages": len(ids),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
