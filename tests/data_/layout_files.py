"""Writers of the files that training tuples are published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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
