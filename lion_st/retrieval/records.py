"""Reading a corpus one record at a time, from whatever it is kept in."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

ID_FIELDS = ("_id", "id", "docid", "doc_id", "pid", "query_id", "qid")
TEXT_FIELDS = ("text", "contents", "body", "passage", "query", "question")

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

Corpus: TypeAlias = str | Path | Iterable[Mapping[str, Any]]


class Record(NamedTuple):
    """One text to encode."""

    id: str
    text: str


class BadRecord(NamedTuple):
    """A record that cannot be encoded: `reason` is "malformed" or "empty", `where` says which one it is.

    Malformed is what is no record (broken JSON, a line without a tab), has no id or text, or holds bytes or escapes
    that are no Unicode text.
    """

    reason: str
    where: str


def read_corpus(corpus: Corpus, split: str = "train") -> Iterator[Record | BadRecord]:
    """Yield the records of a corpus in its own order, never holding more than a few of them.

    A record's id is its first field of `_id`, `id`, `docid`, `doc_id`, `pid`, `query_id`, `qid`; its text is the first
    of `text`, `contents`, `body`, `passage`, `query`, `question`, with the `title`, if there is one, in front.

    Args:
        corpus: A BEIR folder (its `corpus.jsonl`), a `.jsonl`, `.tsv` (id, text and perhaps title, tab-separated) or
            `.parquet` file, optionally compressed (.gz, .bz2, .xz), a folder of such files, a folder of `.txt` files
            (each a document with the file's name as its id), "-" for JSON lines on the standard input, a dataset on the
            Hub as "hf://owner/name" or "hf://owner/name/configuration", or any iterable of mappings.
        split: Split of a Hub dataset.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file is of an unknown kind, or a compressed one ends early or is damaged.
    """
    if not isinstance(corpus, str | Path):
        yield from (_record(row, f"record {number}") for number, row in enumerate(corpus, 1))
    elif str(corpus) == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
        yield from _json_lines(sys.stdin, "standard input")
    elif str(corpus).startswith("hf://"):
        yield from _hub_dataset(str(corpus).removeprefix("hf://"), split)
    else:
        for file in corpus_files(corpus):
            yield from _read_file(file)


def texts_of(corpus: Corpus, kind: str) -> Corpus:
    """Where texts of a kind are: of a BEIR folder, `queries.jsonl` holds the queries."""
    if kind == "query" and isinstance(corpus, str | Path) and Path(corpus).is_dir():
        files = [Path(corpus) / f"queries.jsonl{end}" for end in ("", *COMPRESSED)]
        return next((file for file in files if file.exists()), corpus)
    return corpus


def corpus_files(corpus: str | Path) -> list[Path]:
    """The files that a path stands for, in reading order."""
    path = Path(corpus)
    if not path.exists():
        raise FileNotFoundError(f"The corpus {path} does not exist; a Hub dataset is written hf://owner/name.")
    if path.is_file():
        return [path]
    for end in ("", *COMPRESSED):
        if (path / f"corpus.jsonl{end}").exists():
            return [path / f"corpus.jsonl{end}"]
    readable = sorted(file for file in path.iterdir() if _kind(file) is not None)
    # Beside tables, a text file is a note about them and no document.
    files = [file for file in readable if _kind(file) != ".txt"] or readable
    if not files:
        raise ValueError(f"The folder {path} holds no .jsonl, .tsv, .parquet or .txt file.")
    return files


def _read_file(file: Path) -> Iterator[Record | BadRecord]:
    kind = _kind(file)
    if kind == ".parquet":
        import pyarrow.parquet

        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield _record(row, f"{file.name} row {number}")
    elif kind == ".txt":
        yield _record({"id": file.name, "text": "".join(_lines(file))}, file.name)
    elif kind == ".jsonl":
        yield from _json_lines(_lines(file), file.name)
    elif kind == ".tsv":
        yield from _tab_separated(_lines(file), file.name)
    else:
        raise ValueError(
            f"Cannot read a corpus from {file}: give .jsonl, .tsv, .parquet or .txt (also .gz, .bz2, .xz)."
        )


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", ".tsv", ".parquet", ".txt") else None


def _lines(file: Path) -> Iterator[str]:
    """Lines of a text file; a byte that is no UTF-8 becomes a surrogate, which makes its record malformed."""
    opener = COMPRESSED.get(file.suffix, open)
    lines: IO[str]
    try:
        with opener(file, "rt", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            yield from lines
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} ends early or is damaged ({error}): compress or copy it again.") from error


def _tab_separated(lines: Iterable[str], name: str) -> Iterator[Record | BadRecord]:
    for number, line in enumerate(lines, 1):
        fields = line.rstrip("\r\n").split("\t")
        where = f"{name}:{number}"
        if len(fields) in (2, 3):
            yield _record(dict(zip(("id", "text", "title"), fields, strict=False)), where)
        elif line.strip():
            yield BadRecord("malformed", where)


def _json_lines(lines: Iterable[str], name: str) -> Iterator[Record | BadRecord]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield BadRecord("malformed", where)
        else:
            yield _record(row, where)


def _hub_dataset(name: str, split: str) -> Iterator[Record | BadRecord]:
    from datasets import load_dataset

    owner, repository, *configuration = name.split("/", 2)
    dataset = load_dataset(f"{owner}/{repository}", *configuration, split=split, streaming=True)
    for number, row in enumerate(dataset, 1):
        yield _record(row, f"hf://{name} row {number}")


def _record(row: Any, where: str) -> Record | BadRecord:
    if not isinstance(row, Mapping):
        return BadRecord("malformed", where)
    identifier = next((row[field] for field in ID_FIELDS if row.get(field) is not None), None)
    text = next((row[field] for field in TEXT_FIELDS if row.get(field) is not None), None)
    title = row.get("title")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int) or not str(identifier).strip():
        return BadRecord("malformed", where)
    if not isinstance(text, str | None) or not isinstance(title, str | None) or (text is None and title is None):
        return BadRecord("malformed", where)
    joined = f"{title or ''} {text or ''}".strip()
    if not joined:
        return BadRecord("empty", where)
    try:
        f"{identifier}{joined}".encode()
    except UnicodeEncodeError:  # half a surrogate pair: neither a tokenizer nor a file takes it
        return BadRecord("malformed", where)
    return Record(str(identifier), joined)
