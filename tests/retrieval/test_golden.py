"""The exact search reproduces the runs of the paper's implementation."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lion_st.indexes import create_index


def test_the_exact_index_reproduces_the_golden_run(golden_case: Path) -> None:
    vectors = load_file(golden_case / "retrieval.safetensors")
    run = json.loads((golden_case / "retrieval_run.json").read_text())
    index = create_index("exact", "sparse")
    index.add([f"d{row}" for row in range(len(vectors["doc_reps"]))], vectors["doc_reps"])
    found = index.search(vectors["query_reps"], 20)
    assert len(found) == len(run)
    for row, hits in enumerate(found):
        assert dict(hits) == pytest.approx(run[f"q{row}"], rel=1e-5)
        assert [document for document, _ in hits] == list(run[f"q{row}"])
