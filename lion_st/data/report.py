"""What a check of training data has found, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Severity: TypeAlias = Literal["error", "warning", "note"]
SHOWN_PLACES = 3


class Fault(NamedTuple):
    """A kind of finding: how bad it is, what it is and what to do about it."""

    severity: Severity
    what: str
    remedy: str


# An error is what `lion-st train` would refuse, or would train on and come to something else than is meant.
FAULTS = {
    "malformed": Fault("error", "rows cannot be read", "repair or remove them"),
    "empty_text": Fault("error", "rows have an empty query or document", "fill them in or remove them"),
    "no_positive": Fault("error", "rows have no positive", "remove them"),
    "unscored": Fault("error", "rows lack a teacher's scores that others have", "score them with `lion-st teach`"),
    "score_count": Fault("error", "rows have more or fewer scores than documents", "score them again"),
    "bad_score": Fault("error", "rows have a score that is not a finite number", "score them again"),
    "repeated_id": Fault("error", "an id is given to two texts or to none", "make ids unique"),
    "missing_id": Fault(
        "error", "ids have no text", "give the collection that the tuples were made from, or none where they hold texts"
    ),
    "few_negatives": Fault("error", "rows have fewer negatives than asked for", "lower --negatives, or --drop_short"),
    "reversed_scores": Fault(
        "error",
        "positives score below the mean of their negatives in most rows, as distances or labels in another order do",
        "negate the scores, or put each row's positive first",
    ),
    "constant_scores": Fault("error", "no row's scores differ, which teaches nothing", "score with another teacher"),
    "evaluation_query": Fault(
        "error",
        "training queries are queries of an evaluation set",
        "remove them from the training data, or evaluate on another set",
    ),
    "judged_document_missing": Fault("warning", "judged documents are not in the corpus and left out", "add them"),
    "none_relevant": Fault(
        "warning", "queries have no document that a label calls relevant and are left out", "label one, or nothing"
    ),
    "positive_among_negatives": Fault(
        "warning", "negatives have the text of a positive of their row and are left out", "mine negatives again"
    ),
    "positive_elsewhere": Fault(
        "warning",
        "negatives are a positive of the same query in another row and are left out",
        "put a query's positives into one row",
    ),
    "repeated_document": Fault("warning", "negatives repeat another one of their row and are left out", "nothing"),
    "repeated_row": Fault("warning", "rows repeat an earlier row's query and documents", "remove them, or weigh twice"),
    "positive_below_negative": Fault(
        "warning",
        "positives score below one of their negatives, which the teacher then calls the better",
        "look at some: those negatives are often relevant, see load_tuples' margins",
    ),
    "evaluation_document": Fault(
        "warning",
        "positives of training are relevant documents of an evaluation set",
        "say so beside the scores, or remove them",
    ),
    "cut_texts": Fault("warning", "texts of the sample are cut", "raise the length, or split the texts"),
    "same_text": Fault("note", "texts stand under more than one id", "nothing: they are compared by their texts"),
    "unequal_lists": Fault("note", "rows have another number of documents than most", "nothing, with --negatives"),
}
ORDER = ("error", "warning", "note")


@dataclass
class Finding:
    """Something that was found, how often, and where first.

    Attributes:
        fault: Its key in `FAULTS`.
        count: How many rows, ids or texts.
        places: The first places, with what stands there.
    """

    fault: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return FAULTS[self.fault].severity

    def describe(self) -> str:
        """The finding in a line."""
        _, what, remedy = FAULTS[self.fault]
        return f"{self.severity}: {self.count:,} {what} ({'; '.join(self.places)}). Remedy: {remedy}."


@dataclass(frozen=True)
class Lengths:
    """Lengths of a sample of texts.

    Attributes:
        texts: "queries" or "documents".
        unit: "tokens" or "words".
        sample: How many texts were measured.
        median: Half are no longer.
        p90: Nine in ten are no longer.
        p99: 99 in 100 are no longer.
        longest: The longest of the sample.
        histogram: How many have at most so many, doubling from 8 on; the last one's bound is the longest.
        limit: Where training cuts them, None if not measured in tokens.
        cut_share: Share that is longer than that, None if not measured in tokens.
    """

    texts: str
    unit: str
    sample: int
    median: int
    p90: int
    p99: int
    longest: int
    histogram: dict[int, int]
    limit: int | None
    cut_share: float | None

    @classmethod
    def of(cls, texts: str, unit: str, lengths: Sequence[int], limit: int | None) -> Lengths:
        """Summarize lengths, of which there is at least one."""
        found = np.asarray(lengths)
        median, p90, p99 = (int(np.quantile(found, share, method="higher")) for share in (0.5, 0.9, 0.99))
        longest = int(found.max())
        bounds = [8]
        while bounds[-1] < longest:
            bounds.append(min(2 * bounds[-1], longest))
        counts = np.bincount(np.searchsorted(bounds, found), minlength=len(bounds))
        histogram = dict(zip(bounds, counts.tolist(), strict=True))
        share = None if limit is None else float((found > limit).mean())
        return cls(texts, unit, len(found), median, p90, p99, longest, histogram, limit, share)

    def describe(self) -> str:
        """The lengths in two lines."""
        cut = "" if self.cut_share is None else f", {self.cut_share:.1%} longer than {self.limit}"
        head = (
            f"{self.texts}, {self.unit} of {self.sample:,}: median {self.median}, 90% up to {self.p90}, 99% up to "
            f"{self.p99}, longest {self.longest}{cut}"
        )
        bars = ", ".join(f"<= {bound}: {count / self.sample:.1%}" for bound, count in self.histogram.items())
        return f"{head}\n    {bars}"


@dataclass
class DataReport:
    """What a check of training data has found.

    Attributes:
        source: What was checked.
        rows: Rows that can be read.
        queries: Different texts of queries.
        documents: Different texts of documents that the rows name.
        negatives: Fewest, median and most negatives of a row that are left after repeats.
        teachers: Names of the teachers with scores; "" is one without a name.
        lengths: Of queries and documents.
        findings: The worst first.
    """

    source: str
    rows: int = 0
    queries: int = 0
    documents: int = 0
    negatives: tuple[int, int, int] = (0, 0, 0)
    teachers: list[str] = field(default_factory=list)
    lengths: list[Lengths] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def describe(self) -> str:
        """The report as lines of text."""
        fewest, median, most = self.negatives
        scored = [name or "one without a name" for name in self.teachers]
        head = (
            f"{self.source}: {self.rows:,} rows, {self.queries:,} queries, {self.documents:,} documents, {fewest} to "
            f"{most} negatives a row (median {median}), teachers: {', '.join(scored) or 'none'}"
        )
        found = [finding.describe() for finding in self.findings] or ["nothing found"]
        return "\n".join([head, *(lengths.describe() for lengths in self.lengths), *found])

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        lengths = [vars(one) | {"histogram": {str(k): n for k, n in one.histogram.items()}} for one in self.lengths]
        findings = [
            {"fault": one.fault, "severity": one.severity, "count": one.count, "places": one.places}
            | {"what": FAULTS[one.fault].what, "remedy": FAULTS[one.fault].remedy}
            for one in self.findings
        ]
        return vars(self) | {"lengths": lengths, "findings": findings, "is_sound": self.is_sound}


class Findings:
    """Collects findings, the first places of each."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def add(self, fault: str, place: str, count: int = 1) -> None:
        """Count a finding."""
        finding = self._found.setdefault(fault, Finding(fault))
        finding.count += count
        if len(finding.places) < SHOWN_PLACES:
            finding.places.append(place)

    def sorted(self) -> list[Finding]:
        """All findings, the worst first."""
        return sorted(self._found.values(), key=lambda finding: ORDER.index(finding.severity))
