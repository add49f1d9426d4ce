"""The published layouts of training tuples, each read into the same candidates."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lion_st.data.fields import DOCUMENT_ID_FIELDS, GRADE_FIELDS, QUERY_ID_FIELDS, Fields, Row, require_unicode
from lion_st.data.teachers import UNNAMED

# A row with one column of each is a pair, perhaps with negatives; a score without negatives says how relevant it is.
PAIR_QUERIES = ("query", "question", "anchor", "sentence1", *QUERY_ID_FIELDS)
PAIR_DOCUMENTS = (
    "positive", "answer", "answers", "passage", "document", "document_text", "response", "sentence2",
    *DOCUMENT_ID_FIELDS,
)  # fmt: skip
ANSWERS = ("answer", "answers", "response")  # of which a row has a passage besides that may be meant
PASSAGES = (
    "passage", "passages", "positive_passages", "document", "document_text", "context", "contexts", "ctxs",
    "positive_ctxs",
)  # fmt: skip
PAIR_SCORES = (*GRADE_FIELDS, "labels", "similarity_score")
GRADES = ("relevance", "grade", "label", "labels", "rel")  # of which whole numbers are how relevant a document is
DOCUMENT_LISTS = ("positive_document_ids", "negative_document_ids")
HEADERLESS = ("question", "answers")
TUPLE_FORMS = (
    "tuples need a header that names the columns of a layout, such as query, positive, negative or question, answer; "
    "without one, a .tsv has two columns, a question and a list of answers ['...', '...'], as DPR's."
)


class RowError(ValueError):
    """A row that cannot be trained on.

    Args:
        message: The place, what is wrong and what to do.
        fault: "malformed", "empty_text", "no_positive", "unscored", "score_count" or "bad_score".
    """

    def __init__(self, message: str, fault: str = "malformed") -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True)
class Candidates:
    """A query with its relevant and other documents, as ids or as texts.

    `scores` are those of each teacher by name, of the positives and then of the negatives; None where the layout has
    none. A list is of one teacher without a name, and `read_row` makes a mapping of it.
    """

    query: Any
    positives: list[Any]
    negatives: list[Any]
    scores: Any = None


@dataclass(frozen=True)
class Layout:
    """A published layout: the columns that tell it apart, and how a row of it reads.

    `query_ids` and `document_ids` say whether queries and documents are ids. None leaves it to the values, of which
    integers are, and to whether their texts were given.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Candidates]
    query_ids: bool | None
    document_ids: bool | None


def detect_layout(row: Row) -> Layout:
    """Find the layout of a row by its columns."""
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns):
            return layout
    pair = _pair_columns(row)
    if pair is not None:
        query, document = pair
        _require_one_meant(row, document)
        read = partial(_answers if document == "answers" else _columns, query=query, document=document)
        return Layout("columns", pair, read, query in QUERY_ID_FIELDS or None, document in DOCUMENT_ID_FIELDS or None)
    known = "; ".join(f"{', '.join(layout.columns)} ({layout.name})" for layout in LAYOUTS)
    raise ValueError(
        f"The columns {sorted(row)} fit no layout of training tuples. Known are: {known}; one of "
        f"{', '.join(PAIR_QUERIES)} with one of {', '.join(PAIR_DOCUMENTS)} (pairs), with negative or negative_1, "
        f"negative_2 ... (columns), with one of {', '.join(PAIR_SCORES)} (pairs with scores)."
    )


def fits_layout(names: Collection[str]) -> bool:
    """Whether columns of these names are training tuples."""
    known = any(set(layout.columns) <= set(names) for layout in LAYOUTS)
    return known or _pair_columns(dict.fromkeys(names, "")) is not None


def scored_pair_fields(row: Row) -> tuple[str, str, str] | None:
    """The columns of query, document and score of a row that has one of each; None for other rows."""
    pair = _pair_columns(row)
    score = next((name for name in PAIR_SCORES if row.get(name) is not None), None)
    if pair is None or score is None or _negatives(row) or any(set(layout.columns) <= set(row) for layout in LAYOUTS):
        return None
    _require_one_meant(row, pair[1])
    is_one = isinstance(row[pair[1]], (str, int)) and isinstance(row[score], (str, int, float))
    is_list = str(row[score]).startswith("[")  # in a .csv
    return (*pair, score) if is_one and not is_list else None


def read_scored_pair(row: Row, place: str, fields: tuple[str, str, str]) -> tuple[str | int, str | int, float]:
    """Query, document and score of a row, from the columns that `scored_pair_fields` found in the first one."""
    found: list[Any] = [row.get(name) for name in fields]
    query, document, score = found
    for value, field in ((query, fields[0]), (document, fields[1])):
        if not _is_text(value):
            raise _not_a_text(value, field, place)
    require_unicode((query, document), place)
    try:
        number = float(score)  # of a .csv too
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{place} has {score!r} in the field {fields[2]!r}: a score is a finite number.", "bad_score")
    return query, document, number


def read_row(layout: Layout, row: Row, place: str) -> Candidates:
    """Read a row and check what can be checked on it alone.

    Raises:
        ValueError: If a value is missing, empty or no text, or the scores do not match the documents; the message names
            the place.
    """
    try:
        found = layout.read(row)
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"{place} is not a row of the layout {layout.name!r} ({type(error).__name__}: {error}); it has the columns "
            f"{sorted(row)}."
        ) from error
    for listed in (found.positives, found.negatives):
        if not isinstance(listed, (list, tuple)):
            raise RowError(f"{place} has {listed!r} in the field {_field_of(row, listed)!r}, where a list belongs.")
    documents = [*found.positives, *found.negatives]
    for value in (found.query, *documents):
        if not _is_text(value):
            raise _not_a_text(value, _field_of(row, value), place)
    require_unicode((found.query, *documents), place)
    if not found.positives:
        raise RowError(f"{place} has no positive document: remove the row.", "no_positive")
    if found.scores is None:
        return found
    by_teacher = found.scores if isinstance(found.scores, Mapping) else {UNNAMED: found.scores}
    for teacher, scores in by_teacher.items():
        _check_scores(scores, teacher, len(documents), row, place)
    return replace(found, scores=dict(by_teacher))


def _check_scores(scores: Any, teacher: str, documents: int, row: Row, place: str) -> None:
    of_teacher = f" of the teacher {teacher!r}" if teacher else ""
    if scores is None:
        message = f"{place} has no scores{of_teacher}: score it with `lion-st teach`, or remove the row."
        raise RowError(message, "unscored")
    if not isinstance(scores, (list, tuple)):
        raise RowError(f"{place} has the teacher scores {scores!r}{of_teacher}: give a list, one for each document.")
    if len(scores) != documents:
        message = f"{place} has {len(scores)} teacher scores{of_teacher} for {documents} documents: they must pair up."
        raise RowError(message, "score_count")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            field = _field_of(row, score)
            raise RowError(
                f"{place} has the teacher score {score!r}{of_teacher} in the field {field!r}: score it again or remove "
                "the row.",
                "bad_score",
            )


def _is_text(value: Any) -> bool:
    """Whether a value is a text or an id."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    return isinstance(value, int) and not isinstance(value, bool)


def _not_a_text(value: Any, field: str, place: str) -> RowError:
    is_empty = value is None or (isinstance(value, str) and not value.strip())
    return RowError(
        f"{place} has {value!r} in the field {field!r}, where a query or document belongs: a text or an id, and "
        "no instruction with it. Remove the row or fill it in.",
        "empty_text" if is_empty else "malformed",
    )


def _field_of(row: Row, value: Any) -> str:
    """The column that a value was read from."""

    def holds(found: Any) -> bool:
        if found is value:
            return True
        inner: Any = found.values() if isinstance(found, Mapping) else found
        return isinstance(inner, Iterable) and not isinstance(inner, str) and any(map(holds, inner))

    return next((name for name, found in row.items() if holds(found)), ", ".join(row))


def _pair_columns(row: Row) -> tuple[str, str] | None:
    query, document = (
        next((name for name in names if row.get(name) is not None), None) for names in (PAIR_QUERIES, PAIR_DOCUMENTS)
    )
    return None if query is None or document is None else (query, document)


def _require_one_meant(row: Row, document: str) -> None:
    """Refuse a row with an answer and its passage, which is mostly what is to be found."""
    passage = next((name for name in PASSAGES if row.get(name)), None)
    if document in ANSWERS and passage is not None:
        raise ValueError(
            f"The columns {sorted(row)} have {document!r} and {passage!r}: call the one that is to be found "
            "'positive', a text or a list, or leave the other out."
        )


def _answers(row: Row, *, query: str, document: str) -> Candidates:
    value = row[document]
    if isinstance(value, str) and not value.lstrip().startswith("["):
        raise ValueError(f"{value[:80]!r} is not a list of answers; {TUPLE_FORMS}")
    return Candidates(row[query], _list(value["text"] if isinstance(value, Mapping) else value), [])


def _scored_list(row: Row) -> Candidates:
    """Documents in any order with a score each: the best scored is the positive; of several teachers, the first is."""
    if isinstance(row["scores"], Mapping):
        documents = _list(row["document_ids"])
        return Candidates(row["query_id"], documents[:1], documents[1:], row["scores"])
    documents, scores = _list(row["document_ids"]), _list(row["scores"])
    if len(documents) != len(scores) or any(score is None or score != score for score in scores):
        return Candidates(row["query_id"], documents[:1], documents[1:], scores)  # refused by `read_row`
    best = max(range(len(scores)), key=scores.__getitem__, default=0)
    order = [best, *(i for i in range(len(scores)) if i != best)]
    documents, scores = [documents[i] for i in order], [scores[i] for i in order]
    return Candidates(row["query_id"], documents[:1], documents[1:], scores)


def _positive_first(row: Row) -> Candidates:
    return Candidates(row["query"], row["docids"][:1], row["docids"][1:], row["scores"])


def _question_with_ids(row: Row) -> Candidates:
    scores = [row["pos_score"], *row["neg_scores"]] if "neg_scores" in row else None
    return Candidates(row["question"], [row["pos_pid"]], row["neg_pids"], scores)


def _labeled_list(row: Row) -> Candidates:
    return _by_label(row["query_id"], row["doc_ids"], row["labels"])


def _by_label(query: Any, documents: Iterable[Any], labels: Iterable[Any]) -> Candidates:
    relevant: list[Any] = []
    others: list[Any] = []
    for document, label in zip(documents, labels, strict=True):
        if label != int(label):
            raise ValueError(f"the label {label!r} is no grade, a whole number: name a teacher's scores 'scores'")
        (relevant if label > 0 else others).append(document)
    return Candidates(query, relevant, others)


def _id_triplet(row: Row) -> Candidates:
    """A triplet of ids; its score, if any, is the teacher's margin, and only margins are known then."""
    scores = [row["score"], 0.0] if "score" in row else None
    return Candidates(row["query_id"], [row["positive_id"]], [row["negative_id"]], scores)


def _mined_by_systems(row: Row) -> Candidates:
    """Negatives in a list for each system that found them, rank by rank, each document once; or in one list."""
    if not isinstance(row["neg"], Mapping):
        scores = [*row["pos.score"], *row["neg.score"]] if row.get("pos.score") is not None else None
        return Candidates(row["qid"], row["pos"], row["neg"] or [], scores)
    lists = [[_pid(item) for item in found or ()] for found in row["neg"].values()]  # a table has null for no list
    ranks = [found[rank] for rank in range(max(map(len, lists), default=0)) for found in lists if rank < len(found)]
    return Candidates(row["qid"], [_pid(item) for item in row["pos"]], list(dict.fromkeys(ranks)))


def _passages(row: Row) -> Candidates:
    positives, negatives = row["positive_passages"], row["negative_passages"]
    scores = _scores_inside([*positives, *negatives])
    return Candidates(row["query"], list(map(_titled, positives)), list(map(_titled, negatives)), scores)


def _scores_inside(passages: Sequence[Mapping[str, Any]]) -> Any:
    """Scores that stand in the passages themselves: `score`, or `scores` of several teachers by name."""
    first = passages[0].get("scores") if passages else None
    if isinstance(first, Mapping):
        return {teacher: [(passage.get("scores") or {}).get(teacher) for passage in passages] for teacher in first}
    scores = [passage.get("score") for passage in passages]
    return None if all(score is None for score in scores) else scores


def _document_ids(row: Row) -> Candidates:
    query = next(row[name] for name in ("query_text", "query", "query_id") if name in row)
    return Candidates(query, row["positive_document_ids"], row["negative_document_ids"] or [], row.get("scores"))


def _pos_neg(row: Row) -> Candidates:
    positives, negatives = ([row[k]] if isinstance(row.get(k), str) else row.get(k) or [] for k in ("pos", "neg"))
    scores = [*row["pos_scores"], *(row.get("neg_scores") or [])] if row.get("pos_scores") else row.get("scores")
    return Candidates(row["query"] if "query" in row else row["query_id"], positives, negatives, scores)


def _columns(row: Row, *, query: str, document: str) -> Candidates:
    """One column a document, and the label, if any, a score for each of them or, for triplets, the teacher's margin.

    The documents of `negative` may stand in a list.
    """
    columns = _negatives(row)
    if isinstance(row[document], list):
        return _columns_of_lists(row, row[query], document, columns)
    given = [row[name] for name in columns]
    negatives = [value for value in given if value not in (None, "")]  # rows may have fewer than others
    if len(negatives) == 1 and isinstance(negatives[0], list):
        given = negatives = negatives[0]
    label = next((row[name] for name in ("label", "labels", "score", "scores") if name in row), None)
    if isinstance(label, str):
        label = ast.literal_eval(label)
    if isinstance(label, (int, float)) and not columns:
        raise ValueError(
            f"it has the score or label {label!r}, the first row has none, and it decides what is relevant"
        )
    if isinstance(label, (int, float)) and len(negatives) < 2:
        label = [label, 0.0][: 1 + len(negatives)]
    if isinstance(label, list) and len(label) == 1 + len(given) > 1 + len(negatives):
        label = [label[0], *(one for one, value in zip(label[1:], given, strict=True) if value not in (None, ""))]
    return Candidates(row[query], [row[document]], negatives, label)


def _columns_of_lists(row: Row, query: Any, document: str, columns: list[str]) -> Candidates:
    """A list of documents with a label of each, or with scores, the positive first; or lists of both kinds."""
    documents, labels, scores = row[document], row.get("labels"), row.get("scores")
    if len(columns) == 1:
        return Candidates(query, documents, row[columns[0]] or [], scores)
    if labels is None and scores is None:
        raise ValueError(f"the list in {document!r} has neither labels nor scores, nor a list in 'negative'")
    if labels is None:
        return Candidates(query, documents[:1], documents[1:], scores)
    return _by_label(query, documents, labels)


def _negatives(row: Row) -> list[str]:
    """The columns with negatives, in their order."""
    numbered = [name for name in row if re.fullmatch(r"negatives?|negative_\d+", name)]
    return sorted(numbered, key=lambda name: int(name.partition("_")[2] or 0))


def _list(value: Any) -> list[Any]:
    """A list, also where it was published as its text."""
    if isinstance(value, str):
        return list(ast.literal_eval(value))
    return list(value)


def _pid(item: Any) -> Any:
    return item["pid"] if isinstance(item, Mapping) else item


def _titled(passage: Mapping[str, Any]) -> Any:
    title, text = passage.get("title") or "", passage["text"]
    return Fields("", title, text or "").content if isinstance(text, str | None) else text


LAYOUTS = (
    Layout("ids with teacher scores", ("query_id", "document_ids", "scores"), _scored_list, True, True),
    Layout("question and ids", ("question", "pos_pid", "neg_pids"), _question_with_ids, None, True),
    Layout("query, ids and scores, positive first", ("query", "docids", "scores"), _positive_first, None, True),
    Layout("labeled list of ids", ("query_id", "doc_ids", "labels"), _labeled_list, True, True),
    Layout("triplets of ids", ("query_id", "positive_id", "negative_id"), _id_triplet, True, True),
    Layout("negatives by system", ("qid", "pos", "neg"), _mined_by_systems, True, True),
    Layout("passages", ("query", "positive_passages", "negative_passages"), _passages, False, False),
    *(
        Layout("ids of documents", (query, *DOCUMENT_LISTS), _document_ids, is_id, True)
        for query, is_id in {"query_text": False, "query": None, "query_id": True}.items()
    ),
    Layout("lists", ("query", "pos"), _pos_neg, None, None),
    Layout("lists", ("query_id", "pos"), _pos_neg, True, None),
)
