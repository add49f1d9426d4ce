"""Texts to vectors: in memory, or a whole corpus to shards on disk, streaming and resumable."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash
from scipy import sparse

from lion_st.data.files import file_kind
from lion_st.data.records import BadRecord, Corpus, Record, corpus_files, read_corpus
from lion_st.encoding.fingerprints import (
    Kind,
    input_module,
    model_fingerprint,
    model_name,
    model_revision,
    text_limit,
    tokenizer_contract,
    weights_fingerprint,
)
from lion_st.encoding.storage import StorageError, contents_checksum, strings_to_arrays, unpack_strings
from lion_st.encoding.vectors import Vectors, keep_top_terms, to_csr, to_dense
from lion_st.files import (
    LOCK,
    FolderInUse,
    atomic_file,
    atomic_write,
    checksum,
    has_checksum,
    inside,
    lock_folder,
    remove_leftovers,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

VERSION = 1
SETTINGS = "settings.json"
MANIFEST = "manifest.json"
MAX_TEXTS_PER_BATCH = 256
MANY_WITHOUT_TERMS = 0.01  # share of the texts that is warned of
MAX_EXAMPLES = 20  # skipped records that the manifest names

PLURAL: dict[Kind, str] = {"query": "queries", "document": "documents"}
PROMPT_NAMES: dict[Kind, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


class EncodedTexts(NamedTuple):
    """Vectors in the order of their texts, and what they cost."""

    vectors: Vectors  # CSR [N, V] or array [N, D], float32
    tokens: int  # real tokens that went through the model
    truncated: int  # texts longer than the model's limit


def encode_texts(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    kind: Kind,
    *,
    max_tokens: int | None = None,
    tokens_per_batch: int = 8192,
    show_progress: bool = False,
) -> Vectors:
    """Encode texts held in memory; the rows of a sparse model are never dense beyond one batch.

    Many threads may encode with one model, each with its own `max_tokens`.

    Args:
        model: A sparse or dense model.
        texts: N texts.
        kind: Whether they are queries or documents: their prompts and lengths may differ.
        max_tokens: Length to cut texts to, in place of the model's own.
        tokens_per_batch: Padded tokens per batch.
        show_progress: Show a progress bar.

    Returns:
        float32, [N, V] as CSR for a sparse model or [N, D] as an array for a dense one.

    Raises:
        ValueError: If there is no text, or one is empty or not a string.
    """
    from tqdm.auto import tqdm

    if isinstance(texts, str | bytes):
        raise TypeError(f"Give a list of texts, got the string {texts[:40]!r}.")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The {kind} at position {row} is {text!r}: give a string that is not blank.")
    bar = tqdm(total=len(texts), desc=f"Encoding {PLURAL[kind]}", unit=kind, disable=not show_progress)
    with bar as progress:
        return _encode(model, texts, kind, tokens_per_batch, text_limit(model, kind, max_tokens), progress).vectors


def encode_corpus(
    model: SentenceTransformer | SparseEncoder,
    corpus: Corpus,
    output: str | Path,
    *,
    kind: Kind = "document",
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
        kind: Whether the records are documents or queries.
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
        ValueError: At the first bad record if `on_bad_record` is "raise", or if no record is usable.
    """
    output = Path(output)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = corpus_settings(model, kind, dtype, shard_documents, tokens_per_batch, max_tokens=max_tokens)
    reader = ShardReader(corpus, split, shard_documents, on_bad_record, kind)
    with locked_output(output, rank), progress_bar(corpus, show_progress and rank == 0, kind) as progress:
        claim_output(output, settings)
        for number, records in enumerate(reader):
            if number % world_size == rank and not is_finished(output, number, records):
                encode_shard(model, records, output, number, settings, progress)
            else:
                progress.update(len(records))
        finish_output(output, settings, reader.counts)
    return output


@contextmanager
def locked_output(output: Path, rank: int = 0) -> Iterator[None]:
    """Hold an encoding's folder against other runs; a second run waits, and then finds the shards there."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: give a folder.")
    name = LOCK if rank == 0 else f"{LOCK}-{rank}"
    try:
        lock = lock_folder(output, wait=False, name=name)
        lock.__enter__()
    except FolderInUse as error:
        warnings.warn(f"{error} Waiting for it to end.", stacklevel=3)
        lock = lock_folder(output, name=name)
        lock.__enter__()
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def corpus_settings(
    model: SentenceTransformer | SparseEncoder,
    kind: Kind,
    dtype: str,
    shard_documents: int,
    tokens_per_batch: int,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Everything besides the corpus that the shards' bytes depend on."""
    from lion_st.models import paradigm_of

    if kind not in PROMPT_NAMES:
        raise ValueError(f"kind is 'query' or 'document', got {kind!r}.")
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype is 'float32' or 'float16', got {dtype!r}.")
    if shard_documents < 1 or tokens_per_batch < 1:
        raise ValueError(
            f"Got shard_documents={shard_documents} and tokens_per_batch={tokens_per_batch}: give 1 or more."
        )
    return {
        "kind": "lion_st encoded corpus",
        "version": VERSION,
        "model": model_name(model),
        "revision": model_revision(model),
        "model_sha256": model_fingerprint(model),
        "weights_sha256": weights_fingerprint(model),
        "paradigm": paradigm_of(model),
        "texts": kind,
        "prompt": prompt_for(model, kind),
        "max_tokens": text_limit(model, kind, max_tokens),
        "tokenizer": tokenizer_contract(input_module(model, kind).tokenizer),
        "dtype": dtype,
        "shard_documents": shard_documents,
        "tokens_per_batch": tokens_per_batch,
    }


def claim_output(output: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a new folder, or check that an earlier run had the same ones."""
    file = output / SETTINGS
    if not file.exists():
        others = [child.name for child in output.glob("[!.]*") if not child.name.endswith(".tmp")]
        if others and not file.exists():  # another process of the same run may have written it just now
            raise StorageError(f"{output} is not empty ({min(others)}) and holds no {SETTINGS}: give a new folder.")
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(settings, indent=1, ensure_ascii=False))
        return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{file} cannot be read ({error}): give a new folder.") from error
    expected = json.loads(json.dumps(settings))
    binding = (expected.keys() | found.keys()) - {"tokens_per_batch"}  # which rounds otherwise, and no more
    different = [key for key in binding if expected.get(key) != found.get(key)]
    if different:
        changes = "; ".join(f"{key} was {found.get(key)!r}, is {expected.get(key)!r}" for key in sorted(different))
        raise StorageError(f"{output} was begun with other settings: {changes}. Give a new folder.")


@dataclass
class CorpusCounts:
    """What reading a corpus to its end found."""

    shards: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    examples: list[str] = field(default_factory=list)  # the first skipped records


class ShardReader:
    """The usable records of a corpus in lists of `shard_documents`, counting what is skipped.

    Attributes:
        counts: Complete once the iteration has ended.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str = "train",
        shard_documents: int = 4096,
        on_bad_record: str = "skip",
        kind: Kind = "document",
    ) -> None:
        if on_bad_record not in ("skip", "raise"):
            raise ValueError(f"on_bad_record is 'skip' or 'raise', got {on_bad_record!r}.")
        self.corpus = corpus
        self.split = split
        self.shard_documents = shard_documents
        self.on_bad_record = on_bad_record
        self.kind: Kind = kind
        self.counts = CorpusCounts()

    def __iter__(self) -> Iterator[list[Record]]:
        earlier = _SeenIds()
        records: dict[str, Record] = {}
        for item in read_corpus(self.corpus, self.split, self.kind):
            if isinstance(item, BadRecord):
                self._skip(item.reason, item.message)
            elif item.id in records or item.id in earlier:
                self._skip("duplicate id", item.id)
            else:
                records[item.id] = item
            if len(records) == self.shard_documents:
                yield self._shard(records)
                earlier.add(records)
                records = {}
        if records:
            yield self._shard(records)
        if not self.counts.documents:
            raise ValueError(f"The corpus {self.corpus} has no usable record; skipped: {dict(self.counts.skipped)}.")

    def _shard(self, records: dict[str, Record]) -> list[Record]:
        self.counts.shards += 1
        self.counts.documents += len(records)
        return list(records.values())

    def _skip(self, reason: str, message: str) -> None:
        if self.on_bad_record == "raise":
            raise ValueError(f"Bad record ({reason}): {message} Mend the corpus or pass on_bad_record='skip'.")
        self.counts.skipped[reason] += 1
        if len(self.counts.examples) < MAX_EXAMPLES:
            self.counts.examples.append(f"{reason}: {message}")


class _SeenIds:
    """A set of ids in 8 bytes each: their 64-bit hashes, sorted."""

    def __init__(self) -> None:
        self._hashes = np.empty(0, dtype=np.uint64)

    def __contains__(self, identifier: str) -> bool:
        one = self._hash([identifier])[0]
        place = self._hashes.searchsorted(one)
        return bool(place < self._hashes.size and self._hashes[place] == one)

    def add(self, identifiers: Iterable[str]) -> None:
        hashes = np.sort(self._hash(identifiers))
        self._hashes = np.insert(self._hashes, self._hashes.searchsorted(hashes), hashes)

    @staticmethod
    def _hash(identifiers: Iterable[str]) -> np.ndarray:
        digests = b"".join(hashlib.blake2b(one.encode(), digest_size=8).digest() for one in identifiers)
        return np.frombuffer(digests, dtype=np.uint64)


def shard_path(output: Path, number: int) -> Path:
    """Where a shard lies once it is complete."""
    return output / f"shard-{number:06d}.safetensors"


def is_finished(output: Path, number: int, records: list[Record]) -> bool:
    """Whether a shard exists and is intact; raises if it was made of other records.

    Warns:
        UserWarning: If it is damaged, and so has to be encoded again.
    """
    file = shard_path(output, number)
    if not file.exists():
        return False
    try:
        metadata = shard_metadata(file)
        is_intact = _is_intact(file, metadata)
    except StorageError:
        is_intact = False
    if not is_intact:
        warnings.warn(f"{file} is damaged and is encoded again.", stacklevel=2)
        return False
    if metadata["corpus_sha256"] != records_digest(records):
        raise StorageError(
            f"{file} was made of other records than the corpus now gives from {records[0].id!r} on: "
            "the corpus changed. Give a new folder."
        )
    return True


def _is_intact(file: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether a shard's arrays have the checksum in its header; of an earlier version's shard the manifest's counts."""
    if "arrays_xxh3" in metadata:
        return _arrays_checksum(_read_arrays(file)) == metadata["arrays_xxh3"]
    try:
        manifest = json.loads((file.parent / MANIFEST).read_text(encoding="utf-8"))
        facts = next(shard for shard in manifest["shards"] if shard["file"] == file.name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return True  # nothing is known of it beyond its header
    return has_checksum(file, facts)


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise StorageError(f"{file} cannot be read ({error}): run the encoding again.") from error


def _arrays_checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def encode_shard(
    model: SentenceTransformer | SparseEncoder,
    records: list[Record],
    output: Path,
    number: int,
    settings: dict[str, Any],
    progress: Any = None,
) -> Path:
    """Encode records and write them as one shard, under a temporary name first."""
    from safetensors.numpy import save_file

    texts = [record.text for record in records]
    encoded = _encode(model, texts, settings["texts"], settings["tokens_per_batch"], settings["max_tokens"], progress)
    arrays = strings_to_arrays("ids", [record.id for record in records])
    if isinstance(encoded.vectors, np.ndarray):
        arrays["vectors"] = encoded.vectors.astype(settings["dtype"])
        without_terms = 0
    else:
        without_terms = int((np.diff(encoded.vectors.indptr) == 0).sum())
        arrays["indptr"] = encoded.vectors.indptr.astype(np.int64)
        arrays["terms"] = encoded.vectors.indices.astype(np.int32)
        arrays["weights"] = encoded.vectors.data.astype(settings["dtype"])
    metadata = {
        "documents": len(records),
        "dimensions": encoded.vectors.shape[1],
        "tokens": encoded.tokens,
        "truncated": encoded.truncated,
        "without_terms": without_terms,
        "corpus_sha256": records_digest(records),
        "arrays_xxh3": _arrays_checksum(arrays),
    }
    file = shard_path(output, number)
    with atomic_file(file) as temporary:
        save_file(arrays, temporary, metadata={"shard": json.dumps(metadata, sort_keys=True)})
    return file


def shard_metadata(file: Path) -> dict[str, Any]:
    """Counts and the digest of the records that a shard was made of."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as shard:
            return json.loads(shard.metadata()["shard"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{file} is not a complete shard ({error}): delete it and run the encoding again.") from None


def finish_output(output: Path, settings: dict[str, Any], counts: CorpusCounts) -> None:
    """Write the manifest if all shards are there; other processes may still be at work on some."""
    files = [shard_path(output, number) for number in range(counts.shards)]
    surplus = sorted(set(output.glob("shard-*.safetensors")) - set(files))
    if surplus:
        raise StorageError(f"{surplus[0]} lies beyond the end of the corpus: the corpus changed. Give a new folder.")
    if not all(file.exists() for file in files):
        return
    shards = []
    for file in files:
        shards.append({"file": file.name, "bytes": file.stat().st_size, "xxh3": checksum(file), **shard_metadata(file)})
    manifest = {
        "settings": settings,
        "documents": counts.documents,
        "dimensions": shards[0]["dimensions"],
        "tokens": sum(shard["tokens"] for shard in shards),
        "truncated": sum(shard["truncated"] for shard in shards),
        "without_terms": sum(shard.get("without_terms", 0) for shard in shards),
        "skipped": dict(sorted(counts.skipped.items())),
        "skipped_examples": counts.examples,
        "shards": shards,
    }
    manifest["xxh3"] = contents_checksum(manifest)
    if manifest["without_terms"] > MANY_WITHOUT_TERMS * counts.documents:
        warnings.warn(
            f"{manifest['without_terms']:,} of {counts.documents:,} texts have no term and can never be found: check "
            "the model and its prompts.",
            stacklevel=3,
        )
    atomic_write(output / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # else another process may be writing the same manifest
    if is_alone:
        remove_leftovers(output)
    for leftover in output.glob("*.tmp" if is_alone else "shard-*.tmp"):
        leftover.unlink(missing_ok=True)


def is_complete(output: str | Path) -> bool:
    """Whether an encoding has finished: the manifest is written last."""
    return (Path(output) / MANIFEST).exists()


class EncodedCorpus:
    """Reads what `encode_corpus` wrote, shard by shard.

    Args:
        path: The folder.
        verify: Compare each shard's checksum before reading it.

    Raises:
        StorageError: If the encoding has not finished, or a shard is missing or damaged.

    Example:
        >>> for ids, vectors in EncodedCorpus("runs/encoded"):  # doctest: +SKIP
        ...     index.add(ids, vectors)
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path = Path(path)
        self.verify = verify
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such folder.")
        if not (self.path / SETTINGS).exists() and not is_complete(self.path):
            raise StorageError(f"{self.path} is not an encoded corpus: it has neither {SETTINGS} nor {MANIFEST}.")
        if not is_complete(self.path):
            raise StorageError(f"{self.path} has no {MANIFEST}: the encoding has not finished; run it again.")
        try:
            self.manifest: dict[str, Any] = dict(json.loads((self.path / MANIFEST).read_text(encoding="utf-8")))
            self.paradigm: Literal["sparse", "dense"] = self.manifest["settings"]["paradigm"]
            for shard in self.manifest["shards"]:
                inside(self.path, shard["file"])
            is_intact = self.manifest.get("xxh3") in (None, contents_checksum(self.manifest))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self.path / MANIFEST} cannot be read ({error}): delete it and run the encoding again."
            ) from error
        if not is_intact:
            raise StorageError(f"{self.path / MANIFEST} is damaged: delete it and run the encoding again.")

    def __len__(self) -> int:
        return int(self.manifest["documents"])

    def __iter__(self) -> Iterator[tuple[list[str], Vectors]]:
        for shard in self.manifest["shards"]:
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                raise StorageError(f"{file} is missing or truncated: delete it and run the encoding again.")
            if self.verify and not has_checksum(file, shard):
                raise StorageError(f"{file} does not match its checksum: delete it and run the encoding again.")
            arrays = _read_arrays(file)
            try:
                ids = unpack_strings(arrays["ids_bytes"], arrays["ids_offsets"])
                shape = (len(ids), shard["dimensions"])
                if self.paradigm == "dense":
                    vectors: Vectors = to_dense(arrays["vectors"])
                else:
                    parts = (arrays["weights"].astype(np.float32), arrays["terms"], arrays["indptr"])
                    vectors = to_csr(sparse.csr_array(parts, shape=shape))
            except (ValueError, KeyError) as error:
                raise StorageError(f"{file} is damaged ({error}): delete it and run the encoding again.") from error
            if vectors.shape != shape:
                raise StorageError(f"{file} holds vectors {vectors.shape} and not {shape}: run the encoding again.")
            yield ids, vectors

    def whole(self) -> tuple[list[str], Vectors]:
        """All ids and all vectors in memory, such as those of queries."""
        shards = list(self)
        ids = [one for part, _ in shards for one in part]
        parts: list[Any] = [vectors for _, vectors in shards]
        return ids, np.concatenate(parts) if self.paradigm == "dense" else sparse.vstack(parts, format="csr")


def prompt_for(model: SentenceTransformer | SparseEncoder, kind: Kind) -> str | None:
    """The prompt that `encode_query` or `encode_document` would put in front of a text."""
    name = next((name for name in PROMPT_NAMES[kind] if name in model.prompts), model.default_prompt_name)
    return model.prompts.get(name) if name is not None else None


def _encode(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    kind: Kind,
    tokens_per_batch: int,
    limit: int,
    progress: Any,
) -> EncodedTexts:
    """Encode in batches of like length; the batches depend on the texts alone, and so do the vectors' bits."""
    import torch

    from lion_st.models import paradigm_of

    if not texts:
        raise ValueError(f"There is no {kind} to encode.")
    prompt = prompt_for(model, kind)
    lengths = _token_counts(input_module(model, kind).tokenizer, texts, limit, prompt or "")
    real = np.minimum(lengths, limit)
    order = np.argsort(-real, kind="stable")
    convert = to_csr if paradigm_of(model) == "sparse" else to_dense
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        count = min(max(1, tokens_per_batch // int(real[order[start]])), MAX_TEXTS_PER_BATCH)
        batches.append(order[start : start + count])
        start += count
    parts: list[Any] = []
    tokens = 0
    started = time.monotonic()
    model.eval()
    batched_texts = [[texts[row] for row in batch] for batch in batches]
    tokenize = partial(_tokenize, model, prompt=prompt, task=kind, max_length=limit)
    tokenized = _one_ahead(tokenize, batched_texts)
    for batch, features in zip(batches, tokenized, strict=True):
        with torch.inference_mode():
            parts.append(convert(_forward(model, features, kind)))
        if progress is not None:
            progress.update(len(batch))
            tokens += int(real[batch].sum())
            progress.set_postfix_str(f"{tokens / max(1e-9, time.monotonic() - started):,.0f} tokens/s", refresh=False)
    back = np.argsort(order)
    vectors = np.concatenate(parts)[back] if convert is to_dense else sparse.vstack(parts, format="csr")[back]
    return EncodedTexts(vectors, int(real.sum()), int((lengths > limit).sum()))


def _one_ahead(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The function's results in order, each computed by a thread while its predecessor is in use."""
    if len(items) == 1:
        yield function(items[0])
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(function, items[0])
        for item in items[1:]:
            result = coming.result()
            coming = thread.submit(function, item)
            yield result
        yield coming.result()


def _forward(model: SentenceTransformer | SparseEncoder, features: dict[str, Any], kind: Kind) -> Any:
    from sentence_transformers.util import batch_to_device

    from lion_st.modules import SpladeHead

    features = batch_to_device(features, model.device)
    is_fused = any(isinstance(module, SpladeHead) for module in model)
    vectors = model(features, task=kind, **({"output": "sparse"} if is_fused else {}))["sentence_embedding"]
    limit = getattr(model, "max_active_dims", None)  # a stock SparseEncoder's own
    return vectors if limit is None else keep_top_terms(to_csr(vectors), limit)


def _tokenize(model: SentenceTransformer | SparseEncoder, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    from lion_st.modules.tokenizing import exclusive_tokenizer

    with exclusive_tokenizer():
        return model.preprocess(texts, **options)


def _token_counts(tokenizer: Any, texts: Sequence[str], limit: int, prompt: str) -> np.ndarray:
    """Tokens of each text with its prompt; of a text that is much longer than the limit, more than the limit."""
    from lion_st.modules.tokenizing import exclusive_tokenizer, leading_parts

    with exclusive_tokenizer():
        parts = [f"{prompt}{part}" for part in leading_parts(tokenizer, texts, limit, prompt)]
        encoded = tokenizer(parts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)


def records_digest(records: Iterable[Record]) -> str:
    """SHA-256 over ids and texts, in their order."""
    digest = hashlib.sha256()
    for record in records:
        for part in record:
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def progress_bar(corpus: Corpus, show: bool, kind: Kind = "document") -> Any:
    """A bar over the documents of a corpus, with a total where that is cheap to know."""
    from tqdm.auto import tqdm

    return tqdm(total=_count_documents(corpus, kind) if show else None, desc="Encoding", unit="doc", disable=not show)


def _count_documents(corpus: Corpus, kind: Kind) -> int | None:
    """Lines or rows of plain files; None for compressed or remote ones, whose counting would read them twice."""
    files = corpus_files(corpus, kind) if isinstance(corpus, str | Path) and str(corpus) != "-" else []
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            total += pyarrow.parquet.ParquetFile(file).metadata.num_rows
        elif file.suffix == file_kind(file):
            with file.open("rb") as lines:
                total += sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
        else:
            return None
    return total or None
