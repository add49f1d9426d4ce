"""Check and measure everything that needs a GPU, in one command of five and a half minutes.

    python benchmarks/gpu/check.py                             # one H100 or H200; --seconds bounds the whole
    python benchmarks/gpu/check.py --device cpu --seconds 900  # a rehearsal of the same lines at toy shapes
    python benchmarks/gpu/check.py --wheels folder             # install these wheels for the run alone, from no index

It needs torch, triton, transformers, sentence-transformers, peft, accelerate, scipy, numba and pytest (pytest-xdist and
pytest-timeout where they are installed), and imports nothing else. Stages run in processes of their own, each with its
limit, the most important first; what they find goes to `results.json` in the output folder as it comes, what else they
print to `log.txt`. A stage that fails or is stopped keeps what it had, and stops no other. `tables.py` lays the results
out as Markdown.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import tables  # noqa: E402
from stages import SIZES  # noqa: E402

GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_triton.py", "tests/indexes/test_torch_search.py")
ABOUT = "about"  # the stage that always runs, so that figures have a card's name
LEAST_SECONDS = 8  # that a stage is begun with
LATEST = {
    "training": "side",
    "encode": "side",
    "test counts": "run",
}  # sections that keep the last row of each of these


class Stage(NamedTuple):
    """A command whose lines of JSON are findings."""

    name: str
    seconds: float  # its limit
    command: list[str]
    section: str | None = None  # of lines that name none
    labels: dict[str, Any] | None = None  # of such lines


class Results:
    """What was found so far, on disk after every line."""

    def __init__(self, file: Path, about: dict[str, Any]):
        self.file = file
        self.contents: dict[str, Any] = {"about": about, "stages": []}
        self.lock = threading.Lock()
        self._write()

    def add(self, section: str, row: dict[str, Any]) -> None:
        with self.lock:
            rows = self.contents.setdefault(section, [])
            if section in LATEST:
                rows[:] = [other for other in rows if other[LATEST[section]] != row[LATEST[section]]]
            rows.append(row)
            self._write()

    def _write(self) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(temporary, self.file)


class Run:
    """Stages under one limit of time.

    Args:
        results: Where their findings go.
        log: Where everything else that they print goes.
        seconds: Of all stages together.
        environment: Of their processes.
        patience: Factor on the limit of each stage.
    """

    def __init__(self, results: Results, log: Path, seconds: float, environment: dict[str, str], patience: float = 1.0):
        self.patience = patience
        self.results = results
        self.log = log.open("w")
        self.environment = environment
        self.began = time.monotonic()
        self.seconds = seconds

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def together(self, stages: list[Stage]) -> None:
        """Run stages side by side until the last one has ended."""
        threads = [threading.Thread(target=self.one, args=(stage,)) for stage in stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one(self, stage: Stage) -> None:
        """Run a stage to its end or limit."""
        started = self.elapsed()
        limit = min(stage.seconds * self.patience, self.seconds - started)
        if limit < LEAST_SECONDS:
            self._ended(stage, started, "not begun: no time was left")
            return
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=self.environment, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        reader = threading.Thread(target=self._read, args=(stage, process), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
            outcome = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        with contextlib.suppress(ProcessLookupError):  # its children may outlive it and hold memory of the GPU
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=5)
        self._ended(stage, started, outcome)

    def _read(self, stage: Stage, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.log.write(f"{stage.name}: {line}")
            self.log.flush()
            finding = parsed(line)
            if finding is None:
                continue
            if {"section", "row"} == finding.keys():
                self.results.add(finding["section"], finding["row"])
            elif stage.section is not None:
                self.results.add(stage.section, {**(stage.labels or {}), **finding})

    def _ended(self, stage: Stage, started: float, outcome: str) -> None:
        row = {"stage": stage.name, "from s": round(started, 1), "to s": round(self.elapsed(), 1), "outcome": outcome}
        self.results.add("stages", row)
        print(f"{self.elapsed():6.0f} s  {stage.name}: {outcome}", flush=True)


def parsed(line: str) -> dict[str, Any] | None:
    """The object that a line of JSON holds."""
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def plan(device: str, folder: Path, tests: bool) -> list[list[Stage]]:
    """Groups of stages, one after the other; those of a group run side by side."""
    sizes = SIZES[device]
    python = sys.executable
    on_gpu = device == "cuda"
    stages = [python, str(HERE / "stages.py"), "--device", device]
    model = ["--device", device, "--folder", str(folder), "--vocabulary", str(sizes["vocabulary"])]

    def training(side: str, seconds: float) -> Stage:
        script = str(ROOT / "benchmarks" / "training_step.py")
        command = [python, script, "--side", side, *model, *sizes["training"]]
        return Stage(f"training, {side}", seconds, command, "training", {"side": side})

    def encode(side: str, documents: int, seconds: float) -> Stage:
        script = str(ROOT / "benchmarks" / "encode.py")
        command = [python, script, "--side", side, *model, "--documents", str(documents)]
        return Stage(f"encode, {side}", seconds, command, "encode", {"side": side, "documents": documents})

    # Compilers and tests keep the processors busy and share the GPU: nothing is timed meanwhile.
    prepare = [
        Stage("model", 100, [*stages, "model", str(folder)]),
        Stage("attention", 60, [*stages, "attention"]),
    ]
    if tests:
        workers = max(1, (os.cpu_count() or 1) - 4) if on_gpu else 1
        prepare.append(Stage("tests", 170, pytest_command(gpu_tests(), workers)))
    prepare += [
        Stage(f"precompile {part}", 100, [*stages, "precompile", part])
        for part in [*map(str, sizes["dims"]), "compiled"]
    ]
    alone = [
        Stage("head", 60, [*stages, "head", "first"]),
        training("lion_st", 45),
        encode("encode_corpus", sizes["documents"], 60),
        training("stock", 40),
        encode("SparseEncoder.encode", sizes["stock documents"], 40),
        Stage("head, more", 60, [*stages, "head", "more"]),
        Stage("head, compiled", 40, [*stages, "head", "compiled"]),
        training("lion_st compiled", 55),
        training("lion_st cached", 30),
        training("stock cached", 30),
    ]
    groups = [prepare] if on_gpu else [[stage] for stage in prepare]
    alone.insert(0, Stage("machine", 45, [*stages, "machine"]))
    return [[Stage(ABOUT, 40, [*stages, ABOUT])], *groups, *([stage] for stage in alone)]


def gpu_tests() -> list[str]:
    """Files of the tests that a GPU changes: the kernels' and all others that ask for CUDA."""
    files = [str(ROOT / file) for file in GPU_TESTS]
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if "cuda.is_available()" in file.read_text(encoding="utf-8") and str(file) not in files:
            files.append(str(file))
    return files


def pytest_command(files: list[str], workers: int) -> list[str]:
    """pytest over some files, in parallel where pytest-xdist is installed."""
    options = ["-p", "pytest_plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rfEs", "--tb=short"]
    options += ["--continue-on-collection-errors", "-k", "not compile_within"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", "100"]
    return [sys.executable, "-m", "pytest", *files, *options]


def environment(scratch: Path, wheels: Path | None) -> dict[str, str]:
    """Variables of the stages; wheels are installed into the scratch folder."""
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    files = [str(file) for file in sorted(wheels.glob("*.whl"))] if wheels else []
    if files:
        site = scratch / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--no-cache-dir", "--target", str(site), *files], check=True)
        paths.insert(2, str(site))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # as others compile beside it
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "XDG_CACHE_HOME": str(scratch / "cache"),  # so that every run measures the kernels anew
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
    }


def commit() -> str:
    """The checkout's commit, or $COMMIT where it is a copy without a repository."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() if found and found.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SECONDS_IN_ALL", 330)))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--wheels", type=Path, default=Path(os.environ.get("WHEELS", ROOT / ".gpu" / "whl")))
    parser.add_argument("--stages", nargs="+", help="only those of these names, such as 'machine' and 'head'")
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    about = {"commit": commit(), "command": shlex.join(["python", *sys.argv]), "device": options.device}
    results = Results(options.output / "results.json", about)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        variables = environment(Path(name), options.wheels)
        seconds = options.seconds - (time.monotonic() - began) - 5  # for the tables
        patience = 1.0 if options.device == "cuda" else 4.0
        run = Run(results, options.output / "log.txt", seconds, variables, patience)
        for group in plan(options.device, Path(name) / "model", options.tests):
            run.together([stage for stage in group if not options.stages or stage.name in [ABOUT, *options.stages]])
    print("\n\n".join([tables.details(results.contents), tables.render(results.contents)]), flush=True)


if __name__ == "__main__":
    main()
