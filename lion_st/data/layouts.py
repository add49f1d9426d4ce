"""The published layouts of training tuples, each read into the same candidates."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Candidates:
    """A query with its relevant and other documents, as ids or as texts.

    `scores` are the teacher's, of the positives and then of the negatives; None where the layout has none.
    """

    query: Any
    positives: list[Any]
    negatives: list[Any]
    scores: list[float] | None = None


@dataclass(frozen=True)
class Layout:
    """A published layout: the columns that tell it apart, and how a row of it reads.

    `query_ids` and `document_ids` say whether queries and documents are ids; None leaves it to the values: integers
    are.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Candidates]
    query_ids: bool | None
    document_ids: bool | None


def detect_layout(row: Row) -> Layout:
    """Find the layout of a row by its columns.

    Raises:
        ValueError: If the columns fit no known layout.
    """
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns):
            return layout
    known = "; ".join(f"{', '.join(layout.columns)} ({layout.name})" for layout in LAYOUTS)
    raise ValueError(f"The columns {sorted(row)} fit no layout of training tuples. Known are: {known}.")


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
    documents = [*found.positives, *found.negatives]
    for value in (found.query, *documents):
        if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
            raise ValueError(f"{place} has {value!r} where a query or document belongs: remove the row or fill it in.")
    if not found.positives:
        raise ValueError(f"{place} has no positive document: remove the row.")
    if found.scores is not None:
        if len(found.scores) != len(documents):
            raise ValueError(
                f"{place} has {len(found.scores)} teacher scores for {len(documents)} documents: they must pair up."
            )
        for score in found.scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                raise ValueError(f"{place} has the teacher score {score!r}: score it again or remove the row.")
    return found


def _scored_list(row: Row) -> Candidates:
    """Documents in any order with a score each: the best scored is the positive."""
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
    relevant: list[Any] = []
    others: list[Any] = []
    for document, label in zip(row["doc_ids"], row["labels"], strict=True):
        (relevant if label > 0 else others).append(document)
    return Candidates(row["query_id"], relevant, others)


def _id_triplet(row: Row) -> Candidates:
    """A triplet of ids; its score, if any, is the teacher's margin, and only margins are known then."""
    scores = [row["score"], 0.0] if "score" in row else None
    return Candidates(row["query_id"], [row["positive_id"]], [row["negative_id"]], scores)


def _mined_by_systems(row: Row) -> Candidates:
    """Negatives in a list for each system that found them: rank by rank, each document once."""
    lists = [[_pid(item) for item in found] for found in row["neg"].values()]
    ranks = [found[rank] for rank in range(max(map(len, lists), default=0)) for found in lists if rank < len(found)]
    positives = [_pid(item) for item in row["pos"]]
    return Candidates(row["qid"], positives, list(dict.fromkeys(pid for pid in ranks if pid not in positives)))


def _passages(row: Row) -> Candidates:
    positives, negatives = ([_titled(item) for item in row[f"{kind}_passages"]] for kind in ("positive", "negative"))
    return Candidates(row["query"], positives, negatives)


def _document_ids(row: Row) -> Candidates:
    query = row["query_text"] if "query_text" in row else row["query"]
    return Candidates(query, row["positive_document_ids"], row["negative_document_ids"] or [])


def _pos_neg(row: Row) -> Candidates:
    positives, negatives = ([row[k]] if isinstance(row.get(k), str) else row.get(k) or [] for k in ("pos", "neg"))
    scores = [*row["pos_scores"], *(row.get("neg_scores") or [])] if row.get("pos_scores") else None
    return Candidates(row["query"], positives, negatives, scores)


def _columns(row: Row) -> Candidates:
    """One column a document, and the label, if any, a score for each of them or, for triplets, the teacher's margin."""
    query = next(row[name] for name in ("query", "anchor", "question") if name in row)
    numbered = [name for name in row if re.fullmatch(r"negative(_\d+)?", name)]
    negatives = [row[name] for name in sorted(numbered, key=lambda name: int(name.partition("_")[2] or 0))]
    label = next((row[name] for name in ("label", "labels", "score", "scores") if name in row), None)
    if isinstance(label, (int, float)) and len(negatives) == 1:
        label = [label, 0.0]
    return Candidates(query, [row["positive"]], negatives, label)


def _list(value: Any) -> list[Any]:
    """A list, also where it was published as its text."""
    if isinstance(value, str):
        import ast

        return list(ast.literal_eval(value))
    return list(value)


def _pid(item: Any) -> Any:
    return item["pid"] if isinstance(item, Mapping) else item


def _titled(passage: Mapping[str, Any]) -> str:
    return f"{passage.get('title') or ''} {passage['text']}".strip()


LAYOUTS = (
    Layout("ids with teacher scores", ("query_id", "document_ids", "scores"), _scored_list, True, True),
    Layout("question and ids", ("question", "pos_pid", "neg_pids"), _question_with_ids, False, True),
    Layout("query, ids and scores, positive first", ("query", "docids", "scores"), _positive_first, False, True),
    Layout("labeled list of ids", ("query_id", "doc_ids", "labels"), _labeled_list, True, True),
    Layout("triplets of ids", ("query_id", "positive_id", "negative_id"), _id_triplet, True, True),
    Layout("negatives by system", ("qid", "pos", "neg"), _mined_by_systems, True, True),
    Layout("passages", ("query", "positive_passages", "negative_passages"), _passages, False, False),
    Layout("ids of documents", ("positive_document_ids", "negative_document_ids"), _document_ids, False, True),
    Layout("lists of texts", ("query", "pos"), _pos_neg, False, False),
    Layout("columns", ("query", "positive"), _columns, None, None),
    Layout("columns", ("anchor", "positive"), _columns, None, None),
    Layout("columns", ("question", "positive"), _columns, None, None),
)
