"""The one opener of files: lines and rows of every kind, compressed or not, each with its place."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from lion_st.data.fields import Row

# A place, "FILE:LINE" or "Row NUMBER of FILE", with what stands there: an error where that cannot be read.
Lines: TypeAlias = Iterator[tuple[str, "str | ValueError"]]
Rows: TypeAlias = Iterator[tuple[str, "Row | ValueError"]]

TEXT_TABLES = (".jsonl", ".tsv", ".csv")
TABLES = (*TEXT_TABLES, ".parquet")
FILE_KINDS = (*TABLES, ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
READABLE = ".jsonl, .tsv, .csv, .parquet or .txt (all but .parquet also compressed, .gz, .bz2, .xz or .zst)"
LONGEST_QUOTED_FIELD = 100  # lines: a quote that stays open longer was never meant as CSV's
MAX_FIELD_CHARACTERS = 1 << 30  # the csv module's own limit is 131,072, less than a long document


def file_kind(path: str | Path, kinds: Sequence[str] = FILE_KINDS) -> str | None:
    """The kind of a file by its name, compression aside, such as ".jsonl"; None for one that is not of the kinds."""
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in kinds else None


def find_file(folder: Path, stems: Iterable[str], kinds: Sequence[str] = FILE_KINDS) -> Path | None:
    """The first file of a folder with one of these names, of any kind and compression."""
    names = (f"{stem}{kind}{end}" for stem in stems for kind in kinds for end in ("", *COMPRESSED))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_lines(path: str | Path) -> Lines:
    """Yield the lines of a UTF-8 text file, without their ends; byte order marks and blank lines are left out.

    Lines end at newlines alone. One that is not UTF-8 comes as the error that says so.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with _open(path) as stream:
            yield from decode_lines(stream, str(path))
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, and not of what was read
            raise
        raise ValueError(f"{path} ends early or is damaged ({error}): compress or copy it again.") from error


def decode_lines(stream: Iterable[bytes], name: str) -> Lines:
    """`read_lines` of an open stream."""
    for number, raw in enumerate(stream, 1):
        line = raw.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n")
        if not line or line.isspace():
            continue
        place = f"{name}:{number}"
        try:
            yield place, line.decode()
        except UnicodeDecodeError as error:
            shown = line[max(0, error.start - 20) : error.start + 20]
            yield place, ValueError(f"{place} is not UTF-8 text (byte {error.start + 1}, {shown!r}): convert the file.")


def checked(items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Lines or rows, raising the first error among them."""
    for place, item in items:
        if isinstance(item, ValueError):
            raise item
        yield place, item


def read_rows(
    path: str | Path, is_header: Callable[[Sequence[str]], bool], columns: tuple[str, ...] = (), accepted: str = ""
) -> Rows:
    """Yield the rows of a `.jsonl`, `.tsv`, `.csv` or `.parquet` file; a bad one comes as the error that says so.

    Args:
        path: The file. One of another kind is read like a `.tsv`.
        is_header: Whether these names are the header of a `.tsv` or `.csv` file, which is then read with CSV's quotes.
        columns: Names of the columns of a `.tsv` file without a header, in which quotes are text.
        accepted: What the columns have to be, for the error where they are neither.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or its first row is neither a header nor of the columns.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        yield from _parquet_rows(Path(path))
    elif kind == ".jsonl":
        yield from json_rows(read_lines(path))
    else:
        yield from _delimited_rows(read_lines(path), kind == ".csv", is_header, columns, accepted)


def json_rows(lines: Lines) -> Rows:
    """Each line as a JSON object."""
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            yield place, ValueError(f"{place} is not JSON ({reason}): {line.strip()[:80]!r}.")
        else:
            if not isinstance(row, dict):
                row = ValueError(f"{place} is {line.strip()[:80]!r}: every line must be a JSON object.")
            yield place, row


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if path.suffix in openers:
        return io.BufferedReader(openers[path.suffix](path), 1 << 16)
    return path.open("rb")


def _parquet_rows(path: Path) -> Rows:
    number = 0
    for batch in open_parquet(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            yield f"Row {number} of {path}", row
            number += 1


def open_parquet(path: Path) -> Any:
    """Open a parquet file."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): copy it again.") from error


def _delimited_rows(
    lines: Lines, is_csv: bool, is_header: Callable[[Sequence[str]], bool], columns: tuple[str, ...], accepted: str
) -> Rows:
    place, first = next(checked(lines), ("", ""))
    delimiter = "," if is_csv and "\t" not in first else "\t"
    names = [name.strip() for name in (_split_csv(first, delimiter) or first.split(delimiter))]
    if not first:
        return
    if is_header(names):
        repeated = next((name for number, name in enumerate(names) if name and name in names[:number]), None)
        if repeated is not None:
            raise ValueError(
                f"{place} names two columns {repeated!r}, of which one would be lost: name each its own way."
            )
        for place, fields in _csv_records(lines, delimiter, len(names)):
            yield place, fields if isinstance(fields, ValueError) else dict(zip(names, fields, strict=True))
        return
    if delimiter == "," or len(names) != len(columns):
        raise ValueError(f"{place} is {first[:80]!r}, of {len(names)} columns: {accepted}")
    yield place, dict(zip(columns, first.split("\t"), strict=True))
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
        elif line.count("\t") + 1 != len(columns):
            yield place, ValueError(f"{place} is {line[:80]!r}: a line must be {', a tab, '.join(columns)}.")
        else:
            yield place, dict(zip(columns, line.split("\t"), strict=True))


def _csv_records(lines: Lines, delimiter: str, columns: int) -> Iterator[tuple[str, list[str] | ValueError]]:
    """Fields of each record; a quoted field may hold delimiters and line ends.

    Tab-separated files are also written without quoting: a line whose quotes are not CSV's is then split at its tabs.
    """
    for place, line in lines:
        if isinstance(line, ValueError):
            yield place, line
            continue
        fields = line.split(delimiter) if '"' not in line else _split_csv(line, delimiter)
        if fields is None and delimiter == "\t" and line.count("\t") + 1 == columns:
            fields = line.split("\t")
        for _ in range(LONGEST_QUOTED_FIELD if fields is None else 0):
            _, more = next(lines, ("", None))
            if not isinstance(more, str):
                break
            line += "\n" + more
            if '"' in more and (fields := _split_csv(line, delimiter)) is not None:
                break
        if fields is None:
            yield place, ValueError(f"{place} has a quote that is not CSV's, {line[:80]!r}: double it or mend it.")
        elif len(fields) != columns:
            yield place, ValueError(f"{place} has {len(fields)} columns, {line[:80]!r}: the header has {columns}.")
        else:
            yield place, fields


def _split_csv(line: str, delimiter: str) -> list[str] | None:
    """The fields of one record; None if its quotes are not CSV's, or one is still open."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
