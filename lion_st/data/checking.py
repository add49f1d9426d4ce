"""Checks training data as training would read it, all of it, in memory that does not grow with its texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.data.beir import beir_files
from lion_st.data.fields import Task
from lion_st.data.joining import several_positives
from lion_st.data.layouts import Candidates, RowError
from lion_st.data.lookup import TEXTS_AT_ONCE, TextLookup, TextTable, text_keys_of
from lion_st.data.overlap import KnownTexts, TextKeys, normalize
from lion_st.data.report import DataReport, Findings, Lengths
from lion_st.data.tables import TupleSource, load_texts, open_tuples, text_tables
from lion_st.data.trec import iter_qrels

ROWS_AT_ONCE = 1000
SAMPLE = 20_000  # texts of each task whose length is measured
CUT = 0.1  # share of texts from which on cutting them is worth a warning
MOST = 0.5  # share of rows from which on scores are taken to be in the wrong order
Measure = Callable[[Sequence[str]], Iterable[int]]


def check_tuples(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    queries: str | Path | None = None,
    documents: str | Path | None = None,
    negatives: int | None = None,
    tokenizer: Any = None,
    query_length: int = 64,
    document_length: int = 128,
    query_prompt: str = "",
    document_prompt: str = "",
    eval_data: Sequence[str | Path] = (),
    eval_split: str = "test",
    sample: int = SAMPLE,
) -> DataReport:
    """Read training tuples as `load_tuples` does, but to the end, and say what is wrong with them.

    Rows are read up to three times and never kept: memory holds 8 to 40 bytes for each row, and for each text of the
    collections, which are memory-mapped.

    Args:
        source: See `load_tuples`, as `split`, `subset`, `queries` and `documents`.
        negatives: Negatives that training will ask for of each row.
        tokenizer: Of the model, to measure lengths in tokens and what is cut; None measures words.
        query_length: Where training cuts queries, in tokens.
        document_length: The same for documents.
        query_prompt: What training puts in front of queries, and what counts in their length.
        document_prompt: The same for documents.
        eval_data: Test collections in BEIR layout, whose queries must not be trained on.
        eval_split: Split of their judgements.
        sample: Texts of each task whose length is measured, drawn at random.

    Raises:
        FileNotFoundError: If a source is not there.
        ValueError: If no row of it can be read, or a test collection cannot be.

    Example:
        >>> check_tuples("lion-st/lion-quickstart", negatives=4).is_sound
        True
    """
    opened = open_tuples(source, subset, split, queries, documents)
    report, findings = DataReport(str(source)), Findings()
    tables = text_tables(opened, source, queries, documents)
    try:
        texts = _Texts(tables[0], sample), _Texts(tables[1], sample)
    except ValueError as error:
        findings.add("repeated_id", str(error))
        report.findings = findings.sorted()
        return report
    evaluation = _Evaluation(eval_data, eval_split)
    checker = _Checker(opened, texts, findings, report)
    if opened.query_ids or opened.document_ids:
        checker.mark_used()
    for text in texts:
        text.read_used(findings, normalized=len(evaluation.queries) > 0)
    checker.check(evaluation)
    checker.compare_rows(negatives)
    measure = _words if tokenizer is None else partial(_tokens, tokenizer)
    for name, text, prompt, length in (
        ("queries", texts[0], query_prompt, query_length),
        ("documents", texts[1], document_prompt, document_length),
    ):
        if text.sample:
            limit, unit = (None, "words") if tokenizer is None else (length, "tokens")
            lengths = Lengths.of(name, unit, list(measure([prompt + one for one in text.sample])), limit)
            report.lengths.append(lengths)
            if lengths.cut_share is not None and lengths.cut_share > CUT:
                place = f"{lengths.cut_share:.1%} of the {name} have more than {limit} tokens"
                findings.add("cut_texts", place, round(lengths.cut_share * lengths.sample))
    report.findings = findings.sorted()
    return report


@dataclass
class _Texts:
    """Queries or documents: of rows in a table, or as the tuples have them.

    `keys` and `normal_keys` are of the rows of the table, 0 where they are not used.
    """

    table: TextTable | None
    size: int

    def __post_init__(self) -> None:
        self.lookup = None if self.table is None else TextLookup(self.table)
        rows = 0 if self.lookup is None else len(self.lookup)
        self.used = np.zeros(rows, bool)
        self.keys = self.normal_keys = np.zeros(0, np.int64)
        self.sample: list[str] = []
        self._seen = 0
        self._random = random.Random(0)

    def read_used(self, findings: Findings, normalized: bool) -> None:
        """Read the texts of a table that tuples name, in their order."""
        if self.table is None:
            return
        self.keys = np.zeros(len(self.used), np.int64)
        self.normal_keys = np.zeros(len(self.used) if normalized else 0, np.int64)
        for start in range(0, len(self.used), TEXTS_AT_ONCE):
            rows = start + np.flatnonzero(self.used[start : start + TEXTS_AT_ONCE])
            texts = [text or "" for text in self.table.read_unchecked(rows)]
            for row, text in zip(rows, texts, strict=True):
                if not text.strip():
                    findings.add("empty_text", f"{self.table.id_of(int(row))!r} in {self.table.name}")
            self.draw(texts)
            self.keys[rows] = text_keys_of(texts)
            if normalized:
                self.normal_keys[rows] = text_keys_of(map(normalize, texts))
        own = self.keys[self.used]
        values, counts = np.unique(own, return_counts=True)
        if (counts > 1).any():
            first = np.flatnonzero(self.used)[np.isin(own, values[counts > 1])][:2]
            ids = " and ".join(repr(self.table.id_of(row)) for row in first)
            findings.add("same_text", f"{ids} in {self.table.name}", int((counts - 1).sum()))

    def draw(self, texts: Sequence[str]) -> None:
        """Take texts into the sample, each that was ever shown with the same probability."""
        for text in texts:
            self._seen += 1
            if len(self.sample) < self.size:
                self.sample.append(text)
            elif (place := self._random.randrange(self._seen)) < self.size:
                self.sample[place] = text

    def key(self, names: Sequence[str]) -> np.ndarray:
        """Keys of texts or of the texts of ids, int64 [names]; 0 where an id has none."""
        if self.lookup is None:
            return text_keys_of(names)
        rows = self.lookup.find(names)
        return np.where(rows < 0, 0, self.keys[rows])

    def both_keys(self, names: Sequence[str]) -> TextKeys:
        """`key` of texts as they are and after `normalize`."""
        if self.lookup is None:
            return TextKeys.of(names)
        rows = self.lookup.find(names)
        return TextKeys(*(np.where(rows < 0, 0, keys[rows]) for keys in (self.keys, self.normal_keys)))


class _Checker:
    """Reads the rows of a source and looks at them."""

    def __init__(
        self, opened: TupleSource, texts: tuple[_Texts, _Texts], findings: Findings, report: DataReport
    ) -> None:
        self.opened = opened
        self.queries, self.documents = texts
        self.findings = findings
        self.report = report
        self._rows: list[np.ndarray] = []  # a hash of each row
        self._negatives: list[np.ndarray] = []  # how many each row has, -1 of one without a positive
        self._pairs: list[np.ndarray] = []  # keys of a query and a positive

    def mark_used(self) -> None:
        """Find the texts of all ids that rows name."""
        for _, places, rows in self._chunks():
            for texts, listed in (
                (self.queries, [[row.query] for row in rows]),
                (self.documents, [[*row.positives, *row.negatives] for row in rows]),
            ):
                if texts.lookup is None:
                    continue
                names = [name for row in listed for name in row]
                found = texts.lookup.find(names) if names else np.empty(0, np.int64)
                texts.used[found[found >= 0]] = True
                owners = np.repeat(np.arange(len(rows)), [len(row) for row in listed])
                fault = "judged_document_missing" if self.opened.judged and texts is self.documents else "missing_id"
                for place in np.flatnonzero(found < 0):
                    self.findings.add(fault, f"{names[place]!r} at {places[owners[place]]}")

    def check(self, evaluation: _Evaluation) -> None:
        """Look at each row alone, and at the evaluation sets."""
        seen_queries, seen_documents = _Keys(), _Keys()
        scores = _Scores()
        for errors, places, rows in self._chunks():
            for place, error in errors:
                fault = error.fault if isinstance(error, RowError) else "malformed"
                self.findings.add(fault, f"{place}: {error}" if place not in str(error) else str(error))
            if not rows:
                continue
            own = self.queries.key([row.query for row in rows])
            listed = [document for row in rows for document in (*row.positives, *row.negatives)]
            keys = self.documents.key(listed)
            if self.queries.lookup is None:
                self.queries.draw([row.query for row in rows])
            if self.documents.lookup is None:
                self.documents.draw(listed)
            seen_queries.add(own)
            seen_documents.add(keys)
            evaluation.compare(rows, places, self.queries, self.documents, self.findings)
            self._check_rows(rows, places, own, keys.tolist())
            scores.add(rows, places, self.findings)
        scores.report(self.findings)
        self.report.queries, self.report.documents = len(seen_queries), len(seen_documents)
        self.report.teachers = scores.teachers

    def compare_rows(self, negatives: int | None) -> None:
        """Look at the rows of the same query, reading all again if there are any, and at what is left of each."""
        counts = np.concatenate([np.empty(0, np.int64), *self._negatives])
        hashes = np.concatenate([np.empty(0, np.int64), *self._rows])
        _, first = np.unique(hashes, return_index=True)
        repeated = np.setdiff1d(np.arange(len(hashes)), first)
        pairs = np.concatenate([np.empty((0, 2), np.int64), *self._pairs])
        ones = np.ones(len(pairs), np.int64)
        relevant = several_positives([(pairs[:, 0], pairs[:, 1], ones, ones)])
        again, number = set(repeated.tolist()), 0
        for _, places, rows in self._chunks() if again or relevant else ():
            own = self.queries.key([row.query for row in rows]).tolist() if rows else []
            for place, row, query in zip(places, rows, own, strict=True):
                if number in again:
                    self.findings.add("repeated_row", place)
                others = relevant.get(query)
                if others and row.negatives:
                    positives = set(self.documents.key(row.positives).tolist())
                    found = (others - positives) & set(self.documents.key(row.negatives).tolist())
                    if found:
                        self.findings.add("positive_elsewhere", place, len(found))
                        counts[number] -= len(found)
                number += 1
        if (counts >= 0).any():
            self._report_counts(counts[counts >= 0], negatives)

    def _chunks(self) -> Iterator[tuple[list[tuple[str, ValueError]], list[str], list[Candidates]]]:
        """Errors, places and candidates of some rows at a time."""
        rows = self.opened.rows()
        while part := list(islice(rows, ROWS_AT_ONCE)):
            good = [(place, row) for place, row in part if not isinstance(row, ValueError)]
            errors = [(place, row) for place, row in part if isinstance(row, ValueError)]
            yield errors, [place for place, _ in good], [row for _, row in good]

    def _check_rows(self, rows: Sequence[Candidates], places: Sequence[str], own: np.ndarray, keys: list[int]) -> None:
        counts, hashes, pairs, start = [], [], [], 0
        for row, place, query in zip(rows, places, own.tolist(), strict=True):
            middle = start + len(row.positives)
            stop = middle + len(row.negatives)
            positives = {key for key in keys[start:middle] if key}  # 0 has no text
            negatives, start = [key for key in keys[middle:stop] if key], stop
            different = set(negatives)
            among = len(different & positives)
            if among:
                self.findings.add("positive_among_negatives", place, among)
            if len(different) < len(negatives):
                self.findings.add("repeated_document", place, len(negatives) - len(different))
            counts.append(len(different) - among if row.positives else -1)
            if not row.positives:  # of pairs with labels
                self.findings.add("none_relevant", place)
            hashes.append(hash((query, frozenset(positives), frozenset(different))))
            pairs += [(query, positive) for positive in positives]
        self._negatives.append(np.array(counts, np.int64))
        self._rows.append(np.array(hashes, np.int64))
        self._pairs.append(np.array(pairs, np.int64).reshape(-1, 2))
        self.report.rows += len(rows)

    def _report_counts(self, counts: np.ndarray, negatives: int | None) -> None:
        median = int(np.median(counts))
        self.report.negatives = (int(counts.min()), median, int(counts.max()))
        usual = np.bincount(counts).argmax()
        if (counts != usual).any():
            place = f"{counts.min()} to {counts.max()} negatives, most have {usual}"
            self.findings.add("unequal_lists", place, int((counts != usual).sum()))
        if negatives is not None and (short := counts < negatives).any():
            place = f"{counts.min()} at the least, {negatives} are asked for"
            self.findings.add("few_negatives", place, int(short.sum()))


class _Keys:
    """Counts different keys."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._size = 0

    def add(self, keys: np.ndarray) -> None:
        self._parts.append(np.unique(keys))
        self._size += len(self._parts[-1])
        if len(self._parts) > 1 and self._size > 2 * len(self._parts[0]) + 1_000_000:
            self._merge()

    def __len__(self) -> int:
        self._merge()
        return int((self._parts[0] != 0).sum()) if self._parts else 0

    def _merge(self) -> None:
        if self._parts:
            self._parts = [np.unique(np.concatenate(self._parts))]
            self._size = len(self._parts[0])


@dataclass
class _TeacherScores:
    """Of the rows with negatives that one teacher has scored: how many there are, and how many are odd."""

    rows: int = 0
    reversed: int = 0  # the best positive is below the mean of the negatives
    constant: int = 0
    first_reversed: str = ""


class _Scores:
    """Looks at the order of each teacher's scores."""

    def __init__(self) -> None:
        self._found: dict[str, _TeacherScores] = {}

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers with scores."""
        return list(self._found)

    def add(self, rows: Sequence[Candidates], places: Sequence[str], findings: Findings) -> None:
        for row, place in zip(rows, places, strict=True):
            for teacher, scores in (row.scores or {}).items():
                found = self._found.setdefault(teacher, _TeacherScores())
                positives, negatives = scores[: len(row.positives)], scores[len(row.positives) :]
                if not negatives:
                    continue
                found.rows += 1
                best = max(positives)
                if best < sum(negatives) / len(negatives):
                    found.reversed += 1
                    found.first_reversed = found.first_reversed or place
                found.constant += max(scores) == min(scores)
                if best < max(negatives):
                    of_teacher = f" by {teacher}" if teacher else ""
                    findings.add("positive_below_negative", f"{place}: {best:g} and {max(negatives):g}{of_teacher}")

    def report(self, findings: Findings) -> None:
        """Say what most rows of a teacher are like."""
        for teacher, found in self._found.items():
            name = f"teacher {teacher or 'without a name'}"
            if found.rows and found.reversed > MOST * found.rows:
                findings.add("reversed_scores", f"{name}, first at {found.first_reversed}", found.reversed)
            if found.rows and found.constant == found.rows:
                findings.add("constant_scores", f"all {found.rows:,} rows of the {name}", found.constant)


class _Evaluation:
    """Queries and relevant documents of test collections, the latter with their titles and without."""

    def __init__(self, sources: Sequence[str | Path], split: str) -> None:
        found: dict[Task, tuple[list[str], list[str]]] = {"query": ([], []), "document": ([], [])}
        for source in sources:
            corpus, topics, qrels = beir_files(source, split)
            relevant = [(query, document) for _, query, document, grade in iter_qrels(qrels) if grade > 0]
            of_task: list[tuple[Task, Path, set[str]]] = [
                ("query", topics, {query for query, _ in relevant}),
                ("document", corpus, {document for _, document in relevant}),
            ]
            for task, file, ids in of_task:
                table = load_texts(source, file, task)
                names = sorted(ids)
                rows = TextLookup(table).find(names)
                known = [f"{name!r} of {source}" for name, row in zip(names, rows, strict=True) if row >= 0]
                texts, called = found[task]
                for with_title in (True, False) if task == "document" else (True,):
                    texts += [text or "" for text in table.read_unchecked(rows[rows >= 0], with_title)]
                    called += known
        self.queries, self.documents = (KnownTexts(TextKeys.of(texts), names) for texts, names in found.values())

    def compare(
        self,
        rows: Sequence[Candidates],
        places: Sequence[str],
        queries: _Texts,
        documents: _Texts,
        findings: Findings,
    ) -> None:
        """Look for the queries and positives of rows."""
        if not len(self.queries):
            return
        owners = [place for row, place in zip(rows, places, strict=True) for _ in row.positives]
        positives = [positive for row in rows for positive in row.positives]
        for texts, names, of, known, fault in (
            (queries, [row.query for row in rows], places, self.queries, "evaluation_query"),
            (documents, positives, owners, self.documents, "evaluation_document"),
        ):
            exact, normal = known.find(texts.both_keys(names))
            for number in np.flatnonzero(normal >= 0).tolist():
                but = "" if exact[number] >= 0 else " but for case, punctuation or spaces"
                one = int(exact[number] if exact[number] >= 0 else normal[number])
                findings.add(fault, f"{of[number]} is {known.names[one]}{but}")


def _words(texts: Sequence[str]) -> Iterator[int]:
    return (len(text.split()) for text in texts)


def _tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[int]:
    for start in range(0, len(texts), ROWS_AT_ONCE):
        ids = tokenizer(list(texts[start : start + ROWS_AT_ONCE]), verbose=False)["input_ids"]
        yield from map(len, ids)
