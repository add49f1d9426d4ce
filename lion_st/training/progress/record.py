"""What a training run was asked to do and what it has cost so far, beside its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from sentence_transformers.util import get_rank
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lion_st.files import atomic_write, read_json

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_STATES = 30.0
# How a batch is divided: what may change in a run whose result does not depend on it.
DIVISION = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps")


class RunLog(TrainerCallback):
    """A JSON file with a run's settings, kept up to date at every checkpoint, so that a run resumes only itself.

    Beside it `trainer_state.json` holds what was logged, also since the last checkpoint, for `lion-st report`.

    Args:
        path: The JSON file, in the run's output folder.
        settings: What determines the result of the run. A folder with other settings is refused; another number of
            processes with the same batch is not, but warned of.
        data_checksum: `lion_st.data.sources.files_checksum` of the data. A folder of a run on others is refused.
        tokens_a_step: Tokens of an optimizer step, where all steps have as many.
        accumulates: Whether accumulation steps leave the objective as it is. Where they do not, because the texts of a
            step are each other's negatives, a run keeps their number.

    Raises:
        ValueError: If the folder belongs to a run with other settings or data; the message names them.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        data_checksum: str | None = None,
        tokens_a_step: int | None = None,
        accumulates: bool = False,
    ) -> None:
        self.path = path
        self.tokens_a_step = tokens_a_step
        self.accumulates = accumulates
        # The way through JSON turns tuples into lists, as they come back from an earlier run.
        settings = json.loads(json.dumps(settings, default=str))
        self.content: dict[str, Any] = {"settings": settings}
        if path.exists():
            self.content = read_json(path)
            self._require_same_settings(self.content.get("settings", {}), settings)
            self.content["settings"] = settings
        if data_checksum is not None:
            self._require_same_data("checksum", data_checksum)
        self._seconds_before = self.content.get("seconds", 0.0)
        self._start = time.monotonic()
        self._last_state = -math.inf

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
        """Write the settings before the first step.

        Raises:
            ValueError: If the data have another number of rows than when the run was begun.
        """
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        if dataset is not None:
            self._require_same_data("rows", len(dataset))
        self._start = time.monotonic()
        self._write(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what was logged on the disk, not more often than `SECONDS_BETWEEN_STATES`."""
        if state.is_world_process_zero and time.monotonic() - self._last_state >= SECONDS_BETWEEN_STATES:
            self._write_state(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the run has cost up to this checkpoint."""
        self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the whole run has cost, and the last of what was logged."""
        self._write(state)
        if state.is_world_process_zero:
            self._write_state(state)

    def finish(self, state: TrainerState, **figures: Any) -> None:
        """Say that the run has written its result, and what it has cost."""
        self.update(steps=state.global_step, floating_point_operations=state.total_flos, **figures, finished=True)

    def _write_state(self, state: TrainerState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True)
        atomic_write(self.folder / TRAINER_STATE_NAME, content + "\n")
        self._last_state = time.monotonic()

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            seconds = self._seconds_before + time.monotonic() - self._start
            figures: dict[str, Any] = {"steps": state.global_step, "seconds": round(seconds, 2)}
            if self.tokens_a_step is not None:
                figures["tokens"] = state.global_step * self.tokens_a_step
            self.update(**figures, floating_point_operations=state.total_flos)

    def _require_same_settings(self, earlier: dict[str, Any], settings: dict[str, Any]) -> None:
        changed = {name for name in earlier.keys() | settings.keys() if earlier.get(name) != settings.get(name)}
        redivided = changed.intersection(DIVISION)
        if redivided and self._batches(earlier) == self._batches(settings):
            changed -= redivided
        if changed:
            described = [f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}" for name in sorted(changed)]
            raise ValueError(
                f"{self.folder} holds a run with other settings: {'; '.join(described)}. Repeat its command to "
                "resume it, or choose another --output_dir."
            )
        if redivided and not self.is_finished and get_rank() == 0:
            logger.warning(
                "The run in %s was begun on %s process(es) and goes on on %s. The batch is the same; dropout, order "
                "and rounding are not: the result will not be equal to the bit.",
                self.folder,
                earlier.get("world_size"),
                settings.get("world_size"),
            )

    def _batches(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """The sizes that the objective depends on: of an optimizer step, and of the texts that see each other."""
        world_size, each, steps = (settings.get(name) or 1 for name in DIVISION)
        return (world_size * each * steps,) if self.accumulates else (world_size * each, steps)

    def _require_same_data(self, name: str, found: Any) -> None:
        earlier = self.content.setdefault("data", {}).setdefault(name, found)
        if earlier != found:
            raise ValueError(
                f"{self.folder} holds a run on other data: their {name} was {earlier} and is {found}. Restore them, "
                "or choose another --output_dir."
            )
