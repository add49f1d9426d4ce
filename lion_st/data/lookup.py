"""Texts by row and by id over a memory-mapped table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lion_st.data.fields import ID_FIELDS, TEXT_FIELDS, TITLE_FIELD, Task, choose_column

if TYPE_CHECKING:
    from datasets import Dataset

MAX_DIGITS = 18  # of a decimal number that surely fits 64 bits
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
    import xxhash

    hashes = [xxhash.xxh3_64_intdigest(text.strip().encode()) for text in texts]
    return np.array(hashes, dtype=np.uint64).view(np.int64)


class TextLookup:
    """Rows of texts by their ids: a sorted array of the ids in memory.

    Ids that are decimal numbers are kept as 64-bit integers, others as fixed-width strings; with the rows they make 16
    bytes a text, 141 MB for the 8.8 million passages of MS MARCO.

    Example:
        >>> table = Dataset.from_dict({"docid": ["7", "9"], "text": ["a lion", "a tiger"]})
        >>> documents = TextLookup(TextTable(table, "animals"))
        >>> documents.table.read(documents.rows(["9", "7", "9"]))
        ['a tiger', 'a lion', 'a tiger']
    """

    def __init__(self, table: TextTable) -> None:
        self.table = table
        self.name = table.name
        ids = _id_array(table.table, table.id_column, table.name)
        self.rows_by_id = np.argsort(ids, kind="stable")
        self.ids = ids[self.rows_by_id]
        repeated = np.flatnonzero(self.ids[1:] == self.ids[:-1])
        if len(repeated):
            raise ValueError(
                f"{self.name} has the id {str(self.ids[repeated[0]])!r} in rows {self.rows_by_id[repeated[0]]} and "
                f"{self.rows_by_id[repeated[0] + 1]}: ids must be unique, remove one of the rows."
            )

    def __len__(self) -> int:
        return len(self.ids)

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
        wanted = np.asarray(ids, dtype=str)
        if self.ids.dtype.kind == "i":
            decimal = np.char.isdecimal(wanted) & (np.char.str_len(wanted) <= MAX_DIGITS)
            keys = np.where(decimal, wanted, "-1").astype(np.int64)
        else:
            keys = wanted
        places = np.minimum(np.searchsorted(self.ids, keys), len(self.ids) - 1)
        return np.where(self.ids[places].astype(str) == wanted, self.rows_by_id[places], -1)


def _id_array(table: Dataset, column: str, name: str) -> np.ndarray:
    """The ids as integers where all of them are plain decimal numbers, else as strings."""
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
            return ids.cast(pa.int64()).to_numpy()
    ids = ids.cast(pa.string())
    if not pc.all(pc.match_substring_regex(ids, rf"^(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})$")).as_py():
        return np.asarray(ids.to_pylist(), dtype=str)
    return ids.cast(pa.int64()).to_numpy()
