"""The training tests run several ranks as those of the losses do."""

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import positive, write_tuples

from lion_st.data import save_beir

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training tuples, see `write_tuples`."""
    return write_tuples(tmp_path_factory.mktemp("tuples") / "tuples.jsonl")


@pytest.fixture(scope="module")
def collection(data, tmp_path_factory) -> Path:
    """A BEIR folder of the queries of `data` and their positives."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return save_beir(
        tmp_path_factory.mktemp("beir") / "own",
        {f"d{row}": {"title": "", "text": positive(row)} for row in range(len(rows))},
        {f"q{row}": one["query"] for row, one in enumerate(rows)},
        {f"q{row}": {f"d{row}": 1} for row in range(len(rows))},
    )
