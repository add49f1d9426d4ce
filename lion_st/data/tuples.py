"""Training tuples (query, positive, negatives, teacher scores) from every layout they are published in."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from lion_st.data.joining import join_tuples
from lion_st.data.lookup import TextTable
from lion_st.data.tables import open_tuples, text_tables
from lion_st.data.teachers import (
    COLUMN,
    Combination,
    Normalization,
    TeacherMixture,
    Teachers,
    choose_teachers,
    column_of,
    normalize_scores,
    require_combination,
    teachers_of,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Sampling: TypeAlias = Literal["random", "first"]
ROWS_AT_ONCE = 100_000  # of integers
CANDIDATES = {"query_name", "query_row", "documents", "keys", "positives"}  # columns of `join_tuples`
SHORTEST_LIST = 3  # of two scores only the sign of their difference is left


def load_tuples(
    source: str | Path,
    *,
    negatives: int | None = None,
    teacher_scores: bool = False,
    teachers: Teachers | None = None,
    combine: Combination = "zscore",
    teachers_apart: bool = False,
    teacher_normalization: Normalization = "none",
    split: str = "train",
    subset: str | None = None,
    queries: str | Path | None = None,
    documents: str | Path | None = None,
    sampling: Sampling = "random",
    ranks: tuple[int, int | None] = (0, None),
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    drop_short: bool = False,
    seed: int = 0,
) -> Dataset:
    """Load training tuples; ids become texts when a row is read.

    The layout is told by the columns. Every row and id is checked once, when the tuples are joined with the rows of
    their texts: the table of integers that this gives stays in the cache of `datasets` until a source, an option that
    it depends on or the version of lion_st changes. The first process that asks for it makes it, the others wait, and
    all share it memory-mapped. Texts are not copied but read from the memory-mapped collection when their batch is.
    Layouts that carry their texts are copied to the cache with them.

    | layout | columns |
    |---|---|
    | lightonai/ms-marco-en-bge, lion-quickstart | query_id, document_ids, scores; the best scored is the positive |
    | sentence-transformers/msmarco | query_id, positive_id, negative_id[, score]; query_id, doc_ids, labels |
    | mined by sentence-transformers, ids or texts | query, positive, negative or negative_1 ... negative_n[, label] |
    | the same as labeled pairs, or lists | query, positive, label (0 or 1), or lists of the latter two or of scores |
    | sentence-transformers/msmarco-hard-negatives | qid, pos, neg (a list for each system) |
    | Tevatron/msmarco-passage | query, positive_passages, negative_passages or lists of document ids |
    | Tevatron's form with scores inside, as a reranker leaves them | the same, each passage with score or scores |
    | hotchpotch/mmarco-hard-negatives-reranker-score | qid, pos, neg, pos.score, neg.score |
    | `lion-st mine`, `lion-st teach` | query_id, positive_document_ids, negative_document_ids[, scores (by teacher)] |
    | the paper's contrastive and KL files | question, pos_pid, neg_pids[, pos_score, neg_scores] |
    | the paper's MarginMSE file | query, docids, scores; the first is positive |
    | JSONL pairs and lists | query, pos[, neg, pos_scores, neg_scores or scores (by teacher)] |
    | pairs | query, question or sentence1 with answer, answers (DPR), passage, document or sentence2; or of ids |
    | tuples | the same with negative_1 ... negative_n[, label]; or with negative or negatives, a text or a list |
    | pairs with scores | the same with score, a row each; or with label, of whole numbers, where 0 is not relevant |
    | judgements of the Hub's BEIR sets | query-id, corpus-id, score, of whole numbers, where 0 is not relevant |
    | BEIR folder | pairs from qrels/<split>.tsv |

    Negatives that are positives of their own query, also in another row of it, or whose text repeats that of a positive
    or of another negative, also under another id, are left out; so are queries without a positive, and in BEIR folders
    pairs whose document the corpus lacks. A warning says how many.

    Args:
        source: Hub data set ("owner/name", "owner/name:subset", "hf://owner/name/subset"), local copy of one, folder of
            `Dataset.save_to_disk`, BEIR folder, or file: `.jsonl`, `.tsv` or `.csv` (with a header; without one a .tsv
            holds DPR's questions and answers), also `.gz`, `.bz2`, `.xz` or `.zst`; `.parquet`.
        negatives: Negatives of each tuple; None takes all, of which every row must then have equally many.
        teacher_scores: Whether to add the column `label`, a list of 1 + negatives scores, the positive's first. Where
            only the margin of a triplet is published, it reads [margin, 0].
        teachers: Of data with the scores of several, the teachers to learn from: names, or weights by name.
        combine: How several become one, see `lion_st.data.teachers.TeacherMixture`. With "separate", `label` has a
            list for each of them.
        teachers_apart: Have lists for each of several with other rules too, after the rule's transformation.
        teacher_normalization: What `label` holds of the teacher's scores, or of what the teachers were combined to:
            "none", the scores as they are; "zscore",
            less their mean and over their standard deviation; "minmax", from 0 for the lowest to 1 for the highest.
            Both are over all scores of the row's query, those of documents that are not drawn included. A list of
            equal scores becomes zeros.
        split: Split of the data set; slices such as "train[:1%]" work where `datasets` reads the source.
        subset: Configuration of the data set, or name of a JSONL file in it; by default the first present of train,
            labeled-list, bert-ensemble-margin-mse, triplets, else the only one.
        queries: Where the texts of query ids are, if not in the source: a file, a folder, or a data set, as in
            "sentence-transformers/msmarco-corpus:query"; the forms are those of `read_corpus`. What could be ids or
            texts, as `query` or `pos`, are then ids; integers always are.
        documents: The same for document ids.
        sampling: "random" draws negatives (and one positive, where there are several) anew in every epoch, see
            `set_epoch`; "first" takes them in the published order.
        ranks: Negatives are taken from these ranks of the published order, [start, stop).
        absolute_margin: Keep negatives whose teacher score is at least this far below the positive's.
        relative_margin: Keep negatives whose teacher score is at most (1 - this) times the positive's.
        drop_short: Whether to leave out rows with too few negatives instead of raising.
        seed: Seed of the sampling. A row's sample depends on the seed, the epoch and its query alone, so that a resumed
            run sees what an uninterrupted one sees.

    Returns:
        A dataset whose rows read as `query`, `positive`, `negative_1` ... `negative_n`[, `label`]. They are made as
        they are read: `filter`, `shuffle` and `select` work as ever; for `map`, copy the rows first, with
        `Dataset.from_list(list(tuples))`.

    Raises:
        FileNotFoundError: If a local source does not exist.
        ValueError: If the layout is unknown, a line is malformed, an id is unknown or repeated, a text is empty, a
            teacher score is missing or not finite, a list has fewer than three scores to normalize, or rows have too
            few negatives or unequally many.

    Warns:
        UserWarning: If something was left out.

    Example:
        >>> tuples = load_tuples("lion-st/lion-quickstart", negatives=4, teacher_scores=True)
        >>> list(tuples[0])
        ['query', 'positive', 'negative_1', 'negative_2', 'negative_3', 'negative_4', 'label']
    """
    if negatives is not None and negatives < 0:
        raise ValueError(f"negatives is {negatives}: give 0 or more, or None for all.")
    require_ranks(ranks)
    if teacher_normalization not in get_args(Normalization):
        raise ValueError(
            f"teacher_normalization is {teacher_normalization!r}: choose one of {', '.join(get_args(Normalization))}."
        )
    require_combination(combine)
    if teachers_apart and combine == "random":
        raise ValueError("combine='random' draws one teacher, so that teachers_apart has no others: leave one out.")
    if sampling not in ("random", "first"):
        raise ValueError(f"sampling is {sampling!r}: choose 'random' or 'first'.")
    opened = open_tuples(source, subset, split, queries, documents)
    query_texts, document_texts = text_tables(opened, source, queries, documents)
    reader = TupleReader(
        queries=query_texts,
        documents=document_texts,
        negatives=negatives,
        scored=teacher_scores,
        normalization=teacher_normalization,
        sampling=sampling,
        ranks=ranks,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        seed=seed,
    )
    table = join_tuples(opened, reader.queries, reader.documents)
    if teacher_scores or reader.has_margins:
        table = _with_teachers(table, reader, str(source), teachers, combine, teachers_apart)
    return reader.check(table, str(source), drop_short).with_transform(reader)


def require_ranks(ranks: tuple[int, int | None]) -> None:
    """Refuse ranks to take negatives from that are not [start, stop)."""
    start, stop = ranks
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"ranks are [start, stop) with 0 <= start < stop, got {start} and {stop}.")


def _with_teachers(
    table: Dataset, reader: TupleReader, source: str, wanted: Teachers | None, combine: Combination, apart: bool
) -> Dataset:
    """The table with the scores that were asked for alone; those of one teacher are called `COLUMN`."""
    present = teachers_of(table.column_names)
    if not present:
        raise ValueError(
            f"{source} has no teacher scores: score it with `lion-st teach`, choose a subset or file that has them, or "
            "train with the contrastive objective alone and without margins."
        )
    weights = choose_teachers(source, present, wanted)
    table = table.remove_columns([column_of(name) for name in present if name not in weights])
    if len(weights) == 1:
        (name,) = weights
        return table.rename_column(column_of(name), COLUMN) if name else table
    if reader.has_margins:
        raise ValueError(f"Margins are those of one teacher's scores, and there are {', '.join(weights)}: name one.")
    reader.mixture = TeacherMixture(weights, combine, apart)
    return table


def set_epoch(tuples: Dataset, epoch: int) -> None:
    """Draw the negatives of `load_tuples(..., sampling="random")` as in this epoch, from 0."""
    reader = reader_of(tuples)
    if reader is None:
        raise ValueError("These tuples do not come from load_tuples (or were converted since): they have no epochs.")
    reader.epoch = epoch


def reader_of(tuples: Dataset) -> TupleReader | None:
    """The reader of tuples of `load_tuples`, None of other data sets.

    Found too behind the column of names that sentence-transformers' trainer adds to several sources with prompts.
    """
    transform = tuples.format["format_kwargs"].get("transform")
    while isinstance(transform, partial):
        transform = transform.keywords.get("transform")
    return transform if isinstance(transform, TupleReader) else None


@dataclass
class TupleReader:
    """Turns a batch of candidates into columns of texts; the transform of `load_tuples`."""

    queries: TextTable | None
    documents: TextTable | None
    negatives: int | None
    scored: bool
    normalization: Normalization
    sampling: Sampling
    ranks: tuple[int, int | None]
    absolute_margin: float | None
    relative_margin: float | None
    seed: int
    epoch: int = 0
    mixture: TeacherMixture | None = None  # of several teachers

    def __deepcopy__(self, memo: dict[int, Any]) -> TupleReader:
        """The same reader: views of a dataset share the texts and the epoch."""
        return self

    @property
    def has_margins(self) -> bool:
        """Whether teacher scores decide on which negatives there are."""
        return self.absolute_margin is not None or self.relative_margin is not None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of candidates."""
        made = [name for name in batch if name in ("query", "positive", "label") or name.startswith("negative_")]
        if made or not batch.keys() >= CANDIDATES:
            raise ValueError(
                "Rows of load_tuples are made as they are read, so that map, select_columns and rename_column do not "
                "change them: copy them first, with Dataset.from_list(list(tuples))."
            )
        chosen = self._choose_all(batch)
        documents = [row[place] for row, places in zip(batch["documents"], chosen, strict=True) for place in places]
        if self.documents is not None:
            documents = self.documents.read(documents)
        columns = {"query": batch["query_name"] if self.queries is None else self.queries.read(batch["query_row"])}
        width = len(chosen[0]) if chosen else 0
        for position in range(width):
            columns["positive" if position == 0 else f"negative_{position}"] = documents[position::width]
        if self.scored:
            columns["label"] = self._labels(batch, chosen)
        return columns

    def labels(self, batch: dict[str, list[Any]]) -> list[list[Any]]:
        """The teacher's scores of each row in this epoch, as the column `label` has them."""
        return self._labels(batch, self._choose_all(batch)) if self.scored else [[] for _ in batch["query_name"]]

    def _labels(self, batch: dict[str, list[Any]], chosen: list[list[int]]) -> list[list[Any]]:
        if self.mixture is None:
            return list(map(self._label, batch[COLUMN], chosen))
        by_teacher = zip(*(batch[name] for name in self.mixture.columns), strict=True)
        draws = (f"{self.seed} {self.epoch} {query} teacher" for query in batch["query_name"])
        combined = map(self.mixture.combine, by_teacher, draws)
        if not self.mixture.is_nested:
            return list(map(self._label, combined, chosen))
        return [[self._label(row, places) for row in rows] for rows, places in zip(combined, chosen, strict=True)]

    def _label(self, scores: Sequence[float], places: list[int]) -> list[float]:
        normalized = normalize_scores(scores, self.normalization)
        return [normalized[place] for place in places]

    def keys(self, table: pa.Table) -> np.ndarray:
        """What of rows is the same text in this epoch, without reading one.

        Args:
            table: Candidates.

        Returns:
            int64 [rows, 2 + negatives], see `text_keys_of`: of each query, of the positive and of the negatives, the
            latter in any order.
        """
        assert self.negatives is not None
        queries = table["query_key"].to_numpy()[:, None]
        lists = table["keys"].combine_chunks()
        keys, lengths = lists.flatten().to_numpy(), lists.value_lengths().to_numpy()
        starts = np.cumsum(lengths) - lengths
        if not self.has_margins and (self._counts(table) == self.negatives).all() and _one_positive(table):
            # All negatives of the ranks are drawn, in whatever order.
            places = np.r_[0, 1 + self.ranks[0] + np.arange(self.negatives)][None]
        else:
            names = [name for name in table.column_names if name not in ("documents", "query_key")]
            batch = table.select(names).to_pydict()
            places = np.array(self._choose_all(batch))
        return np.hstack([queries, keys[starts[:, None] + places]])

    def check(self, table: Dataset, source: str, drop_short: bool) -> Dataset:
        """Settle the number of negatives and drop or refuse rows that have too few."""
        parts = table.with_format("arrow").select_columns(_columns_of_counts(table)).iter(ROWS_AT_ONCE)
        counts = np.concatenate([np.empty(0, np.int64), *map(self._counts, parts)])
        if not len(counts):
            raise ValueError(f"{source} has no rows.")
        rule = self.normalization if self.mixture is None else self.mixture.rule
        if self.scored and ("zscore" in (rule, self.normalization) or "minmax" in (rule, self.normalization)):
            self._require_lists(table, source)
        if self.negatives is None:
            self.negatives = int(counts.max())
        if self.negatives and self.ranks[0] == 0 and not self.has_margins and not counts.any():
            raise ValueError(
                f"{source} has no negatives, {self.negatives} are needed: train on those of the batch with "
                "--objective cl --negatives 0, or mine some, as in docs/train.md."
            )
        short = np.flatnonzero(counts < self.negatives)
        if not len(short):
            return table
        if len(short) == len(counts) or not drop_short:
            raise ValueError(
                f"Row {short[0]} of {source} has {counts[short[0]]} negatives to choose from, {self.negatives} are "
                f"needed ({len(short):,} of {len(counts):,} rows have too few): ask for fewer, widen the ranks or "
                "margins, or leave these rows out with drop_short=True."
            )
        what = f"{len(short):,} of {len(counts):,} rows, which have fewer than {self.negatives} negatives"
        warnings.warn(f"{source}: left out {what} to choose from.", stacklevel=3)
        return table.select(np.flatnonzero(counts >= self.negatives))

    def _require_lists(self, table: Dataset, source: str) -> None:
        import pyarrow.compute as pc

        lengths = pc.list_value_length(table.with_format("arrow")[:]["keys"]).to_numpy()
        if lengths.min() < SHORTEST_LIST:
            setting, other = f"teacher_normalization={self.normalization!r}", "'none'"
            if self.normalization == "none" and self.mixture is not None:
                setting, other = f"combine={self.mixture.rule!r}", "'weighted'"
            raise ValueError(
                f"Row {lengths.argmin()} of {source} has {lengths.min()} teacher scores, of which "
                f"{setting} would leave no more than which is higher; it needs {SHORTEST_LIST}. Take {other}, and "
                "teacher_temperature for their scale."
            )

    def _counts(self, table: pa.Table) -> np.ndarray:
        """Number of negatives that ranks and margins leave of each row, [rows]."""
        lists = table["keys"].combine_chunks()
        lengths, positives = lists.value_lengths().to_numpy(), table["positives"].to_numpy()
        start, stop = self.ranks
        if not self.has_margins:
            there = lengths - positives
            return np.maximum(0, (there if stop is None else np.minimum(there, stop)) - start).astype(np.int64)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        ranks = np.arange(len(rows)) - np.repeat(
            np.cumsum(lengths) - lengths + positives, lengths
        )  # negative: positives
        scores = table["teacher_scores"].combine_chunks().flatten().to_numpy().astype(np.float64)
        least = np.full(len(lengths), np.inf)
        np.minimum.at(least, rows[ranks < 0], scores[ranks < 0])
        margins = np.maximum(self.absolute_margin or 0.0, (self.relative_margin or 0.0) * np.abs(least))
        kept = (ranks >= start) & (scores <= (least - margins)[rows])
        if stop is not None:
            kept &= ranks < stop
        return np.bincount(rows[kept], minlength=len(lengths))

    def _choose_all(self, batch: dict[str, list[Any]]) -> list[list[int]]:
        """Places among the documents of each row: of a positive and of the negatives drawn."""
        scores = batch["teacher_scores"] if self.has_margins else [None] * len(batch["query_name"])
        rows = zip(batch["query_name"], batch["positives"], map(len, batch["keys"]), scores, strict=True)
        return [self._choose(*row) for row in rows]

    def _choose(self, query: str, positives: int, documents: int, scores: list[float] | None) -> list[int]:
        assert self.negatives is not None
        pool = self._pool(positives, documents - positives, scores)
        if self.sampling == "first":
            return [0, *(positives + place for place in pool[: self.negatives])]
        generator = random.Random(f"{self.seed} {self.epoch} {query}")
        positive = generator.randrange(positives)
        return [positive, *(positives + place for place in generator.sample(pool, self.negatives))]

    def _pool(self, positives: int, negatives: int, scores: list[float] | None) -> Sequence[int]:
        """Places among the negatives that ranks and margins leave, in the published order."""
        pool: Sequence[int] = range(*slice(*self.ranks).indices(negatives))
        if scores is None:
            return pool
        positive = min(scores[:positives])
        margin = max(self.absolute_margin or 0.0, (self.relative_margin or 0.0) * abs(positive))
        return [place for place in pool if scores[positives + place] <= positive - margin]


def _one_positive(table: pa.Table) -> bool:
    return bool((table["positives"].to_numpy() == 1).all())


def _columns_of_counts(table: Dataset) -> list[str]:
    return [name for name in ("keys", "positives", "teacher_scores") if name in table.column_names]
