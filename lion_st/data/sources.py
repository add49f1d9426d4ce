"""One syntax for where data are: files and folders here, data sets on the Hub, and their subsets."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lion_st.data.fields import Task
from lion_st.data.files import COMPRESSED, FILE_KINDS, READABLE, TABLES, Rows, file_kind, find_file, open_parquet
from lion_st.data.quickstart import QUICKSTART_REPOSITORY, quickstart_data
from lion_st.files import LOCAL_FOLDERS, checksum

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
HUB_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:[:/](?P<subset>[^/:]+))?")
SYNTAX = "a file or folder, or a Hub data set: owner/name, owner/name:subset or hf://owner/name/subset"
TEXT_STEMS: dict[Task, tuple[str, ...]] = {
    "document": ("corpus", "documents", "collection"),
    "query": ("queries", "topics"),
}
TEXT_SUBSETS: dict[Task, tuple[str, ...]] = {
    "document": ("documents", "corpus", "passage"),
    "query": ("queries", "query"),
}
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` of `datasets` writes into a folder
TOPIC_KINDS = (".xml", ".trec")  # beside tables, a folder's `topics` may be these
DATA_KINDS = (*FILE_KINDS, *TOPIC_KINDS, ".qrels", ".arrow", ".json")  # of a folder that is read, by `datasets` too


@dataclass(frozen=True)
class Source:
    """A file or folder (`path`) or a data set of the Hub (`repository`), and perhaps the subset of it that is meant."""

    path: Path | None
    repository: str | None
    subset: str | None = None

    @property
    def place(self) -> str:
        """What `datasets` loads."""
        return str(self.path) if self.path is not None else str(self.repository)

    def __str__(self) -> str:
        return self.place if self.subset is None else f"{self.place}:{self.subset}"


def parse_source(source: str | Path, subset: str | None = None) -> Source:
    """Read "PATH", "FOLDER:SUBSET", "owner/name", "owner/name:subset" or "hf://owner/name/subset".

    What exists here is meant before what the Hub has under the same name, and so is the bundled data set's folder, see
    `quickstart_data`.
    """
    name = str(source)
    remote = re.sub(r"^hf:/{1,2}", "", name)  # pathlib makes one slash of two
    head, colon, tail = name.rpartition(":")
    match = HUB_NAME.fullmatch(remote)
    if remote == name and Path(name).exists():
        found = Source(Path(name), None)
    elif remote == name and colon and Path(head).exists():
        found = Source(Path(head), None, tail)
    elif match is not None and (remote != name or _may_be_of_the_hub(name)):
        found = _of_repository(match["repository"], match["subset"])
    else:
        raise FileNotFoundError(f"{name} is not a file or folder here, nor the name of a Hub data set; give {SYNTAX}.")
    if subset is None or subset == found.subset:
        return found
    if found.subset is not None:
        raise ValueError(f"{name} names the subset {found.subset!r}, beside {subset!r}: name one of them.")
    return Source(found.path, found.repository, subset)


def _may_be_of_the_hub(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return slash != "" and "/" not in rest and file_kind(name) is None and owner not in LOCAL_FOLDERS


def _of_repository(repository: str, subset: str | None) -> Source:
    if repository != QUICKSTART_REPOSITORY:
        return Source(None, repository, subset)
    return Source(quickstart_data(), None, subset)


def text_files(path: Path, task: Task) -> list[Path]:
    """The files of documents or queries that a file or folder stands for, in reading order."""
    if path.is_file():
        if file_kind(path) is None and task == "document":
            raise ValueError(f"Cannot read documents from {path}: give {READABLE}.")
        return [path]
    kinds = (*FILE_KINDS, *TOPIC_KINDS) if task == "query" else FILE_KINDS
    found = find_file(path, TEXT_STEMS[task], kinds)
    if found is not None:
        return [found]
    other = find_file(path, TEXT_STEMS["document" if task == "query" else "query"])
    if other is not None:
        raise FileNotFoundError(
            f"{path} has {other.name}, but no {' or '.join(TEXT_STEMS[task])}: put a {TEXT_STEMS[task][0]}.jsonl there."
        )
    readable = sorted(file for file in path.iterdir() if file.is_file() and file_kind(file) is not None)
    # Beside tables, a text file is a note about them.
    files = [file for file in readable if file_kind(file) != ".txt"] or readable
    if notes := [file.name for file in readable if file not in files]:
        logger.warning("%s: %s beside tables not read: as texts, put .txt files alone.", path, ", ".join(notes[:5]))
    if not files:
        raise ValueError(f"The folder {path} holds nothing to read: {READABLE}.")
    return files


def stream_rows(source: Source, task: Task, split: str) -> Rows:
    """Yield the rows of a data set with their places, downloading as it reads."""
    from datasets import load_dataset

    subset = choose_subset(source, TEXT_SUBSETS[task])
    splits = load_dataset(source.place, subset, streaming=True)
    if split == "train" and len(splits) == 1:  # which BEIR's data sets call corpus and queries
        (split,) = splits
    if split not in splits:
        raise ValueError(f"The subset {subset!r} of {source.place} has the splits {list(splits)}, not {split!r}.")
    for number, row in enumerate(splits[split]):
        yield f"Row {number} of {source}", row


def open_source(
    source: Source, split: str | None, stems: Sequence[str], subsets: Sequence[str], *, only: bool = True
) -> Path | Dataset:
    """Find a text file to read line by line, or load a table.

    Args:
        source: Where to look.
        split: Split of a subset; None takes its only one.
        stems: Names, without their endings, of the files to look for in a folder, or in a data set that `datasets`
            cannot load, where no subset is named.
        subsets: Subsets to choose from where none is named.
        only: Whether a subset without a sibling is taken whatever its name.
    """
    path, subset = source.path, source.subset
    if path is not None and path.is_file():
        return _open_file(path, split)
    if subset is not None and file_kind(subset) is not None:  # a file of the data set
        if path is not None and (path / subset).is_file():
            return _open_file(path / subset, split)
        if path is None:
            return _open_file(_download(source.place, [subset]), split)
    if path is not None and subset is None:
        file = find_file(path, stems, (".jsonl", ".tsv", ".csv"))
        if file is not None:
            return file
        if any((path / name).is_file() for name in SAVED):
            return _load_saved(path, split)
    try:
        subset = choose_subset(source, subsets, only=only)
    except RuntimeError:  # it comes with a loading script, which `datasets` no longer runs
        if path is not None or subset is not None:
            raise
        return _download(source.place, [f"{stem}.jsonl{end}" for stem in stems for end in ("", *COMPRESSED)])
    return load_table(source.place, subset, split)


def choose_subset(source: Source, subsets: Sequence[str], *, only: bool = True) -> str:
    """The subset that is named, else the first there is of some, else the only one."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetNotFoundError

    try:
        there = list(get_dataset_config_names(source.place))
    except (DatasetNotFoundError, ConnectionError) as error:
        raise _not_found(source, error) from error
    wanted = [source.subset] if source.subset is not None else [*subsets, *(there if only and len(there) == 1 else [])]
    found = next((name for name in wanted if name in there), None)
    if found is None:
        raise ValueError(f"{source.place} has the subsets {there}: name one of them (got {source.subset!r}).")
    return found


def download_folder(source: Source, patterns: Sequence[str]) -> Path:
    """Files of a data set on the Hub, those of the folder that the subset names if there is one; cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = "" if source.subset is None else f"{source.subset}/"
    files = [f"{inside}{pattern}" for pattern in patterns]
    try:
        return Path(snapshot_download(source.place, repo_type="dataset", allow_patterns=files)) / inside
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _not_found(source, error) from error


def dataset_commit(source: Source) -> str:
    """The commit of a data set on the Hub, which tells one state of it from another."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(source.place).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise _not_found(source, error) from error


def _not_found(source: Source, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source} is not a file or folder here, and the Hub gives no such data set ({error}); give {SYNTAX}."
    )


def files_checksum(sources: Iterable[str | Path], leave_out: Path) -> str | None:
    """A checksum of the contents of those sources of data that are files or folders here, None if there are none.

    Args:
        sources: See `parse_source`. Data sets of the Hub are not looked at.
        leave_out: A folder that is written to, which may lie in one of them.
    """
    import xxhash

    found = []
    for number, source in enumerate(sources):
        try:
            path = parse_source(source).path
        except FileNotFoundError:  # which will be said by who reads it
            continue
        if path is not None and path.is_file():
            found.append((number, path.name, checksum(path)))
        elif path is not None:
            files = (file for file in sorted(path.rglob("*")) if file.is_file() and file_kind(file, DATA_KINDS))
            found += [
                (number, file.relative_to(path).as_posix(), checksum(file))
                for file in files
                if not file.resolve().is_relative_to(leave_out.resolve())
            ]
    return None if not found else xxhash.xxh3_128_hexdigest(json.dumps(found).encode())


def _open_file(path: Path, split: str | None) -> Path | Dataset:
    from datasets import load_dataset

    if file_kind(path) in (".jsonl", ".tsv", ".csv", ".txt"):
        if split not in (None, "train"):
            raise ValueError(
                f"{path} is a file without splits, and {split!r} was asked for: leave the split out, or take a "
                ".parquet file, of which `datasets` reads a slice."
            )
        return path
    if file_kind(path) is None:
        raise ValueError(f"Cannot read {path}: give {READABLE}.")
    open_parquet(path)  # raises where it is damaged
    return load_dataset("parquet", data_files=str(path), split=split or "train")


def load_table(place: str, subset: str | None, split: str | None) -> Dataset:
    """Load a table with `datasets`; no split takes the only one.

    Raises:
        ValueError: If its files cannot be read as one table.

    Warns:
        UserWarning: If files of a folder are not read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        found = load_dataset(place, subset, split=split)
    except DatasetGenerationError as error:
        reason = " ".join(str(error.__cause__ or error).split())  # such as files with different columns
        raise ValueError(f"The files of {place} cannot be read as one table: {reason}. Name one of them.") from error
    if Path(place).is_dir():
        _warn_of_unread(Path(place), subset)
    return found if split is not None else _only_split(found, f"The subset {subset!r} of {place}")


def _warn_of_unread(folder: Path, subset: str | None) -> None:
    """Name the tables that `datasets` leaves out: those of another kind, or without a split's name where one has it."""
    from datasets import get_dataset_config_names, load_dataset_builder

    if len(get_dataset_config_names(str(folder))) > 1:  # its card says which files belong together
        return
    splits = load_dataset_builder(str(folder), subset).config.data_files or {}
    read = {Path(file).resolve() for files in splits.values() for file in files}
    kinds = {*TABLES, *map(file_kind, read)}
    unread = sorted(
        file.name
        for file in folder.rglob("*")
        if file_kind(file) in kinds and file.resolve() not in read and not file.name.startswith(".")
    )
    if unread:
        warnings.warn(
            f"{folder}: {len(unread)} of its tables are not read: {', '.join(unread[:5])}. `datasets` reads files of "
            "one kind and, where one has a split in its name, such as train, none that has not: name the files alike.",
            stacklevel=3,
        )


def _load_saved(path: Path, split: str | None) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(path))
    splits = found if isinstance(found, DatasetDict) else {"train": found}
    if split is None:
        return _only_split(splits, str(path))
    if split not in splits:
        raise ValueError(f"{path} was written by save_to_disk with the splits {list(splits)}, not {split!r}.")
    return splits[split]


def _only_split(splits: Mapping[str, Dataset], name: str) -> Dataset:
    if len(splits) > 1 and "train" not in splits:
        raise ValueError(f"{name} has the splits {list(splits)}: texts must be in one split.")
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
