"""Texts by id over a memory-mapped table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lion_st.data.fields import ID_FIELDS, TEXT_FIELDS, TITLE_FIELD, choose_column

if TYPE_CHECKING:
    from datasets import Dataset

MAX_DIGITS = 18  # of a decimal number that surely fits 64 bits
TEXTS_AT_ONCE = 10_000


class TextLookup:
    """Texts by id: the texts stay on disk, a sorted array of the ids in memory.

    Ids that are decimal numbers are kept as 64-bit integers, others as fixed-width strings; with the rows they make 16
    bytes a text, 141 MB for the 8.8 million passages of MS MARCO, shared by forked workers.

    Args:
        table: A table with an id column, a text column and, optionally, a title, which is put before the text.
        name: What error messages call the table.

    Raises:
        ValueError: If the table lacks an id or text column, or an id is missing or occurs twice.

    Example:
        >>> documents = TextLookup(Dataset.from_dict({"docid": ["7", "9"], "text": ["a lion", "a tiger"]}), "animals")
        >>> documents.texts(["9", "7", "9"])
        ['a tiger', 'a lion', 'a tiger']
    """

    def __init__(self, table: Dataset, name: str) -> None:
        self.name = name
        id_column = choose_column(table.column_names, ID_FIELDS, "id", name)
        self.text_column = choose_column(table.column_names, TEXT_FIELDS, "text", name)
        columns = [self.text_column] + ([TITLE_FIELD] if TITLE_FIELD in table.column_names else [])
        self.table = table.select_columns(columns)
        ids = _id_array(table, id_column, name)
        self.rows_by_id = np.argsort(ids, kind="stable")
        self.ids = ids[self.rows_by_id]
        repeated = np.flatnonzero(self.ids[1:] == self.ids[:-1])
        if len(repeated):
            raise ValueError(
                f"{name} has the id {str(self.ids[repeated[0]])!r} in rows {self.rows_by_id[repeated[0]]} and "
                f"{self.rows_by_id[repeated[0] + 1]}: ids must be unique, remove one of the rows."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id, [ids].

        Raises:
            ValueError: If an id is not in the table.
        """
        known, rows = self._find(ids)
        if not known.all():
            raise ValueError(
                f"The id {str(ids[int(np.argmin(known))])!r} is not among the {len(self):,} of {self.name}: give the "
                "collection that the tuples were made from."
            )
        return rows

    def knows(self, ids: Sequence[str]) -> np.ndarray:
        """Whether each id is in the table, [ids]."""
        return self._find(ids)[0]

    def first_of_equals(self, ids: Sequence[str]) -> dict[str, str]:
        """The ids whose text is that of an earlier one among them, with that earlier one."""
        first: dict[int, str] = {}  # by the text's hash: texts of a whole collection would not fit memory
        found: dict[str, str] = {}
        for start in range(0, len(ids), TEXTS_AT_ONCE):
            part = ids[start : start + TEXTS_AT_ONCE]
            for key, text in zip(part, self.texts(part), strict=True):
                one = first.setdefault(hash(text.strip()), key)
                if one != key:
                    found[key] = one
        return found

    def _find(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Whether each id is known, and its row if it is."""
        wanted = np.asarray(ids, dtype=str)
        if self.ids.dtype.kind == "i":
            decimal = np.char.isdecimal(wanted) & (np.char.str_len(wanted) <= MAX_DIGITS)
            keys = np.where(decimal, wanted, "-1").astype(np.int64)
        else:
            keys = wanted
        places = np.minimum(np.searchsorted(self.ids, keys), len(self.ids) - 1)
        return self.ids[places].astype(str) == wanted, self.rows_by_id[places]

    def texts(self, ids: Sequence[str]) -> list[str]:
        """Text of each id, the title before it where there is one.

        Raises:
            ValueError: If an id is not in the table, or its text is empty.
        """
        if not len(ids):
            return []
        rows = self.table[self.rows(ids).tolist()]
        texts = rows[self.text_column]
        if TITLE_FIELD in rows:
            texts = [
                f"{title or ''} {text or ''}".strip() for title, text in zip(rows[TITLE_FIELD], texts, strict=True)
            ]
        for key, text in zip(ids, texts, strict=True):
            if not text or text.isspace():
                raise ValueError(f"The text of {key!r} in {self.name} is {text!r}: remove the tuples that name it.")
        return texts


def _id_array(table: Dataset, column: str, name: str) -> np.ndarray:
    """The ids as integers where all of them are plain decimal numbers, else as strings."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not len(table):
        raise ValueError(f"{name} is empty.")
    ids = table.with_format("arrow")[:][column]
    if ids.null_count:
        raise ValueError(f"{name} has no id in row {pc.index(pc.is_null(ids), True).as_py()}: every row needs one.")
    if not pa.types.is_integer(ids.type):
        ids = ids.cast(pa.string())
        if not pc.all(pc.match_substring_regex(ids, rf"^(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})$")).as_py():
            return np.asarray(ids.to_pylist(), dtype=str)
    return ids.cast(pa.int64()).to_numpy()
