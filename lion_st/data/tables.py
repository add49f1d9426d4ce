"""Training tuples and their texts as memory-mapped tables, from files, folders and data sets of the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.data.beir import beir_files
from lion_st.data.fields import DOCUMENT_ID_FIELDS, QUERY_ID_FIELDS, TITLE_FIELD, Kind, first_field
from lion_st.data.files import checked, find_file, read_rows
from lion_st.data.layouts import (
    HEADERLESS,
    PAIR_DOCUMENTS,
    PAIR_QUERIES,
    TUPLE_FORMS,
    Layout,
    detect_layout,
    fits_layout,
    is_pair_with_score,
    read_row,
    read_scored_pair,
)
from lion_st.data.lookup import TextLookup
from lion_st.data.records import read_file
from lion_st.data.sources import TEXT_STEMS, TEXT_SUBSETS, open_source, parse_source
from lion_st.data.trec import iter_qrels

if TYPE_CHECKING:
    from datasets import Dataset, Features

TUPLE_SUBSETS = ("train", "labeled-list", "bert-ensemble-margin-mse", "triplets")
TABLE_FORMAT = 2  # part of the cache key of converted tables: raise it when the conversion changes


def load_candidates(
    source: str | Path, subset: str | None, split: str, *, queries_given: bool, documents_given: bool
) -> tuple[Dataset, bool, bool]:
    """Read a source into a table of `query`, `positives`, `negatives` and, where it has them, `teacher_scores`.

    Returns:
        The table, and whether its queries and its documents are ids.

    Warns:
        UserWarning: If negatives were left out that are positives of their own query or repeat another, or queries
            that have no positive.
    """
    if is_beir(source, subset):
        return _generate(_beir_pairs, beir_files(source, split)[2], _features(scored=False)), True, True
    opened = open_source(parse_source(source, subset), split, (split,), TUPLE_SUBSETS)
    if isinstance(opened, Path):
        place, first = next(checked(_tuple_rows(opened)), (f"{opened}:1", {}))
    elif not len(opened):
        raise ValueError(f"{source} has no rows.")
    else:
        place, first = f"Row 0 of {source}", opened[0]
    if is_pair_with_score(first):
        query, document, _ = read_scored_pair(first, place)
        names = [first_field(first, PAIR_QUERIES) in QUERY_ID_FIELDS, queries_given, isinstance(query, int)]
        document_names = [first_field(first, PAIR_DOCUMENTS) in DOCUMENT_ID_FIELDS, documents_given]
        table = _report_left_out(_group_pairs(opened, str(source)), str(source))
        return table, any(names), any([*document_names, isinstance(document, int)])
    layout = detect_layout(first)
    candidates = read_row(layout, first, place)
    scored = candidates.scores is not None
    if isinstance(opened, Path):
        table = _generate(partial(_row_candidates, layout=layout, scored=scored), opened, _features(scored))
    else:
        table = opened.map(
            partial(_table_candidates, layout=layout, scored=scored, source=str(source), table_format=TABLE_FORMAT),
            batched=True,
            with_indices=True,
            remove_columns=opened.column_names,
            features=_features(scored),
            desc="Read tuples",
        )
    query_ids, document_ids = layout.query_ids, layout.document_ids
    if query_ids is None:
        query_ids = queries_given or isinstance(candidates.query, int)
    if document_ids is None:
        document_ids = documents_given or isinstance(candidates.positives[0], int)
    return _report_left_out(table, str(source)), query_ids, document_ids


def is_beir(source: str | Path, subset: str | None = None) -> bool:
    """Whether a source is a folder in BEIR layout, whose judgements make pairs."""
    folder = Path(source)
    is_collection = (folder / "qrels").is_dir() and find_file(folder, TEXT_STEMS["document"]) is not None
    return subset is None and is_collection


def load_lookup(source: str | Path, given: str | Path | None, kind: Kind) -> TextLookup:
    """Load the texts of query or document ids.

    Args:
        source: Source of the tuples, which is searched where nothing is given.
        given: Another source, see `parse_source`.
        kind: Which texts.

    Raises:
        FileNotFoundError: If a given file or folder does not exist.
        ValueError: If there are no texts there, a line is malformed, or an id is missing or repeated.
    """
    plural = "queries" if kind == "query" else "documents"
    place = parse_source(source if given is None else given)
    try:
        if given is None and place.path is not None and place.path.is_file():
            raise ValueError(f"{place} is a single file")
        opened = open_source(place, None, TEXT_STEMS[kind], TEXT_SUBSETS[kind], only=given is not None)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"The {plural} of {source} are ids and their texts are not there ({error}): say where they are, "
            f"{plural}=FILE, FOLDER or DATA SET."
        ) from error
    if isinstance(opened, Path):
        from datasets import Features, Value

        features = Features({column: Value("string") for column in ("id", "text", TITLE_FIELD)})
        opened = _generate(partial(_texts, kind=kind), opened, features)
    return TextLookup(opened, str(place))


def drop_equal_texts(table: Dataset, equals: dict[str, str], source: str) -> Dataset:
    """Leave out negatives whose text is that of a positive of their query, or of another negative, under another id.

    Args:
        table: As `load_candidates` makes it, with document ids.
        equals: Those whose text is that of another one, with that one, see `TextLookup.first_of_equals`.
        source: What warnings call it.
    """
    if not equals:
        return table
    clean = table.map(partial(_drop_equals, equals=equals), batched=True, features=_features_of(table), desc="Clean")
    return _report_left_out(clean, source)


def drop_relevant_negatives(table: Dataset, equals: dict[str, str], source: str) -> Dataset:
    """Leave out negatives that another row of the same query has as a positive.

    Args:
        table: As `load_candidates` makes it.
        equals: Documents whose text is that of another one, with that one.
        source: What warnings call it.
    """
    relevant = _relevant_elsewhere(table, equals)
    if not relevant:
        return table
    drop = partial(_drop_relevant, relevant=relevant)
    clean = table.map(drop, batched=True, features=_features_of(table), desc="Clean")
    return _report_left_out(clean, source)


def _relevant_elsewhere(table: Dataset, equals: dict[str, str]) -> dict[str, set[str]]:
    """The positives of queries with several rows, of which at least one stands among their negatives."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = table.with_format("arrow").select_columns(["query", "positives", "negatives"])[:].combine_chunks()
    counts = pc.value_counts(columns["query"].combine_chunks())
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(repeated):
        return {}

    def pairs(column: str) -> pa.Table:
        lists = columns[column].combine_chunks()
        queries = columns["query"].take(pc.list_parent_indices(lists))
        flat = pa.table([queries, pc.list_flatten(lists)], ["query", "document"])
        return flat.filter(pc.is_in(flat["query"], repeated))

    same: dict[str, list[str]] = {}
    for document, first in equals.items():
        same.setdefault(first, [first]).append(document)
    relevant: dict[str, set[str]] = {}
    distinct = pairs("positives").group_by(["query", "document"]).aggregate([])
    for query, document in zip(distinct["query"].to_pylist(), distinct["document"].to_pylist(), strict=True):
        relevant.setdefault(query, set()).update(same.get(equals.get(document, document), [document]))
    negatives = pairs("negatives")
    keys = pa.array(f"{query}\t{document}" for query, documents in relevant.items() for document in documents)
    found = pc.is_in(pc.binary_join_element_wise(negatives["query"], negatives["document"], "\t"), keys)
    hit = set(pc.unique(negatives["query"].filter(found)).to_pylist())
    return {query: documents for query, documents in relevant.items() if query in hit}


def _drop_relevant(batch: dict[str, list[Any]], *, relevant: dict[str, set[str]]) -> dict[str, list[Any]]:
    rows = []
    scores = batch.get("teacher_scores") or [None] * len(batch["query"])
    for query, positives, negatives, of_row in zip(
        batch["query"], batch["positives"], batch["negatives"], scores, strict=True
    ):
        kept = [place for place, document in enumerate(negatives) if document not in relevant.get(query, ())]
        row = {"query": query, "positives": positives, "negatives": [negatives[place] for place in kept]}
        if of_row is not None:
            row["teacher_scores"] = of_row[: len(positives)] + [of_row[len(positives) + place] for place in kept]
        rows.append(row | {"left_out": len(negatives) - len(kept)})
    return _columns(rows)


def keep_known_pairs(table: Dataset, lookup: TextLookup, source: str) -> Dataset:
    """Leave out the pairs of a test collection whose document it lacks, and say how many.

    Raises:
        ValueError: If no pair is left.
    """
    known = lookup.knows([positives[0] for positives in table["positives"]])
    if known.all():
        return table
    count = int((~known).sum())
    if count == len(known):
        raise ValueError(f"None of the {count:,} documents that {source} judges as relevant is in {lookup.name}.")
    warnings.warn(f"{source}: left out {count:,} pairs whose document the corpus lacks.", stacklevel=3)
    return table.select(known.nonzero()[0])


def _report_left_out(table: Dataset, source: str) -> Dataset:
    import numpy as np
    import pyarrow.compute as pc

    columns = table.with_format("arrow")[:]
    count = pc.sum(columns["left_out"]).as_py() or 0
    if count:
        warnings.warn(
            f"{source}: left out {count:,} negatives that are positives of their own query or repeat another negative.",
            stacklevel=4,
        )
    empty = pc.list_value_length(columns["positives"]).to_numpy() == 0
    if empty.any():
        warnings.warn(f"{source}: left out {int(empty.sum()):,} queries without a positive document.", stacklevel=4)
        table = table.select(np.flatnonzero(~empty))
    return table.remove_columns("left_out")


def _tuple_rows(path: Path) -> Iterator[tuple[str, Any]]:
    return read_rows(path, fits_layout, HEADERLESS, TUPLE_FORMS)


def _generate(read: Callable[..., Iterator[dict[str, Any]]], path: Path, features: Features) -> Dataset:
    """Read a file into a memory-mapped table, once for each state of the file."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    state = (path.stat().st_size, path.stat().st_mtime_ns, TABLE_FORMAT)
    try:
        return Dataset.from_generator(read, features, gen_kwargs={"path": str(path), "state": state})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _features(scored: bool) -> Features:
    from datasets import Features, List, Value

    columns: dict[str, Any] = {"query": Value("string")}
    columns |= {name: List(Value("string")) for name in ("positives", "negatives")}
    columns |= {"teacher_scores": List(Value("float32"))} if scored else {}
    return Features(columns | {"left_out": Value("int32")})


def _features_of(table: Dataset) -> Features:
    return _features("teacher_scores" in table.column_names)


def _candidates(layout: Layout, scored: bool, row: dict[str, Any], place: str) -> dict[str, Any]:
    found = read_row(layout, row, place)
    if scored and found.scores is None:
        raise ValueError(f"{place} has no teacher scores, other rows have: score it or remove the row.")
    return _distinct(
        str(found.query),
        [str(document) for document in found.positives],
        [str(document) for document in found.negatives],
        found.scores if scored else None,
    )


def _distinct(
    query: str,
    positives: list[str],
    negatives: list[str],
    scores: list[float] | None,
    equals: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A row of the table, without negatives that are positives or repeated, and without repeated positives."""
    seen: set[str] = set()
    kept: list[int] = []
    documents = [*positives, *negatives]
    for place, document in enumerate(documents):
        key = (equals or {}).get(document, document).strip()
        if key not in seen:
            seen.add(key)
            kept.append(place)
    row: dict[str, Any] = {
        "query": query,
        "positives": [documents[place] for place in kept if place < len(positives)],
        "negatives": [documents[place] for place in kept if place >= len(positives)],
    }
    if scores is not None:
        row["teacher_scores"] = [scores[place] for place in kept]
    return row | {"left_out": len(negatives) - len(row["negatives"])}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {column: [row[column] for row in rows] for column in rows[0]}


def _table_candidates(
    batch: dict[str, list[Any]], rows: list[int], *, layout: Layout, scored: bool, source: str, table_format: int
) -> dict[str, list[Any]]:
    values = zip(*batch.values(), strict=True)
    return _columns(
        [
            _candidates(layout, scored, dict(zip(batch, row, strict=True)), f"Row {number} of {source}")
            for number, row in zip(rows, values, strict=True)
        ]
    )


def _drop_equals(batch: dict[str, list[Any]], *, equals: dict[str, str]) -> dict[str, list[Any]]:
    scores = batch.get("teacher_scores") or [None] * len(batch["query"])
    rows = zip(batch["query"], batch["positives"], batch["negatives"], scores, strict=True)
    return _columns([_distinct(*row, equals) for row in rows])


def _row_candidates(path: str, state: tuple[int, ...], *, layout: Layout, scored: bool) -> Iterator[dict[str, Any]]:
    for place, row in checked(_tuple_rows(Path(path))):
        yield _candidates(layout, scored, row, place)


def _group_pairs(opened: Path | Dataset, source: str) -> Dataset:
    """Pairs with scores as one row a query, with its documents in their order.

    Scores that are all 0 or 1 are labels, and what is labelled 1 is positive. Others are a teacher's, and the best
    scored document of a query is its positive.
    """
    import pyarrow as pa
    from datasets import Dataset

    if isinstance(opened, Path):
        rows = checked(_tuple_rows(opened))
    else:
        rows = ((f"Row {number} of {source}", row) for number, row in enumerate(opened))
    queries, documents, scores = zip(*(read_scored_pair(row, place) for place, row in rows), strict=True)
    columns = [pa.array(list(map(str, column))) for column in (queries, documents)] + [pa.array(scores, pa.float32())]
    pairs = pa.table(columns, ["query", "documents", "scores"])
    groups = pairs.group_by("query", use_threads=False).aggregate([("documents", "list"), ("scores", "list")])
    table = Dataset(groups.rename_columns([name.removesuffix("_list") for name in groups.column_names]))
    labels = set(scores) <= {0.0, 1.0}
    read = partial(_grouped_candidates, labels=labels)
    return table.map(read, batched=True, remove_columns=table.column_names, features=_features(not labels))


def _grouped_candidates(batch: dict[str, list[Any]], *, labels: bool) -> dict[str, list[Any]]:
    rows = []
    for query, documents, scores in zip(batch["query"], batch["documents"], batch["scores"], strict=True):
        order = sorted(range(len(scores)), key=lambda place: -scores[place])
        positives = sum(score > 0 for score in scores) if labels else 1
        ranked = [documents[place] for place in order]
        teacher = None if labels else [scores[place] for place in order]
        rows.append(_distinct(query, ranked[:positives], ranked[positives:], teacher))
    return _columns(rows)


def _beir_pairs(path: str, state: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for _, query, document, grade in iter_qrels(path):
        if grade > 0:
            yield {"query": query, "positives": [document], "negatives": [], "left_out": 0}


def _texts(path: str, state: tuple[int, ...], *, kind: Kind) -> Iterator[dict[str, Any]]:
    for _, fields in checked(read_file(Path(path), kind)):
        yield {"id": fields.id, "text": fields.text, TITLE_FIELD: fields.title}
