"""The bundled data set: training tuples with teacher scores, and two test sets."""

from __future__ import annotations

import os
from pathlib import Path

from lion_st.data.beir import Qrels, save_beir
from lion_st.extras import require

QUICKSTART_REPOSITORY = "lion-st/lion-quickstart"
QUICKSTART_VARIABLE = "LION_ST_QUICKSTART"
TEST_SETS = ("squad_dev", "scifact")


def quickstart_data() -> Path:
    """Folder of the data set lion-quickstart, which `load_tuples` reads.

    Taken from the folder that the environment variable LION_ST_QUICKSTART names, else from a source checkout, else from
    the Hub (9 MB, cached).

    Raises:
        FileNotFoundError: If LION_ST_QUICKSTART names no folder with the data set.
    """
    named = os.environ.get(QUICKSTART_VARIABLE)
    if named is not None:
        if not (Path(named) / "train.parquet").is_file():
            raise FileNotFoundError(
                f"{QUICKSTART_VARIABLE} is {named!r}, where there is no train.parquet: name the folder of the data set "
                "or unset the variable."
            )
        return Path(named)
    checkout = Path(__file__).parents[2] / "hub_uploads" / "datasets" / "lion-quickstart"
    if checkout.is_dir():
        return checkout
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(QUICKSTART_REPOSITORY, repo_type="dataset"))


def quickstart_test_sets(folder: str | Path) -> dict[str, Path]:
    """Write the test sets of the data set as BEIR folders, unless they are there.

    Args:
        folder: Where to write them, each in a folder of its name.

    Returns:
        Folder of each test set, by name: squad_dev and scifact.
    """
    parquet = require("pyarrow.parquet")

    data = quickstart_data()
    written = {name: Path(folder) / name for name in TEST_SETS}
    for name, target in written.items():
        if (target / "qrels" / "test.tsv").exists():
            continue
        corpus, queries, judgements = (
            parquet.read_table(data / name / f"{part}.parquet").to_pylist() for part in ("corpus", "queries", "qrels")
        )
        qrels: Qrels = {}
        for row in judgements:
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
        save_beir(
            target,
            {row["_id"]: {"title": row["title"], "text": row["text"]} for row in corpus},
            {row["_id"]: row["text"] for row in queries},
            qrels,
        )
    return written
