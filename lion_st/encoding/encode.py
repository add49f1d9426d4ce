"""Texts to vectors: in memory, or a whole corpus to shards on disk, streaming and resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lion_st.data.fields import Task
from lion_st.data.records import Corpus, Record
from lion_st.encoding.fingerprints import (
    input_module,
    model_fingerprint,
    model_name,
    model_revision,
    model_settings,
    prompt_for,
    term_limit,
    text_limit,
    tokenizer_contract,
    weights_fingerprint,
)
from lion_st.encoding.options import EncodingOptions
from lion_st.encoding.reading import ShardReader, progress_bar
from lion_st.encoding.shards import (
    VERSION,
    claim_output,
    finish_output,
    is_finished,
    launched_processes,
    locked_output,
    write_shard,
)
from lion_st.encoding.vectors import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

PLURAL: dict[Task, str] = {"query": "queries", "document": "documents"}


def encode_texts(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    task: Task,
    *,
    max_tokens: int | None = None,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> Vectors:
    """Encode texts held in memory; the rows of a sparse model are never dense beyond one batch.

    Many threads may encode with one model, each with its own `max_tokens`.

    Args:
        model: A sparse or dense model.
        texts: N texts: a list, an array, a column of a table.
        task: Whether they are queries or documents: their prompts and lengths may differ.
        max_tokens: Length to cut texts to, in place of the model's own.
        tokens_per_batch: Padded tokens per batch.
        show_progress: Show a progress bar.

    Returns:
        float32: [N, V] as CSR for a sparse model, [N, D] as an array for a dense one, `TokenVectors` for a multi-vector
        one, `HybridVectors` for a hybrid one.

    Raises:
        ValueError: If there is no text, or one is empty or not a string.
    """
    from tqdm.auto import tqdm

    from lion_st.encoding.batches import BatchEncoder
    from lion_st.modules.tokenizing import check_texts

    if isinstance(texts, str | bytes):
        raise TypeError(f"Give a list of texts, got the string {texts[:40]!r}.")
    if task not in PLURAL:
        raise ValueError(f"task is 'query' or 'document', got {task!r}.")
    texts = list(texts)  # of pandas' Series the values, whatever their labels
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The {task} at position {row} is {text!r}: give a string that is not blank.")
    if not texts:
        raise ValueError(f"There is no {task} to encode.")
    check_texts(texts)
    limit = text_limit(model, task, max_tokens)
    with tqdm(total=len(texts), desc=f"Encoding {PLURAL[task]}", unit=task, disable=not show_progress) as progress:
        return BatchEncoder(model, task, limit, tokens_per_batch, progress).encode(texts).vectors


def encode_corpus(
    model: SentenceTransformer | SparseEncoder,
    corpus: Corpus,
    output: str | Path,
    *,
    task: Task = "document",
    split: str = "train",
    max_tokens: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    shard_documents: int = 4096,
    tokens_per_batch: int = 16_384,
    on_bad_record: Literal["skip", "raise"] = "skip",
    show_progress: bool = True,
) -> Path:
    """Encode a corpus into shards on disk; run again after any interruption to go on where it stopped.

    The corpus is read once, in its own order, `shard_documents` at a time. Within a shard, texts are batched by length
    under a token budget. A shard is written under a temporary name and renamed, so a shard that exists is complete.
    Under torchrun or accelerate, each process encodes every `WORLD_SIZE`-th shard; whichever ends last writes
    `manifest.json`. The same command gives the same bytes, whatever interrupted it. Memory does not grow with the
    corpus, but for 8 bytes a document by which repeated ids are noticed.

    A record without an id or text ("malformed"), with a blank text ("empty") or an id seen before ("duplicate id") is
    skipped, counted and, for the first 20, named in the manifest. Texts beyond the model's length limit are cut by its
    tokenizer and counted as truncated.

    Args:
        model: A sparse or dense model.
        corpus: See `read_corpus`; of a folder, queries are its `queries` file.
        output: Folder for the shards.
        task: Whether the records are documents or queries.
        split: Split of a Hub dataset.
        max_tokens: Length to cut texts to, in place of the model's own.
        dtype: How values are stored.
        shard_documents: Documents per shard.
        tokens_per_batch: Padded tokens per batch. An interrupted encoding may go on with another number, such as a
            smaller one after memory ran out; the vectors of its further shards then differ in rounding.
        on_bad_record: "raise" stops at the first record that would be skipped.
        show_progress: Show documents/s, tokens/s and, where the size of the corpus is known, the time left.

    Returns:
        The output folder; see `EncodedCorpus` for reading it.

    Raises:
        StorageError: If the folder was made with another model, other settings or another corpus, naming what differs.
            A checkpoint that was moved meanwhile is the same model.
        ValueError: At the first bad record if `on_bad_record` is "raise", or if no record is usable.
    """
    from lion_st.encoding.batches import BatchEncoder, TokenizedTexts
    from lion_st.encoding.pipeline import computed_ahead, done_behind, read_ahead

    output = Path(output)
    rank, world_size = launched_processes()
    options = EncodingOptions(task, split, max_tokens, dtype, shard_documents, tokens_per_batch, on_bad_record)
    settings = corpus_settings(model, options)
    reader = ShardReader(corpus, options)
    # What an iterator runs may insist on the caller's thread, and a standard input may never end.
    is_file = isinstance(corpus, str | Path) and str(corpus) != "-"
    shards = read_ahead(enumerate(reader)) if is_file else enumerate(reader)
    with locked_output(output, rank), progress_bar(corpus, show_progress and rank == 0, task) as progress:
        claim_output(output, settings)
        encoder = BatchEncoder(model, task, settings["max_tokens"], tokens_per_batch, progress)

        def prepare(shard: tuple[int, list[Record]]) -> tuple[int, list[Record], TokenizedTexts | None]:
            number, records = shard
            if number % world_size != rank or is_finished(output, number, records):
                return number, records, None
            return number, records, encoder.tokenize([record.text for record in records])

        def write(number: int, records: list[Record], tokenized: TokenizedTexts, copies: list[Any]) -> None:
            write_shard(output, number, records, encoder.collect(tokenized, copies), dtype)

        with done_behind() as behind:
            for number, records, tokenized in computed_ahead(prepare, shards):
                if tokenized is None:
                    progress.update(len(records))
                else:
                    behind(write, number, records, tokenized, encoder.run(tokenized))
        finish_output(output, settings, reader.counts)
    return output


def corpus_settings(model: SentenceTransformer | SparseEncoder, options: EncodingOptions) -> dict[str, Any]:
    """Everything besides the corpus that the shards' bytes depend on."""
    from lion_st.models import paradigm_of

    return {
        "kind": "lion_st encoded corpus",
        "version": VERSION,
        "model": model_name(model),
        "revision": model_revision(model),
        "model_xxh3": model_fingerprint(model),
        "weights_xxh3": weights_fingerprint(model),
        "model_settings": model_settings(model),
        "paradigm": paradigm_of(model),
        "texts": options.task,
        "prompt": prompt_for(model, options.task),
        "max_tokens": text_limit(model, options.task, options.max_tokens),
        "max_active_dims": term_limit(model, options.task),
        "fusion_weights": getattr(list(model)[-1], "fusion_weights", None),  # of a hybrid model
        "tokenizer": tokenizer_contract(input_module(model, options.task).tokenizer),
        "dtype": options.dtype,
        "shard_documents": options.shard_documents,
        "tokens_per_batch": options.tokens_per_batch,
    }


def encode_shard(
    model: SentenceTransformer | SparseEncoder,
    records: list[Record],
    output: Path,
    number: int,
    settings: dict[str, Any],
) -> Path:
    """Encode records and write them as one shard."""
    from lion_st.encoding.batches import BatchEncoder

    encoder = BatchEncoder(model, settings["texts"], settings["max_tokens"], settings["tokens_per_batch"])
    return write_shard(output, number, records, encoder.encode([record.text for record in records]), settings["dtype"])
