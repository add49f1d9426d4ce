"""What a training run was asked to do and what it has cost so far, beside its checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lion_st.files import atomic_write


class RunLog(TrainerCallback):
    """A JSON file with a run's settings, kept up to date at every checkpoint, so that a run resumes only itself.

    Args:
        path: The JSON file, in the run's output folder.
        settings: What determines the result of the run. A folder with other settings is refused.
        tokens_a_step: Tokens of an optimizer step, where all steps have as many.

    Raises:
        ValueError: If the folder belongs to a run with other settings; the message names them.
    """

    def __init__(self, path: Path, settings: dict[str, Any], tokens_a_step: int | None = None) -> None:
        self.path = path
        self.tokens_a_step = tokens_a_step
        # The way through JSON turns tuples into lists, as they come back from an earlier run.
        self.content: dict[str, Any] = {"settings": json.loads(json.dumps(settings, default=str))}
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            self._require_same_settings(earlier.get("settings", {}))
            self.content = earlier
        self._seconds_before = self.content.get("seconds", 0.0)
        self._start = time.monotonic()

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return self.path.parent

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its result."""
        return self.content.get("finished", False)

    def update(self, **figures: Any) -> None:
        """Add figures and write the file."""
        self.content |= figures
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(self.content, indent=2) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the settings before the first step."""
        self._start = time.monotonic()
        self._write(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the run has cost up to this checkpoint."""
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the whole run has cost."""
        self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            seconds = self._seconds_before + time.monotonic() - self._start
            figures: dict[str, Any] = {"steps": state.global_step, "seconds": round(seconds, 2)}
            if self.tokens_a_step is not None:
                figures["tokens"] = state.global_step * self.tokens_a_step
            self.update(**figures, floating_point_operations=state.total_flos)

    def _require_same_settings(self, earlier: dict[str, Any]) -> None:
        settings = self.content["settings"]
        changed = [
            f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted(earlier.keys() | settings.keys())
            if earlier.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.path.parent} holds a run with other settings: {'; '.join(changed)}. Repeat its command to "
                "resume it, or choose another --output_dir."
            )


def checkpoint_to_resume(folder: Path, given: str | bool | None = None) -> str | None:
    """The checkpoint a run goes on from: the one that was given, else the last in its folder, None to begin.

    Args:
        folder: The run's output folder.
        given: The option `resume_from_checkpoint`: a folder; or whether to resume.

    Raises:
        FileNotFoundError: If the given folder is not a checkpoint.
        ValueError: If the run shall begin anew in a folder that holds checkpoints.
    """
    answer = {"true": True, "false": False}.get(str(given).lower(), given)
    last = last_checkpoint(folder)
    if answer is False and last is not None:
        raise ValueError(
            f"{folder} holds checkpoints, which --resume_from_checkpoint {given} would write over: delete them, or "
            "choose another --output_dir."
        )
    if isinstance(answer, bool) or answer is None:
        return last
    if not (Path(answer) / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint {answer} is not a checkpoint: it has no trainer_state.json.")
    return answer


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint of a run that was written to its end, None if there is none.

    The trainer's state is the last file it writes; a checkpoint without it was cut off.
    """
    steps = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-[0-9]*")]
    for step in sorted(steps, reverse=True):
        state = folder / f"checkpoint-{step}" / TRAINER_STATE_NAME
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(state.parent)
    return None
