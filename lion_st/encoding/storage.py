"""Crash-safe folders of arrays: a header that names its files, their sizes and checksums; nothing is ever unpickled.

Data files go into a fresh sub-folder, then the header is replaced in one atomic rename. A save that dies on the way
leaves the previous contents readable; the leftovers are removed by the next save. One save at a time: the others wait.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from lion_st.files import atomic_write, checksum, fsync, fsync_tree, has_checksum, inside, lock_folder, remove_leftovers

HEADER = "header.json"
SMALL = 1 << 20  # bytes of a file whose checksum is always compared
ATTEMPTS = 5  # at reading a folder that others write
Contents = TypeVar("Contents")


class StorageError(ValueError):
    """A saved folder is missing, foreign, of another version, truncated or damaged."""


def write_folder(
    path: str | Path,
    kind: str,
    version: int,
    metadata: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    write_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write arrays (as `.npy`) and JSON metadata; replace what the folder held only once everything is on disk.

    Args:
        path: Folder to write. A folder that holds something else is refused.
        kind: What the folder holds, checked by `read_header`.
        version: Version of the layout.
        metadata: JSON-serialisable description.
        arrays: Arrays by name.
        write_files: Called with the data folder to add an engine's own files.

    Raises:
        StorageError: If the folder exists, is not empty and was not written by this function with the same kind, or its
            header is damaged, so that nobody knows what else it holds.
        OSError: If the disk is full or the folder cannot be written; what it held stays.
    """
    path = Path(path)
    with lock_folder(path):
        _require_ours(path, kind)
        remove_leftovers(path)
        data = path / f"data-{secrets.token_hex(8)}"
        data.mkdir()
        try:
            for name, array in arrays.items():
                with (data / f"{name}.npy").open("wb") as file:
                    np.save(file, array, allow_pickle=False)
            if write_files is not None:
                write_files(data)
        except BaseException as error:
            shutil.rmtree(data, ignore_errors=True)  # which makes room again
            if isinstance(error, OSError) and not isinstance(error, FileExistsError):
                raise OSError(f"{path} cannot be written ({error}): is the disk full? Its contents stay.") from error
            raise
        # The names of the files as well, or a crash could leave a header without what it names.
        fsync_tree(data)
        fsync(path)
        files = {
            name: {"bytes": (data / name).stat().st_size, "xxh3": checksum(data / name)} for name in _files_below(data)
        }
        header = {"kind": kind, "version": version, "data": data.name, "files": files, "metadata": dict(metadata)}
        header["xxh3"] = contents_checksum(header)
        atomic_write(path / HEADER, json.dumps(header, indent=1, ensure_ascii=False))
        for child in path.glob("data-*"):
            if child != data:
                shutil.rmtree(child, ignore_errors=True)
    return path


def read_folder(
    path: str | Path,
    kind: str,
    version: int,
    read: Callable[[dict[str, Any], Path], Contents],
    verify: bool = True,
) -> Contents:
    """Check a folder and read its contents; again if it was written anew meanwhile.

    Args:
        path: Folder written by `write_folder`.
        kind: Expected kind.
        version: The latest version of the layout that this code reads.
        read: Called with the metadata and the folder of the data files.
        verify: Also compare the checksums of files over a mebibyte. Sizes and smaller files are always compared.

    Returns:
        What `read` returns.

    Raises:
        StorageError: See `read_header`; also if an array that `read` asks for is missing or damaged.
    """
    path = Path(path)
    for _ in range(ATTEMPTS):
        header = folder_stamp(path)
        try:
            return read(*read_header(path, kind, version, verify))
        except Exception:
            if folder_stamp(path) == header:
                raise
    raise StorageError(f"{path} was written anew {ATTEMPTS} times while it was read: wait until it is complete.")


def read_header(path: str | Path, kind: str, version: int, verify: bool = True) -> tuple[dict[str, Any], Path]:
    """Read a folder's metadata and check its files.

    Args:
        path: Folder written by `write_folder`.
        kind: Expected kind.
        version: The latest version of the layout that this code reads.
        verify: Also compare the checksums of files over a mebibyte. Sizes and smaller files are always compared.

    Returns:
        The metadata and the folder of the data files.

    Raises:
        FileNotFoundError: If there is no such folder.
        StorageError: If anything does not match, naming the file and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder.")
    if not (path / HEADER).is_file():
        raise StorageError(f"{path} holds no {HEADER}: it is not a saved {kind}, or its first save never ended.")
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
        found_kind, found_version = header["kind"], header["version"]
        files, metadata = dict(header["files"]), dict(header["metadata"])
        data = inside(path, header["data"])
        sizes = {inside(data, name): int(facts["bytes"]) for name, facts in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path / HEADER} cannot be read ({error}): build the {kind} again.") from error
    if found_kind != kind:
        raise StorageError(f"{path} holds {found_kind!r}, not {kind!r}.")
    if not isinstance(found_version, int) or not 1 <= found_version <= version:
        raise StorageError(
            f"{path} was written with layout version {found_version}; this lion_st reads version {version}: "
            f"build the {kind} again or use the lion_st that wrote it."
        )
    if header.get("xxh3") != contents_checksum(header):
        raise StorageError(f"{path / HEADER} does not match its checksum: it is damaged. Build the {kind} again.")
    for file, size in sizes.items():
        if not file.is_file():
            raise StorageError(f"{file} is missing: build the {kind} again.")
        if file.stat().st_size != size:
            raise StorageError(
                f"{file} has {file.stat().st_size} bytes instead of {size}: it is truncated or was changed. "
                f"Build the {kind} again."
            )
    if unknown := set(_files_below(data)) - files.keys():
        raise StorageError(f"{data / min(unknown)} is not named by {HEADER}: build the {kind} again.")
    for file, facts in zip(sizes, files.values(), strict=True):
        if (verify or sizes[file] <= SMALL) and not _is_intact(file, facts):
            raise StorageError(f"{file} does not match its checksum: it is damaged. Build the {kind} again.")
    return metadata, data


def _require_ours(path: Path, kind: str) -> None:
    """Refuse a folder that holds anything but an earlier save of this kind."""
    if not (path / HEADER).exists():
        others = [child.name for child in path.iterdir() if not child.name.startswith(("data-", "."))]
        if others:
            raise StorageError(f"{path} holds {min(others)} and no {HEADER}: give a new or empty folder.")
        return
    try:
        found = json.loads((path / HEADER).read_text(encoding="utf-8"))["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path / HEADER} cannot be read ({error}): delete {path} if nothing in it is needed, or give another "
            "folder."
        ) from error
    if found != kind:
        raise StorageError(f"{path} holds {found!r}, not {kind!r}: give another folder.")


def _files_below(data: Path) -> list[str]:
    return sorted(child.relative_to(data).as_posix() for child in data.rglob("*") if child.is_file())


def contents_checksum(header: Mapping[str, Any]) -> str:
    """Checksum of a header's or manifest's JSON values, but for the checksum itself."""
    contents = {key: value for key, value in header.items() if key != "xxh3"}
    return xxhash.xxh3_128_hexdigest(json.dumps(contents, sort_keys=True).encode())


def _is_intact(file: Path, facts: Any) -> bool:
    try:
        return has_checksum(file, facts)
    except (ValueError, AttributeError):
        return False


def folder_stamp(path: Path) -> bytes | None:
    """Bytes that change whenever a folder is written anew; None if there is nothing in it."""
    try:
        return (path / HEADER).read_bytes()
    except OSError:
        return None


def read_array(data: Path, name: str, memory_map: bool = False) -> np.ndarray:
    """Load one array, optionally without reading it into memory."""
    try:
        return np.load(data / f"{name}.npy", mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise StorageError(f"{data / name}.npy cannot be read ({error}): build it again.") from error


def write_joined(data: Path, name: str, parts: Sequence[np.ndarray]) -> None:
    """Write arrays one after the other as one, which is never whole in memory; nothing if there is none.

    (By a memory mapping, a full disk would end the process.)
    """
    if not parts:
        return
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    kind = np.lib.format.dtype_to_descr(parts[0].dtype)
    with (data / f"{name}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
        for part in parts:
            part.tofile(file)


def require_sound(place: Path, *conditions: Any) -> None:
    """Raise a StorageError unless all conditions on what was read hold: compiled code trusts the contents of files."""
    if not all(conditions):
        raise StorageError(f"The contents of {place} do not fit each other: the index is damaged. Build it again.")


def require_whole(vectors: int, ids: int) -> None:
    """Raise a RuntimeError if an interrupted addition, whose engine takes nothing back, left vectors without ids."""
    if vectors != ids:
        raise RuntimeError(
            f"Adding documents was interrupted, which left {vectors:,} vectors for {ids:,} ids: build the index again."
        )


def strings_to_arrays(prefix: str, strings: list[str]) -> dict[str, np.ndarray]:
    """Pack strings into two arrays: their UTF-8 bytes and where each one starts."""
    encoded = [string.encode() for string in strings]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in encoded], out=offsets[1:])
    return {f"{prefix}_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{prefix}_offsets": offsets}


def arrays_to_strings(data: Path, prefix: str) -> list[str]:
    """Undo `strings_to_arrays`."""
    return unpack_strings(read_array(data, f"{prefix}_bytes"), read_array(data, f"{prefix}_offsets"))


def unpack_strings(joined: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Undo `strings_to_arrays`, of its two arrays."""
    places = offsets.tolist()
    if joined.dtype != np.uint8 or offsets.ndim != 1 or not places or places[0] != 0 or places[-1] != joined.size:
        raise StorageError("The ids are damaged: their offsets do not fit their bytes. Build it again.")
    contents = joined.tobytes()
    try:
        return [contents[start:end].decode() for start, end in pairwise(places)]
    except UnicodeDecodeError as error:
        raise StorageError(f"The ids are damaged ({error}). Build it again.") from error
