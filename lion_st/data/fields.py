"""The names under which files and data sets keep ids, titles, texts and grades, and the kinds of texts and vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Task: TypeAlias = Literal["document", "query"]
Paradigm: TypeAlias = Literal["sparse", "dense", "multi_vector", "hybrid"]
TASKS: tuple[Task, ...] = ("query", "document")

# Of several that are present and not null, the first counts. A passage of MS MARCO v2 has its document's `docid` too.
QUERY_ID_FIELDS = ("query_id", "query-id", "qid")
JUDGED_FIELDS = ("corpus_id", "corpus-id")  # of BEIR's judgements
DOCUMENT_ID_FIELDS = ("pid", "passage_id", "docid", "doc_id", "document_id", *JUDGED_FIELDS)
ID_FIELDS = ("_id", "id", *DOCUMENT_ID_FIELDS, *QUERY_ID_FIELDS)
TEXT_FIELDS = (
    "text", "contents", "content", "body", "segment", "passage", "document", "document_text", "query", "query_text",
    "question",
)  # fmt: skip
TITLE_FIELD = "title"
GRADE_FIELDS = ("score", "relevance", "grade", "label", "rel")


class Fields(NamedTuple):
    """One text with its id; `title` is "" where it has none."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """What a model reads: the title in front of the text, as the paper, BEIR and mteb feed a document."""
        return f"{self.title} {self.text}".strip()


def first_field(row: Row, names: Iterable[str]) -> str | None:
    """The first of the names under which the row has a value that is not null."""
    for name in names:
        if row.get(name) is not None:
            return name
    return None


def names_texts(names: Iterable[str]) -> bool:
    """Whether the names of columns include one of an id and one of a text or title."""
    found = set(names)
    return bool(found & set(ID_FIELDS)) and bool(found & {*TEXT_FIELDS, TITLE_FIELD})


def require_text_name(row: Row, place: str) -> None:
    """Refuse a document with a title and no text, where it has further fields, of which one may be the text."""
    further = row.keys() - {TITLE_FIELD, *ID_FIELDS}
    if row.get(TITLE_FIELD) is not None and further and further.isdisjoint(TEXT_FIELDS):
        raise ValueError(
            f"{place} has a title and no text among its fields {sorted(row)}: accepted are {', '.join(TEXT_FIELDS)}. "
            "Name the text so, or the title if that is all there is to find."
        )


def check_id(value: Any, place: str, field: str) -> str:
    """An id as a string; integers become their digits."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(f"{place} has {value!r} in the field {field!r}: an id is a string that is not blank.")
    key = str(value)
    if "\t" in key or "\n" in key or "\r" in key:
        raise ValueError(f"{place} has the id {value!r}: ids may hold spaces, but no tabs or line breaks.")
    return key


def read_fields(row: Row, place: str, task: Task = "document") -> Fields:
    """Read the id, title and text of a row.

    A title without a text, or a text that is null beside a title, is an empty text. A query has no title: one beside
    its text is left out, and one without a text is the query, as in TREC topics.
    """
    id_field = first_field(row, ID_FIELDS)
    if id_field is None:
        raise ValueError(f"{place} has no id among its fields {sorted(row)}: accepted are {', '.join(ID_FIELDS)}.")
    key = check_id(row[id_field], place, id_field)
    title, text_field = row.get(TITLE_FIELD), first_field(row, TEXT_FIELDS)
    if task == "query":
        title, text_field = None, text_field or first_field(row, (TITLE_FIELD,))
    text = row[text_field] if text_field is not None else None
    if text is None and title is None and (task == "query" or not any(name in row for name in TEXT_FIELDS)):
        raise ValueError(f"{place} has no text among its fields {sorted(row)}: accepted are {', '.join(TEXT_FIELDS)}.")
    for field, value in ((text_field, text), (TITLE_FIELD, title)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place} has {value!r} in the field {field!r}: a text is a string.")
    require_unicode((key, title, text), place)
    return Fields(key, title or "", text or "")


def require_unicode(values: Iterable[Any], place: str) -> None:
    """Refuse texts that neither a tokenizer nor a file takes; other values are left alone."""
    try:
        for value in values:
            if isinstance(value, str) and not value.isascii():
                value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half of a surrogate pair, which is not Unicode text.") from error


def choose_column(columns: Sequence[str], accepted: Sequence[str], what: str, name: str) -> str:
    """The column of a table that holds something."""
    found = next((column for column in accepted if column in columns), None)
    if found is None:
        raise ValueError(f"{name} has the columns {list(columns)}, no {what}: accepted are {', '.join(accepted)}.")
    return found
