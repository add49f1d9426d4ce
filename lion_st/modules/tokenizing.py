"""Tokenizing from many threads, without reading more of a long text than its first tokens need."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# A cut text is at least this long, and this many times its limit in tokens.
FEWEST_CHARACTERS = 4096
CHARACTERS_PER_TOKEN = 16
# A cut can change the piece that it is in and, through what a pre-tokenizer looks ahead, the one before.
PIECES_NEAR_A_CUT = 3

_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it does not exist in the child


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive_tokenizer() -> Iterator[None]:
    """Hold off other threads: transformers sets the length and padding of a call on the tokenizer itself.

    Without this, a text of one thread is cut to the length of another's. The work inside uses all cores anyway.
    """
    with _lock:
        yield


def check_texts(inputs: Sequence[Any]) -> None:
    """Raise unless every value is a text with something to read in it.

    Raises:
        TypeError: Naming the first value that is not a `str`, and its position.
        ValueError: Naming the first text that is empty, only white space, or not valid Unicode.
    """
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

    Raises:
        ValueError: With the prompt, its length and the limit.
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
    least = max(FEWEST_CHARACTERS, CHARACTERS_PER_TOKEN * limit)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.truncation_side != "right":
        return list(texts)
    return [text if len(text) <= least else _leading_part(tokenizer, text, limit, prompt, least) for text in texts]


def _leading_part(tokenizer: Any, text: str, limit: int, prompt: str, length: int) -> str:
    while length < len(text):
        part = text[:length]
        with exclusive_tokenizer():
            encoded = tokenizer(prompt + part, truncation=False, padding=False, add_special_tokens=False, verbose=False)
        pieces = encoded.word_ids()
        kept, rest = pieces[:limit], pieces[limit:]
        if len(kept) == limit and rest and None not in pieces and kept[-1] + PIECES_NEAR_A_CUT <= rest[-1]:
            return part
        length *= 2
    return text


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
