"""Tokenizing from many threads, without reading more of a long text than its first tokens need."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

# A cut text is at least this long, and this many times its limit in tokens.
FEWEST_CHARACTERS = 4096
CHARACTERS_PER_TOKEN = 16
# A cut can change the piece that it is in and, through what a pre-tokenizer looks ahead, the one before.
PIECES_NEAR_A_CUT = 3

_lock = threading.RLock()


def _after_fork() -> None:
    """A forked process has none of its parent's threads: it must not wait for them."""
    global _lock
    _lock = threading.RLock()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # OpenMP's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive_tokenizer() -> Iterator[None]:
    """Hold off other threads: transformers sets the length and padding of a call on the tokenizer itself.

    Without this, a text of one thread is cut to the length of another's. The work inside uses all cores anyway.
    """
    with _lock:
        yield


def check_texts(inputs: Sequence[Any]) -> None:
    """Raise unless every value is a text with something to read in it."""
    for position, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {position} is {_shortened(text)}, a {type(text).__name__}. Pass strings; drop or fill in "
                "missing values first."
            )
        if not text or text.isspace():
            raise ValueError(
                f"Text {position} is {_shortened(text)}, which has nothing to encode. Drop empty texts first."
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {position} is {_shortened(text)}, which is not valid Unicode ({error.reason}). Repair it with "
                'text.encode("utf-8", "replace").decode().'
            ) from error


def require_room(tokenizer: Any, prompt: str, limit: int, texts: str) -> None:
    """Raise if a prompt and the special tokens leave no token for the text itself.

    Args:
        tokenizer: Of transformers.
        prompt: What stands in front of each text.
        limit: Tokens to which prompt and text are cut together.
        texts: What is cut, for the message.
    """
    with exclusive_tokenizer():
        taken = len(tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"])
    if taken < limit:
        return
    what = f"the prompt {prompt!r} with special tokens takes" if prompt else "special tokens take"
    raise ValueError(
        f"{texts} are cut to {limit} tokens, of which {what} {taken}: nothing of the text would be left, and all "
        f"texts would get one vector. Allow more than {taken} tokens{', or shorten the prompt' if prompt else ''}."
    )


def leading_parts(tokenizer: Any, texts: Sequence[str], limit: int, prompt: str = "") -> list[str]:
    """Texts cut by characters where that changes none of their first `limit` tokens.

    A fast tokenizer splits a text into pieces (words), each of which it tokenizes by itself. A text is cut only if
    `limit` tokens end several pieces before the cut, so that the pieces they are made of are those of the whole text;
    twice as much is tried where they do not, up to the whole text.

    Args:
        tokenizer: Of transformers.
        texts: N texts.
        limit: Tokens that are kept of each.
        prompt: What stands in front of each text.

    Returns:
        N texts, each the beginning of its own; short ones, and those of tokenizers that split nothing, are whole.
    """
    least = _least_characters(tokenizer, limit)
    return [
        text if least is None or len(text) <= least else _leading_part(tokenizer, text, limit, prompt, least)
        for text in texts
    ]


class TokenIds(NamedTuple):
    """Texts as the tokens that a model reads of them."""

    rows: list[np.ndarray]  # of each text, int64 [L], special tokens included
    is_cut: np.ndarray  # [N], whether a text has more tokens


def first_tokens(tokenizer: Any, texts: Sequence[str], limit: int, prompt: str = "") -> TokenIds:
    """Tokenize each text once, and keep what `truncation=True, max_length=limit` keeps.

    Of a long text no more is read than `leading_parts` reads, and that once as well, but where a cut turns out not to
    be safe.

    Args:
        tokenizer: Of transformers.
        texts: N texts.
        limit: Tokens that are kept of each, special ones included.
        prompt: What stands in front of each text.
    """
    rows = [np.empty(0, dtype=np.int64)] * len(texts)
    is_cut = np.zeros(len(texts), dtype=bool)
    least = _least_characters(tokenizer, limit)
    characters = max(map(len, texts), default=0) if least is None else least
    pending = list(range(len(texts)))
    with exclusive_tokenizer():
        before, after = map(len, special_ids(tokenizer))
        if before + after >= limit:
            raise ValueError(f"Special tokens alone take {before + after} of {limit} tokens: allow more.")
        while pending:
            parts = [prompt + texts[row][:characters] for row in pending]
            encoded = tokenizer(parts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
            again = []
            for place, (row, ids) in enumerate(zip(pending, encoded["input_ids"], strict=True)):
                if len(texts[row]) > characters:
                    pieces = encoded.word_ids(place)
                    if not _is_safe_cut(pieces[before : len(pieces) - after], limit):
                        again.append(row)
                        continue
                surplus = len(ids) - limit
                if surplus > 0:
                    is_cut[row] = True
                    first = before if tokenizer.truncation_side == "left" else limit - after
                    del ids[first : first + surplus]
                rows[row] = np.array(ids, dtype=np.int64)
            pending = again
            characters *= 2
    return TokenIds(rows, is_cut)


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that a tokenizer puts before and behind a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    if 0 not in mask:
        return ids, []
    return ids[: mask.index(0)], ids[len(mask) - mask[::-1].index(0) :]


def _least_characters(tokenizer: Any, limit: int) -> int | None:
    """Characters that are read at least of a text; None of tokenizers whose texts are read whole."""
    if not getattr(tokenizer, "is_fast", False) or tokenizer.truncation_side != "right":
        return None
    return max(FEWEST_CHARACTERS, CHARACTERS_PER_TOKEN * limit)


def _leading_part(tokenizer: Any, text: str, limit: int, prompt: str, length: int) -> str:
    while length < len(text):
        part = text[:length]
        with exclusive_tokenizer():
            encoded = tokenizer(prompt + part, truncation=False, padding=False, add_special_tokens=False, verbose=False)
        if _is_safe_cut(encoded.word_ids(), limit):
            return part
        length *= 2
    return text


def _is_safe_cut(pieces: list[int | None], limit: int) -> bool:
    """Whether the first tokens of a cut text are those of the whole one, given the piece that each token is of."""
    kept, rest = pieces[:limit], pieces[limit:]
    if len(kept) < limit or not rest or None in pieces:
        return False
    return kept[-1] + PIECES_NEAR_A_CUT <= rest[-1]  # type: ignore[operator]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
