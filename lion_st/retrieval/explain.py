"""Why a document was found: the terms it shares with the query, and what a text was expanded to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lion_st.retrieval.vectors import to_csr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """
    query, document = to_csr(query), to_csr(document)
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
    row = to_csr(vector)
    if row.shape[0] != 1:
        raise ValueError(f"Give one row, got {row.shape[0]}.")
    order = np.argsort(-row.data, kind="stable")[:count]
    return list(zip(term_names(row.indices[order], tokenizer), row.data[order].tolist(), strict=True))


def term_names(terms: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Readable names of vocabulary entries; a leading space, which marks the start of a word, is dropped."""
    return [
        str(tokenizer.decode([int(term)])).strip() or repr(tokenizer.convert_ids_to_tokens(int(term))) for term in terms
    ]
