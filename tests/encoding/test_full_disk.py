"""A full disk and a folder that cannot be made are one clear line, leave nothing half-written, and a rerun goes on."""

import json
import subprocess
import sys

import pytest
from tiny_models import TEXTS

import lion_st

pytest.importorskip("resource")

# Each line of the standard input is a command line with the largest file that it may write, in bytes.
PROGRAM = """
import contextlib, io, json, resource, sys
from lion_st.cli import app

for line in sys.stdin:
    largest, *arguments = json.loads(line)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            app(arguments, prog_name="lion-st")
        except SystemExit as end:
            code = end.code or 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([code, errors.getvalue()]), flush=True)
"""


def test_a_full_disk_is_one_line_and_a_rerun_goes_on(tiny_backbone, tmp_path):
    checkpoint = lion_st.export(lion_st.build(tiny_backbone(), "sparse"), tmp_path / "lion", verify=False)
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"_id": f"d{n}", "text": f"{TEXTS[n % 8]} {n}"} for n in range(3)]
    rows += [{"_id": f"e{n}", "text": f"{TEXTS[n % 8]} {n}"} for n in range(200)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, index = tmp_path / "encoded", tmp_path / "index"
    anything, little = 1 << 30, 20_000
    encode = ["encode", str(checkpoint), str(corpus), str(encoded), "--shard-documents", "3", "--quiet"]
    whole = [*encode[:3], str(tmp_path / "whole"), "--shard-documents", "100", "--quiet"]
    commands = [
        [anything, *encode],
        [little, *whole],
        [anything, *whole],
        [little, "index", str(encoded), str(index), "--sample", "0", "--quiet"],
        [anything, "index", str(encoded), str(index), "--sample", "0", "--quiet"],
        [little, "index", str(encoded), str(index), "--sample", "0", "--quiet", "--overwrite"],
        [anything, "encode", str(checkpoint), str(corpus), "/dev/null/encoded", "--quiet"],
        [anything, "index", str(encoded), "/dev/null/index", "--quiet"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="".join(json.dumps(line) + "\n" for line in commands),
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(outcomes) == len(commands), done.stderr[-2000:]
    assert [code for code, _ in outcomes] == [0, 1, 0, 1, 0, 1, 1, 1], outcomes
    for code, errors in outcomes:
        if code:
            assert errors.count("\n") == 1 and "Traceback" not in errors and "unexpected" not in errors, errors
            assert any(str(place) in errors for place in (tmp_path / "whole", index, "/dev/null")), errors
    from lion_st.encoding import EncodedCorpus
    from lion_st.indexes import load_index

    assert len(EncodedCorpus(tmp_path / "whole")) == len(load_index(index)) == 203
    for folder in (encoded, tmp_path / "whole", index):
        assert not [child.name for child in folder.iterdir() if child.name.endswith(".tmp")]
    assert len(list(index.glob("data-*"))) == 1
