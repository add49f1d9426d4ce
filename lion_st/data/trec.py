"""Runs, relevance judgements and topics, in the forms of TREC, BEIR and MS MARCO."""

from __future__ import annotations

import html
import math
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from lion_st.data.fields import (
    DOCUMENT_ID_FIELDS,
    GRADE_FIELDS,
    QUERY_ID_FIELDS,
    Row,
    check_id,
    first_field,
)
from lion_st.data.files import checked, file_kind, read_lines, read_rows

RUN_FORMS = (
    "a run is 'query Q0 document rank score tag' (TREC) or 'query document rank' (MS MARCO), separated by tabs where "
    "ids hold spaces"
)
QRELS_FORMS = (
    "judgements are 'query 0 document grade' (TREC), or tab-separated query-id, corpus-id and score (BEIR), separated "
    "by tabs where ids hold spaces"
)


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a run file: scores by query and document.

    TREC's six columns, of which the ranks are ignored, as trec_eval does; or the three of MS MARCO, where the score is
    1 / rank. Columns are separated by white space, or by tabs alone where ids hold spaces.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: At the first line that is of neither form, holds no finite score or whole rank, or repeats a
            document or, without scores, a rank of a query.
    """
    run: dict[str, dict[str, float]] = {}
    ranks: set[tuple[str, int]] = set()
    for place, fields in _split_lines(path, (6, 3), RUN_FORMS):
        query, document = fields[0], fields[2 if len(fields) == 6 else 1]
        hits = run.setdefault(query, {})
        if document in hits:
            raise ValueError(f"{place}: document {document!r} occurs twice for query {query!r}.")
        if len(fields) == 6:
            hits[document] = _finite(fields[4], place, "score")
            continue
        if not re.fullmatch(r"[1-9][0-9]*", fields[2].strip()) or (query, int(fields[2])) in ranks:
            raise ValueError(f"{place} has {fields[2]!r} where a rank of its own belongs, from 1 on: {RUN_FORMS}.")
        ranks.add((query, int(fields[2])))
        hits[document] = 1 / int(fields[2])
    unranked = next((query for query in run if ranks and (query, 1) not in ranks), None)
    if unranked is not None:
        raise ValueError(
            f"{path} has no rank 1 for query {unranked!r}, so that its numbers are not ranks: {RUN_FORMS}."
        )
    return run


def read_qrels(
    path: str | Path, queries: Collection[str] | None = None, documents: Collection[str] | None = None
) -> dict[str, dict[str, int]]:
    """Read relevance judgements: grades by query and document; see `iter_qrels` for the forms.

    Args:
        path: The file.
        queries: Ids of the queries there are, if they are to be checked.
        documents: The same of documents.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: At the first line that is malformed, names an unknown query or contradicts an earlier one.

    Warns:
        UserWarning: If documents are judged that are unknown: they count as never found, as in trec_eval.
    """
    qrels: dict[str, dict[str, int]] = {}
    unknown: list[str] = []
    for place, query, document, grade in iter_qrels(path):
        if queries is not None and query not in queries:
            raise ValueError(f"{place} judges the unknown query {query!r}: add it or remove the judgement.")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise ValueError(
                f"{place} judges document {document!r} of query {query!r} as {grade}, an earlier line as "
                f"{qrels[query][document]}: keep one of them."
            )
        if documents is not None and document not in documents:
            unknown.append(document)
    if unknown:
        warnings.warn(
            f"{path} judges {len(unknown):,} document(s) that the corpus lacks, such as {unknown[0]!r}: they count as "
            "never found.",
            stacklevel=3,
        )
    return qrels


def iter_qrels(path: str | Path) -> Iterator[tuple[str, str, str, int]]:
    """Yield the place, query id, document id and grade of each judgement.

    TREC's four columns, BEIR's three (tab-separated, with or without the header), or a table with such columns as
    query-id, corpus-id and score in `.jsonl`, `.csv` or `.parquet`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: At the first line that is of no such form, or whose grade is not a whole number.
    """
    if file_kind(path) in (".jsonl", ".csv", ".parquet"):
        for place, row in checked(read_rows(path, _names_judgements, accepted=f"{QRELS_FORMS}.")):
            yield _judgement(row, place)
        return
    lines = _split_lines(path, (4, 3), QRELS_FORMS)
    header: list[str] = []
    for number, (place, fields) in enumerate(lines):
        if number == 0 and _names_judgements(fields):
            header = fields
        elif header:
            yield _judgement(dict(zip(header, fields, strict=True)), place)
        else:
            yield place, fields[0], fields[-2], _grade(fields[-1], place)


def is_topics(line: str) -> bool:
    """Whether a file that begins with this line holds topics with tags."""
    return line.lstrip().startswith("<")


def read_tagged_topics(path: str | Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield TREC topics as rows with `id` and `query`, from `<top>` blocks or from XML.

    The query is the `<title>` of a block; in XML the `<query>`, `<title>` or `<question>`, else the topic's own text.
    """
    lines = [line for _, line in checked(read_lines(path))]
    text = "\n".join(str(line) for line in lines)
    topics = _blocks(text) if re.search(r"<top>", text, flags=re.IGNORECASE) else _xml_topics(text, path)
    for count, (number, query) in enumerate(topics, 1):
        if not number or not query:
            missing = "number" if not number else "title, query or question"
            raise ValueError(f"{path}: topic {number or count} has no {missing}.")
        yield f"{path}, topic {number}", {"id": number, "query": query}


def _split_lines(path: str | Path, counts: Sequence[int], forms: str) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line, as many as in the first line, which decides whether tabs alone separate them."""
    separator, columns = None, 0
    for place, line in checked(read_lines(path)):
        if not columns:
            separator = "\t" if line.count("\t") + 1 in counts else None
            columns = len(line.split(separator))
        fields = line.split(separator)
        if len(fields) != columns or columns not in counts:
            raise ValueError(f"{place} is {line.strip()[:80]!r}, of {len(fields)} columns: {forms}.")
        yield place, fields


def _names_judgements(names: Sequence[str]) -> bool:
    return all(set(names) & set(known) for known in (QUERY_ID_FIELDS, DOCUMENT_ID_FIELDS, GRADE_FIELDS))


def _judgement(row: Row, place: str) -> tuple[str, str, str, int]:
    names = [first_field(row, known) for known in (QUERY_ID_FIELDS, DOCUMENT_ID_FIELDS, GRADE_FIELDS)]
    query, document, grade = names
    if query is None or document is None or grade is None:
        raise ValueError(f"{place} has the fields {sorted(row)}: {QRELS_FORMS}.")
    ids = [check_id(row[name], place, name) for name in (query, document)]
    return place, ids[0], ids[1], _grade(row[grade], place)


def _grade(value: object, place: str) -> int:
    grade = _finite(value, place, "grade")
    if grade != int(grade):
        raise ValueError(f"{place} has the grade {value!r}: grades are whole numbers.")
    return int(grade)


def _finite(value: object, place: str, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{place} has the {what} {value!r}, which is not a number.") from None
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{place} has the {what} {value!r}, which is not a finite number.")
    return number


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    for topic in re.split(r"<top>", text, flags=re.IGNORECASE)[1:]:
        number = re.search(r"<num>\s*(?:Number:)?\s*([^\s<]+)", topic, flags=re.IGNORECASE)
        title = re.search(r"<title>\s*(?:Topic:)?\s*([^<]+)", topic, flags=re.IGNORECASE)
        yield number[1] if number else "", " ".join(html.unescape(title[1]).split()) if title else ""


def _xml_topics(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML ({error}), nor has it <top> blocks, as TREC topics have.") from error
    for topic in root.iter("topic"):
        texts = {child.tag: " ".join("".join(child.itertext()).split()) for child in topic}
        number = topic.get("number") or topic.get("id") or texts.get("number") or texts.get("num") or texts.get("id")
        own = " ".join((topic.text or "").split())
        found = next((texts[name] for name in ("query", "title", "question") if texts.get(name)), own)
        yield (number or "").strip(), found
