"""Files and folders that appear whole or not at all, locks between processes, and checksums."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# What no name of a repository ends and begins with: the folders are those that commands write to and read from.
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".tsv", ".csv", ".txt", ".gz", ".bz2", ".xz", ".zst", ".zip", ".gguf")
LOCAL_FOLDERS = ("runs", "data")
LOCK = ".lock"
EARLIER = ".earlier.tmp"  # suffix of what is being replaced, where names cannot be exchanged
SAFETENSORS_LEFTOVER = ".tmp??????"  # what safetensors writes before it renames
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


class FolderInUse(OSError):
    """Another process or thread is writing into a folder."""


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Replace a file's contents; a crash leaves either the old ones or the new ones. Text is written as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(
            f"{str(path)!r} cannot be read as JSON ({error}). Restore the file, or remove it and repeat what wrote it."
        ) from None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file that takes its place if the block succeeds, and vanishes if not."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _let_others_read(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def staging_folder(path: str | Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, removed in the end unless it was renamed; leftovers of kills go too."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    lock = staging.with_suffix(".lock")
    with lock_file(lock):
        remove_abandoned(path)
        try:
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block succeeds, and vanishes if not.

    Args:
        path: The folder to make.
        replace: Whether an earlier folder may be there. It stays until the new one is complete; where the system can
            exchange two names (Linux), `path` is never missing.

    Raises:
        FileExistsError: If `path` is a file, or a folder that is not empty and `replace` is False; also if another
            process has filled it meanwhile.
    """
    path = Path(path).resolve()
    _require_free_folder(path, replace)
    with staging_folder(path) as staging:
        yield staging
        fsync_tree(staging)
        _require_free_folder(path, replace)
        if not path.exists():
            os.replace(staging, path)
        elif not replace:
            (path / LOCK).unlink(missing_ok=True)
            path.rmdir()  # an empty one, or this fails
            os.replace(staging, path)
        elif not _exchange(staging, path):
            _replace_folder(staging, path)
        fsync(path.parent)


def require_free(path: str | Path, overwrite: bool = False) -> None:
    """Refuse to write over what is there: the one rule of everything in lion_st that writes a file or folder."""
    path = Path(path)
    occupied = any(child.name != LOCK for child in path.iterdir()) if path.is_dir() else path.exists()
    if occupied and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists. Name another, or pass overwrite=True to replace it.")


@contextmanager
def lock_folder(folder: str | Path, wait: bool = True, name: str = LOCK) -> Iterator[None]:
    """Hold a folder's lock against other processes and threads; it ends with the process, however that ends.

    Args:
        folder: Made if it is not there. The lock is a hidden file in it, which stays.
        wait: Wait for whoever holds it.
        name: Of the hidden file.

    Raises:
        FolderInUse: If it is held and `wait` is False.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / name, wait):
        yield


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Like `lock_folder`, of a file of any name."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise FolderInUse(f"{path.parent} is being written by another process: wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of single files left in a folder, whose lock the caller holds."""
    for pattern in (".*.tmp", SAFETENSORS_LEFTOVER):
        for leftover in folder.glob(pattern):
            if leftover.is_file():
                leftover.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what killed writers of a folder `path` left, whose locks nobody holds; restore what they moved away."""
    for lock in path.parent.glob(f".{path.name}.????????.lock"):
        with suppress(OSError), lock_file(lock, wait=False):
            remove_abandoned(lock.with_suffix(".tmp"))  # what was to become a folder that is left itself
            shutil.rmtree(lock.with_suffix(".tmp"), ignore_errors=True)
            earlier = lock.with_suffix(EARLIER)
            if earlier.exists() and not path.exists():
                os.replace(earlier, path)
            shutil.rmtree(earlier, ignore_errors=True)
            lock.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders, and keeps their entries itself
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Wait until everything below a folder is on the disk, readable for whoever can read new files there."""
    for child in folder.rglob("*"):
        if child.is_file():
            _let_others_read(child)
        fsync(child)
    fsync(folder)


def _let_others_read(file: Path) -> None:
    """Give a file the permissions of a new one: safetensors (0.8.0) makes files for their owner alone."""
    if os.name == "nt" or file.stat().st_mode & 0o777 != 0o600:
        return
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    new.touch(mode=0o666)  # less what the process's umask takes away
    try:
        file.chmod(new.stat().st_mode & 0o777)
    finally:
        new.unlink()


def checksum(path: Path) -> str:
    """A file's xxh3 checksum (128 bits, as fast as memory; against damage) in hexadecimal."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def has_checksum(path: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a file has the checksum that a manifest names under "xxh3"."""
    if not isinstance(facts.get("xxh3"), str):
        raise ValueError(f"The manifest names no checksum of {path}.")
    return checksum(path) == facts["xxh3"]


def require_writable(path: Path) -> None:
    """Refuse a place where nothing can be written, before computing what would be."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{str(path)!r} cannot be written: {str(there)!r} is not writable.")
    if there != path and not there.is_dir():
        raise NotADirectoryError(f"{str(path)!r} cannot be made: {str(there)!r} is a file.")


def is_hub_name(place: str | Path) -> bool:
    """Whether this is a text `owner/name`, and not a file or folder, here or gone; a `Path` always is one of these."""
    return (
        isinstance(place, str)
        and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place) is not None
        and place.split("/")[0] not in LOCAL_FOLDERS
        and not place.endswith(FILE_ENDINGS)
        and not Path(place).exists()
    )


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loader's options that say from where, and as whom, a file is read."""
    names = ("token", "cache_dir", "cache_folder", "revision", "local_files_only", "subfolder")
    return {name: options[name] for name in names if options.get(name)}


def read_card(source: str, revision: str | None = None, *, offline: bool = False, token: Any = None) -> dict[str, Any]:
    """The header of the README.md of a folder or Hub repository, empty if there is none."""
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    path = Path(source) / "README.md"
    if not Path(source).is_dir():
        if "/" in source and not is_hub_name(source):
            return {}
        try:
            path = Path(hf_hub_download(source, "README.md", revision=revision, local_files_only=offline, token=token))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return {}
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}


def inside(folder: Path, name: Any) -> Path:
    """The path of what a manifest names in its folder.

    Raises:
        ValueError: If that would lie elsewhere: the name is absolute, climbs with `..`, or follows a link out.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file.")
    path, root = folder / name, folder.resolve()
    # The Hub's cache holds the files of a snapshot as links into its own folder `blobs`.
    caches = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    is_inside = any(path.resolve().is_relative_to(place) for place in (root, *caches))
    if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside:
        raise ValueError(f"{name!r} lies outside of {folder}.")
    return path


def _require_free_folder(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{str(path)!r} is a file, whose place no folder takes. Name another.")
    require_free(path, replace)


def _replace_folder(staging: Path, path: Path) -> None:
    """Move a folder to `path` by two renames, of which the first is undone if the second fails."""
    earlier = staging.with_suffix(EARLIER)
    os.replace(path, earlier)
    try:
        os.replace(staging, path)
    except OSError:
        os.replace(earlier, path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
