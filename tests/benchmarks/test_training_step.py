"""The table of training steps is measured by processes of their own, one a side."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_step.py"


def test_a_tiny_step_is_measured(tmp_path):
    sizes = ["--shape", "tiny", "--vocabulary", "1000", "--active-terms", "50", "--rows", "1", "--negatives", "1"]
    words = [*sizes, "--steps", "1", "--sides", "lion_st", "--no-largest-batch", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), *words, str(tmp_path)], env=environment, check=True, timeout=500)
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["side"] == "lion_st" and row["tokens/s"] > 0 and row["seconds/step"] > 0
