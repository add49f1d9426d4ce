"""A Parquet file that is computed block by block: resumable, by one process or several, and whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from lion_st.encoding.shards import launched_processes
from lion_st.encoding.storage import StorageError
from lion_st.extras import require
from lion_st.files import atomic_file, atomic_write, lock_file, require_free

T = TypeVar("T")

SETTINGS = "settings.json"
METADATA = "lion_st"  # key in the schema of the file
DIGEST = "rows_xxh3"


def write_in_blocks(
    output: str | Path,
    settings: Mapping[str, Any],
    blocks: Callable[[], Iterator[list[T]]],
    compute: Callable[[list[Any]], Any],
    *,
    prepare: Callable[[list[T]], list[Any]] = list,
    overwrite: bool = False,
) -> Path:
    """Compute a table from blocks of rows and write it as one Parquet file.

    Each block becomes a file in the folder `<output>.parts`, under a temporary name first, so that a run that was
    killed at any moment goes on with the first block that is not there, and ends with the same bytes. Of several
    processes (`RANK` and `WORLD_SIZE` of torchrun) each takes its blocks in turn, and the one that ends last puts the
    file together; they share the file system and nothing else.

    Args:
        output: The file.
        settings: All that the table depends on besides the rows, as JSON. They stand in the schema's metadata, beside
            a digest of the rows, under "lion_st".
        blocks: Yields the rows in blocks, the same ones each time.
        compute: Makes a pyarrow table, with the same columns for every block, from a block.
        prepare: Reads what a block's rows lack, such as their texts, into lists of what JSON can hold.
        overwrite: Replace a file in `output`, once the new one stands.

    Returns:
        `output`.

    Raises:
        ValueError: If `output` is not the name of a Parquet file.
        FileExistsError: If `output` was made with other settings or of other rows, and `overwrite` is False.
        StorageError: If the parts were begun with other settings or other rows, or there are no rows.
    """
    output = Path(output)
    if output.suffix != ".parquet":
        raise ValueError(
            f"{output} would not be read as the Parquet file that it is: give a name that ends in .parquet."
        )
    settings = json.loads(json.dumps(settings))
    parts = output.with_name(f"{output.name}.parts")
    if output.exists():
        if _is_made_of(output, settings, map(prepare, blocks())):
            _remove_leftovers(output, parts)
            return output
        require_free(output, overwrite)
    rank, world_size = launched_processes()
    _claim(parts, settings)
    count = 0
    for number, block in enumerate(blocks()):
        count += 1
        if number % world_size != rank:
            continue
        if not parts.is_dir():  # another process found all parts there and put them together
            return output
        rows = prepare(block)
        digest = _digest(rows)
        if not _is_done(parts / _name(number), digest):
            table = compute(rows).replace_schema_metadata({DIGEST: digest})
            with atomic_file(parts / _name(number)) as temporary:
                require("pyarrow.parquet").write_table(table, temporary, compression="zstd")
    if not count:
        shutil.rmtree(parts, ignore_errors=True)
        raise StorageError(f"There are no rows to make {output} of.")
    _join(output, parts, count, settings)
    return output


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a file that `write_in_blocks` made, without those if it is another's."""
    return _metadata(Path(path)).get("settings", {})


def _name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def _digest(rows: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(rows, ensure_ascii=False).encode())


def _digest_of_all(digests: Iterator[str]) -> str:
    return xxhash.xxh3_128_hexdigest(" ".join(digests).encode())


def _metadata(output: Path) -> dict[str, Any]:
    from pyarrow import ArrowInvalid

    try:
        found = require("pyarrow.parquet").read_schema(output).metadata or {}
        return dict(json.loads(found.get(METADATA.encode(), b"{}")))
    except (ArrowInvalid, ValueError, TypeError):
        return {}


def _is_made_of(output: Path, settings: Mapping[str, Any], blocks: Iterator[list[Any]]) -> bool:
    found = _metadata(output)
    return found.get("settings") == settings and found.get(DIGEST) == _digest_of_all(map(_digest, blocks))


def _claim(parts: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings into a folder without parts, or check that those that are there have the same ones."""
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / SETTINGS
    if not file.exists() or not any(parts.glob("part-*.parquet")):
        atomic_write(file, json.dumps(settings, ensure_ascii=False, indent=1))
        return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{file} cannot be read ({error}): delete {parts} and begin anew.") from error
    changes = [
        f"{key} was {found.get(key)!r}, is {settings.get(key)!r}"
        for key in sorted(found.keys() | settings.keys())
        if found.get(key) != settings.get(key)
    ]
    if changes:
        raise StorageError(
            f"{parts} was begun with other settings: {'; '.join(changes)}. Go on with those, name another output, or "
            "delete the folder to begin anew."
        )


def _is_done(part: Path, digest: str) -> bool:
    if not part.exists():
        return False
    if _read_digest(part) != digest:
        raise StorageError(
            f"{part} was made of other rows than the source now gives: it changed. Delete {part.parent} to begin anew."
        )
    return True


def _read_digest(part: Path) -> str:
    from pyarrow import ArrowInvalid

    try:
        return require("pyarrow.parquet").read_schema(part).metadata[DIGEST.encode()].decode()
    except (ArrowInvalid, KeyError, TypeError) as error:
        raise StorageError(f"{part} is damaged ({error}): delete it and run the same command again.") from error


def _join(output: Path, parts: Path, count: int, settings: Mapping[str, Any]) -> None:
    """Put the parts together if all are there; other processes may still be at work on some."""
    parquet = require("pyarrow.parquet")

    with lock_file(_lock_of(output)):
        files = [parts / _name(number) for number in range(count)]
        if not all(file.exists() for file in files):  # or another process was here before
            _lock_of(output).unlink(missing_ok=True)
            return
        surplus = sorted(set(parts.glob("part-*.parquet")) - set(files))
        if surplus:
            raise StorageError(
                f"{surplus[0]} lies beyond the end of the source: it changed. Delete {parts} to begin anew."
            )
        made = {"settings": settings, DIGEST: _digest_of_all(map(_read_digest, files))}
        schema = parquet.read_schema(files[0]).with_metadata({METADATA: json.dumps(made, ensure_ascii=False)})
        with atomic_file(output) as temporary, parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for file in files:
                writer.write_table(parquet.read_table(file).replace_schema_metadata(schema.metadata))
        _remove_leftovers(output, parts)


def _lock_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _remove_leftovers(output: Path, parts: Path) -> None:
    """Remove what a finished file no longer needs, also of a run that was killed just then."""
    shutil.rmtree(parts, ignore_errors=True)
    for leftover in output.parent.glob(f".{output.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    _lock_of(output).unlink(missing_ok=True)
