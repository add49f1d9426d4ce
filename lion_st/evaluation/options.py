"""The options that `evaluate_retrieval` and `open_retriever` hand on, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


class RetrieverOptions(TypedDict, total=False):
    """Further arguments of `ModelRetriever`, which describes them."""

    idf: bool
    tokens_per_batch: int
    threads: int
    encoded: str | Path | None
    encoded_dir: str | Path | None


class EvaluationOptions(TypedDict, total=False):
    """Further arguments of `open_retriever`, which describes them, and of `ModelRetriever`."""

    query_model: SentenceTransformer | SparseEncoder | str | Path | None
    name: str | None
    load_options: Mapping[str, Any] | None
    engine_parameters: Mapping[str, Any] | None
    idf: bool
    tokens_per_batch: int
    threads: int
    encoded: str | Path | None


def require_known(given: Iterable[str], options: Any) -> None:
    """Refuse arguments that there are not, such as one that is misspelt.

    Args:
        given: Names.
        options: One of the classes above.

    Raises:
        TypeError: With those that there are.
    """
    known = options.__annotations__
    if unknown := [name for name in sorted(given) if name not in known]:
        raise TypeError(
            f"{', '.join(unknown)}: there is no such argument. There are {', '.join(known)}; lengths are those of a "
            "protocol."
        )
