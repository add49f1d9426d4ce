"""A share of the training data held out, to be searched while the rest trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lion_st.data.lookup import TextTable, text_keys_of
from lion_st.data.overlap import normalize
from lion_st.data.tuples import TupleReader, reader_of

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 10_000  # of integers
TEXTS_AT_ONCE = 1000  # rows with their texts, whose bytes Arrow counts to 2 GiB
COLUMNS = ["query_key", "keys", "positives"]
TEXT_COLUMNS = [*COLUMNS, "query_name", "query_row", "documents"]


@dataclass(frozen=True)
class HeldOut:
    """Queries that were held out, and the documents to search for them; ids are keys of the normalized texts.

    Attributes:
        corpus: Text of each document: positives of the queries and as many of their negatives as training draws.
        queries: Text of each query.
        relevant: Ids of the positives of each query.
        left_out: Further rows that are not trained on, since one of their documents is a positive of a held-out query.
        has_prompts: Whether the texts begin with the prompts of their sources.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, set[str]]
    left_out: int
    has_prompts: bool = False


def hold_out(
    sources: Mapping[str, Dataset],
    share: float,
    seed: int = 0,
    prompts: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[dict[str, Dataset], HeldOut]:
    """Split training tuples into what trains and what is held out.

    Of what trains, no row has the text of a held-out query, nor names a document with the text of one of its positives,
    be it as a positive or as a negative, in any of the sources and under any id, nor such a text in another case,
    punctuation or spacing (`normalize`). Negatives of held-out queries may be documents of training.

    Args:
        sources: Tuples of `load_tuples`, by name.
        share: Share of each source's queries to hold out, above 0 and below 1; at least one query.
        seed: Seed of the choice, which does not depend on the order of the rows.
        prompts: What is put in front of each source's held-out texts, of `"query"` and of `"document"`. A text with two
            prompts is held out twice.

    Returns:
        The tuples that train, by name, and what is held out.

    Raises:
        ValueError: If the share is out of range, the tuples are not of `load_tuples`, or nothing is left to train on.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share to hold out is {share}: give one above 0 and below 1.")
    readers = {name: _reader(tuples, name) for name, tuples in sources.items()}
    normal = _NormalKeys()
    for name, tuples in sources.items():
        normal.read(tuples, readers[name])
    chosen = np.concatenate([_choose(tuples, normal, share, seed) for tuples in sources.values()])
    relevant = np.unique(np.concatenate([_positives(tuples, normal, chosen) for tuples in sources.values()]))
    held = HeldOut({}, {}, {}, 0)
    training, left_out = {}, 0
    for name, tuples in sources.items():
        own, touched = _rows(tuples, normal, chosen, relevant)
        _add(held, tuples, readers[name], normal, np.flatnonzero(own), (prompts or {}).get(name, {}))
        rows = np.flatnonzero(~(own | touched))
        if not len(rows):
            raise ValueError(
                f"Holding out a share of {share} leaves no row of {name} that shares no query or positive with what "
                "is held out. Give a smaller share, or another test collection."
            )
        left_out += int((touched & ~own).sum())
        training[name] = tuples.select(rows)
    return training, HeldOut(held.corpus, held.queries, held.relevant, left_out, prompts is not None)


def _reader(tuples: Dataset, name: str) -> TupleReader:
    reader = reader_of(tuples)
    if reader is None:
        raise ValueError(f"{name} does not come from load_tuples (or was converted since): it cannot be split here.")
    return reader


class _NormalKeys:
    """Keys of normalized texts by those of the texts as they are, 16 bytes a text; each text is read once."""

    def __init__(self) -> None:
        self._exact = np.empty(0, np.int64)
        self._normal = np.empty(0, np.int64)

    def __call__(self, keys: np.ndarray | int) -> np.ndarray:
        """The keys of the normalized texts, of texts that were read."""
        return self._normal[np.searchsorted(self._exact, keys)]

    def read(self, tuples: Dataset, reader: TupleReader) -> None:
        """Read all texts of tuples."""
        rows_at_once = TEXTS_AT_ONCE if reader.documents is None else ROWS_AT_ONCE
        for part in tuples.with_format("arrow").select_columns(TEXT_COLUMNS).iter(rows_at_once):
            queries = part["query_name"] if reader.queries is None else part["query_row"]
            self._read(part["query_key"].to_numpy(), queries, reader.queries)
            keys, documents = (part[name].combine_chunks().flatten() for name in ("keys", "documents"))
            self._read(keys.to_numpy(), documents, reader.documents)

    def _read(self, keys: np.ndarray, texts: Any, table: TextTable | None) -> None:
        keys, first = np.unique(keys, return_index=True)
        places = np.searchsorted(self._exact, keys)
        is_known = places < len(self._exact)
        is_known[is_known] = self._exact[places[is_known]] == keys[is_known]
        new = ~is_known
        found = texts.take(first[new]).to_pylist()
        normal = text_keys_of(map(normalize, found if table is None else table.read(found)))
        self._exact = np.insert(self._exact, places[new], keys[new])
        self._normal = np.insert(self._normal, places[new], normal)


def _parts(tuples: Dataset, normal: _NormalKeys) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Keys of queries [rows], keys of documents [documents], the row of each document, and whether it is a positive."""
    for part in tuples.with_format("arrow").select_columns(COLUMNS).iter(ROWS_AT_ONCE):
        lists = part["keys"].combine_chunks()
        lengths, positives = lists.value_lengths().to_numpy(), part["positives"].to_numpy()
        rows = np.repeat(np.arange(len(lengths)), lengths)
        ranks = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = normal(lists.flatten().to_numpy())
        yield normal(part["query_key"].to_numpy()), keys, rows, ranks < positives[rows]


def _choose(tuples: Dataset, normal: _NormalKeys, share: float, seed: int) -> np.ndarray:
    """Keys of the queries to hold out."""
    queries = np.unique(np.concatenate([keys for keys, *_ in _parts(tuples, normal)]))
    return np.random.default_rng(seed).choice(queries, max(1, round(share * len(queries))), replace=False)


def _positives(tuples: Dataset, normal: _NormalKeys, chosen: np.ndarray) -> np.ndarray:
    """Keys of the positives of some queries."""
    parts = _parts(tuples, normal)
    return np.concatenate(
        [keys[is_positive & np.isin(queries, chosen)[rows]] for queries, keys, rows, is_positive in parts]
    )


def _rows(
    tuples: Dataset, normal: _NormalKeys, chosen: np.ndarray, relevant: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, whether its query is held out, and whether it names a document that is relevant to one that is."""
    own, touched = [], []
    for queries, keys, rows, _ in _parts(tuples, normal):
        own.append(np.isin(queries, chosen))
        touched.append(np.bincount(rows[np.isin(keys, relevant)], minlength=len(queries)) > 0)
    return np.concatenate(own), np.concatenate(touched)


def _add(
    held: HeldOut,
    tuples: Dataset,
    reader: TupleReader,
    normal: _NormalKeys,
    rows: np.ndarray,
    prompts: Mapping[str, str],
) -> None:
    """Add the texts of held-out rows, with their prompts before them and in their ids."""
    before_query, before_document = (prompts.get(task, "") for task in ("query", "document"))
    table = tuples.with_format("arrow").select_columns(TEXT_COLUMNS)
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        batch = table[rows[start : start + TEXTS_AT_ONCE]].to_pydict()
        queries = batch["query_name"] if reader.queries is None else reader.queries.read(batch["query_row"])
        kept: list[tuple[str, Any]] = []
        for query_key, text, keys, documents, positives in zip(
            batch["query_key"], queries, batch["keys"], batch["documents"], batch["positives"], strict=True
        ):
            query_id = f"{before_query}{normal(query_key)}"
            ids = [f"{before_document}{key}" for key in normal(np.array(keys))]
            held.queries[query_id] = before_query + text
            held.relevant.setdefault(query_id, set()).update(ids[:positives])
            last = positives + (reader.negatives or 0)
            kept += zip(ids[:last], documents[:last], strict=True)
        new = {key: document for key, document in kept if key not in held.corpus}
        for key, text in zip(new, _texts(new.values(), reader), strict=True):
            held.corpus[key] = before_document + text


def _texts(documents: Iterable[Any], reader: TupleReader) -> list[str]:
    return list(documents) if reader.documents is None else reader.documents.read(list(documents))
