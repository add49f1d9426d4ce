"""Where the bundled data set is: training tuples with teacher scores, and two test sets."""

from __future__ import annotations

import os
from pathlib import Path

QUICKSTART_REPOSITORY = "lion-st/lion-quickstart"
QUICKSTART_VARIABLE = "LION_ST_QUICKSTART"
TEST_SETS = ("squad_dev", "scifact")  # see `lion_st.data.beir.quickstart_test_sets`


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
