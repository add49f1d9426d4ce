"""Training tuples (query, positive, negatives, teacher scores) from every layout they are published in."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lion_st.data.lookup import TextLookup
from lion_st.data.tables import (
    drop_equal_texts,
    drop_relevant_negatives,
    is_beir,
    keep_known_pairs,
    load_candidates,
    load_lookup,
)

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

Sampling: TypeAlias = Literal["random", "first"]
Normalization: TypeAlias = Literal["none", "zscore", "minmax"]
SHORTEST_LIST = 3  # of two scores only the sign of their difference is left


def load_tuples(
    source: str | Path,
    *,
    negatives: int | None = None,
    teacher_scores: bool = False,
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

    The layout is told by the columns. Ids with their scores are converted once to a common table in the cache of
    `datasets`, which checks every row; texts are not copied but looked up row by row in the memory-mapped collection
    (`TextLookup`). Layouts that carry their texts are copied to the cache with them.

    | layout | columns |
    |---|---|
    | lightonai/ms-marco-en-bge, lion-quickstart | query_id, document_ids, scores; the best scored is the positive |
    | sentence-transformers/msmarco | query_id, positive_id, negative_id[, score]; query_id, doc_ids, labels |
    | mined by sentence-transformers, ids or texts | query, positive, negative or negative_1 ... negative_n[, label] |
    | sentence-transformers/msmarco-hard-negatives | qid, pos, neg (a list for each system) |
    | Tevatron/msmarco-passage | query, positive_passages, negative_passages or lists of document ids |
    | the paper's contrastive and KL files | question, pos_pid, neg_pids[, pos_score, neg_scores] |
    | the paper's MarginMSE file | query, docids, scores; the first is positive |
    | JSONL pairs and lists | query, pos[, neg, pos_scores, neg_scores] |
    | pairs | query, question or sentence1 with answer, answers (DPR), passage, document or sentence2; or of ids |
    | pairs with scores | the same with score or label, a row each; of labels 0 and 1, the 1 are positives |
    | BEIR folder | pairs from qrels/<split>.tsv |

    Negatives that are positives of their own query, also in another row of it, or whose text repeats that of a positive
    or of another negative, also under another id, are left out; so are queries without a positive, and in BEIR folders
    pairs whose document the corpus lacks. A warning says how many.

    Args:
        source: Hub data set ("owner/name", "owner/name:subset", "hf://owner/name/subset"), local copy of one, BEIR
            folder, or file: `.jsonl`, `.tsv` or `.csv` (with a header; without one a .tsv holds DPR's questions and
            answers), also `.gz`, `.bz2`, `.xz` or `.zst`; `.parquet`.
        negatives: Negatives of each tuple; None takes all, of which every row must then have equally many.
        teacher_scores: Whether to add the column `label`, a list of 1 + negatives scores, the positive's first. Where
            only the margin of a triplet is published, it reads [margin, 0].
        teacher_normalization: What `label` holds of the teacher's scores: "none", the scores as they are; "zscore",
            less their mean and over their standard deviation; "minmax", from 0 for the lowest to 1 for the highest.
            Both are over all scores of the row's query, those of documents that are not drawn included. A list of
            equal scores becomes zeros.
        split: Split of the data set; slices such as "train[:1%]" work where `datasets` reads the source.
        subset: Configuration of the data set, or name of a JSONL file in it; by default the first present of train,
            labeled-list, bert-ensemble-margin-mse, triplets, else the only one.
        queries: Where the texts of query ids are, if not in the source: a file, a folder, or a data set, as in
            "sentence-transformers/msmarco-corpus:query"; the forms are those of `read_corpus`.
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
        A dataset whose rows read as `query`, `positive`, `negative_1` ... `negative_n`[, `label`].

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
    if teacher_normalization not in get_args(Normalization):
        raise ValueError(
            f"teacher_normalization is {teacher_normalization!r}: choose one of {', '.join(get_args(Normalization))}."
        )
    if sampling not in ("random", "first"):
        raise ValueError(f"sampling is {sampling!r}: choose 'random' or 'first'.")
    table, query_ids, document_ids = load_candidates(
        source, subset, split, queries_given=queries is not None, documents_given=documents is not None
    )
    query_lookup = load_lookup(source, queries, "query") if query_ids else None
    document_lookup = load_lookup(source, documents, "document") if document_ids else None
    margins = absolute_margin is not None or relative_margin is not None
    if (teacher_scores or margins) and "teacher_scores" not in table.column_names:
        raise ValueError(
            f"{source} has no teacher scores: choose a subset or file that has them, or train with the contrastive "
            "objective alone and without margins."
        )
    reader = TupleReader(
        query_lookup,
        document_lookup,
        negatives,
        teacher_scores,
        teacher_normalization,
        sampling,
        ranks,
        absolute_margin,
        relative_margin,
        seed,
    )
    if query_lookup is not None:
        query_lookup.rows(_unique_values(table, "query"))
    if document_lookup is not None:
        if is_beir(source, subset):
            table = keep_known_pairs(table, document_lookup, str(source))
        ids = list(dict.fromkeys([*_unique_values(table, "positives"), *_unique_values(table, "negatives")]))
        document_lookup.rows(ids)
        reader.equals = document_lookup.first_of_equals(ids)
        table = drop_equal_texts(table, reader.equals, str(source))
    table = drop_relevant_negatives(table, reader.equals, str(source))
    table = reader.check(table, str(source), drop_short)
    return table.with_transform(reader)


def set_epoch(tuples: Dataset, epoch: int) -> None:
    """Draw the negatives of `load_tuples(..., sampling="random")` as in this epoch, from 0."""
    reader = tuples.format["format_kwargs"].get("transform")
    if not isinstance(reader, TupleReader):
        raise ValueError("These tuples do not come from load_tuples (or were converted since): they have no epochs.")
    reader.epoch = epoch


@dataclass
class TupleReader:
    """Turns a batch of candidates into columns of texts; the transform of `load_tuples`."""

    queries: TextLookup | None
    documents: TextLookup | None
    negatives: int | None
    scored: bool
    normalization: Normalization
    sampling: Sampling
    ranks: tuple[int, int | None]
    absolute_margin: float | None
    relative_margin: float | None
    seed: int
    epoch: int = 0
    equals: dict[str, str] = field(default_factory=dict)  # ids of documents -> another id with the same text

    def __deepcopy__(self, memo: dict[int, Any]) -> TupleReader:
        """The same reader: views of a dataset share the lookups and the epoch."""
        return self

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Read a batch of candidates."""
        drawn = self._drawn(batch)
        width = 1 + (self.negatives or 0)
        documents = [document for row in drawn for document in row[0]]
        if self.documents is not None:
            documents = self.documents.texts(documents)
        columns = {"query": batch["query"] if self.queries is None else self.queries.texts(batch["query"])}
        for position in range(width):
            columns["positive" if position == 0 else f"negative_{position}"] = documents[position::width]
        if self.scored:
            columns["label"] = [scores for _, scores in drawn]
        return columns

    def _drawn(self, batch: dict[str, list[Any]]) -> list[tuple[list[str], list[float]]]:
        """The documents of each row in this epoch, the positive first, and the teacher's scores of them."""
        columns = [batch["query"], batch["positives"], batch["negatives"]]
        scores = batch.get("teacher_scores") or [None] * len(batch["query"])
        drawn = []
        for query, positives, negatives, of_row in zip(*columns, scores, strict=True):
            places = self._draw(query, len(positives), len(negatives), of_row)
            documents = [*positives, *negatives]
            labels = normalize_scores(of_row, self.normalization) if self.scored else []
            drawn.append(([documents[place] for place in places], [labels[place] for place in places if self.scored]))
        return drawn

    def labels(self, batch: dict[str, list[Any]]) -> list[list[float]]:
        """The teacher's scores of each row in this epoch, as the column `label` has them."""
        return [labels for _, labels in self._drawn(batch)]

    def keys(self, batch: dict[str, list[Any]]) -> list[tuple[str, list[str], list[str]]]:
        """What tells the texts of rows apart, without reading those of documents known by id.

        Args:
            batch: Candidates, as the table holds them.

        Returns:
            For each row the query's text, a key of each document that `__call__` reads in this epoch, and of each
            positive.
        """
        queries = batch["query"] if self.queries is None else self.queries.texts(batch["query"])
        return [
            (query.strip(), self.document_keys(documents), self.document_keys(positives))
            for query, (documents, _), positives in zip(queries, self._drawn(batch), batch["positives"], strict=True)
        ]

    def document_keys(self, documents: Iterable[str]) -> list[str]:
        """A key of each document: equal where the texts are."""
        if self.documents is None:
            return [document.strip() for document in documents]
        return [f"\0{self.equals.get(document, document)}" for document in documents]  # no text begins so

    def check(self, table: Dataset, source: str, drop_short: bool) -> Dataset:
        """Settle the number of negatives and drop or refuse rows that have too few."""
        import numpy as np

        counts = self._available(table)
        if not len(counts):
            raise ValueError(f"{source} has no rows.")
        if self.scored and self.normalization != "none":
            self._require_lists(table, source)
        if self.negatives is None:
            self.negatives = int(counts.max())
        plain = self.ranks[0] == 0 and self.absolute_margin is None and self.relative_margin is None
        if self.negatives and plain and not counts.any():
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
        return table.select(np.flatnonzero(counts >= self.negatives))

    def _require_lists(self, table: Dataset, source: str) -> None:
        import pyarrow.compute as pc

        lengths = pc.list_value_length(table.with_format("arrow")[:]["teacher_scores"]).to_numpy()
        if lengths.min() < SHORTEST_LIST:
            raise ValueError(
                f"Row {lengths.argmin()} of {source} has {lengths.min()} teacher scores, of which "
                f"teacher_normalization={self.normalization!r} would leave no more than which is higher; it needs "
                f"{SHORTEST_LIST}. Take 'none', and teacher_temperature for their scale."
            )

    def _available(self, table: Dataset) -> np.ndarray:
        """Number of negatives that ranks and margins leave of each row, [rows]."""
        import numpy as np
        import pyarrow.compute as pc

        if self.absolute_margin is None and self.relative_margin is None:
            lengths = pc.list_value_length(table.with_format("arrow")[:]["negatives"]).to_numpy()
            start, stop = self.ranks
            return np.maximum(0, lengths.clip(max=stop) - start)
        return np.asarray(
            [
                len(self._pool(len(positives), len(negatives), scores))
                for batch in table.iter(10_000)
                for positives, negatives, scores in zip(
                    batch["positives"], batch["negatives"], batch["teacher_scores"], strict=True
                )
            ]
        )

    def _pool(self, positives: int, negatives: int, scores: list[float] | None) -> Sequence[int]:
        """Places among the negatives that ranks and margins leave, in the published order."""
        pool: Sequence[int] = range(*slice(*self.ranks).indices(negatives))
        if scores is None or (self.absolute_margin is None and self.relative_margin is None):
            return pool
        positive = min(scores[:positives])
        margin = max(self.absolute_margin or 0.0, (self.relative_margin or 0.0) * abs(positive))
        return [place for place in pool if scores[positives + place] <= positive - margin]

    def _draw(self, query: str, positives: int, negatives: int, scores: list[float] | None) -> list[int]:
        """Places of this epoch's positive and negatives among the positives and then the negatives of a row."""
        assert self.negatives is not None
        pool = self._pool(positives, negatives, scores)
        if self.sampling == "random":
            generator = random.Random(f"{self.seed} {self.epoch} {query}")
            positive = generator.randrange(positives)
            pool = generator.sample(pool, self.negatives)
        else:
            positive, pool = 0, pool[: self.negatives]
        return [positive, *(positives + place for place in pool)]


def normalize_scores(scores: Sequence[float], normalization: Normalization) -> list[float]:
    """The teacher's scores of a query's documents, brought to the same scale for all queries.

    Example:
        >>> normalize_scores([4.0, 1.0, 2.5], "minmax")
        [1.0, 0.0, 0.5]
    """
    if normalization == "none":
        return list(scores)
    if normalization == "minmax":
        zero, one = min(scores), max(scores) - min(scores)
    else:
        zero = sum(scores) / len(scores)
        one = math.sqrt(sum((score - zero) ** 2 for score in scores) / len(scores))
    return [(score - zero) / one if one else 0.0 for score in scores]


def _unique_values(table: Dataset, column: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_list(values.type):
        values = pc.list_flatten(values)
    return pc.unique(values).to_pylist()
