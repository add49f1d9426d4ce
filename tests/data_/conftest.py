"""Real questions, passages and teacher scores, written in the layouts in which training tuples are published."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from lion_st.data import quickstart_data

TUPLES = 12


@dataclass
class Sample:
    """Tuples whose numeric ids are like those of MS MARCO; documents[0] of a tuple is its positive."""

    queries: dict[str, str]
    documents: dict[str, str]
    tuples: list[tuple[str, list[str], list[float]]]  # query id, document ids, scores

    def texts(self, row: int) -> list[str]:
        query, documents, _ = self.tuples[row]
        return [self.queries[query], *(self.documents[document] for document in documents)]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="session")
def sample() -> Sample:
    data = quickstart_data()
    rows = pq.read_table(data / "train.parquet").slice(0, TUPLES).to_pylist()
    wanted = {document for row in rows for document in row["document_ids"]}
    texts = pq.read_table(data / "documents.parquet").to_pylist()
    documents = {row["document_id"]: row["text"] for row in texts if row["document_id"] in wanted}
    queries = {
        row["query_id"]: row["text"] for row in pq.read_table(data / "queries.parquet").slice(0, TUPLES).to_pylist()
    }
    number = {key: str(7 + 31 * i) for i, key in enumerate([*documents, *queries])}
    return Sample(
        {number[key]: text for key, text in queries.items()},
        {number[key]: text for key, text in documents.items()},
        [(number[row["query_id"]], [number[key] for key in row["document_ids"]], row["scores"]) for row in rows],
    )
