"""BM25 through bm25s, the lexical baseline of every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from lion_st.extras import require
from lion_st.indexes.base import Hits
from lion_st.retrieval.texts import documents_digest, listed_queries, require_documents


class Bm25Retriever:
    """BM25 over a corpus held in memory, with the methods of `Retriever`.

    Words are lower-cased runs of two or more word characters without English stop words (bm25s' tokenizer).

    Args:
        k1: Saturation of the term frequency.
        b: Length normalisation, 0 to 1.
        stemmer: Algorithm of PyStemmer, such as "porter" (that of Anserini's BM25) or "english" (Snowball's). None
            leaves words as they are.

    Raises:
        ValueError: If there is no such stemmer.

    Example:
        >>> bm25 = Bm25Retriever()
        >>> bm25.index({"d1": "maned lions hunt at night", "d2": "tigers hunt alone"})
        >>> bm25.search(["when do lions hunt"], k=1)[0][0][0]
        'd1'
    """

    paradigm = "lexical"
    engine = "bm25s"

    def __init__(self, k1: float = 0.9, b: float = 0.4, stemmer: str | None = None) -> None:
        self.k1 = k1
        self.b = b
        self.stemmer = stemmer
        self.name = "bm25" if stemmer is None else f"bm25-{stemmer}"
        if stemmer is not None and stemmer not in (known := require("Stemmer").algorithms()):
            raise ValueError(f"stemmer must be one of {', '.join(known)}, or None, got {stemmer!r}.")
        self.ids: list[str] = []
        self.documents_xxh3: str | None = None  # digest of the documents that were indexed last
        self._figures: dict[str, Any] = {}

    def fingerprint(self) -> str:
        """The settings, which are all that the scores depend on."""
        return f"k1={self.k1},b={self.b}" + ("" if self.stemmer is None else f",stemmer={self.stemmer}")

    def index(self, documents: Mapping[str, str], show_progress: bool = False) -> None:
        """Index documents, text by id, in place of any earlier ones.

        Raises:
            TypeError: If they are not texts by id.
            ValueError: If there are none, or no word in them.
        """
        bm25s = require("bm25s")

        require_documents(documents)
        if not documents:
            raise ValueError("BM25 needs at least one document.")
        started = perf_counter()
        self.ids = []  # no search finds what a failure leaves
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        tokens = self._tokenize(list(documents.values()), show_progress=show_progress)
        if not any(tokens.ids):
            raise ValueError("BM25 needs a word of two letters that is not a stop word: the documents have none.")
        index.index(tokens, show_progress=show_progress)
        self._index, self.ids, self.documents_xxh3 = index, list(documents), documents_digest(documents)
        size = sum(part.nbytes for part in index.scores.values() if hasattr(part, "nbytes"))
        self._figures = {"index_bytes": size, "index_seconds": perf_counter() - started}

    def search(self, queries: Sequence[str], k: int = 10, show_progress: bool = False) -> list[Hits]:
        """Return for each query its best documents with a score above 0, best first.

        Raises:
            TypeError: If the queries are one string, or one of them is not a text.
            ValueError: If k is not at least 1.
            RuntimeError: If nothing was indexed.
        """
        queries = listed_queries(queries)
        if not self.ids:
            raise RuntimeError("Nothing is indexed yet: call index(documents) before search.")
        if k < 1:
            raise ValueError(f"k is at least 1, got {k}.")
        if not queries:
            return []

        started = perf_counter()
        tokens = self._tokenize(queries, show_progress=False, return_ids=False)
        documents, scores = self._index.retrieve(tokens, k=min(k, len(self.ids)), show_progress=show_progress)
        hits = [
            [(self.ids[row], float(score)) for row, score in zip(row_list, score_list, strict=True) if score > 0]
            for row_list, score_list in zip(documents.tolist(), scores.tolist(), strict=True)
        ]
        self._figures["search_ms_per_query"] = 1000 * (perf_counter() - started) / len(queries)
        return hits

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        stemmer = None if self.stemmer is None else require("Stemmer").Stemmer(self.stemmer)
        return require("bm25s").tokenize(texts, stemmer=stemmer, **options)

    def figures(self) -> dict[str, Any]:
        """Sizes and times of the last `index` and `search`."""
        return dict(self._figures)
