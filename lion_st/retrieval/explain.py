"""Why a document was found: the terms it shares with the query, and what a text was expanded to."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from lion_st.encoding.vectors import to_csr
from lion_st.errors import require_type
from lion_st.indexes.base import refuse_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


WORD = re.compile(r"\w+")
PART_OF_A_CHARACTER = "\ufffd"  # what bytes that are not a whole character decode to
STARTS_A_WORD = ("Ġ", "▁")  # in byte-level and SentencePiece vocabularies


class TextTerm(NamedTuple):
    """One word of an expanded text: its own or, `in_text` False, one that the model added."""

    name: str
    weight: float
    in_text: bool


class SharedTerm(NamedTuple):
    """One term's part in a score."""

    term: str
    query_weight: float
    document_weight: float
    share: float  # of the score, 0..1


def explain_score(query: Any, document: Any, tokenizer: PreTrainedTokenizerBase) -> list[SharedTerm]:
    """List the terms that a query and a document share, the weightiest first; the shares sum to 1.

    Args:
        query: One sparse row [1, V].
        document: One sparse row [1, V].
        tokenizer: Names the terms.

    Raises:
        TypeError: If texts are given where rows are expected, or no tokenizer.
        ValueError: If these are not one row each, of the same vocabulary.
    """
    query, document = _rows(query, tokenizer), _rows(document, tokenizer)
    if query.shape != document.shape or query.shape[0] != 1:
        raise ValueError(f"Give one query row and one document row, got {query.shape} and {document.shape}.")
    terms, left, right = np.intersect1d(query.indices, document.indices, assume_unique=True, return_indices=True)
    products = query.data[left].astype(np.float64) * document.data[right]
    order = np.argsort(-products, kind="stable")
    score = products.sum()
    names = term_names(terms[order], tokenizer)
    return [
        SharedTerm(
            name, float(query.data[left[place]]), float(document.data[right[place]]), float(products[place] / score)
        )
        for name, place in zip(names, order, strict=True)
    ]


def top_terms(vector: Any, tokenizer: PreTrainedTokenizerBase, count: int = 10) -> list[tuple[str, float]]:
    """The heaviest terms of one sparse row [1, V] with their weights."""
    row = _rows(vector, tokenizer)
    if row.shape[0] != 1:
        raise ValueError(f"Give one row, got {row.shape[0]}.")
    order = np.argsort(-row.data, kind="stable")[:count]
    return list(zip(term_names(row.indices[order], tokenizer), row.data[order].tolist(), strict=True))


def expanded_terms(vector: Any, text: str, tokenizer: PreTrainedTokenizerBase, count: int = 10) -> list[TextTerm]:
    """The heaviest terms of a text as a reader knows them, weights of pieces of one word added up.

    Pieces of the text's own words count as these words, spellings that differ in case or a leading space as one term,
    and all parts of characters as one. Any other piece from inside a word is written "…piece".

    Args:
        vector: The text's sparse row [1, V].
        text: The text, as far as the model reads it.
        tokenizer: Names the terms.
        count: Terms to give.
    """
    row = _rows(vector, tokenizer)
    require_type(text, str, "A text", "pass what the vector was encoded from")
    words = words_of_tokens(text, tokenizer)
    own = {word.casefold() for word in words.values()}
    weights: dict[str, float] = {}
    shown: dict[str, str] = {}
    order = np.argsort(-row.data, kind="stable")
    for term, weight in zip(row.indices[order].tolist(), row.data[order].tolist(), strict=True):
        (name,) = term_names(np.asarray([term]), tokenizer)
        if term in words:
            name = words[term]
        elif PART_OF_A_CHARACTER in name:
            name = PART_OF_A_CHARACTER
        elif name.casefold() not in own and _is_inside_a_word(term, tokenizer):
            name = f"…{name}"
        key = name.casefold()
        weights[key] = weights.get(key, 0.0) + weight
        shown.setdefault(key, name)
    heaviest = sorted(weights, key=lambda key: -weights[key])[:count]
    return [TextTerm(shown[key], weights[key], key in own) for key in heaviest]


def _rows(vector: Any, tokenizer: Any) -> sparse.csr_array:
    """Sparse rows that were given with the tokenizer that names their terms."""
    refuse_texts(vector)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(f"A tokenizer expected, got a {type(tokenizer).__name__}: pass model.tokenizer.")
    return to_csr(vector)


def words_of_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The word of a text that each of its tokens belongs to, the first where there are several; by token id."""
    if not tokenizer.is_fast:  # it does not say where its tokens stand
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(ids, term_names(np.asarray(ids, dtype=np.int64), tokenizer), strict=True))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = [*WORD.finditer(text)]
    ends = [word.end() for word in found]
    words: dict[int, str] = {}
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        place = bisect_right(ends, start)
        word = found[place][0] if place < len(found) and found[place].start() < end else None
        words.setdefault(token, word or text[start:end].strip() or str(tokenizer.decode([token])))
    return words


def _is_inside_a_word(term: int, tokenizer: Any) -> bool:
    """Whether a token continues a word: it does not start one, and the vocabulary has none that does with its name."""
    token = str(tokenizer.convert_ids_to_tokens(term))
    if not token[:1].isalpha() or token.startswith(STARTS_A_WORD):
        return False
    known = (tokenizer.convert_tokens_to_ids(f"{mark}{token}") for mark in STARTS_A_WORD)
    has_marks = any(tokenizer.convert_tokens_to_ids(f"{mark}a") not in (None, tokenizer.unk_token_id)
                    for mark in STARTS_A_WORD)  # fmt: skip
    return has_marks and all(one in (None, tokenizer.unk_token_id) for one in known)


def term_names(terms: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Readable names of vocabulary entries; a leading space, which marks the start of a word, is dropped."""
    return [
        str(tokenizer.decode([int(term)])).strip() or repr(tokenizer.convert_ids_to_tokens(int(term))) for term in terms
    ]
