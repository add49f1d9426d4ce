"""Plain text for language-model stages: reading files and cutting them into fixed blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from lion_st.data.cache import cached_table, identity_of
from lion_st.data.fields import TEXT_FIELDS as NAMES_OF_TEXTS
from lion_st.data.fields import TITLE_FIELD
from lion_st.data.files import READABLE, checked, file_kind, read_lines, read_rows
from lion_st.data.sources import load_table, parse_source
from lion_st.files import checksum

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT_FIELDS = tuple(dict.fromkeys(("text", TITLE_FIELD, "query", "question", "pos", "positive", *NAMES_OF_TEXTS)))
ROWS_PER_DOCUMENT = 64
BLOCKS_FORMAT = 2  # part of the cache's key: raise it when the same texts shall give other blocks
FORM = f"text in a table needs a header with one of {', '.join(TEXT_FIELDS)}."


def iter_documents(path: str | Path, lines_per_document: int = 64) -> Iterator[str]:
    """Yield the documents of one file.

    Args:
        path: `.txt` (consecutive lines are grouped), or `.jsonl`, `.parquet`, `.tsv` or `.csv` with a header (the text
            fields of a row are joined by a newline), all but .parquet optionally compressed.
        lines_per_document: Lines of a `.txt` file that make one document.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind is None:
        raise ValueError(f"Cannot read text from {path}: give {READABLE}.")
    if kind == ".txt":
        stripped = (line.strip() for _, line in checked(read_lines(path)))
        while group := list(islice(stripped, lines_per_document)):
            yield "\n".join(group)
        return
    for place, row in checked(read_rows(path, lambda names: any(name in TEXT_FIELDS for name in names), accepted=FORM)):
        parts = [row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str)]
        if not parts:
            raise ValueError(f"{place} has the fields {sorted(row)}, no text: accepted are {', '.join(TEXT_FIELDS)}.")
        yield "\n".join(parts)


def read_documents(sources: Iterable[str | Path], rows_per_document: int = ROWS_PER_DOCUMENT) -> Iterator[str]:
    """Yield the documents of files and data sets.

    Args:
        sources: Files as `iter_documents` reads them, or data sets of the Hub (or local folders of one) with a column
            `text`, such as "Salesforce/wikitext:wikitext-103-raw-v1"; see `parse_source`.
        rows_per_document: Rows of a data set, empty ones not counted, or lines of a `.txt` file that make one document.

    Raises:
        FileNotFoundError: If a source is not there.
        ValueError: If a data set has no column `text`.
    """
    for source in sources:
        yield from _documents(_open(source), rows_per_document)


def token_blocks(
    sources: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    rows_per_document: int = ROWS_PER_DOCUMENT,
) -> Dataset:
    """The texts of files and data sets as blocks of tokens, see `read_documents` and `iter_blocks`.

    They are tokenized once, by the first process that asks for them, on all cores; the others wait. The blocks stay in
    the cache of `datasets` until a text, the tokenizer, the block size or the version of lion_st changes, and are
    memory-mapped.

    Returns:
        A dataset with one int32 column `input_ids`, each row of `block_size` tokens.

    Raises:
        FileNotFoundError: If a source is not there.
        ValueError: If a source cannot be read, or the texts do not fill a single block.
    """
    opened = list(map(_open, sources))
    identity = {
        "format": BLOCKS_FORMAT,
        "texts": [identity_of(one) for one in opened],
        "tokenizer": _tokenizer_identity(tokenizer),
        "block_size": block_size,
        "rows_per_document": rows_per_document,
    }

    def write(path: Path) -> dict[str, int]:
        documents = (document for one in opened for document in _documents(one, rows_per_document))
        return {"blocks": _write_blocks(path, iter_blocks(documents, tokenizer, block_size), block_size)}

    return cached_table("tokens", identity, write)[0]


def iter_blocks(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, documents_at_once: int = 256
) -> Iterator[np.ndarray]:
    """Concatenate tokenized documents and cut them into blocks of equal length.

    Every document is tokenized with the tokenizer's own special tokens, so a BOS token marks where it starts. The
    tail that does not fill a block is dropped.

    Yields:
        int32 [blocks, block_size], as they come.
    """
    from tqdm.auto import tqdm

    stream = iter(tqdm(documents, desc="Tokenize", unit=" documents"))
    rest = np.empty(0, np.int32)
    filled = False
    while batch := list(islice(stream, documents_at_once)):
        encoded = tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
        tokens = np.concatenate([rest, *(np.asarray(ids, dtype=np.int32) for ids in encoded)])
        count = len(tokens) // block_size
        rest = tokens[count * block_size :]
        if count:
            filled = True
            yield tokens[: count * block_size].reshape(count, block_size)
    if not filled:
        raise ValueError(f"The text has {len(rest)} tokens, fewer than one block of {block_size}: give more text.")


def _open(source: str | Path) -> Path | Dataset:
    """A file to read line by line, or a table."""
    found = parse_source(source)
    if found.path is not None and found.path.is_file():
        return found.path
    rows = load_table(found.place, found.subset, "train")
    if "text" not in rows.column_names:
        raise ValueError(f"{source} has the columns {rows.column_names}: it needs a column 'text'.")
    return rows.select_columns(["text"])


def _documents(opened: Path | Dataset, rows_per_document: int) -> Iterator[str]:
    if isinstance(opened, Path):
        yield from iter_documents(opened, rows_per_document)
        return
    texts = (text.strip() for batch in opened.iter(1000) for text in batch["text"] if text and not text.isspace())
    while group := list(islice(texts, rows_per_document)):
        yield "\n".join(group)


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides on a tokenizer's tokens."""
    import xxhash

    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        del state["truncation"], state["padding"]  # of the last call
        return xxhash.xxh3_128_hexdigest(json.dumps([state, tokenizer.split_special_tokens]).encode())
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return " ".join(f"{file.relative_to(folder)} {checksum(file)}" for file in files)


def _write_blocks(path: Path, blocks: Iterator[np.ndarray], block_size: int) -> int:
    import pyarrow as pa

    schema, count = pa.schema({"input_ids": pa.list_(pa.int32())}), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for part in blocks:
            offsets = pa.array(np.arange(len(part) + 1) * block_size, pa.int32())
            rows = pa.ListArray.from_arrays(offsets, pa.array(part.reshape(-1)))
            writer.write_batch(pa.RecordBatch.from_arrays([rows], schema=schema))
            count += len(part)
    return count
