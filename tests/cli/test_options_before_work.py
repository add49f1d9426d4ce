"""A value that no command can work with is refused before a model, a corpus or a run is opened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# (command, what its error says); DIR is a folder, FILE a file, OTHER another, NEW a name that is not taken.
FUSE = ["fuse", "FILE", "OTHER", "--output", "NEW"]
FITTED = [*FUSE, "--dev", "FILE", "--dev", "OTHER", "--dev-qrels", "FILE"]
INDEX = ["index", "DIR", "NEW"]
PRUNE = ["prune", "DIR", "--queries", "DIR", "--qrels", "FILE", "--report", "NEW"]
EVALUATE = ["evaluate", "DIR", "--data", "DIR", "--output", "NEW"]
ENCODE = ["encode", "DIR", "DIR", "NEW"]
QUERY_ENCODER = ["query-encoder", "DIR", "DIR", "NEW"]
WRONG = [
    ([*FUSE, "--weight", "-1", "--weight", "2"], "--weight is a finite number of at least 0, got -1.0"),
    ([*FUSE, "--weight", "nan", "--weight", "2"], "--weight is a finite number of at least 0, got nan"),
    ([*FUSE, "--weight", "inf", "--weight", "2"], "--weight is a finite number of at least 0, got inf"),
    ([*FUSE, "--weight", "0", "--weight", "0"], "All --weight are 0"),
    ([*FUSE, "--weight", "1"], "2 runs need as many --weight, got 1"),
    ([*FUSE, "-k", "0"], "Invalid value for '-k'"),
    ([*FUSE, "--metric", "nDCG@10"], "--metric is what weights are fitted to"),
    ([*FITTED, "--metric", "nDGC@10"], "Unknown metric 'nDGC@10'"),
    ([*FITTED, "-k", "5"], "nDCG@10 looks deeper than the 5 documents"),
    (["fuse", "FILE", "--output", "NEW"], "two runs or more"),
    (["fuse", "FILE", "OTHER", "FILE", "--output", "NEW", "--dev", "FILE", "--dev", "FILE", "--dev", "FILE",
      "--dev-qrels", "FILE"], "Weights are fitted for two runs"),
    ([*INDEX, "--threshold", "nan"], "threshold is a finite weight of at least 0, got nan"),
    ([*INDEX, "--threshold", "-0.5"], "got -0.5"),
    ([*INDEX, "--top-terms", "0"], "Invalid value for '--top-terms'"),
    ([*INDEX, "--sample", "-1"], "Invalid value for '--sample'"),
    ([*INDEX, "--set", "probes=3"], "exact has no setting 'probes': choose from quantization, dtype"),
    ([*PRUNE, "--metric", "nothing"], "Unknown metric 'nothing'"),
    ([*PRUNE, "--metric", "Recall@1000"], "Recall@1000 looks deeper than the 100 documents"),
    ([*PRUNE, "--top-terms", "-3"], "Invalid value for '--top-terms'"),
    ([*PRUNE, "-k", "-1"], "Invalid value for '-k'"),
    (["search", "DIR", "DIR", "query", "-k", "0"], "Invalid value for '-k'"),
    (["search", "DIR", "DIR", "query", "--threads", "0"], "Invalid value for '--threads'"),
    ([*EVALUATE, "--metric", "MRR@ten"], "Unknown metric 'MRR@ten'"),
    ([*EVALUATE, "--engine", "lucene"], "Unknown engine 'lucene': choose one of exact"),
    ([*EVALUATE, "--engine", "faiss", "--set", "quantization=uint8"], "faiss has no setting 'quantization'"),
    ([*EVALUATE, "--hybrid", "rrf"], "--hybrid rrf fuses two models or more, got 1"),
    ([*EVALUATE, "--dev", "DIR"], "--dev is for the weights of --hybrid convex"),
    ([*EVALUATE, "--bm25-stemmer", "porter"], "add --bm25"),
    ([*EVALUATE, "--bm25", "--bm25-stemmer", "krovetz"], "stemmer must be one of"),
    (["evaluate", "bm25", "FILE", *EVALUATE[2:], "--idf"], "--idf weighs the terms of sparse models' queries"),
    (["evaluate", "DIR"], "nothing to evaluate on"),
    (["evaluate", "DIR", "--data", "DIR", "--output", "FILE/inside"], "cannot be made"),
    ([*ENCODE, "--ray", "--cpus-per-worker", "-1"], "--cpus-per-worker is a finite number above 0, got -1"),
    ([*ENCODE, "--workers", "2"], "--workers are actors of Ray"),
    ([*ENCODE, "--max-tokens", "0"], "Invalid value for '--max-tokens'"),
    ([*QUERY_ENCODER, "--epochs", "nan"], "--epochs is a finite number above 0, got nan"),
    ([*QUERY_ENCODER, "--learning-rate", "-1"], "--learning-rate is a finite number above 0"),
    (["compare", "FILE", "OTHER", "--qrels", "FILE", "--metric", "F1"], "Unknown metric 'F1'"),
    (["compare", "FILE", "OTHER", "--qrels", "FILE", "--baseline", "c"], "--baseline c is not among the runs"),
    (["compare", "FILE", "--qrels", "FILE"], "two runs or more"),
    (["demo", "DIR", "--port", "99999"], "Invalid value for '--port'"),
    (["card", "DIR", "--results", "NEW"], "There are no --results"),
    (["publish", "DIR", "me/it", "--results", "NEW"], "There are no --results"),
    (["publish", "DIR", "me/it", "--folder", "--license", "mit"], "--folder uploads a folder as it is"),
    (["publish", "DIR", "me/it", "--repo-type", "space"], "--repo-type is for --folder"),
]  # fmt: skip

PROGRAM = """
import json, sys
from typer.testing import CliRunner
from lion_st.cli import app
results = []
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    results.append([done.exit_code, done.stderr])
heavy = {"torch", "mteb", "transformers", "datasets", "numba"} & set(sys.modules)
print(json.dumps([sorted(heavy), results]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[list[str], list[tuple[int, str]], Path]:
    """What imported, and exit code and error of every command, in one process."""
    folder = tmp_path_factory.mktemp("options")
    places = {name: str(folder / name.lower()) for name in ("DIR", "FILE", "OTHER", "NEW")}
    (folder / "dir").mkdir()
    for name in ("file", "other"):
        (folder / name).write_text("q Q0 d 1 1.0 run\n")

    def placed(argument: str) -> str:
        name, slash, rest = argument.partition("/")
        return places.get(name, name) + slash + rest

    commands = [[placed(argument) for argument in command] for command, _ in WRONG]
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, results = json.loads(done.stdout)
    return heavy, results, folder


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(command) for command, _ in WRONG])
def test_a_wrong_value_is_refused(answers, number) -> None:
    code, line = answers[1][number]
    assert WRONG[number][1] in line, line
    assert code in (1, 2) and line.count("\n") == 1 and line.startswith(f"lion-st {WRONG[number][0][0]}: ")


def test_nothing_was_opened_or_written_for_it(answers) -> None:
    heavy, _, folder = answers
    assert not heavy
    assert sorted(path.name for path in folder.iterdir()) == ["dir", "file", "other"]
