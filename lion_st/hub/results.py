"""The scores that a card shows: mteb's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from lion_st.files import read_json

# Model, test set, subset, split and engine -> what rows of figures say of the measurement.
RowKey: TypeAlias = tuple[str, str, str, str, str | None]

RESULTS_FOLDER = "results"
ROW_FIGURES = ("query_terms", "document_terms", "dtype")


@dataclass(frozen=True)
class TaskScores:
    """One model's scores on one test set, as mteb wrote them.

    Attributes:
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    query_terms: float | None = None
    document_terms: float | None = None
    dtype: str | None = None

    @property
    def is_bm25(self) -> bool:
        """Whether these are BM25's."""
        return self.model.split("/")[-1].lower().startswith("bm25")


def task_scores(places: Iterable[Path]) -> list[TaskScores]:
    """Every mteb result in files and folders, by test set; of several engines over the same vectors the exact one."""
    found: dict[tuple[bool, str, str, str], list[TaskScores]] = {}
    figures: dict[RowKey, dict[str, Any]] = {}
    for file in _result_files(places):
        content = read_json(file)
        figures |= _row_figures(content)
        for scores in _read_task_result(file, content):
            found.setdefault((scores.is_bm25, scores.task, scores.subset, scores.split), []).append(scores)
    models = {one.model for results in found.values() for one in results if not one.is_bm25}
    if len(models) > 1:
        raise ValueError(
            f"The results are of several models: {', '.join(sorted(models))}. Name the folder of the one that the card "
            "is about."
        )
    chosen = []
    for _, results in sorted(found.items()):
        exact = [one for one in results if one.engine == "exact"] or results
        if any((one.scores, one.settings) != (exact[0].scores, exact[0].settings) for one in exact):
            raise ValueError(
                f"There are several results of {exact[0].model} on {exact[0].task}: "
                f"{', '.join(dict.fromkeys(str(one.file) for one in exact))}. Name those that the card is about "
                f"(results=, --results), and leave no others in the checkpoint's {RESULTS_FOLDER}/."
            )
        first = exact[0]
        key = (first.model.removeprefix("lion_st/"), first.task, first.subset, first.split, first.engine)
        chosen.append(replace(first, **figures.get(key, {})))
    return chosen


def _result_files(places: Iterable[Path]) -> list[Path]:
    """The JSON files in some places, each once."""
    files: dict[Path, Path] = {}
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"There are no results at {str(place)!r}. Evaluate first, or leave it out.")
        for file in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            files.setdefault(file.resolve(), file)
    return list(files.values())


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
    meta = read_json(meta_file) if meta_file.is_file() else {}
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
            settings={name: value for name, value in settings.items() if name not in ("engine", "data")},
        )
        for split, parts in content["scores"].items()
        for part in parts
    ]
