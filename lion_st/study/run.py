"""Runs the cells of a study in processes of their own, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from lion_st.files import atomic_write, lock_folder, read_json
from lion_st.study.data import StudyData, prepare_data
from lion_st.study.grid import Cell, MntpStage, Plan, output_place, place_of
from lion_st.study.jobs import JOB, LOG, ROWS
from lion_st.study.settings import OWN_TEXTS, BackboneChoice

DESCRIBED = (
    "backbone", "non_embedding_parameters", "parameters", "paradigm", "objective", "label_noise", "seed", "tokens",
    "budget_flops", "mntp_flops", "configuration",
)  # fmt: skip
QUIET = {"disable_tqdm": True, "report_to": "none"}


class StudyIncomplete(RuntimeError):
    """Some cells of a study have failed; the others are finished."""


def run_study(plan: Plan, output: str | Path, say: Callable[[str], Any] = print, workers: int = 1) -> Path:
    """Run the cells of a plan, each in a process of its own.

    A finished cell is skipped and an interrupted one goes on from its last checkpoint. One that fails, or whose process
    dies, is named in the end and tried again by the next run; the others are not held up by it.

    Args:
        plan: See `plan_study`.
        output: Folder of everything: data, backbones, cells.
        say: Takes a line for every cell.
        workers: Cells that run side by side, with the cores divided among them. Where there are several GPUs each
            worker has one, or one for each of the plan's processes, in turn. Results are the same up to the order of
            sums, but for the dropout of adapters, which each process draws for itself; seconds, and latencies of
            queries, are then those of a shared machine.

    Returns:
        The folder.

    Raises:
        StudyIncomplete: If a cell has failed, after all others were run.
        OverlapError: If a test set is trained on.
        ValueError: If the folder holds a cell of this name with other settings, if there are no workers, or fewer GPUs
            than processes of a cell.
        FolderInUse: If another process runs a study there.
    """
    from lion_st.kernels.bfloat16 import warn_of_slow_bfloat16

    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")
    gpus = visible_gpus()
    if 0 < len(gpus) < plan.processes:
        raise ValueError(f"{plan.processes} processes of a cell need a GPU each, and there are {len(gpus)}.")
    trainings = [stage for stage in (plan.study.training, plan.study.mntp) if stage is not None]
    if not gpus and any(stage.get("bf16", True) for stage in trainings):
        warn_of_slow_bfloat16("cpu", "bf16: false below training: and mntp:")
    folder = Path(output).resolve()
    begun = require_same_cells(plan, folder)
    with lock_folder(folder, wait=False):
        data = prepare_data(plan.study, folder / "data", begun)
        pool = Workers(workers, say, plan.processes)
        stages = []
        for stage in plan.stages:
            place = folder / "backbones" / stage.backbone
            job = {
                "stage": "mntp",
                "name": f"MNTP of {stage.backbone}",
                "options": stage_options(plan, stage, data, place),
                "processes": plan.processes,
            }
            stages.append(Job(place, job, stage.configuration, place / "finished"))
        failed = pool.run(stages)
        cells = []
        for cell in plan.cells:
            place = output_place(folder, cell.name)
            if f"MNTP of {cell.backbone}" in failed:
                failed[cell.name] = "its backbone's MNTP stage failed"
                say(f"{cell.name}: skipped, {failed[cell.name]}.")
            else:
                cells.append(Job(place, _cell_job(plan, cell, data, folder), cell.configuration, place / ROWS))
        failed |= pool.run(cells)
    if failed:
        described = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise StudyIncomplete(
            f"{len(failed)} of {len(plan.stages) + len(plan.cells)} jobs failed, the others are finished. {described}. "
            f"The logs are {folder / '*' / 'NAME' / LOG}; the same command tries again."
        )
    return folder


class Job(NamedTuple):
    """What a process does."""

    place: Path  # its folder
    contents: dict[str, Any]  # of its job.json
    configuration: str
    done: Path  # a file that stands when it has ended well

    @property
    def name(self) -> str:
        """What it is called in messages."""
        name: str = self.contents["name"]
        return name


class Workers:
    """Jobs side by side, each in a process of its own and on GPUs of its own where there are several.

    Args:
        number: Of jobs at a time.
        say: Takes a line for every job.
        processes: That train in each job.
    """

    def __init__(self, number: int, say: Callable[[str], Any], processes: int = 1):
        self.number = number
        self.say = say
        self.processes = processes
        self._free = list(range(number))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Run jobs in their order; what was wrong with those that failed, by name."""
        with ThreadPoolExecutor(self.number) as threads:
            waiting = [threads.submit(self._one, job) for job in jobs]
            try:
                wait(waiting, return_when=FIRST_EXCEPTION)
                errors = [one.result() for one in waiting if one.done()]
            except BaseException:
                self._stop()
                raise
        return {job.name: error for job, error in zip(jobs, errors, strict=True) if error is not None}

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _one(self, job: Job) -> str | None:
        place, name, done = job.place, job.name, job.done
        if done.exists():
            self.say(f"{name}: finished already.")
            return None
        place.mkdir(parents=True, exist_ok=True)
        atomic_write(place / JOB, json.dumps(job.contents | {"configuration": job.configuration}, indent=1) + "\n")
        with (place / LOG).open("ab") as log:
            begin = log.tell()
            with self._lock:
                if self._stopped:
                    return "not begun"
                self.say(f"{name}: runs, {place / LOG}")
                slot = self._free.pop(0)
                command = [sys.executable, "-m", "lion_st.study.jobs", str(place)]
                environment = worker_environment(slot, self.number, self.processes)
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
                self._free.append(slot)
        if code == 0:
            if not done.exists():
                done.touch()
            return None
        written = (place / LOG).read_bytes()[begin:]  # earlier attempts are none of this one's
        lines = written.decode("utf-8", errors="replace").strip().splitlines()
        reason = f"ended by signal {-code}" if code < 0 else last_error(lines) or f"exit code {code}"
        self.say(f"{name}: FAILED, {reason}")
        return reason


def last_error(lines: Sequence[str]) -> str | None:
    """What a job said in the end; what torchrun adds when one of its processes fails is no news."""
    own = [line for line in lines[-100:] if line.startswith("job: ")]
    return own[-1].removeprefix("job: ") if own else (lines[-1] if lines else None)


def require_same_cells(plan: Plan, folder: Path) -> bool:
    """Refuse a folder with cells of these names and other settings; whether it holds a cell or stage of any study."""
    jobs = [(output_place(folder, cell.name), cell.name, cell.configuration) for cell in plan.cells]
    jobs += [(folder / "backbones" / one.backbone, f"MNTP of {one.backbone}", one.configuration) for one in plan.stages]
    for place, name, configuration in jobs:
        file = place / JOB
        if file.exists() and read_json(file)["configuration"] != configuration:
            raise ValueError(
                f"{folder} holds {name} with other settings than the study now has. Choose another --output, or remove "
                f"{place} to run it again."
            )
    return any(folder.glob(f"*/*/{JOB}"))


def commit() -> str:
    """The commit of the checkout that lion_st is imported from, "+" where files differ from it; else its version."""
    place = Path(__file__).parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(place), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == place.resolve():
            return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return version("lion-st")
    except PackageNotFoundError:
        return "unknown"


def visible_gpus() -> list[str]:
    """The GPUs that processes of this one see, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(one) for one in range(torch.cuda.device_count())]
    # As CUDA reads it: the list ends at the first that names none, such as the -1 that hides all.
    names = (one.strip() for one in visible.split(","))
    return list(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))


def worker_environment(slot: int, workers: int, processes: int = 1) -> dict[str, str]:
    """Variables of a worker's job, which sees a GPU for each of its processes and has its share of the cores."""
    import torch

    environment = dict(os.environ)
    if workers * processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // (workers * processes))))
    gpus = visible_gpus()
    if len(gpus) < 2:
        return environment
    own = [gpus[(slot * processes + one) % len(gpus)] for one in range(processes)]
    return environment | {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def _choice(plan: Plan, name: str) -> BackboneChoice:
    return next(choice for choice in plan.study.backbones if choice.name == name)


def stage_options(plan: Plan, stage: MntpStage, data: StudyData, place: Path) -> dict[str, Any]:
    """Options of `lion-st adapt` for an MNTP stage, whose result is to be at a place."""
    choice = _choice(plan, stage.backbone)
    options = dict(stage.options)
    if options["backbone"] == choice.model:
        options["backbone"] = place_of(choice)
    texts = options.get("texts")
    if texts is not None:
        texts = [texts] if isinstance(texts, str) else texts
        options["texts"] = [str(data.texts) if one == OWN_TEXTS else one for one in texts]
    if plan.processes > 1:
        options["per_device_train_batch_size"] = stage.batch // plan.processes
    return options | QUIET | {"output_dir": str(place)}


def _cell_job(plan: Plan, cell: Cell, data: StudyData, folder: Path) -> dict[str, Any]:
    study = plan.study
    model = str(folder / "backbones" / cell.backbone) if plan.stages else place_of(_choice(plan, cell.backbone))
    place = output_place(folder, cell.name)
    options: Mapping[str, Any] = {
        **cell.options,
        **data.options[cell.label_noise],
        **QUIET,
        "model": model,
        "output_dir": str(place / "trained"),
    }
    description = {
        "study": study.name,
        "cell": cell.name,
        **{name: getattr(cell, name) for name in DESCRIBED},
        "commit": commit(),
    }
    return {
        "stage": "cell",
        "name": cell.name,
        "options": options,
        "processes": plan.processes,
        "temperature": cell.temperature,
        "dense_temperature": cell.dense_temperature,
        "keep_weights": study.keep_weights,
        "evaluation": study.of_evaluation(),
        "tests": dict(data.tests),
        "description": description,
    }
