"""Real tuples, and writers of the files in which such tuples are published."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


@cache
def read_sample() -> Sample:
    """The first tuples of the bundled data set."""
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


def write_parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tsv(path: Path, texts: dict[str, str]) -> Path:
    path.write_text("".join(f"{key}\t{text}\n" for key, text in texts.items()))
    return path


def write_card(folder: Path, configurations: dict[str, str]) -> Path:
    """The card of a Hub data set: which files belong to which configuration, split train."""
    lines = ["---", "configs:"]
    for name, files in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {files}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder
