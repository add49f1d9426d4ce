"""The data of a study: training tuples without the test sets, shuffled labels, and the proof of no overlap."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lion_st.data.beir import Corpus, Qrels, Queries, load_beir, require_queries, save_beir
from lion_st.data.layouts import DOCUMENT_LISTS
from lion_st.data.overlap import KnownTexts, TextKeys, normalize
from lion_st.data.quickstart import QUICKSTART_REPOSITORY, quickstart_data
from lion_st.data.sources import files_checksum
from lion_st.data.teachers import COLUMN
from lion_st.data.text import read_documents
from lion_st.data.tuples import load_tuples, reader_of
from lion_st.files import atomic_folder, atomic_write, read_json
from lion_st.study.settings import DOMAIN_NAMES, HELD_OUT, OWN_TEXTS, Study, TestSet, digest

SEED = 0  # of what is held out and of what is shuffled: the same in every cell
FORMAT = 2  # of the folder: raise it when the same settings shall give other files
ROWS_AT_ONCE = 2000


class OverlapError(ValueError):
    """Texts of a test set are trained on."""


@dataclass(frozen=True)
class StudyData:
    """Where the data of a study are, all of them local files or names of data sets.

    Attributes:
        options: Of `lion-st train`, by share of shuffled labels.
        texts: The study's own training documents, for MNTP; None where the training data are used as they are.
        tests: Source of each test set, by name.
        overlap: What `check_overlap` found.
    """

    options: Mapping[float, Mapping[str, Any]]
    texts: Path | None
    tests: Mapping[str, str]
    overlap: list[dict[str, Any]]


def local(source: str) -> str:
    """The bundled data set by its folder, any other source as it is."""
    if source.partition(":")[0] != QUICKSTART_REPOSITORY:
        return source
    return str(quickstart_data() / source.partition(":")[2])


class TrainingRow(NamedTuple):
    """A query of the training data with all its candidates."""

    query: str
    positives: list[str]
    negatives: list[str]
    scores: list[float]  # the teacher's, of positives and negatives; none unless they are asked for


def read_training_rows(
    data: Mapping[str, Any], teacher_scores: bool = False, sample: int | None = None
) -> Iterator[TrainingRow]:
    """All rows of `Study.data` in the published order, whatever their numbers of candidates.

    Args:
        data: Of the study.
        teacher_scores: Whether the scores are read too.
        sample: Read about so many, evenly spread, in place of all.

    Raises:
        ValueError: If a row has no scores that are asked for.
    """
    values = {"split": "train", **data}
    tuples = load_tuples(local(values.pop("train")), negatives=0, teacher_scores=teacher_scores, **values)
    reader: Any = reader_of(tuples)
    if sample is not None:
        tuples = tuples.select(range(0, len(tuples), max(1, len(tuples) // sample)))
    for part in tuples.with_format("arrow").iter(ROWS_AT_ONCE):
        columns = part.to_pydict()
        queries = columns["query_name"] if reader.queries is None else reader.queries.read(columns["query_row"])
        listed = list(chain.from_iterable(columns["documents"]))
        texts = iter(listed if reader.documents is None else reader.documents.read(listed))
        scores = columns[COLUMN] if teacher_scores else [[]] * len(queries)
        for query, found, count, of_row in zip(
            queries, columns["documents"], columns["positives"], scores, strict=True
        ):
            documents = list(islice(texts, len(found)))
            yield TrainingRow(query, documents[:count], documents[count:], of_row)


def prepare_data(study: Study, folder: Path, begun: bool = False) -> StudyData:
    """Make what the study asks for, unless it is there: held-out and cut test sets, shuffled labels, and the check.

    Args:
        study: The study.
        folder: Where it is made.
        begun: Whether cells were trained on what is there, which is then not made anew.

    Raises:
        OverlapError: If a text of a test set is trained on, and `overlap` is "refuse".
        FileNotFoundError: If a source is not there.
        ValueError: If a source cannot be read, or has changed since cells were trained on it.
    """
    made = study.hold_out > 0 or any(study.label_noise) or OWN_TEXTS in _mntp_texts(study)
    files = _data_checksum(study, folder)
    wanted = digest({"format": FORMAT, **study.of_data(), "mntp": _mntp_texts(study), "files": files})
    manifest = folder / "data.json"
    content = read_json(manifest) if manifest.exists() else {}
    is_changed = content.get("settings") != wanted
    if is_changed or (_reads_scores(study) and not content.get("scores", True)):  # of objectives that came later
        if is_changed and content and begun:
            raise ValueError(
                f"Settings or files of the study's data have changed since {folder} was made, and cells were trained "
                "on what they held: choose another --output, or bring them back."
            )
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_folder(folder) as staging:
            _make(study, staging, made)
            overlap = check_overlap(study, _placed(study, staging, made))
            content = {"settings": wanted, "scores": _reads_scores(study), "overlap": overlap}
            atomic_write(staging / "data.json", json.dumps(content, indent=1) + "\n")
    found = _placed(study, folder, made)
    refuse_overlap(study, content["overlap"])
    return StudyData(found.options, found.texts, found.tests, content["overlap"])


def check_overlap(study: Study, data: StudyData) -> list[dict[str, Any]]:
    """Count the texts of each test set that are trained on, exactly and after `normalize`.

    Returns:
        A row for each test set: queries and documents, and how many of each are among the training queries, the
        training documents or the texts of the MNTP stage.
    """
    trained = KnownTexts(TextKeys.of(_training_texts(study, data)))
    rows = []
    for test in study.tests:
        corpus, queries, qrels = load_test(data.tests[test.name], test.split)
        asked = [queries[query] for query in qrels]
        row: dict[str, Any] = {"test set": test.name, "domain": DOMAIN_NAMES[test.domain], "queries": len(asked),
                               "documents": len(corpus)}  # fmt: skip
        # Documents with their titles in front, as they are read, and without.
        titled = (f"{one.get('title') or ''} {one['text']}" for one in corpus.values())
        forms: dict[str, list[Iterable[str]]] = {
            "queries": [asked], "documents": [titled, (one["text"] for one in corpus.values())]
        }  # fmt: skip
        for what, texts in forms.items():
            found = [trained.find(TextKeys.of(form)) for form in texts]
            for name, places in zip(("exact", "normalised"), zip(*found, strict=True), strict=True):
                row[f"{what} trained on, {name}"] = int((np.max(places, axis=0) >= 0).sum())
        rows.append(row)
    return rows


def refuse_overlap(study: Study, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse test sets whose texts are trained on, where the study does not merely report them.

    In domain the queries alone count: a collection such as MS MARCO's is searched in training and in the test.
    """
    if study.overlap == "report":
        return
    for row in rows:
        kinds = (
            ("queries",) if row["domain"] == "in domain" and row["test set"] != HELD_OUT else ("queries", "documents")
        )
        for kind in kinds:
            count = row[f"{kind} trained on, normalised"]
            if count:
                raise OverlapError(
                    f"{count:,} {kind} of the test set {row['test set']!r} are trained on: take them out of the "
                    "training data (data.hold_out makes a test set without any), or say `overlap: report` under data."
                )


def load_test(source: str, split: str) -> tuple[Corpus, Queries, Qrels]:
    """Documents, queries and judgements of a test set: a folder, a data set with such files, or one of mteb's tasks.

    Raises:
        ValueError: If the task has several subsets or splits, or a judged query has no text.
    """
    from lion_st.evaluation.tasks import get_task, loaded

    if Path(source).is_dir():
        return load_beir(source, split)
    task = get_task(source, split)
    with loaded(task) as dataset:
        names = [(subset, name) for subset, splits in dataset.items() for name in task.eval_splits if name in splits]
        if len(names) != 1:
            listed = ", ".join("/".join(pair) for pair in names[:5])
            raise ValueError(
                f"{source} has {len(names)} parts to search on their own ({listed}), and a test set of a study is one: "
                "write those that are meant as folders with lion_st.data.save_beir, and name these."
            )
        ((subset, name),) = names
        part = dataset[subset][name]
        corpus = {row["id"]: {"title": row.get("title") or "", "text": row["text"]} for row in part["corpus"]}
        queries = {row["id"]: row["text"] for row in part["queries"]}
        qrels = {query: dict(grades) for query, grades in part["relevant_docs"].items() if grades}
    require_queries(queries, qrels, source)
    return corpus, queries, qrels


def part_of(
    corpus: Corpus, queries: Queries, qrels: Qrels, documents: int | None, asked: int | None
) -> tuple[Corpus, Queries, Qrels]:
    """The first queries of a test set, all their documents, and the first of the others up to a number."""
    chosen = {query: qrels[query] for query in islice(qrels, asked)}
    kept = dict.fromkeys(one for grades in chosen.values() for one in grades if one in corpus)
    size = len(corpus) if documents is None else documents
    kept |= dict.fromkeys(islice((one for one in corpus if one not in kept), max(0, size - len(kept))))
    return {one: row for one, row in corpus.items() if one in kept}, {one: queries[one] for one in chosen}, chosen


def shuffle_labels(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Give a share of the queries the documents and scores of another of them.

    Args:
        rows: Training tuples with a column `query_text`; the others go together.
        share: From 0 to 1. What a smaller one shuffles, a larger one does too.
    """
    generator = random.Random(SEED)
    order = generator.sample(range(len(rows)), len(rows))
    chosen = sorted(order[: round(share * len(rows))])
    if len(chosen) < 2:
        return rows
    # A cycle in random order: nobody keeps their own.
    cycle = generator.sample(chosen, len(chosen))
    shuffled = list(rows)
    for one, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        shuffled[one] = {**rows[other], "query_text": rows[one]["query_text"]}
    return shuffled


def _placed(study: Study, folder: Path, made: bool) -> StudyData:
    """Where everything is, once it is made."""
    if made:
        texts: Path | None = folder / "documents.parquet"
        options = {
            noise: {"train_data": str(folder / f"train-noise{noise:g}.parquet"), "train_documents": str(texts)}
            for noise in study.label_noise
        }
    else:
        texts = None
        names = {"train": "train_data", "subset": "train_subset", "split": "train_split", "queries": "train_queries",
                 "documents": "train_documents"}  # fmt: skip
        options = {0.0: {names[name]: value for name, value in study.data.items()}}
    tests = {test.name: str(folder / "tests" / test.name) if _is_made(test) else local(test.source)
             for test in study.tests}  # fmt: skip
    return StudyData(options, texts, tests, [])


def _is_made(test: TestSet) -> bool:
    return test.source == HELD_OUT or test.documents is not None or test.queries is not None


def _mntp_texts(study: Study) -> list[str]:
    texts = (study.mntp or {}).get("texts", [])
    return [texts] if isinstance(texts, str) else list(texts)


def _reads_scores(study: Study) -> bool:
    return any(objective != "cl" for objective in study.objectives) and not study.training.get("self_distillation")


def _data_checksum(study: Study, folder: Path) -> str | None:
    """Of the files and folders that the data come from, so that changed ones are read again."""
    named = [study.data[name] for name in ("train", "queries", "documents") if study.data.get(name) is not None]
    sources = [*named, *_mntp_texts(study), *(test.source for test in study.tests), *(study.dev or ())[:1]]
    return files_checksum(dict.fromkeys(map(str, sources)), folder)


def _make(study: Study, folder: Path, made: bool) -> None:
    held: tuple[Corpus, Queries, Qrels] = {}, {}, {}
    if made:
        rows, documents = _rows_of(read_training_rows(study.data, _reads_scores(study)))
        if study.hold_out:
            rows, held = _hold_out(rows, documents, study.hold_out)
        used = {one for row in rows for name in DOCUMENT_LISTS for one in row[name]}
        _write(folder / "documents.parquet", [{"id": one, "text": text} for one, text in documents.items()
                                              if one in used])  # fmt: skip
        for noise in study.label_noise:
            _write(folder / f"train-noise{noise:g}.parquet", shuffle_labels(rows, noise))
    for test in filter(_is_made, study.tests):
        whole = held if test.source == HELD_OUT else load_test(local(test.source), test.split)
        save_beir(folder / "tests" / test.name, *part_of(*whole, test.documents, test.queries), split=test.split)


def _rows_of(tuples: Iterable[TrainingRow]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Tuples with ids in the place of documents, and the documents by id."""
    ids: dict[str, str] = {}
    rows = []
    for one in tuples:
        row: dict[str, Any] = {"query_text": one.query} | ({"scores": one.scores} if one.scores else {})
        for name, texts in zip(DOCUMENT_LISTS, (one.positives, one.negatives), strict=True):
            row[name] = [ids.setdefault(text, f"d{len(ids)}") for text in texts]
        rows.append(row)
    return rows, {one: text for text, one in ids.items()}


def _hold_out(
    rows: list[dict[str, Any]], documents: Mapping[str, str], count: int
) -> tuple[list[dict[str, Any]], tuple[Corpus, Queries, Qrels]]:
    """Take documents and their queries out of the training tuples, and make a test set of them."""
    positive, negative = DOCUMENT_LISTS
    answers = list(dict.fromkeys(one for row in rows for one in row[positive]))
    if count >= len(answers):
        raise ValueError(
            f"data.hold_out is {count}, and the training data have {len(answers):,} relevant documents: hold out fewer."
        )
    chosen = random.Random(SEED).sample(answers, count)
    held = {normalize(documents[one]) for one in chosen}
    hidden = {one for one, text in documents.items() if normalize(text) in held}  # copies of them too
    asked = [row for row in rows if not hidden.isdisjoint(row[positive])]
    said = {normalize(row["query_text"]) for row in asked}
    kept = []
    for row in rows:
        if normalize(row["query_text"]) in said:
            continue
        stays = [one not in hidden for one in (*row[positive], *row[negative])]
        row = {**row, negative: [one for one in row[negative] if one not in hidden]}
        if "scores" in row:
            row["scores"] = list(compress(row["scores"], stays))
        kept.append(row)
    first = {normalize(documents[one]): one for one in reversed(chosen)}  # of copies one is searched
    queries: Queries = {f"q{number}": row["query_text"] for number, row in enumerate(asked)}
    qrels = {
        f"q{number}": {first[normalize(documents[one])]: 1 for one in row[positive] if one in hidden}
        for number, row in enumerate(asked)
    }
    order = random.Random(SEED).sample(list(qrels), len(qrels))  # the first ones are then of all sources
    return kept, (
        {one: {"title": "", "text": documents[one]} for one in first.values()},
        queries,
        {query: qrels[query] for query in order},
    )


def _write(path: Path, rows: Collection[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def _training_texts(study: Study, data: StudyData) -> Iterator[str]:
    """Every text that a cell may be trained on, its backbone's MNTP stage included."""
    if data.texts is not None:
        from pyarrow import parquet

        yield from parquet.read_table(data.texts, columns=["text"])["text"].to_pylist()
        path = data.options[study.label_noise[0]]["train_data"]
        yield from parquet.read_table(path, columns=["query_text"])["query_text"].to_pylist()
    else:
        for row in read_training_rows(study.data):
            yield from (row.query, *row.positives, *row.negatives)
    for text in read_documents([source for source in map(local, _mntp_texts(study)) if source != OWN_TEXTS]):
        yield text
        yield from text.split("\n")
