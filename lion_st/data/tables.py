"""Training tuples and their texts, from files, folders and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.data.beir import beir_files
from lion_st.data.cache import identity_of
from lion_st.data.fields import DOCUMENT_ID_FIELDS, JUDGED_FIELDS, QUERY_ID_FIELDS, TITLE_FIELD, Row, Task
from lion_st.data.files import Rows, checked, find_file, read_rows
from lion_st.data.layouts import (
    GRADES,
    HEADERLESS,
    TUPLE_FORMS,
    Candidates,
    Layout,
    RowError,
    detect_layout,
    fits_layout,
    read_row,
    read_scored_pair,
    scored_pair_fields,
)
from lion_st.data.lookup import TextTable
from lion_st.data.records import read_file
from lion_st.data.sources import TEXT_STEMS, TEXT_SUBSETS, open_source, parse_source
from lion_st.data.teachers import UNNAMED
from lion_st.data.trec import iter_qrels
from lion_st.errors import require_type

if TYPE_CHECKING:
    from datasets import Dataset, Features

TUPLE_SUBSETS = ("train", "labeled-list", "bert-ensemble-margin-mse", "triplets")
TEXT_FORMAT = 2  # part of the cache key of converted texts: raise it when the conversion changes
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class TupleSource:
    """An opened source of training tuples, of which no more than the first row was read.

    Args:
        name: What messages call it.
        identity: What tells one state of it from another, as JSON.
        rows: Yields each place with the candidates there, queries and documents as strings, all rows with scores of the
            same teachers or none; or, of a bad row, with the error that says what is wrong.
        query_ids: Whether the queries are ids.
        document_ids: Whether the documents are ids.
        judged: Whether these are the judgements of a test collection, whose corpus may lack documents.
    """

    name: str
    identity: list[Any]
    rows: Callable[[], Iterator[tuple[str, Candidates | ValueError]]]
    query_ids: bool
    document_ids: bool
    judged: bool = False

    def read(self) -> Iterator[Candidates]:
        """The candidates of its rows.

        Raises:
            ValueError: At the first bad row.
        """
        for _, candidates in checked(self.rows()):
            yield candidates


def open_tuples(
    source: str | Path,
    subset: str | None,
    split: str,
    queries: str | Path | None = None,
    documents: str | Path | None = None,
) -> TupleSource:
    """Open a source and tell its layout by its first row that can be read.

    Args:
        source: See `load_tuples`.
        subset: Of the source.
        split: Of the source.
        queries: Where texts of query ids are, which makes ids of queries where the layout leaves it open.
        documents: The same for documents.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is empty or its layout is unknown.
    """
    remedy = "name a file, folder or data set; other rows train as they are, with build_trainer"
    require_type(source, (str, PathLike), "A source of tuples", remedy)
    name = str(source)
    if is_beir(source, subset):
        file = beir_files(source, split)[2]
        return TupleSource(name, identity_of(file), partial(_judged_pairs, file), True, True, judged=True)
    opened = open_source(parse_source(source, subset), split, (split,), TUPLE_SUBSETS)
    place, first = _first_row(opened, name)
    identity = [*identity_of(opened), split]
    fields = scored_pair_fields(first)
    if fields is not None:
        query, document, _ = read_scored_pair(first, place, fields)
        query_ids = fields[0] in QUERY_ID_FIELDS or queries is not None or isinstance(query, int)
        document_ids = fields[1] in DOCUMENT_ID_FIELDS or documents is not None or isinstance(document, int)
        return TupleSource(name, identity, partial(_scored_pairs, opened, name, fields), query_ids, document_ids)
    layout = detect_layout(first)
    candidates = read_row(layout, first, place)
    read = partial(_tuples, opened, name, layout, tuple(candidates.scores or ()))
    by_values = (
        queries is not None or isinstance(candidates.query, int),
        documents is not None or isinstance(candidates.positives[0], int),
    )
    declared = (layout.query_ids, layout.document_ids)
    ids = [value if known is None else known for known, value in zip(declared, by_values, strict=True)]
    return TupleSource(name, identity, read, *ids)


def is_beir(source: str | Path, subset: str | None = None) -> bool:
    """Whether a source is a folder in BEIR layout, whose judgements make pairs."""
    folder = Path(source)
    is_collection = (folder / "qrels").is_dir() and find_file(folder, TEXT_STEMS["document"]) is not None
    return subset is None and is_collection


def text_tables(
    opened: TupleSource, source: str | Path, queries: str | Path | None, documents: str | Path | None
) -> tuple[TextTable | None, TextTable | None]:
    """The texts of queries and of documents, None of those that are texts already; see `load_texts`."""
    return (
        load_texts(source, queries, "query") if opened.query_ids else None,
        load_texts(source, documents, "document") if opened.document_ids else None,
    )


def load_texts(source: str | Path, given: str | Path | None, task: Task) -> TextTable:
    """Find the texts of query or document ids, and memory-map them."""
    plural = "queries" if task == "query" else "documents"
    place = parse_source(source if given is None else given)
    try:
        if given is None and place.path is not None and place.path.is_file():
            raise ValueError(f"{place} is a single file")
        opened = open_source(place, None, TEXT_STEMS[task], TEXT_SUBSETS[task], only=given is not None)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"The {plural} of {source} are ids and their texts are not there ({error}): say where they are, "
            f"{plural}=FILE, FOLDER or DATA SET."
        ) from error
    return TextTable(_as_table(opened, task) if isinstance(opened, Path) else opened, str(place), task)


def _as_table(path: Path, task: Task) -> Dataset:
    """The texts of a file as a memory-mapped table, converted once for each state of the file."""
    from datasets import Dataset, Features, Value
    from datasets.exceptions import DatasetGenerationError

    features: Features = Features({column: Value("string") for column in ("id", "text", TITLE_FIELD)})
    state = (path.stat().st_size, path.stat().st_mtime_ns, TEXT_FORMAT)
    read = partial(_texts, task=task)
    try:
        return Dataset.from_generator(read, features, gen_kwargs={"path": str(path), "state": state})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _texts(path: str, state: tuple[int, ...], *, task: Task) -> Iterator[dict[str, Any]]:
    for _, fields in checked(read_file(Path(path), task)):
        yield {"id": fields.id, "text": fields.text, TITLE_FIELD: fields.title}


def _first_row(opened: Path | Dataset, name: str) -> tuple[str, Row]:
    """The first row that is one of a layout, with its place."""
    error: ValueError | None = None
    for place, row in islice(_rows(opened, name), ROWS_AT_ONCE):
        try:
            if isinstance(row, ValueError):
                raise row
            if (fields := scored_pair_fields(row)) is not None:
                read_scored_pair(row, place, fields)
            else:
                read_row(detect_layout(row), row, place)
            return place, row
        except ValueError as problem:
            error = error or problem
    raise error or ValueError(f"{name} has no rows.")


def _rows(opened: Path | Dataset, name: str) -> Rows:
    """The rows of a source with their places."""
    if isinstance(opened, Path):
        yield from read_rows(opened, fits_layout, HEADERLESS, TUPLE_FORMS)
        return
    number = 0
    for batch in opened.iter(ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield f"Row {number} of {name}", dict(zip(batch, values, strict=True))
            number += 1


def _tuples(
    opened: Path | Dataset, name: str, layout: Layout, teachers: tuple[str, ...]
) -> Iterator[tuple[str, Candidates | ValueError]]:
    for place, row in _rows(opened, name):
        try:
            yield place, row if isinstance(row, ValueError) else _candidates(row, place, layout, teachers)
        except ValueError as error:
            yield place, error


def _candidates(row: Row, place: str, layout: Layout, teachers: tuple[str, ...]) -> Candidates:
    found = read_row(layout, row, place)
    scores = found.scores or {}
    missing = next((teacher for teacher in teachers if teacher not in scores), None)
    if missing is not None:
        of_teacher = f" of the teacher {missing!r}" if missing else ""
        message = f"{place} has no teacher scores{of_teacher}, other rows have: score it or remove the row."
        raise RowError(message, "unscored")
    positives, negatives = (list(map(str, documents)) for documents in (found.positives, found.negatives))
    kept = {teacher: scores[teacher] for teacher in teachers} or None
    return Candidates(str(found.query), positives, negatives, kept)


def _scored_pairs(
    opened: Path | Dataset, name: str, fields: tuple[str, str, str]
) -> Iterator[tuple[str, Candidates | ValueError]]:
    """Pairs with scores, the documents of a query together and in their order.

    Scores that are all 0 or 1, or whole numbers in a field of grades or of judgements, are labels, and what is labelled
    above 0 is positive. Others are a teacher's, and the best scored document of a query is its positive.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    schema = pa.schema({"query": pa.large_string(), "documents": pa.large_string(), "scores": pa.float32()})
    batches = []
    rows = _rows(opened, name)
    while part := list(islice(rows, ROWS_AT_ONCE)):
        triples = []
        for place, row in part:
            try:
                if isinstance(row, ValueError):
                    raise row
                triples.append(read_scored_pair(row, place, fields))
            except ValueError as error:
                yield place, error
        queries, documents, scores = zip(*triples, strict=True) if triples else ((), (), ())
        columns = [list(map(str, queries)), list(map(str, documents)), list(map(float, scores))]
        batches.append(pa.RecordBatch.from_arrays(list(map(pa.array, columns, schema.types)), schema=schema))
    pairs = pa.Table.from_batches(batches, schema)
    values = pc.unique(pairs["scores"]).to_pylist()
    _, document_field, score_field = fields
    is_graded = score_field in GRADES or document_field in JUDGED_FIELDS
    are_grades = is_graded and all(value == int(value) for value in values)
    labels = are_grades or set(values) <= {0.0, 1.0}
    groups = pairs.group_by("query", use_threads=False).aggregate([("documents", "list"), ("scores", "list")])
    several = pairs.group_by(["query", "documents"]).aggregate([]).num_rows > len(groups)
    if not labels and len(values) > 1 and several == (document_field == "positive"):
        yield name, RowError(_not_told_apart(document_field, score_field, several))
        return
    for batch in groups.to_batches(ROWS_AT_ONCE):
        for query, documents, scores in zip(*batch.to_pydict().values(), strict=True):
            yield f"The query {query!r} of {name}", _by_score(query, documents, scores, labels=labels)


def _not_told_apart(document_field: str, score_field: str, several: bool) -> str:
    """What to do with pairs whose scores do not say which documents are relevant."""
    if several:
        return (
            f"Queries have several documents in {document_field!r}, and their {score_field!r} does not say which are "
            "relevant: mine them with output_format='n-tuple', give 'label' 0 or 1 in its place, or call the documents "
            "'passage' to have each query's best scored one as its positive."
        )
    return (
        f"Each query has one document with a {score_field!r}, which does not say whether it is relevant: leave that "
        "column out if all are, else keep those that are; scores of similarity train with CoSENTLoss of "
        "sentence-transformers."
    )


def _by_score(query: str, documents: list[str], scores: list[float], *, labels: bool) -> Candidates:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    positives = sum(score > 0 for score in scores) if labels else 1
    ranked = [documents[place] for place in order]
    teacher = None if labels else {UNNAMED: [scores[place] for place in order]}
    return Candidates(query, ranked[:positives], ranked[positives:], teacher)


def _judged_pairs(file: Path) -> Iterator[tuple[str, Candidates | ValueError]]:
    try:
        for place, query, document, grade in iter_qrels(file):
            if grade > 0:
                yield place, Candidates(query, [document], [])
    except ValueError as error:  # after which the file cannot be read on
        yield str(file), error
