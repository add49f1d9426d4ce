"""The scores that a card shows: mteb's results, each of one measurement that nothing else contradicts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

# Model, test set, subset, split and engine -> what rows of figures say of the measurement, each in its file.
RowKey: TypeAlias = tuple[str, str, str, str, str | None]
RowFigures: TypeAlias = dict[RowKey, dict[Path, dict[str, Any]]]

RESULTS_FOLDER = "results"
ROW_FIGURES = ("query_terms", "document_terms", "dtype")


@dataclass(frozen=True)
class TaskScores:
    """One model's scores on one test set, as mteb wrote them.

    Attributes:
        revision: A hash of the weights, lengths and engine settings, or the Hub's commit.
        settings: Depth and the like: those of the experiment but the engine, and the place where local data lay.
        query_terms: Mean active terms of a query, if rows of figures say so.
        document_terms: Likewise of a document.
        dtype: Type of the weights while measuring, likewise.
    """

    model: str
    task: str
    subset: str
    split: str
    scores: dict[str, float]
    dataset_revision: str
    mteb_version: str
    engine: str | None
    file: Path
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    query_terms: float | None = None
    document_terms: float | None = None
    dtype: str | None = None

    @property
    def is_bm25(self) -> bool:
        """Whether these are BM25's."""
        return self.model.split("/")[-1].lower().startswith("bm25")


def task_scores(places: Iterable[Path]) -> list[TaskScores]:
    """Every mteb result in files and folders, by test set; of several engines over the same vectors the exact one.

    Raises:
        FileNotFoundError: If a place is not there.
        ValueError: If they are of several models other than BM25, or of one with several weights or settings, or a file
            is damaged.
    """
    found: dict[tuple[bool, str, str, str], list[TaskScores]] = {}
    rows: RowFigures = {}
    models: set[str] = set()
    for file in _result_files(places):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}). Evaluate again, or remove it.") from error
        for key, figures in _row_figures(content).items():
            rows.setdefault(key, {})[file] = figures
        for scores in _read_task_result(file, content):
            models |= set() if scores.is_bm25 else {scores.model}
            found.setdefault((scores.is_bm25, scores.task, scores.subset, scores.split), []).append(scores)
    if len(models) > 1:
        raise ValueError(
            f"The results are of several models: {', '.join(sorted(models))}. Name the folder of the one that the card "
            "is about."
        )
    chosen = [_only_measurement(results) for _, results in sorted(found.items())]
    _require_same_weights(chosen)
    return [_with_figures(scores, rows) for scores in chosen]


def _result_files(places: Iterable[Path]) -> list[Path]:
    """The JSON files in some places, each once."""
    files: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"There are no results at {str(place)!r}. Evaluate first, or leave it out.")
        for file in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _only_measurement(results: list[TaskScores]) -> TaskScores:
    """The result of one model on one test set.

    Raises:
        ValueError: If there are several that a reader could not tell apart.
    """
    exact = [scores for scores in results if scores.engine == "exact"] or results
    first = exact[0]
    is_same = all((one.revision, one.settings) == (first.revision, first.settings) for one in results)
    if not is_same or any((one.engine, one.scores) != (first.engine, first.scores) for one in exact):
        raise ValueError(f"There are several results of {first.model} on {first.task}: {_told_apart(results)}")
    return first


def _require_same_weights(chosen: list[TaskScores]) -> None:
    """Refuse results on several test sets whose revisions, hashes of the model, differ under the same settings.

    Other settings may bring other lengths, and so another hash. A commit on the Hub changes with the card alone.
    """
    groups: dict[str, list[TaskScores]] = {}
    for scores in chosen:
        if scores.engine is not None:
            key = json.dumps([scores.model, scores.engine, scores.settings], sort_keys=True)
            groups.setdefault(key, []).append(scores)
    for results in groups.values():
        if len({scores.revision for scores in results}) > 1:
            raise ValueError(
                f"The results of {results[0].model} on {', '.join(scores.task for scores in results)} are not of the "
                f"same weights: {_told_apart(results)}"
            )


def _told_apart(results: Iterable[TaskScores]) -> str:
    files = ", ".join(dict.fromkeys(str(scores.file) for scores in results))
    return (
        f"{files}. They differ in the weights, their type, the lengths, the engine's settings or the depth. Name those "
        f"that the card is about (results=, --results), and leave no others in the checkpoint's {RESULTS_FOLDER}/."
    )


def _with_figures(scores: TaskScores, rows: RowFigures) -> TaskScores:
    """Scores with what the rows of figures say of the same measurement.

    Raises:
        ValueError: If rows contradict one another.
    """
    key = (scores.model.removeprefix("lion_st/"), scores.task, scores.subset, scores.split, scores.engine)
    found = rows.get(key, {})
    figures: dict[str, Any] = {}
    for row in found.values():
        if not all(_is_same(figures.setdefault(name, value), value) for name, value in row.items()):
            raise ValueError(
                f"Rows of figures of {scores.model} on {scores.task} contradict one another: "
                f"{', '.join(map(str, found))}. Keep those of the model that the card is about."
            )
    return replace(scores, **figures)


def _is_same(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, float) and math.isclose(one, other, rel_tol=1e-3))


def _row_figures(rows: Any) -> dict[RowKey, dict[str, Any]]:
    """Mean active terms and the type of the weights in rows such as `evaluate_retrieval` writes."""
    found: dict[RowKey, dict[str, Any]] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.keys() >= {"model", "dataset", "subset", "split", "engine"}:
            key = (row["model"], row["dataset"], row["subset"], row["split"], row["engine"])
            found[key] = {name: row[name] for name in ROW_FIGURES if row.get(name) is not None}
    return found


def _read_task_result(file: Path, content: Any) -> list[TaskScores]:
    if not isinstance(content, dict) or not {"task_name", "mteb_version", "scores"} <= content.keys():
        return []
    meta_file = file.parent / "model_meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8")) if meta_file.is_file() else {}
    settings = dict(meta.get("experiment_kwargs") or {})
    return [
        TaskScores(
            model=meta.get("name") or file.parent.parent.name.replace("__", "/"),
            task=content["task_name"],
            subset=part.get("hf_subset", "default"),
            split=split,
            scores={name: value for name, value in part.items() if isinstance(value, int | float)},
            dataset_revision=content.get("dataset_revision") or "",
            mteb_version=content["mteb_version"],
            engine=settings.get("engine"),
            file=file,
            revision=meta.get("revision"),
            settings={name: value for name, value in settings.items() if name not in ("engine", "data")},
        )
        for split, parts in content["scores"].items()
        for part in parts
    ]
