"""Where training tuples and their texts come from: Hub data sets, local copies of them, BEIR folders and files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lion_st.data.beir import read_jsonl, read_qrels
from lion_st.data.layouts import Layout, detect_layout, read_row
from lion_st.data.lookup import ID_COLUMNS, TEXT_COLUMNS, TITLE_COLUMN, TextLookup
from lion_st.data.text import open_text

if TYPE_CHECKING:
    from datasets import Dataset, Features

Rows: TypeAlias = Iterator[dict[str, Any]]

TUPLE_SUBSETS = ("train", "labeled-list", "bert-ensemble-margin-mse", "triplets")
TEXT_SUBSETS = {"queries": ("queries", "query"), "documents": ("documents", "corpus", "passage")}
TEXT_FILES = {"queries": ("queries",), "documents": ("corpus",)}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TABLE_FORMAT = 1  # part of the cache key of converted tables: raise it when the conversion changes


def load_candidates(
    source: str | Path, subset: str | None, split: str, *, queries_given: bool, documents_given: bool
) -> tuple[Dataset, bool, bool]:
    """Read a source into a table of `query`, `positives`, `negatives` and, where it has them, `teacher_scores`.

    Returns:
        The table, and whether its queries and its documents are ids.
    """
    folder = Path(source)
    if (folder / "corpus.jsonl").exists() and subset is None:
        return _generate(_beir_pairs, folder / "qrels" / f"{split}.tsv", _features(scored=False)), True, True
    opened = _open(source, subset, split, (split,), TUPLE_SUBSETS)
    if isinstance(opened, Path):
        place, first = next(read_jsonl(opened, ()), (f"{opened}:1", {}))
    elif not len(opened):
        raise ValueError(f"{source} has no rows.")
    else:
        place, first = f"Row 0 of {source}", opened[0]
    layout = detect_layout(first)
    candidates = read_row(layout, first, place)
    scored = candidates.scores is not None
    if isinstance(opened, Path):
        table = _generate(partial(_json_candidates, layout=layout, scored=scored), opened, _features(scored))
    else:
        table = opened.map(
            partial(_table_candidates, layout=layout, scored=scored, source=str(source), table_format=TABLE_FORMAT),
            batched=True,
            with_indices=True,
            remove_columns=opened.column_names,
            features=_features(scored),
            desc="Read tuples",
        )
    query_ids, document_ids = layout.query_ids, layout.document_ids
    if query_ids is None:
        query_ids = queries_given or isinstance(candidates.query, int)
    if document_ids is None:
        document_ids = documents_given or isinstance(candidates.positives[0], int)
    return table, query_ids, document_ids


def load_lookup(source: str | Path, given: str | Path | None, kind: str) -> TextLookup:
    """Load the texts of query or document ids.

    Args:
        source: Source of the tuples, which is searched where nothing is given.
        given: A file (`.tsv`, `.jsonl`, `.parquet`), a folder, or a data set, its subset after a colon.
        kind: "queries" or "documents".

    Raises:
        FileNotFoundError: If a given file or folder does not exist.
        ValueError: If there are no texts there, a line is malformed, or an id is missing or repeated.
    """
    place, subset = str(source if given is None else given), None
    if given is not None and not Path(place).exists() and ":" in place:
        place, _, subset = place.rpartition(":")
    try:
        if given is None and Path(place).is_file():
            raise ValueError(f"{place} is a single file")
        opened = _open(place, subset, None, TEXT_FILES[kind], TEXT_SUBSETS[kind], only=given is not None)
    except ValueError as error:
        if given is not None:
            raise
        raise ValueError(
            f"The {kind} of {source} are ids and their texts are not there ({error}): say where they are, "
            f"{kind}=FILE, FOLDER or DATA SET."
        ) from error
    if isinstance(opened, Path):
        from datasets import Features, Value

        features = Features({column: Value("string") for column in ("id", "text", TITLE_COLUMN)})
        opened = _generate(_tsv_texts if ".tsv" in opened.suffixes else _json_texts, opened, features)
    return TextLookup(opened, f"{place}:{subset}" if subset else place)


def _open(
    source: str | Path,
    subset: str | None,
    split: str | None,
    files: Sequence[str],
    subsets: Sequence[str],
    *,
    only: bool = True,
) -> Path | Dataset:
    """Find a text file to read line by line, or load a table.

    Args:
        source: A file, a folder or a Hub data set.
        subset: Configuration, or name of a JSONL file in the folder or data set.
        split: Split of the configuration; None takes its only one.
        files: Names, without their endings, of the JSONL files to look for in a folder, or in a data set that
            `datasets` cannot load, where no subset is named.
        subsets: Configurations to choose from where none is named.
        only: Whether a configuration without a sibling is taken whatever its name.
    """
    from datasets import get_dataset_config_names

    path = Path(source)
    if path.is_file():
        return _open_file(path)
    lines = [f"{stem}.jsonl{end}" for stem in files for end in ("", ".gz")] if subset is None else []
    if subset is not None and ".jsonl" in subset:
        lines = [subset]
    if path.is_dir():
        for name in lines:
            if (path / name).is_file():
                return path / name
    elif not HUB_NAME.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is no file or folder here, nor the name of a Hub data set (owner/name).")
    elif subset in lines:
        return _download(str(source), lines)
    try:
        configurations = list(get_dataset_config_names(str(source)))
    except RuntimeError:  # it comes with a loading script, which `datasets` no longer runs
        if path.is_dir():
            raise
        return _download(str(source), lines)
    if subset is None:
        subset = next((name for name in subsets if name in configurations), None)
    if subset is None and only and len(configurations) == 1:
        subset = configurations[0]
    if subset is None or subset not in configurations:
        raise ValueError(f"{source} has the subsets {configurations}: name one of them (got {subset!r}).")
    return _load(source, subset, split)


def _open_file(path: Path) -> Path | Dataset:
    from datasets import load_dataset

    if {".jsonl", ".tsv"} & set(path.suffixes):
        return path
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    raise ValueError(f"Cannot read {path}: give .jsonl or .tsv (also .gz, .xz), or .parquet.")


def _load(source: str | Path, subset: str, split: str | None) -> Dataset:
    from datasets import load_dataset

    if split is not None:
        return load_dataset(str(source), subset, split=split)
    splits = load_dataset(str(source), subset)
    if len(splits) > 1 and "train" not in splits:
        raise ValueError(
            f"The subset {subset!r} of {source} has the splits {list(splits)}: texts must be in one split."
        )
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _download(repository: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
        except EntryNotFoundError:
            continue
    raise ValueError(f"{repository} has none of the files {list(names)}, and no subsets that `datasets` can load.")


def _generate(read: Callable[..., Rows], path: Path, features: Features) -> Dataset:
    """Read a file into a memory-mapped table, once for each state of the file."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    state = (path.stat().st_size, path.stat().st_mtime_ns, TABLE_FORMAT)
    try:
        return Dataset.from_generator(read, features, gen_kwargs={"path": str(path), "state": state})
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _features(scored: bool) -> Features:
    from datasets import Features, List, Value

    columns: dict[str, Any] = {"query": Value("string")}
    columns |= {name: List(Value("string")) for name in ("positives", "negatives")}
    return Features(columns | ({"teacher_scores": List(Value("float32"))} if scored else {}))


def _candidates(layout: Layout, scored: bool, row: dict[str, Any], place: str) -> dict[str, Any]:
    found = read_row(layout, row, place)
    candidates: dict[str, Any] = {
        "query": str(found.query),
        "positives": [str(document) for document in found.positives],
        "negatives": [str(document) for document in found.negatives],
    }
    if scored:
        if found.scores is None:
            raise ValueError(f"{place} has no teacher scores, other rows have: score it or remove the row.")
        candidates["teacher_scores"] = found.scores
    return candidates


def _table_candidates(
    batch: dict[str, list[Any]], rows: list[int], *, layout: Layout, scored: bool, source: str, table_format: int
) -> dict[str, list[Any]]:
    values = zip(*batch.values(), strict=True)
    read = [
        _candidates(layout, scored, dict(zip(batch, row, strict=True)), f"Row {number} of {source}")
        for number, row in zip(rows, values, strict=True)
    ]
    return {column: [row[column] for row in read] for column in read[0]}


def _json_candidates(path: str, state: tuple[int, ...], *, layout: Layout, scored: bool) -> Rows:
    for place, row in read_jsonl(path, ()):
        yield _candidates(layout, scored, row, place)


def _beir_pairs(path: str, state: tuple[int, ...]) -> Rows:
    for _, query, document, grade in read_qrels(Path(path)):
        if grade > 0:
            yield {"query": query, "positives": [document], "negatives": []}


def _json_texts(path: str, state: tuple[int, ...]) -> Rows:
    for place, row in read_jsonl(path, ()):
        key = next((row[name] for name in ID_COLUMNS if row.get(name) is not None), None)
        text = next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        if key is None or text is None:
            raise ValueError(
                f"{place} has the fields {sorted(row)}: it needs an id (one of {list(ID_COLUMNS)}) and a text (one of "
                f"{list(TEXT_COLUMNS)})."
            )
        yield {"id": str(key), "text": text, TITLE_COLUMN: row.get(TITLE_COLUMN)}


def _tsv_texts(path: str, state: tuple[int, ...]) -> Rows:
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            key, tab, text = line.rstrip("\r\n").partition("\t")
            if not tab or not key:
                raise ValueError(f"{path}:{number} is {line.strip()[:80]!r}: a line must be an id, a tab and a text.")
            yield {"id": key, "text": text, TITLE_COLUMN: None}
