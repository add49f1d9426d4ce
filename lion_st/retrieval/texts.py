"""What retrievers are given: documents by id, and lists of queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xxhash

from lion_st.errors import require_list, require_type


def require_documents(documents: Any) -> None:
    """Raise a TypeError unless these are texts by id."""
    remedy = 'pass texts by id, {"d1": "a text"}'
    require_type(documents, Mapping, "Documents", remedy)
    for one, text in documents.items():
        require_type(one, str, "An id of a document", remedy)
        require_type(text, str, f"A text of the document {one!r}", remedy)


def listed_queries(queries: Any) -> list[str]:
    """Queries as a list, in their order: also of a generator, and of pandas' Series whatever their labels."""
    require_list(queries, "queries")
    if isinstance(queries, Mapping):
        raise TypeError("Give a list of queries, got a mapping: pass list(queries.values()).")
    found = list(queries)
    for number, query in enumerate(found):
        require_type(query, str, f"A text for query {number}", "pass strings")
    return found


def documents_digest(documents: Mapping[str, str]) -> str:
    """A digest of ids and texts, in their order."""
    digest = xxhash.xxh3_128()
    for pair in documents.items():
        for part in pair:
            encoded = part.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
