"""Documents and queries, one at a time, from whatever they are kept in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeAlias

from lion_st.data.fields import Fields, Row, Task, names_texts, read_fields, require_text_name
from lion_st.data.files import Rows, checked, decode_lines, file_kind, json_rows, read_lines, read_rows
from lion_st.data.sources import parse_source, stream_rows, text_files
from lion_st.data.trec import is_topics, read_tagged_topics

Corpus: TypeAlias = "str | Path | Iterable[Row] | Mapping[str, Row | str]"

logger = logging.getLogger(__name__)
TABLE_FORMS = (
    "without a header a .tsv has two columns, id and text; with others, or as .csv, it needs a header that names an id "
    "(such as id, docid, pid, qid) and a text (such as text, contents, passage, query) and perhaps a title."
)


class Record(NamedTuple):
    """One text to encode."""

    id: str
    text: str


class BadRecord(NamedTuple):
    """A record that cannot be encoded: `reason` is "malformed" or "empty", `message` says which one and why.

    Malformed is what is not a record (broken JSON, a line without a tab), has no id or text, or holds bytes or escapes
    that are not Unicode text.
    """

    reason: str
    message: str


def read_corpus(corpus: Corpus, split: str = "train", task: Task = "document") -> Iterator[Record | BadRecord]:
    """Yield the records of a corpus in its own order, never holding more than a few of them.

    The names of ids, texts and titles are those of `lion_st.data.fields`; a document's title stands before its text.

    Args:
        corpus: A `.jsonl`, `.parquet`, `.tsv` (id and text, or with a header), `.csv` (with a header) or `.txt` file (a
            document a line, whose id is FILE:LINE), all but .parquet optionally compressed (.gz, .bz2, .xz, .zst); a
            folder (its `corpus`, `documents` or `collection` file, as BEIR's, else all such files); "-" for JSON lines
            on the standard input; a data set on the Hub as "owner/name", "owner/name:subset" or
            "hf://owner/name/subset"; any iterable of mappings; or a mapping of ids to texts, or to mappings without an
            id, as BEIR's loader gives it. Queries also come as TREC topics, and of a folder from its `queries` or
            `topics` file.
        split: Split of a data set; "train" is also its only one, whatever it is called.
        task: Whether the records are documents or queries.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file is of an unknown kind, a compressed one ends early or is damaged, or the first record of
            a file names no id or no text, or a title and something else; the message says which names are accepted.
    """
    for place, fields in _read_all(corpus, split, task):
        if isinstance(fields, ValueError):
            yield BadRecord("malformed", str(fields))
        elif not fields.content:
            yield BadRecord("empty", f"{place} has the id {fields.id!r} and no text.")
        else:
            yield Record(fields.id, fields.content)


def read_texts(corpus: Corpus, task: Task = "document", split: str = "train") -> dict[str, Fields]:
    """All records of a corpus by their ids, blank ones too; see `read_corpus`."""
    texts: dict[str, Fields] = {}
    for place, fields in checked(_read_all(corpus, split, task)):
        if fields.id in texts:
            raise ValueError(f"{place} repeats the id {fields.id!r}: ids must be unique.")
        texts[fields.id] = fields
    if not texts:
        raise ValueError(f"{corpus} has no {task}.")
    return texts


def read_topics(source: str | Path, split: str = "train") -> dict[str, str]:
    """Read queries by id from any source that `read_corpus` takes: TREC topics, tables, folders, data sets.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: At the first query without an id or text, or with the id of another.
    """
    queries = {key: fields.text.strip() for key, fields in read_texts(source, "query", split).items()}
    blank = next((key for key, text in queries.items() if not text), None)
    if blank is not None:
        raise ValueError(f"{source} has a query without a text, {blank!r}: remove it or fill it in.")
    return queries


def corpus_files(corpus: str | Path, task: Task = "document") -> list[Path]:
    """The local files that a path stands for, in reading order; none for a data set."""
    source = parse_source(corpus)
    return text_files(source.path, task) if source.path is not None and source.subset is None else []


def _read_all(corpus: Corpus, split: str, task: Task) -> Iterator[tuple[str, Fields | ValueError]]:
    if not isinstance(corpus, str | Path):
        given = (_with_id(*item) for item in corpus.items()) if isinstance(corpus, Mapping) else corpus
        rows: Rows = ((f"record {number}", row) for number, row in enumerate(given, 1))
        yield from _as_fields(rows, task)
    elif str(corpus) == "-":
        yield from _as_fields(json_rows(decode_lines(sys.stdin.buffer, "standard input")), task)
    elif files := corpus_files(corpus, task):
        for file in files:
            yield from read_file(file, task)
    else:
        yield from _as_fields(stream_rows(parse_source(corpus), task, split), task)


def _with_id(identifier: str, row: Row | str) -> Row:
    return {"_id": identifier, **(row if isinstance(row, Mapping) else {"text": row})}


def read_file(file: Path, task: Task) -> Iterator[tuple[str, Fields | ValueError]]:
    """The records of one file with their places; a bad one comes as the error that says so."""
    what = file_kind(file)
    first = "" if what in (".jsonl", ".parquet") else str(next(checked(read_lines(file)), ("", ""))[1])
    if task == "query" and is_topics(first):
        yield from _as_fields(read_tagged_topics(file), task)
    elif what == ".txt" and not (task == "query" and "\t" in first):
        logger.warning("%s: one %s a line, with the ids %s:1, %s:2, ...", file, task, file.name, file.name)
        for place, line in read_lines(file):
            number = place.rpartition(":")[2]
            yield place, line if isinstance(line, ValueError) else Fields(f"{file.name}:{number}", "", line.strip())
    else:
        yield from _as_fields(read_rows(file, names_texts, ("id", "text"), TABLE_FORMS), task)


def _as_fields(rows: Rows, task: Task) -> Iterator[tuple[str, Fields | ValueError]]:
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first[1], dict) and not names_texts(first[1]):
        read_fields(first[1], first[0], task)  # raises: all other records would be bad, too
    if isinstance(first[1], dict) and task == "document":
        require_text_name(first[1], first[0])
    for place, row in chain([first], rows):
        if isinstance(row, ValueError):
            yield place, row
            continue
        try:
            yield place, read_fields(row, place, task)
        except (ValueError, AttributeError) as error:
            yield place, error if isinstance(error, ValueError) else ValueError(f"{place} is {row!r}, not a mapping.")
