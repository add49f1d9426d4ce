"""Whether texts of a test are trained on: one comparison for `check_tuples`, `hold_out` and studies."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from lion_st.data.lookup import TEXTS_AT_ONCE, text_keys_of


def normalize(text: str) -> str:
    """A text in one case and Unicode form, without punctuation and with single spaces.

    A text of punctuation alone stays as it is, so that not all such texts are alike.

    Example:
        >>> normalize("  Lions' PREY,\\non zebras. ")
        'lions prey on zebras'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[^\w\s]|_", _mark_or_space, folded).split()) or text


def _mark_or_space(character: re.Match[str]) -> str:
    """A vowel sign or accent, which no pattern takes for a part of a word, as in Hindi; a space for punctuation."""
    return character[0] if unicodedata.category(character[0]).startswith("M") else " "


class TextKeys(NamedTuple):
    """Keys of texts as they are, and of the same texts after `normalize`; see `text_keys_of`."""

    exact: np.ndarray  # int64 [texts]
    normal: np.ndarray  # int64 [texts]

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextKeys:
        """The keys of texts, of which so many are held in memory as are read at once."""
        exact, normal = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        stream = iter(texts)
        while part := list(islice(stream, TEXTS_AT_ONCE)):
            exact.append(text_keys_of(part))
            normal.append(text_keys_of(map(normalize, part)))
        return cls(np.concatenate(exact), np.concatenate(normal))


class KnownTexts:
    """Texts that are found again, as they are and after `normalize`.

    Args:
        keys: Of the texts.
        names: What each is called, if they have names.
    """

    def __init__(self, keys: TextKeys, names: Sequence[str] = ()) -> None:
        self.names = names
        self._order = [np.argsort(one, kind="stable") for one in keys]
        self._sorted = [one[order] for one, order in zip(keys, self._order, strict=True)]

    def __len__(self) -> int:
        return len(self._order[0])

    def find(self, keys: TextKeys) -> TextKeys:
        """The place of the known text that each text is, and of the one that it is after `normalize`; -1 for none."""
        return TextKeys(*map(_places, keys, self._sorted, self._order))


def _places(keys: np.ndarray, known: np.ndarray, order: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.full(len(keys), -1)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, order[places], -1)
