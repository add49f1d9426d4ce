"""A run's checkpoints: sealed with checksums once they are whole, and the one that a run goes on from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from sentence_transformers.util import get_rank, get_world_size
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lion_st.files import (
    atomic_write,
    checksum,
    fsync_tree,
    has_checksum,
    inside,
    lock_folder,
    read_json,
    remove_abandoned,
)
from lion_st.modules.folding import RESUME_FILE

logger = logging.getLogger(__name__)
Decision = TypeVar("Decision")
CHECKSUMS = "checksums.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
UNSEALED = ".unsealed"  # is in a checkpoint until its checksums are
DAMAGED = "damaged-"  # put in front of the name of a checkpoint that is not gone on from


def seal_checkpoint(folder: Path) -> None:
    """Say that a checkpoint is whole: write the sizes and checksums of its files, once all are on the disk."""
    fsync_tree(folder)
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "xxh3": checksum(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != UNSEALED
    }
    atomic_write(folder / CHECKSUMS, json.dumps({"version": 1, "files": files}, indent=2) + "\n")
    (folder / UNSEALED).unlink(missing_ok=True)


def begin_checkpoint(folder: Path) -> None:
    """Make the folder of a checkpoint, empty but for a mark that goes when it is sealed.

    What stood there is removed: of its files none may be taken for one of the new.
    """
    (folder / CHECKSUMS).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / UNSEALED).touch()


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if a run can go on from it.

    Weights or an adapter, optimizer, learning rate schedule, random states and the trainer's state have to be there,
    and all files as their checksums say.
    """
    if _is_unfinished(folder):
        return "it was not written to its end"
    try:
        return _missing_part(folder) or _changed_file(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read ({error})"


def checkpoint_to_resume(folder: Path, given: str | bool | None = None) -> str | None:
    """The checkpoint a run goes on from: the one that was given, else the last whole one in its folder, None to begin.

    A newer one that is damaged is named in a warning and renamed to `damaged-checkpoint-...`. What killed processes
    left in the folder, unfinished checkpoints among it, is removed. Of several processes the first does all this, and
    the others follow it.

    Args:
        folder: The run's output folder.
        given: The option `resume_from_checkpoint`: a folder; or whether to resume.

    Raises:
        FileNotFoundError: If the given folder is not a checkpoint.
        FolderInUse: If another process trains into the folder.
        ValueError: If the given checkpoint is damaged, or all that the folder holds; or if the run shall begin anew in
            a folder that holds checkpoints.
    """
    return decided_by_first_rank(partial(_choose, folder, given))


def decided_by_first_rank(decide: Callable[[], Decision]) -> Decision:
    """What a function returns or raises on the first process, on all of them."""
    if get_world_size() == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _choose(folder: Path, given: str | bool | None) -> str | None:
    answer = {"true": True, "false": False}.get(str(given).lower(), given)
    if answer is not None and not isinstance(answer, bool):
        return _require_whole(Path(answer))
    if not folder.is_dir():
        return None
    with lock_folder(folder, wait=False):
        return _last_whole(folder, given if answer is False else None)


def _last_whole(folder: Path, refused: Any) -> str | None:
    _remove_leftovers(folder)
    checkpoints = _checkpoints(folder)
    if refused is not None and checkpoints:
        raise ValueError(
            f"{folder} holds checkpoints, which --resume_from_checkpoint {refused} would write over: delete them, or "
            "choose another --output_dir."
        )
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints:
        problem = checkpoint_damage(checkpoint)
        if problem is None:
            for other, reason in damaged.items():
                aside = other.with_name(DAMAGED + other.name)
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(other, aside)
                logger.warning(
                    "%s is damaged: %s. The run goes on from %s; the damaged one is now %s.",
                    other,
                    reason,
                    checkpoint.name,
                    aside.name,
                )
            return str(checkpoint)
        damaged[checkpoint] = problem
    if damaged:
        found = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in damaged.items())
        raise ValueError(
            f"All checkpoints in {folder} are damaged ({found}). Restore one of them from a copy, or delete them to "
            "begin anew."
        )
    return None


def _require_whole(checkpoint: Path) -> str:
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint {checkpoint} is not a checkpoint: it has no {TRAINER_STATE_NAME}."
        )
    problem = checkpoint_damage(checkpoint)
    if problem is not None:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is damaged: {problem}. Name an earlier one, or leave the option "
            "out to go on from the last whole one."
        )
    return str(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, the latest first."""
    numbered = {path: path.name.partition("-")[2] for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*")}
    return sorted((path for path, step in numbered.items() if step.isdigit()), key=lambda p: -int(numbered[p]))


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a run's folder, unfinished checkpoints and exports."""
    for checkpoint in _checkpoints(folder):
        if _is_unfinished(checkpoint):
            shutil.rmtree(checkpoint)
    for place in (folder, *_checkpoints(folder)):
        remove_abandoned(place / "saving")


def _is_unfinished(checkpoint: Path) -> bool:
    """Whether a process was killed while it wrote the checkpoint, or has not sealed it yet."""
    is_begun = (checkpoint / UNSEALED).exists() or not (checkpoint / TRAINER_STATE_NAME).exists()
    return is_begun and not (checkpoint / CHECKSUMS).exists()


def _missing_part(folder: Path) -> str | None:
    modules = folder / "modules.json"
    entries = read_json(modules) if modules.is_file() else []
    weights = folder / (entries[0]["path"] if entries else "")  # those of a SparseEncoder lie in a folder of their own
    if not any((weights / name).is_file() for name in WEIGHTS):
        return "it has neither weights nor an adapter"
    needed = [folder / TRAINER_STATE_NAME, folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME]
    if (weights / WEIGHTS[1]).is_file():
        shards = read_json(weights / WEIGHTS[1])["weight_map"].values()
        needed += [weights / name for name in sorted(set(shards))]
    if (weights / WEIGHTS[2]).is_file():
        needed.append(weights / "adapter_config.json")
    if any("SpladePooling" in entry["type"] for entry in entries):
        needed.append(weights / RESUME_FILE)  # the final norm before the scale was folded in
    missing = [path.name for path in needed if not path.is_file()]
    if not any(folder.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    return f"{', '.join(missing)} missing" if missing else None


def _changed_file(folder: Path) -> str | None:
    """The first file that is not what its checksum says."""
    for name, facts in read_json(folder / CHECKSUMS)["files"].items():
        path = inside(folder, name)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}"
        if not has_checksum(path, facts):
            return f"{name} does not match its checksum"
    return None


def saved_callback(state: TrainerState, name: str) -> dict[str, Any]:
    """What a saved state keeps of a callback: `args` and `attributes`."""
    saved: Any = state.stateful_callbacks
    return saved.get(name, {}) if isinstance(saved, dict) else {}


def is_over(state: TrainerState, stop_after: int | None) -> bool:
    """Whether a training had taken its last step when this state was saved."""
    last_step = state.max_steps if stop_after is None else min(state.max_steps, stop_after)
    stopping = saved_callback(state, "EarlyStopping")
    patience = stopping.get("args", {}).get("early_stopping_patience")
    counted = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return state.global_step >= last_step > 0 or (patience is not None and counted >= patience)
