"""What is shown of term weights: a query's terms, the reasons of a hit, and where they stand in its text.

A term is an entry of the model's vocabulary; a name is what a reader sees of it (`term_names`). Names are compared
without regard to case, so that "Lion", "lion" and "lion" at the start of a word are one name.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lion_st.retrieval.explain import PART_OF_A_CHARACTER, WORD, SharedTerm, term_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_SHARE = 0.01


class Piece(NamedTuple):
    """A token or word of a text: `text[start:end]`, and its name in lower case."""

    start: int
    end: int
    name: str


class Reason(NamedTuple):
    """A shared name's part in a score."""

    name: str
    share: float  # of the score, 0..1
    in_query: bool
    in_passage: bool


class Reasons(NamedTuple):
    """The reasons of a score, the weightiest first, and what was left out."""

    listed: list[Reason]
    more: int  # names not listed
    more_share: float  # their part in the score, 0..1


class Segment(NamedTuple):
    """A run of a text that is marked for the same reasons, or for none."""

    text: str
    reasons: tuple[Reason, ...] = ()
    read: bool = True  # False beyond the length that the model reads

    @property
    def share(self) -> float:
        """The reasons' part in the score, 0..1."""
        return sum(reason.share for reason in self.reasons)


class Pieces(NamedTuple):
    """The tokens and words of a text as a model reads it."""

    pieces: list[Piece]
    read_until: int  # characters within the model's limit
    tokens: int  # of the whole text, those beyond the limit included
    words: Mapping[str, str] = MappingProxyType({})  # of a piece from inside a word, by name

    @property
    def names(self) -> set[str]:
        """All names that stand in the text."""
        return {piece.name for piece in self.pieces}


def read_text(text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None, prompt: str = "") -> Pieces:
    """Cut a text into tokens and words, with their names, as far as a model reads it.

    Args:
        text: The text.
        tokenizer: The model's, a fast one.
        limit: Tokens that the model reads, special ones and the prompt included; None for all.
        prompt: What the model reads in front of the text.
    """
    whole = prompt + text
    encoded = tokenizer(
        whole, truncation=limit is not None, max_length=limit, return_offsets_mapping=True, verbose=False
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    cut_off = limit is not None and len(ids) == limit
    tokens = len(tokenizer(whole, verbose=False)["input_ids"]) if cut_off else len(ids)
    read_until = len(text) if tokens == len(ids) else max(0, max(end for _, end in offsets) - len(prompt))
    pieces = read_words(text[:read_until]).pieces
    whole_words = list(pieces)
    starts = [word.start for word in whole_words]
    words: dict[str, str] = {}
    for name, (start, end) in zip(term_names(np.asarray(ids), tokenizer), offsets, strict=True):
        token = whole[start:end]
        first = start + len(token) - len(token.lstrip()) - len(prompt)
        last = start + len(token.rstrip()) - len(prompt)
        if 0 <= first < last and PART_OF_A_CHARACTER not in name:
            pieces.append(Piece(first, last, name.casefold()))
            place = bisect_right(starts, first) - 1
            if place >= 0 and last <= whole_words[place].end:
                words.setdefault(name.casefold(), whole_words[place].name)
    return Pieces(pieces, read_until, tokens, words)


def read_words(text: str) -> Pieces:
    """Cut a text into words, of which all are read."""
    words = [Piece(word.start(), word.end(), word[0].casefold()) for word in WORD.finditer(text)]
    return Pieces(words, len(text), len(words))


def reasons_of(
    terms: Sequence[SharedTerm],
    in_query: set[str],
    in_passage: set[str],
    count: int = 8,
    words: Mapping[str, str] = MappingProxyType({}),
) -> Reasons:
    """Add up shared terms of the same name or word and list the weightiest.

    Args:
        terms: As `explain_score` gives them.
        in_query: Names that stand in the query.
        in_passage: Names that stand in the passage.
        count: Reasons to list; those with less than a hundredth of the score are not.
        words: Words of the query or the passage by the names of their pieces, which count as these words.
    """
    shares: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for term in terms:
        name = term.term.casefold()
        shown.setdefault(words.get(name, name), words[name] if words.get(name, name) != name else term.term)
        shares[words.get(name, name)] += term.share  # type: ignore[assignment]
    ranked = [(name, float(share)) for name, share in shares.most_common() if share > 0]
    listed = [
        Reason(shown[name], share, name in in_query, name in in_passage)
        for name, share in ranked[:count]
        if share >= LEAST_SHARE
    ]
    rest = ranked[len(listed) :]
    return Reasons(listed, len(rest), sum(share for _, share in rest))


def word_reasons(scores: Mapping[str, float]) -> Reasons:
    """The reasons of a lexical score, which adds up over the words that a query and a passage share."""
    total = sum(scores.values())
    shared = [SharedTerm(word, 1.0, score, score / total) for word, score in scores.items() if score > 0]
    words = {word.casefold() for word in scores}
    return reasons_of(shared, words, words)


def mark(text: str, pieces: Iterable[Piece], reasons: Iterable[Reason], read_until: int | None = None) -> list[Segment]:
    """Cut a text into segments with the reasons that stand there; segments put together are the text again.

    Pieces that touch, such as the tokens of one word, become one segment.

    Args:
        text: The text.
        pieces: Its tokens and words, see `read_text`.
        reasons: What to mark.
        read_until: Characters that the model reads; None for all.
    """
    by_name = {reason.name.casefold(): reason for reason in reasons}
    read_until = len(text) if read_until is None else read_until
    segments: list[Segment] = []
    place = 0
    for start, end, marked in _joined(piece for piece in pieces if piece.name in by_name):
        segments += [
            Segment(text[place:start]),
            Segment(text[start:end], tuple(by_name[name] for name in marked)),
        ]
        place = end
    segments += [Segment(text[place : max(place, read_until)]), Segment(text[max(place, read_until) :], read=False)]
    return [segment for segment in segments if segment.text]


def cut(segments: Sequence[Segment], place: int) -> tuple[list[Segment], list[Segment]]:
    """Split segments after this many characters."""
    before: list[Segment] = []
    after: list[Segment] = []
    for segment in segments:
        kept, rest = segment.text[: max(0, place)], segment.text[max(0, place) :]
        before += [segment._replace(text=kept)] if kept else []
        after += [segment._replace(text=rest)] if rest else []
        place -= len(segment.text)
    return before, after


def _joined(pieces: Iterable[Piece]) -> list[tuple[int, int, list[str]]]:
    """Overlapping and touching pieces as one, with their names in order."""
    joined: list[tuple[int, int, list[str]]] = []
    for start, end, name in sorted(pieces):
        if joined and start <= joined[-1][1]:
            first, last, names = joined[-1]
            joined[-1] = (first, max(last, end), names if name in names else [*names, name])
        else:
            joined.append((start, end, [name]))
    return joined
