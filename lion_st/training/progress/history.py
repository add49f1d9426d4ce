"""A run's history as a table and a figure: loss, nDCG and active terms over steps, also while it still goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lion_st.extras import require
from lion_st.files import atomic_file, read_json

Entry: TypeAlias = Mapping[str, Any]
STATE, RECORDS = "trainer_state.json", ("training.json", "mntp.json")
NDCG = "ndcg@10"
# What the table shows of a step, under which name.
COLUMNS = {
    "loss": "loss",
    "contrastive_loss": "CL",
    "distillation_loss": "KD",
    "sparse_contrastive_loss": "sparse CL",
    "sparse_distillation_loss": "sparse KD",
    "dense_contrastive_loss": "dense CL",
    "dense_distillation_loss": "dense KD",
    f"eval_{NDCG}": "nDCG@10",
    "query_active_dims": "query terms",
    "document_active_dims": "document terms",
    "in_batch_accuracy": "accuracy",
    "tokens_per_second": "tokens/s",
    "peak_memory_gib": "GiB",
}
LOSSES = {
    "loss": "loss",
    "contrastive_loss": "contrastive (CL)",
    "distillation_loss": "distillation (KD)",
    "base_loss": "ranking",
    **{
        f"{kind}_{name}": f"{kind} {words}"  # of hybrid models
        for kind in ("sparse", "dense")
        for name, words in (("contrastive_loss", "CL"), ("distillation_loss", "KD"), ("loss", "ranking"))
    },
    "query_regularizer_loss": "FLOPS of queries",
    "document_regularizer_loss": "FLOPS of documents",
}
TERMS = {"document_active_dims": "documents", "query_active_dims": "queries"}
# Colours that readers with any colour vision tell apart (Okabe and Ito), and dashes for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class RunHistory:
    """What a run has logged so far.

    Attributes:
        folder: The run's output folder.
        steps: Optimizer steps up to when it was last written.
        max_steps: Optimizer steps that were planned.
        is_finished: Whether the result is written.
        seconds_old: Seconds since it was last written.
        entries: What was logged, `step` and figures, in order.
    """

    folder: Path
    steps: int
    max_steps: int
    is_finished: bool
    seconds_old: float
    entries: list[dict[str, Any]]

    def describe(self) -> str:
        """How far the run is, in a line."""
        done = f"{self.folder}: step {self.steps:,} of {self.max_steps:,}"
        if self.is_finished:
            return f"{done}, finished."
        return f"{done}, not finished, last written {self.seconds_old:,.0f} seconds ago."


def read_history(folder: str | Path) -> RunHistory:
    """Read what a run has logged: the newest `trainer_state.json` of its folder and of its checkpoints that is whole.

    Args:
        folder: Output folder of `lion-st train` or `lion-st adapt`, finished, interrupted or still written to.
    """
    folder = Path(folder)
    states = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    there = sorted((path for path in states if path.is_file()), key=lambda path: -path.stat().st_mtime)
    if not there:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {STATE}, nor a checkpoint with one: name the --output_dir of a training that "
            "has logged something, see --logging_steps."
        )
    for path in there:
        try:
            state = read_json(path)
            entries = [dict(entry) for entry in state["log_history"]]
            steps, max_steps = int(state["global_step"]), int(state["max_steps"])
        except (ValueError, KeyError, TypeError):  # a checkpoint that is being written, or was cut off
            continue
        records = [read_json(folder / name) for name in RECORDS if (folder / name).is_file()]
        finished = any(record.get("finished", False) for record in records)
        return RunHistory(folder, steps, max_steps, finished, max(0.0, time.time() - path.stat().st_mtime), entries)
    raise ValueError(f"{', '.join(map(str, there))}: none of these can be read as a trainer's state.")


def history_rows(history: RunHistory, most: int = 20) -> list[dict[str, Any]]:
    """The figures of a run as rows of a table, one a step, evenly chosen if they are many.

    Args:
        history: Of the run.
        most: Rows, beside that of the best evaluation, which is always among them.
    """
    steps: dict[int, dict[str, Any]] = {}
    for entry in history.entries:
        shown = {name: entry[key] for key, name in COLUMNS.items() if key in entry}
        if shown:
            row = steps.setdefault(entry["step"], {"step": entry["step"]})
            row.update(shown)
    rows = [steps[step] for step in sorted(steps)]
    if len(rows) <= most:
        return rows
    chosen = {round(place * (len(rows) - 1) / (most - 1)) for place in range(most)}
    evaluated = [number for number, row in enumerate(rows) if "nDCG@10" in row]
    if evaluated:
        chosen.add(max(evaluated, key=lambda number: rows[number]["nDCG@10"]))
    return [rows[number] for number in sorted(chosen)]


def draw_history(history: RunHistory, files: Sequence[str | Path]) -> list[Path]:
    """Draw loss, nDCG@10 and active terms over steps, each where it was logged.

    Args:
        history: Of the run.
        files: Where to write the figure, in the formats of their endings, such as .svg and .png. What is there is
            replaced.

    Returns:
        The files.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [(title, series) for title, series in _panels(history) if series]
    if not panels:
        raise ValueError(f"{history.folder} has logged no loss yet: see --logging_steps.")
    figure = Figure(figsize=(8, 2.8 * len(panels) + 0.6), dpi=150, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, series) in zip(all_axes, panels, strict=True):
        for number, (label, points) in enumerate(series.items()):
            steps, values = zip(*points, strict=True)
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            marker = "o" if len(steps) <= 30 else None
            axes.plot(steps, values, label=label, linewidth=1.8, marker=marker, markersize=4, **style)
        if "terms" in title:
            axes.set_yscale("symlog", linthresh=1)
        axes.set_ylabel(title)
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best", fontsize="small")
    all_axes[-1].set_xlabel("step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(history.folder.resolve().name)
    written = [Path(file) for file in files]
    for file in written:
        metadata = {"Date": None} if file.suffix == ".svg" else None
        with atomic_file(file) as temporary:
            figure.savefig(temporary, format=file.suffix.removeprefix("."), metadata=metadata)
    return written


def _panels(history: RunHistory) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """What each panel shows: its title, and points by the name of their line."""
    collections = {
        key: key.removeprefix("eval_").removesuffix(end)
        for entry in history.entries
        for key in entry
        for end in (f"_dot_{NDCG}", f"_maxsim_{NDCG}")
        if key.endswith(end)
    }
    if len(collections) > 1:
        collections = {f"eval_{NDCG}": "mean", **collections}
    panels = [("loss", LOSSES), ("nDCG@10", collections), ("active terms", TERMS)]
    return [(title, _series(history.entries, names)) for title, names in panels]


def _series(entries: Sequence[Entry], names: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    found = {
        label: [(entry["step"], entry[key]) for entry in entries if key in entry and math.isfinite(entry[key])]
        for key, label in names.items()
    }
    return {label: points for label, points in found.items() if points}
