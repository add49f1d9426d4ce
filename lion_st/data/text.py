"""Plain text for language-model stages: reading files and cutting them into fixed blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from lion_st.data.files import READABLE, checked, file_kind, read_lines, read_rows
from lion_st.data.sources import parse_source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT_FIELDS = ("text", "title", "query", "question", "pos", "positive")
FORM = f"text in a table needs a header with one of {', '.join(TEXT_FIELDS)}."


def iter_documents(path: str | Path, lines_per_document: int = 64) -> Iterator[str]:
    """Yield the documents of one file.

    Args:
        path: `.txt` (consecutive lines are grouped), or `.jsonl`, `.parquet`, `.tsv` or `.csv` with a header (the text
            fields of a row are joined by a newline), all but .parquet optionally compressed.
        lines_per_document: Lines of a `.txt` file that make one document.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of another kind or damaged, or a row cannot be read or has no text field.
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


def read_documents(sources: Iterable[str | Path], split: str = "train", rows_per_document: int = 64) -> Iterator[str]:
    """Yield the documents of files and data sets.

    Args:
        sources: Files as `iter_documents` reads them, or data sets of the Hub (or local folders of one) with a column
            `text`, such as "Salesforce/wikitext:wikitext-103-raw-v1"; see `parse_source`.
        split: Split of a data set.
        rows_per_document: Rows of a data set, empty ones not counted, or lines of a `.txt` file that make one document.

    Raises:
        FileNotFoundError: If a source is not there.
        ValueError: If a data set has no column `text`.
    """
    for source in sources:
        found = parse_source(source)
        if found.path is not None and found.path.is_file():
            yield from iter_documents(found.path, rows_per_document)
            continue
        from datasets import load_dataset

        rows = load_dataset(found.place, found.subset, split=split)
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
