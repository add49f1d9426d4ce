"""Train the small retrievers on one GPU within minutes: stages in lanes, each with its own seconds, resumable.

python training_scripts/gpu_run/run.py --data data --out results --plan plan.json --seconds 540

A plan is a JSON list of stages {"name", "lane", "seconds", "command", "keep"}: stages of a lane run one after another,
lanes side by side; one that comes "after" a stage of another lane waits for it. A stage that has ended well is not
run again; one that failed ends its lane unless it is "optional". Commands are those that a person would type; "{work}",
"{data}", "{out}", "{seconds}" and "{python}" are filled in. Files that "keep" names are copied to `--out`, in parts of
15 MiB where they are larger, with `results.json`: seconds, exit status and last lines of every stage.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PART_BYTES = 15 * 2**20
LOCK = threading.Lock()
ENDED: set[str] = set()  # stages that are over, well or not


def keep(file: Path, name: str, out: Path) -> None:
    """Copy a file, in parts if it is large."""
    with file.open("rb") as source:
        number = 0
        while block := source.read(PART_BYTES):
            last = len(block) < PART_BYTES and number == 0
            (out / (name if last else f"{name}.{number:02d}")).write_bytes(block)
            number += 1


def note(out: Path, name: str, result: dict[str, Any]) -> None:
    with LOCK:
        file = out / "results.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        content[name] = result
        file.write_text(json.dumps(content, indent=1))
        print(json.dumps({name: {key: value for key, value in result.items() if key != "tail"}}), flush=True)


def run_stage(stage: dict[str, Any], options: argparse.Namespace, deadline: float) -> bool:
    """Whether the lane may go on; see `_run_stage`."""
    try:
        return _run_stage(stage, options, deadline)
    finally:
        ENDED.add(stage["name"])


def _run_stage(stage: dict[str, Any], options: argparse.Namespace, deadline: float) -> bool:
    """Whether the lane may go on."""
    work, out, name = Path(options.work), Path(options.out), stage["name"]
    done = work / "done" / name
    if done.exists():
        return True
    while "after" in stage and not (work / "done" / stage["after"]).exists():
        if stage["after"] in ENDED or time.time() > deadline:
            note(out, name, {"status": f"{stage['after']} has not ended well"})
            return False
        time.sleep(0.5)
    seconds = min(stage["seconds"] * options.scale, deadline - time.time() - 5)
    if seconds < 5:
        note(out, name, {"status": "no time left"})
        return False
    values = {"work": work, "data": options.data, "seconds": round(seconds, 1), "python": sys.executable, "out": out}
    command = stage["command"].format(**values)
    log = work / "logs" / f"{name}.txt"
    start = time.time()
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            # Loading, tokenizing and saving come on top of the seconds of training.
            status: int | str = process.wait(timeout=max(1, min(seconds + options.grace, deadline - time.time())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "out of time"
    tail = log.read_text(errors="replace")[-3000:]
    note(out, name, {"status": status, "seconds": round(time.time() - start, 1), "command": command, "tail": tail})
    for pattern in stage.get("keep", []):
        for file in sorted(work.glob(pattern)):
            keep(file, file.relative_to(work).as_posix().replace("/", "-"), out)
    if status == 0:
        done.touch()
        return True
    print(tail[-1500:], flush=True)
    return bool(stage.get("optional"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True, help="JSON file of the stages")
    parser.add_argument("--data", required=True, help="folder of the data")
    parser.add_argument("--out", required=True, help="folder for what is kept")
    parser.add_argument("--work", default="runs/gpu_run", help="folder of everything else")
    parser.add_argument("--seconds", type=float, default=540, help="seconds for all")
    parser.add_argument("--grace", type=float, default=60, help="seconds of a stage beside those of training")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the seconds of every stage")
    parser.add_argument("--lanes", help="comma-separated; all by default")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    for folder in ("logs", "done"):
        (Path(options.work) / folder).mkdir(parents=True, exist_ok=True)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    stages = json.loads(Path(options.plan).read_text())
    lanes: dict[str, list[dict[str, Any]]] = {}
    for stage in stages:
        lanes.setdefault(stage["lane"], []).append(stage)
    chosen = options.lanes.split(",") if options.lanes else list(lanes)

    def run_lane(name: str) -> None:
        for stage in lanes[name]:
            if not run_stage(stage, options, deadline):
                break

    threads = [threading.Thread(target=run_lane, args=(name,)) for name in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
