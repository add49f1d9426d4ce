"""The documents that the page searches, with queries to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from lion_st.data.beir import beir_files, load_beir, quickstart_test_sets
from lion_st.data.fields import Fields
from lion_st.data.records import read_texts


@dataclass(frozen=True)
class Collection:
    """Documents to search.

    Args:
        name: Shown on the page.
        documents: Documents by id.
        judged: Ids of the relevant documents by the text of a query, of the queries that were judged.
    """

    name: str
    documents: Mapping[str, Fields]
    judged: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def examples(self, count: int = 5) -> list[str]:
        """Judged queries at even steps through the collection, to be tried; none where nothing was judged."""
        queries = list(self.judged)
        count = min(count, len(queries))
        return [queries[place * len(queries) // count] for place in range(count)]

    def relevant(self, query: str) -> frozenset[str]:
        """Ids of the documents judged relevant to a query of this text; empty for one that was not judged."""
        return self.judged.get(query.strip(), frozenset())


def read_collection(path: str | Path, name: str | None = None) -> Collection:
    """Read the documents of a folder or file, and queries with judgements where it has them.

    Args:
        path: A test collection in BEIR layout with the split "test", see `load_beir`, or documents alone in any form
            that `read_corpus` takes.
        name: Name of the collection; by default that of the path.

    Returns:
        The collection, without documents that are blank.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If the folder holds vectors, a document is malformed, an id repeats, or no document is left.
    """
    if any((Path(path) / name).is_file() for name in ("manifest.json", "header.json")):
        raise ValueError(
            f"{path} holds vectors, and the page shows texts: give the documents as data (--data), and beside them an "
            "encoded folder as encoded (--encoded) or an index as index (--index)."
        )
    judged: dict[str, frozenset[str]] = {}
    if _is_test_collection(path):
        corpus, queries, qrels = load_beir(path)
        documents = [Fields(key, row["title"], row["text"]) for key, row in corpus.items()]
        for key, grades in qrels.items():
            relevant = frozenset(document for document, grade in grades.items() if grade > 0)
            judged[queries[key].strip()] = judged.get(queries[key].strip(), frozenset()) | relevant
    else:
        documents = list(read_texts(path).values())
    kept = {document.id: document for document in documents if document.content}
    if not kept:
        raise ValueError(f"{path} has no document with a text: the page needs something to search.")
    return Collection(name or Path(path).resolve().name, kept, judged)


def quickstart_collection() -> Collection:
    """The paragraphs of SQuAD's development set from the quickstart data set, with their questions."""
    with TemporaryDirectory() as folder:
        return read_collection(quickstart_test_sets(folder)["squad_dev"], "SQuAD dev paragraphs")


def _is_test_collection(path: str | Path) -> bool:
    if not Path(path).is_dir():
        return False
    try:
        beir_files(path, "test")
    except FileNotFoundError:
        return False
    return True
