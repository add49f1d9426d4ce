"""Texts by row and by id over a memory-mapped table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lion_st.data.fields import ID_FIELDS, TEXT_FIELDS, TITLE_FIELD, Task, choose_column

if TYPE_CHECKING:
    from datasets import Dataset

MAX_DIGITS = 18  # of a decimal number that surely fits 64 bits
NUMBER = re.compile(rf"(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})")
TEXTS_AT_ONCE = 10_000


class TextTable:
    """Texts by their row in a memory-mapped table: of what is on disk, only what is asked for is read.

    Args:
        table: A table with an id column, a text column and, optionally, a title.
        name: What error messages call the table.
        task: Whether the texts are documents, whose title is put before the text, or queries, whose title is left out.

    Raises:
        ValueError: If the table lacks an id or text column.
    """

    def __init__(self, table: Dataset, name: str, task: Task = "document") -> None:
        self.name = name
        self.table = table
        self.id_column = choose_column(table.column_names, ID_FIELDS, "id", name)
        self.text_column = choose_column(table.column_names, TEXT_FIELDS, "text", name)
        has_title = task == "document" and TITLE_FIELD in table.column_names
        columns = [self.text_column] + ([TITLE_FIELD] if has_title else [])
        self._texts = table.select_columns(columns)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Text of each row, the title before it where there is one."""
        texts = []
        for row, text in zip(rows, self.read_unchecked(rows), strict=True):
            if not text or text.isspace():
                key = self.id_of(row)
                raise ValueError(f"The text of {key!r} in {self.name} is {text!r}: remove the tuples that name it.")
            texts.append(text)
        return texts

    def read_unchecked(self, rows: Sequence[int] | np.ndarray, with_title: bool = True) -> list[str | None]:
        """`read`, with texts that are empty; if asked for, without the titles."""
        if not len(rows):
            return []
        columns = self._texts[np.asarray(rows).tolist()]
        texts = columns[self.text_column]
        if with_title and TITLE_FIELD in columns:
            titles = columns[TITLE_FIELD]
            return [f"{title or ''} {text or ''}".strip() for title, text in zip(titles, texts, strict=True)]
        return texts

    def id_of(self, row: int) -> str:
        """The id of a row."""
        return str(self.table[int(row)][self.id_column])

    def keys(self, used: np.ndarray) -> np.ndarray:
        """Keys of the texts of some rows, see `text_keys_of`; the rows are read in their order.

        Args:
            used: Which rows, bool [rows].

        Returns:
            int64 [rows], 0 where a row is not used.

        Raises:
            ValueError: If a text is empty.
        """
        keys = np.zeros(len(used), np.int64)
        for start in range(0, len(used), TEXTS_AT_ONCE):
            rows = start + np.flatnonzero(used[start : start + TEXTS_AT_ONCE])
            keys[rows] = text_keys_of(self.read(rows))
        return keys


def text_keys_of(texts: Iterable[str]) -> np.ndarray:
    """Integers that are equal where texts are, white space around them aside, int64 [texts].

    They are hashes of 64 bits: of ten million different texts, two have the same one in 1 of 400,000 collections.
    """
    return hashes_of(text.strip() for text in texts)


class TextLookup:
    """Rows of texts by their ids: a sorted array of keys of the ids in memory.

    Ids that are decimal numbers are their own keys, others have hashes of 64 bits for keys, as texts have; with the
    rows they make 16 bytes a text, 141 MB for the 8.8 million passages of MS MARCO.

    Example:
        >>> table = Dataset.from_dict({"docid": ["7", "9"], "text": ["a lion", "a tiger"]})
        >>> documents = TextLookup(TextTable(table, "animals"))
        >>> documents.table.read(documents.rows(["9", "7", "9"]))
        ['a tiger', 'a lion', 'a tiger']
    """

    def __init__(self, table: TextTable) -> None:
        self.table = table
        self.name = table.name
        keys, self._are_numbers = _id_keys(table.table, table.id_column, table.name)
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        repeated = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if len(repeated):
            one, other = self._rows[repeated[0] : repeated[0] + 2]
            raise ValueError(
                f"{self.name} has the id {table.id_of(one)!r} in rows {one} and {other}: ids must be unique, remove "
                "one of the rows."
            )

    def __len__(self) -> int:
        return len(self._keys)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id, [ids]."""
        rows = self.find(ids)
        if len(unknown := np.flatnonzero(rows < 0)):
            raise ValueError(
                f"The id {str(ids[int(unknown[0])])!r} is not among the {len(self):,} of {self.name}: give the "
                "collection that the tuples were made from, or none where they hold texts."
            )
        return rows

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id, -1 where it is not in the table, [ids]."""
        keys = np.array(list(map(_as_number, ids)), np.int64) if self._are_numbers else hashes_of(ids)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[places] == keys, self._rows[places], -1)


def _as_number(identifier: str) -> int:
    """The number that an id is, -1 of others and of what has zeros before it."""
    return int(identifier) if NUMBER.fullmatch(identifier) else -1


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """Hashes of strings, int64 [strings]."""
    import xxhash

    hashes = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
    return np.array(hashes, dtype=np.uint64).view(np.int64)


def _id_keys(table: Dataset, column: str, name: str) -> tuple[np.ndarray, bool]:
    """The ids as integers where all of them are plain decimal numbers, which is said, else hashes of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(table):
        raise ValueError(f"{name} is empty.")
    ids = table.with_format("arrow")[:][column]
    if ids.null_count:
        raise ValueError(f"{name} has no id in row {pc.index(pc.is_null(ids), True).as_py()}: every row needs one.")
    if pa.types.is_integer(ids.type):
        least, most = pc.min_max(ids).as_py().values()
        if least >= 0 and most < 10**MAX_DIGITS:  # as hashes need not be
            return ids.cast(pa.int64()).to_numpy(), True
    ids = ids.cast(pa.large_string())
    if pc.all(pc.match_substring_regex(ids, f"^{NUMBER.pattern}$")).as_py():
        return ids.cast(pa.int64()).to_numpy(), True
    parts = (ids[start : start + TEXTS_AT_ONCE].to_pylist() for start in range(0, len(ids), TEXTS_AT_ONCE))
    return np.concatenate(list(map(hashes_of, parts))), False
