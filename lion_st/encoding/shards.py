"""An encoded corpus on disk: settings, shards that are whole or not there, and a manifest that is written last."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash
from scipy import sparse

from lion_st.data.fields import Paradigm
from lion_st.data.records import Record
from lion_st.encoding.reading import CorpusCounts, records_digest
from lion_st.encoding.snapshots import download_explained, local_folder
from lion_st.encoding.storage import StorageError, contents_checksum, strings_to_arrays, unpack_strings
from lion_st.encoding.vectors import (
    HybridVectors,
    TokenVectors,
    Vectors,
    stack,
    stored,
    to_csr,
    to_dense,
    to_token_vectors,
)
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
    from lion_st.encoding.batches import EncodedTexts

VERSION = 1
SETTINGS = "settings.json"
MANIFEST = "manifest.json"
NAMES = ("model", "revision")  # of a checkpoint, whose weights and settings are told apart by their checksums
MANY_WITHOUT_TERMS = 0.01  # share of the texts that is warned of


@contextmanager
def locked_output(output: Path, rank: int = 0) -> Iterator[None]:
    """Hold an encoding's folder against other runs; a second run waits, and then finds the shards there."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: give a folder.")
    name = LOCK if rank == 0 else f"{LOCK}-{rank}"
    with ExitStack() as held:
        try:
            held.enter_context(lock_folder(output, wait=False, name=name))
        except FolderInUse as error:
            warnings.warn(f"{error} Waiting for it to end.", stacklevel=3)
            held.enter_context(lock_folder(output, name=name))
        yield


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
    compared = (expected.keys() | found.keys()) - {"tokens_per_batch"}  # which rounds otherwise, and no more
    compared -= {"model_settings"} - found.keys()  # which model_xxh3 is of too
    different = {key for key in compared if expected.get(key) != found.get(key)}
    if different - set(NAMES):  # one that was moved, or described anew on the Hub, is the same
        changes = "; ".join(f"{key} was {found.get(key)!r}, is {expected.get(key)!r}" for key in sorted(different))
        raise StorageError(f"{output} was begun with other settings: {changes}. Give a new folder.")


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
        is_intact = _arrays_checksum(_read_arrays(file)) == metadata["arrays_xxh3"]
    except (StorageError, KeyError):
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


def write_shard(
    output: Path, number: int, records: Sequence[Record], encoded: EncodedTexts, dtype: Literal["float32", "float16"]
) -> Path:
    """Write records' vectors as one shard, under a temporary name first.

    Raises:
        OSError: If it cannot be written, as when the disk is full. No part of it stays.
        ValueError: If float16 cannot hold a number.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = strings_to_arrays("ids", [record.id for record in records])
    without_terms = 0
    if isinstance(encoded.vectors, np.ndarray):
        arrays["vectors"] = stored(encoded.vectors, dtype)
    elif isinstance(encoded.vectors, TokenVectors):
        arrays["vectors"] = stored(encoded.vectors.values, dtype)
        arrays["offsets"] = encoded.vectors.offsets
    else:
        matrix = encoded.vectors
        if isinstance(matrix, HybridVectors):
            arrays["vectors"] = stored(matrix.dense, dtype)
            matrix = matrix.sparse
        without_terms = int((np.diff(matrix.indptr) == 0).sum())
        arrays["indptr"] = matrix.indptr.astype(np.int64)
        arrays["terms"] = matrix.indices.astype(np.int32)
        arrays["weights"] = stored(matrix.data, dtype)
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
        try:
            save_file(arrays, temporary, metadata={"shard": json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written ({error}): make room, and run the encoding again.") from error
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
        "without_terms": sum(shard["without_terms"] for shard in shards),
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
    is_alone = launched_processes()[1] == 1  # else another process may be writing the same manifest
    if is_alone:
        remove_leftovers(output)
    for leftover in output.glob("*.tmp" if is_alone else "shard-*.tmp"):
        leftover.unlink(missing_ok=True)


def launched_processes() -> tuple[int, int]:
    """The rank of this process and the number of those that torchrun or accelerate launched; (0, 1) of one alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_complete(output: str | Path) -> bool:
    """Whether an encoding has finished: the manifest is written last."""
    return (Path(output) / MANIFEST).exists()


class EncodedCorpus:
    """Reads what `encode_corpus` wrote, shard by shard.

    Args:
        path: The folder, or the name of a data set on the Hub that `lion_st.hub.publish_index` published, `owner/name`.
        verify: Compare each shard's checksum before reading it.
        revision: Commit, tag or branch of the data set; main by default.

    Raises:
        FileNotFoundError: If there is neither such a folder nor such a data set.
        StorageError: If the encoding has not finished, or a shard is missing or damaged.

    Example:
        >>> for ids, vectors in EncodedCorpus("runs/encoded"):  # doctest: +SKIP
        ...     index.add(ids, vectors)
    """

    def __init__(self, path: str | Path, verify: bool = True, revision: str | None = None) -> None:
        self.path = local_folder(path, (MANIFEST, SETTINGS, "shard-*.safetensors"), revision)
        self.verify = verify
        self._place = path
        with download_explained(path):
            self._read_manifest()

    def _read_manifest(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such folder.")
        if not (self.path / SETTINGS).exists() and not is_complete(self.path):
            raise StorageError(f"{self.path} is not an encoded corpus: it has neither {SETTINGS} nor {MANIFEST}.")
        if not is_complete(self.path):
            raise StorageError(f"{self.path} has no {MANIFEST}: the encoding has not finished; run it again.")
        try:
            self.manifest: dict[str, Any] = dict(json.loads((self.path / MANIFEST).read_text(encoding="utf-8")))
            weights = self.manifest["settings"].get("fusion_weights")
            self.fusion_weights: tuple[float, float] | None = None if weights is None else (weights[0], weights[1])
            self.paradigm: Paradigm = self.manifest["settings"]["paradigm"]
            for shard in self.manifest["shards"]:
                inside(self.path, shard["file"])
            is_intact = self.manifest["xxh3"] == contents_checksum(self.manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{self.path / MANIFEST} cannot be read ({error}): delete it and run the encoding again."
            ) from error
        if not is_intact:
            raise StorageError(f"{self.path / MANIFEST} is damaged: delete it and run the encoding again.")

    def __len__(self) -> int:
        return int(self.manifest["documents"])

    def __iter__(self) -> Iterator[tuple[list[str], Vectors]]:
        return map(self.read, self.manifest["shards"])

    def shown(self, doing: str, show: bool = True) -> Iterator[tuple[list[str], Vectors]]:
        """All shards, with a progress bar over their documents that says what is done with them."""
        from tqdm.auto import tqdm

        with tqdm(total=len(self), desc=doing, unit="doc", disable=not show) as progress:
            for ids, vectors in self:
                yield ids, vectors
                progress.update(len(ids))

    def read(self, shard: Mapping[str, Any]) -> tuple[list[str], Vectors]:
        """Ids and vectors of one of the manifest's shards."""
        with download_explained(self._place):
            return self._read(shard)

    def _read(self, shard: Mapping[str, Any]) -> tuple[list[str], Vectors]:
        file = self.path / shard["file"]
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            raise StorageError(f"{file} is missing or truncated: delete it and run the encoding again.")
        if self.verify and not has_checksum(file, shard):
            raise StorageError(f"{file} does not match its checksum: delete it and run the encoding again.")
        arrays = _read_arrays(file)
        try:
            ids = unpack_strings(arrays["ids_bytes"], arrays["ids_offsets"])
            shape = (len(ids), shard["dimensions"])
            vectors = self._vectors(arrays, shape)
        except (ValueError, KeyError) as error:
            raise StorageError(f"{file} is damaged ({error}): delete it and run the encoding again.") from error
        if vectors.shape != shape:
            raise StorageError(f"{file} holds vectors {vectors.shape} and not {shape}: run the encoding again.")
        return ids, vectors

    def _vectors(self, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> Vectors:
        """The vectors of a shard; a hybrid one's shape has the dimensions of both."""
        if self.paradigm == "dense":
            return to_dense(arrays["vectors"])
        if self.paradigm == "multi_vector":
            return to_token_vectors(TokenVectors(arrays["vectors"], arrays["offsets"]))
        parts = (arrays["weights"].astype(np.float32), arrays["terms"], arrays["indptr"])
        if self.paradigm == "sparse":
            return to_csr(sparse.csr_array(parts, shape=shape))
        dense = to_dense(arrays["vectors"])
        terms = to_csr(sparse.csr_array(parts, shape=(shape[0], shape[1] - dense.shape[1])))
        return HybridVectors(terms, dense, self.fusion_weights)

    def whole(self) -> tuple[list[str], Vectors]:
        """All ids and all vectors in memory, such as those of queries."""
        shards = list(self)
        ids = [one for part, _ in shards for one in part]
        return ids, stack([vectors for _, vectors in shards])


def encoded_queries(path: str | Path, documents: EncodedCorpus) -> EncodedCorpus:
    """Open the encoded queries that some encoded documents are to be searched with.

    Raises:
        ValueError: If they were encoded as documents are, or have vectors of another kind or other dimensions.

    Warns:
        UserWarning: If a model of other weights, or with another attention or head, encoded them.
    """
    queries = EncodedCorpus(path)
    settings, others = queries.manifest["settings"], documents.manifest["settings"]
    if settings.get("texts") != "query":
        raise ValueError(f"{queries.path} was encoded as documents are: encode queries with --task query.")
    shapes = [(one.paradigm, one.manifest["dimensions"]) for one in (queries, documents)]
    if shapes[0] != shapes[1]:
        (kind, width), (other_kind, other_width) = shapes
        raise ValueError(
            f"{queries.path} holds {kind} vectors of {width:,} dimensions and {documents.path} {other_kind} ones of "
            f"{other_width:,}: encode both with one model."
        )
    noted = [one["model_settings"] for one in (settings, others) if "model_settings" in one]  # not by earlier versions
    if settings.get("weights_xxh3") != others.get("weights_xxh3") or (len(noted) == 2 and noted[0] != noted[1]):
        warnings.warn(
            f"{queries.path} was encoded by {settings['model']!r} and {documents.path} by {others['model']!r}, whose "
            "weights, their type, attention or head differ: unless one was made for the other, the results mean "
            "nothing.",
            stacklevel=3,
        )
    return queries
