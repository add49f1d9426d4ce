"""Crash-safe folders of arrays: a header that names its files, their sizes and checksums; nothing is ever unpickled.

Data files go into a fresh sub-folder, then the header is replaced in one atomic rename. A save that dies on the way
leaves the previous contents readable; the leftovers are removed by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HEADER = "header.json"


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
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / HEADER).exists():
        leftovers = [child for child in path.iterdir() if not child.name.startswith("data-")]
        if leftovers:
            raise StorageError(f"{path} holds {leftovers[0].name} and no {HEADER}: give a new or empty folder.")
    if (path / HEADER).exists():
        try:
            found = json.loads((path / HEADER).read_text(encoding="utf-8"))["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{path / HEADER} cannot be read ({error}): delete {path} if nothing in it is needed, or give another "
                "folder."
            ) from error
        if found != kind:
            raise StorageError(f"{path} holds {found!r}, not {kind!r}: give another folder.")
    path.mkdir(parents=True, exist_ok=True)
    data = path / f"data-{secrets.token_hex(8)}"
    data.mkdir()
    for name, array in arrays.items():
        with (data / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
    if write_files is not None:
        write_files(data)
    files = {}
    for file_path in sorted(child for child in data.rglob("*") if child.is_file()):
        sync(file_path)
        files[file_path.relative_to(data).as_posix()] = {
            "bytes": file_path.stat().st_size,
            "sha256": checksum(file_path),
        }
    # The names of the files as well, or a crash could leave a header without what it names.
    for folder in (*(child for child in data.rglob("*") if child.is_dir()), data, path):
        sync(folder)
    header = {"kind": kind, "version": version, "data": data.name, "files": files, "metadata": dict(metadata)}
    write_atomic(path / HEADER, json.dumps(header, indent=1, ensure_ascii=False).encode())
    for child in path.iterdir():
        if child.is_dir() and child.name.startswith("data-") and child != data:
            shutil.rmtree(child)
    return path


def read_header(path: str | Path, kind: str, version: int, verify: bool = True) -> tuple[dict[str, Any], Path]:
    """Read a folder's metadata and check its files.

    Args:
        path: Folder written by `write_folder`.
        kind: Expected kind.
        version: The only version this code reads.
        verify: Also compare checksums (reads every byte). Sizes are always compared.

    Returns:
        The metadata and the folder of the data files.

    Raises:
        StorageError: If anything does not match, naming the file and what to do.
    """
    path = Path(path)
    if not (path / HEADER).is_file():
        raise StorageError(f"{path} holds no {HEADER}: it is not a saved {kind}, or its first save never ended.")
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
        found_kind, found_version = header["kind"], header["version"]
        files, data, metadata = header["files"], path / header["data"], header["metadata"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path / HEADER} cannot be read ({error}): build the {kind} again.") from error
    if found_kind != kind:
        raise StorageError(f"{path} holds {found_kind!r}, not {kind!r}.")
    if found_version != version:
        raise StorageError(
            f"{path} was written with layout version {found_version}; this lion_st reads version {version}: "
            f"build the {kind} again or use the lion_st that wrote it."
        )
    for name, facts in files.items():
        file_path = data / name
        if not file_path.is_file():
            raise StorageError(f"{file_path} is missing: build the {kind} again.")
        if file_path.stat().st_size != facts["bytes"]:
            raise StorageError(
                f"{file_path} has {file_path.stat().st_size} bytes instead of {facts['bytes']}: it is truncated or was "
                f"changed. Build the {kind} again."
            )
        if verify and checksum(file_path) != facts["sha256"]:
            raise StorageError(f"{file_path} does not match its checksum: it is damaged. Build the {kind} again.")
    return metadata, data


def read_array(data: Path, name: str, memory_map: bool = False) -> np.ndarray:
    """Load one array, optionally without reading it into memory."""
    return np.load(data / f"{name}.npy", mmap_mode="r" if memory_map else None, allow_pickle=False)


def strings_to_arrays(prefix: str, strings: list[str]) -> dict[str, np.ndarray]:
    """Pack strings into two arrays: their UTF-8 bytes and where each one starts."""
    encoded = [string.encode() for string in strings]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in encoded], out=offsets[1:])
    return {f"{prefix}_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{prefix}_offsets": offsets}


def arrays_to_strings(data: Path, prefix: str) -> list[str]:
    """Undo `strings_to_arrays`."""
    joined = read_array(data, f"{prefix}_bytes").tobytes()
    offsets = read_array(data, f"{prefix}_offsets").tolist()
    return [joined[start:end].decode() for start, end in pairwise(offsets)]


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file's contents so that a crash leaves either the old or the new ones."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
