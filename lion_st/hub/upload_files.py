"""Which files of a folder are uploaded, and which are refused: links out of it, secrets, and pickles."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias

Contents: TypeAlias = dict[str, "Path | bytes"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
SECRET_NAMES = re.compile(
    r"(hf_|hub_)?(access_|auth_|api_)?(token|stored_tokens)(\.txt)?|id_(rsa|dsa|ecdsa|ed25519)(_sk)?|[._]?netrc|"
    r"(credentials|secrets?)(\.(txt|json|toml|ya?ml|ini|cfg))?|kaggle\.json|client_secret.*\.json|"
    r"service[-_]account.*\.json|(.*\.)?htpasswd|(.*\.)?env|.+\.(pem|key|p12|pfx|ppk|jks|keystore|kdbx)",
    re.IGNORECASE,
)
SECRETS = {
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----|PuTTY-User-Key-File-\d",
    "a Hugging Face token": rb"(?<![A-Za-z0-9_])(?:hf_|api_org_)[A-Za-z0-9]{20,}",
    "a GitHub token": rb"(?<![A-Za-z0-9_])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})",
    "an AWS key": rb"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])",
}
PATTERNS = {what: re.compile(pattern) for what, pattern in SECRETS.items()}
# Each has one of these, which gigabytes of numbers are looked through for several times as fast.
MARKS = (b"PRIVATE KEY", b"PuTTY-User", b"hf_", b"api_org_", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_",
         b"github_pat_", b"AKIA", b"ASIA")  # fmt: skip
# Opcodes that import or call; text that happens to parse as a pickle without them does nothing when it is loaded.
CALLING = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}
COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
BLOCK = 1 << 20
OVERLAP = 256  # longer than what a pattern needs to match


def files_to_upload(folder: Path) -> Contents:
    """A folder's files by path, without hidden ones and caches."""
    contents: Contents = {}
    for path in sorted(_paths(folder)):
        file = folder / path
        if not stays_inside(file, folder):
            raise ValueError(
                f"{path} is a link to {str(file.resolve())!r}, out of {str(folder)!r}. Copy what it names into the "
                "folder, or remove the link."
            )
        if not file.is_file():
            raise ValueError(f"{path} in {str(folder)!r} is not a plain file. Remove it from the folder.")
        refuse_unsafe(path, file)
        contents[path] = file
    return contents


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file, or what a link names, lies in a folder; the Hub's cache keeps a snapshot's files in blobs/."""
    real, root = file.resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith(("models--", "datasets--", "spaces--")):
        allowed.append(root.parent.parent / "blobs")
    return any(real.is_relative_to(place) for place in allowed)


def refuse_unsafe(path: str, file: Path) -> None:
    """Refuse a file that is or holds a secret, or that may run code when it is loaded."""
    name = PurePosixPath(path).name
    if SECRET_NAMES.fullmatch(name):
        raise ValueError(f"{path} has the name of a file with secrets. Move it out of the folder, or rename it.")
    if name.lower().endswith(PICKLE_SUFFIXES):
        raise _pickled(path)
    with file.open("rb") as stream:
        if _is_pickled(stream):
            raise _pickled(path)
        for what in _secrets(stream):
            raise ValueError(f"{path} holds {what}. Remove it from the file and revoke it if anybody has seen it.")


def _paths(folder: Path) -> Iterator[str]:
    """Paths of all files, and of links to folders, which are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in [*files, *links]:
            path = (Path(place) / name).relative_to(folder).as_posix()
            if not _is_hidden(path):
                yield path


def _is_hidden(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(part == "__pycache__" or (part.startswith(".") and part != ".gitattributes") for part in parts)


def _pickled(path: str) -> ValueError:
    return ValueError(
        f"{path} may be pickled, and loading it could run any code. Publish weights as safetensors, and remove it from "
        "the folder."
    )


def _is_pickled(stream: IO[bytes], depth: int = 0) -> bool:
    """Whether a file is a pickle or has one in it: torch's and numpy's files, archives, compressed ones."""
    head = stream.read(512)
    stream.seek(0)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    if head.startswith(b"\x93NUMPY"):
        return re.search(rb"'descr': *[^}]*'\|?O", head) is not None
    if depth < 3:
        open_compressed = next((COMPRESSIONS[magic] for magic in COMPRESSIONS if head.startswith(magic)), None)
        if open_compressed is not None:
            return _compressed_is_pickled(stream, open_compressed, depth)
        if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(stream):
            return _archive_is_pickled(stream, depth)
        if head[257:262] == b"ustar":
            return _tar_is_pickled(stream, depth)
    found = _runs_code(stream)
    stream.seek(0)
    return found


def _compressed_is_pickled(stream: IO[bytes], open_compressed: Callable[[IO[bytes]], Any], depth: int) -> bool:
    try:
        with open_compressed(stream) as inner:
            return _is_pickled(io.BytesIO(inner.read(BLOCK)), depth + 1)
    except (OSError, EOFError, lzma.LZMAError):
        return False
    finally:
        stream.seek(0)


def _archive_is_pickled(stream: IO[bytes], depth: int) -> bool:
    try:
        with zipfile.ZipFile(stream) as archive:
            for entry in archive.infolist():
                if entry.filename.lower().endswith(PICKLE_SUFFIXES):
                    return True
                if not entry.is_dir() and not entry.flag_bits & 1:  # an encrypted entry cannot be read
                    with archive.open(entry) as inner:
                        if _is_pickled(io.BytesIO(inner.read(BLOCK)), depth + 1):
                            return True
    except (zipfile.BadZipFile, zlib.error, NotImplementedError):
        pass
    stream.seek(0)
    return False


def _tar_is_pickled(stream: IO[bytes], depth: int) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for entry in archive:
                inner = archive.extractfile(entry) if entry.isfile() else None
                if inner is not None and (
                    entry.name.lower().endswith(PICKLE_SUFFIXES)
                    or _is_pickled(io.BytesIO(inner.read(BLOCK)), depth + 1)
                ):
                    return True
    except tarfile.TarError:
        pass
    stream.seek(0)
    return False


def _runs_code(stream: IO[bytes]) -> bool:
    """Whether a file without a protocol's mark is a pickle of protocol 0 or 1 that imports or calls."""
    calls = False
    try:
        for opcode, _, _ in pickletools.genops(stream):
            calls = calls or opcode.name in CALLING
        if not calls:
            return False
        stream.seek(0)
        pickletools.dis(stream, out=io.StringIO())  # follows the stack, which text that looks like opcodes breaks
    except Exception:
        return False
    return True


def _secrets(stream: IO[bytes]) -> Iterator[str]:
    """What secrets a file holds; the numbers of a safetensors file are not read."""
    end = _end_of_text(stream)
    stream.seek(0)
    before = b""
    while block := stream.read(BLOCK if end is None else max(0, min(BLOCK, end - stream.tell()))):
        text = before + block
        if any(mark in text for mark in MARKS):
            yield from (what for what, pattern in PATTERNS.items() if pattern.search(text))
        before = text[-OVERLAP:]


def _end_of_text(stream: IO[bytes]) -> int | None:
    """Where the header of a safetensors file ends, None for every other file."""
    stream.seek(0)
    head = stream.read(9)
    size = stream.seek(0, os.SEEK_END)
    end = 8 + int.from_bytes(head[:8], "little")
    return end if head[8:] == b"{" and end <= size else None
