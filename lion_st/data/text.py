"""Plain text for language-model stages: reading files and cutting them into fixed blocks."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

JSON_TEXT_FIELDS = ("text", "title", "query", "question", "pos", "positive")


def open_text(path: str | Path) -> IO[str]:
    """Open a UTF-8 text file, decompressing `.gz` and `.xz` on the way; lines end at newlines alone."""
    path = Path(path)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")


def iter_documents(path: str | Path, lines_per_document: int = 64) -> Iterator[str]:
    """Yield the documents of one file.

    Args:
        path: `.txt` (consecutive lines are grouped) or `.jsonl` (the text fields of a row are joined by a newline),
            either of them optionally `.gz` or `.xz`.
        lines_per_document: Lines of a `.txt` file that make one document.

    Raises:
        ValueError: If the file is of another kind or a JSON row has no text field.
    """
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz").removesuffix(".xz")).suffix
    if kind == ".jsonl":
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                parts = [row[field] for field in JSON_TEXT_FIELDS if isinstance(row.get(field), str)]
                if not parts:
                    raise ValueError(f"{path}:{number} has none of the text fields {JSON_TEXT_FIELDS}.")
                yield "\n".join(parts)
    elif kind == ".txt":
        with open_text(path) as lines:
            group: list[str] = []
            for line in lines:
                if line.strip():
                    group.append(line.strip())
                if len(group) == lines_per_document:
                    yield "\n".join(group)
                    group = []
            if group:
                yield "\n".join(group)
    else:
        raise ValueError(f"Cannot read text from {path}: give .txt or .jsonl, optionally compressed as .gz or .xz.")


def read_documents(sources: Iterable[str | Path], split: str = "train", rows_per_document: int = 64) -> Iterator[str]:
    """Yield the documents of files and data sets.

    Args:
        sources: Files as `iter_documents` reads them, or data sets of the Hub (or local folders of one) with a column
            `text`, the subset after a colon, as in "Salesforce/wikitext:wikitext-103-raw-v1".
        split: Split of a data set.
        rows_per_document: Rows of a data set that make one document, empty ones not counted.

    Raises:
        FileNotFoundError: If a source looks like a file and is not there.
        ValueError: If a data set has no column `text`.
    """
    for source in sources:
        name, _, subset = str(source).partition(":")
        path = Path(str(source))
        if path.is_file():
            yield from iter_documents(path)
            continue
        if not Path(name).is_dir() and (path.suffix in (".txt", ".jsonl", ".gz", ".xz") or name.count("/") > 1):
            raise FileNotFoundError(f"There is no text file {str(source)!r}.")
        from datasets import load_dataset

        rows = load_dataset(name, subset or None, split=split)
        if "text" not in rows.column_names:
            raise ValueError(f"{source} has the columns {rows.column_names}: it needs a column 'text'.")
        texts = (text.strip() for batch in rows.iter(1000) for text in batch["text"] if text and not text.isspace())
        while group := list(islice(texts, rows_per_document)):
            yield "\n".join(group)


def token_blocks(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, batch_size: int = 256
) -> Dataset:
    """Concatenate tokenized documents and cut them into blocks of equal length.

    Every document is tokenized with the tokenizer's own special tokens, so a BOS token marks where it starts. The
    tail that does not fill a block is dropped.

    Returns:
        A dataset with one int32 column `input_ids`, each row of `block_size` tokens.

    Raises:
        ValueError: If the documents do not fill a single block.
    """
    import numpy as np
    from datasets import Dataset
    from tqdm.auto import tqdm

    parts: list[np.ndarray] = []

    def flush(batch: list[str]) -> None:
        encoded = tokenizer(batch, return_attention_mask=False, verbose=False)["input_ids"]
        parts.extend(np.asarray(ids, dtype=np.int32) for ids in encoded)

    batch: list[str] = []
    for document in tqdm(documents, desc="Tokenize", unit=" documents"):
        batch.append(document)
        if len(batch) == batch_size:
            flush(batch)
            batch = []
    if batch:
        flush(batch)
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    count = len(tokens) // block_size
    if count == 0:
        raise ValueError(f"The text has {len(tokens)} tokens, fewer than one block of {block_size}: give more text.")
    return Dataset.from_dict({"input_ids": tokens[: count * block_size].reshape(count, block_size)})
