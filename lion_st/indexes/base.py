"""The protocol that all indexes share."""

from __future__ import annotations

import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from lion_st.data.fields import Paradigm
from lion_st.encoding.storage import (
    HEADER,
    StorageError,
    arrays_to_strings,
    read_folder,
    strings_to_arrays,
    write_folder,
)
from lion_st.encoding.vectors import to_csr, to_dense, to_hybrid, to_token_vectors
from lion_st.errors import require_list, require_type
from lion_st.files import require_free
from lion_st.indexes.frequencies import DocumentFrequencies

if TYPE_CHECKING:
    from typing_extensions import Self

Hits: TypeAlias = list[tuple[str, float]]  # (document id, score), best first

KIND = "lion_st index"
VERSION = 2  # since 2 with xxh3 checksums
CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "sparse": to_csr, "dense": to_dense, "multi_vector": to_token_vectors, "hybrid": to_hybrid
}  # fmt: skip
CAN_CHANGE = "exact and torch"  # the engines that delete, and search among some documents alone


class Index(ABC):
    """Documents by id and vector, searched by inner product.

    Any number of threads may search an index at once, from the first search on; documents are added by one thread while
    none searches.

    Args:
        paradigm: "sparse" (rows of term weights [N, V]), "dense" (rows of floats [N, D]), "multi_vector" (several such
            rows of each text) or, where the engine can, "hybrid" (`HybridVectors`, or a pair of sparse and dense).

    Attributes:
        engine: Name in `create_index`.
        paradigms: What the engine searches.
        parameters: Constructor arguments, saved with the index and shown by `stats`.
        not_saved: Those that are of the machine and not of the index.
        not_portable: Why its files are not published, nor read from the Hub; None if they are.
        source: What the vectors come from (model and corpus, their checksums, pruning), saved with the index; None if
            unknown.
    """

    engine: ClassVar[str]
    paradigms: ClassVar[tuple[Paradigm, ...]]
    parameters: ClassVar[tuple[str, ...]] = ()
    not_saved: ClassVar[tuple[str, ...]] = ()
    not_portable: ClassVar[str | None] = None

    def __init__(self, paradigm: Paradigm) -> None:
        if paradigm not in self.paradigms:
            raise ValueError(f"The engine {self.engine!r} searches {' and '.join(self.paradigms)}, not {paradigm!r}.")
        self.paradigm: Paradigm = paradigm
        self.source: dict[str, Any] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Add documents.

        Args:
            ids: N document ids, each given once.
            vectors: [N, dimensions]; anything that `to_csr`, `to_dense` or `to_token_vectors` accepts. What an index
                keeps of them is a copy.

        Raises:
            ValueError: If lengths, dimensions or ids do not fit; nothing is added then.
        """

    def delete(self, ids: Sequence[str]) -> None:
        """Take documents out of the index.

        Args:
            ids: Their ids.

        Raises:
            KeyError: If one is not in the index; none is deleted then.
            NotImplementedError: If the engine cannot delete.
        """
        raise NotImplementedError(f"The engine {self.engine!r} cannot delete documents, {CAN_CHANGE} can.")

    @abstractmethod
    def search(self, queries: Any, k: int = 10, threads: int = 1, allowed: Collection[str] | None = None) -> list[Hits]:
        """Find the k documents of highest inner product with each query.

        Args:
            queries: [Q, dimensions].
            k: Documents per query.
            threads: CPU threads.
            allowed: Find none but these documents, by id; ids that are not in the index are left out, all of them not.

        Raises:
            ValueError: If none of the allowed documents is in the index.
            NotImplementedError: If the engine cannot search among some documents alone.

        Returns:
            Q lists of (document id, score), best first. A sparse search returns only documents that share a term with
            the query, so a list may be shorter than k, and is empty for a query without terms.
        """

    @abstractmethod
    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the index into a folder.

        Args:
            path: The folder.
            overwrite: Replace an earlier save there, of any engine, once everything is on disk.

        Raises:
            FileExistsError: If an index is there and `overwrite` is False.
            StorageError: If something else is there.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, *, memory_map: bool = False, verify: bool = True) -> Index:
        """Read a saved index of this engine.

        Args:
            path: Folder written by `save`.
            memory_map: Leave large arrays on disk and read them as they are touched.
            verify: Compare the checksums of all files; their sizes, and the checksums of small ones, always are.

        Raises:
            StorageError: If the folder is not an index of this engine and version, or is truncated or damaged.
        """

    @property
    def searches_among(self) -> bool:
        """Whether `search` takes `allowed`."""
        return False

    def __getstate__(self) -> Any:
        raise TypeError("An index is not copied or pickled: save it, and load_index(path, memory_map=True) opens it.")

    def __repr__(self) -> str:
        settings = "".join(f", {name}={getattr(self, name)!r}" for name in self.parameters)
        return f"{type(self).__name__}({self.paradigm!r}{settings}): {len(self):,} documents"

    def stats(self) -> dict[str, Any]:
        """Engine, paradigm, documents, size in bytes of the searchable structure (None if unknown), parameters."""
        return {
            "engine": self.engine,
            "paradigm": self.paradigm,
            "documents": len(self),
            "bytes": self._bytes(),
            **{name: getattr(self, name) for name in self.parameters},
        }

    @abstractmethod
    def _bytes(self) -> int | None: ...

    def _write(
        self,
        path: str | Path,
        overwrite: bool,
        metadata: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        write_files: Callable[[Path], None] | None = None,
    ) -> Path:
        _require_no_index(path, overwrite)
        described = {
            "engine": self.engine,
            "paradigm": self.paradigm,
            "documents": len(self),
            "source": self.source,
            "parameters": {name: getattr(self, name) for name in self.parameters if name not in self.not_saved},
        }

        def write_last(data: Path) -> None:
            if not overwrite and (data.parent / HEADER).exists():  # of another process, which held the folder's lock
                shutil.rmtree(data)
                require_free(path)
            if write_files is not None:
                write_files(data)

        return write_folder(path, KIND, VERSION, {**described, **metadata}, arrays, write_last)

    @classmethod
    def _opened(cls, path: str | Path, metadata: Mapping[str, Any], **options: Any) -> Self:
        """An index with the settings that were saved, still without documents."""
        if metadata.get("engine") != cls.engine:
            raise StorageError(f"{path} is an index of the engine {metadata.get('engine')!r}, not {cls.engine!r}.")
        try:
            index = cls(metadata["paradigm"], **metadata["parameters"], **options)
            index.source = metadata["source"]
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"The settings of {path} are damaged ({error}): build the index again.") from error
        return index


def _require_no_index(path: str | Path, overwrite: bool) -> None:
    if (Path(path) / HEADER).exists():
        require_free(path, overwrite)


def as_ids(ids: Any) -> list[str]:
    """Document ids as strings; integers become their digits."""
    require_list(ids, "ids, one per document")
    found = [one if type(one) is str else _as_id(one) for one in ids]
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(0, error.start - 9) : error.end]
        raise ValueError(f"An id is not Unicode text: {near!r}.") from None
    return found


def _as_id(one: Any) -> str:
    require_type(one, str | Integral, "An id, a string or an integer,", "pass .decode() of bytes, .item() of tensors")
    return str(one)


def refuse_texts(vectors: Any) -> None:
    """Raise a TypeError if these are texts, which a model has to encode first, or the path of vectors."""
    first = vectors[0] if isinstance(vectors, list | tuple) and len(vectors) else vectors
    if isinstance(first, str):
        raise TypeError(f"An index holds vectors, got the text {first[:40]!r}: encode it, as `search_texts` does.")
    if isinstance(first, Path):
        raise TypeError(f"Vectors expected, got the path {str(first)!r}: EncodedCorpus(path).whole() reads them.")


def require_index(index: Any) -> None:
    """Raise a TypeError unless this is an index, and not the path of one."""
    require_type(index, Index, "An index", "lion_st.indexes.load_index(path) opens one")


class LocalIndex(Index):
    """An index in this process: ids, checks and files live here; `_add`, `_search` and the like are the engine's.

    Attributes:
        ids: Document ids in the order they were added; equal scores are ranked in that order. Deleted documents keep
            their place until `compact`, which `save` calls.
        dimensions: V or D, known from the first `add` on.
    """

    def __init__(self, paradigm: Paradigm) -> None:
        super().__init__(paradigm)
        self.ids: list[str] = []
        self.dimensions: int | None = None
        self._rows: dict[str, int] | None = {}  # of the documents by id, see `_row_by_id`
        self._alive: np.ndarray | None = None  # bool [len(ids)], once documents were deleted
        self._frequencies: DocumentFrequencies | None = None  # counted when first asked for
        self._lock = threading.RLock()  # held while the structure changes, which a first search may do

    def __len__(self) -> int:
        return len(self.ids) if self._alive is None else int(np.count_nonzero(self._alive))

    def add(self, ids: Sequence[str], vectors: Any) -> None:
        """Add documents whose ids are new; see `Index.add`."""
        ids = as_ids(ids)
        fresh = set(ids)
        with self._lock:
            matrix = self._check(vectors)
            if len(ids) != matrix.shape[0]:
                raise ValueError(f"Got {len(ids)} ids for {matrix.shape[0]} vectors: give one id per row.")
            rows = self._row_by_id()
            if len(fresh) < len(ids) or not rows.keys().isdisjoint(fresh):
                seen = set(rows)
                duplicate = next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]
                raise ValueError(f"The document id {duplicate!r} occurs twice: ids must be unique in an index.")
            self._add(matrix)
            self._frequencies = None
            self.dimensions = matrix.shape[1]
            rows.update(zip(ids, range(len(self.ids), len(self.ids) + len(ids)), strict=True))
            self.ids.extend(ids)
            if self._alive is not None:
                self._alive = np.concatenate([self._alive, np.ones(len(ids), dtype=np.bool_)])

    def delete(self, ids: Sequence[str]) -> None:
        """Take documents out of the index; see `Index.delete`. Their space is freed by `compact`."""
        if not self.searches_among:
            super().delete(ids)
        ids = as_ids(ids)
        with self._lock:
            rows = self._rows_of(ids)
            if self._alive is None:
                self._alive = np.ones(len(self.ids), dtype=np.bool_)
            self._alive[rows] = False
            self._frequencies = None
            for one in ids:
                self._row_by_id().pop(one, None)

    def compact(self) -> None:
        """Free what deleted documents take up; the others keep their order."""
        with self._lock:
            if self._alive is not None:
                self._keep(self._alive)
                self.ids = [one for one, alive in zip(self.ids, self._alive.tolist(), strict=True) if alive]
                self._alive = self._rows = None

    def search(self, queries: Any, k: int = 10, threads: int = 1, allowed: Collection[str] | None = None) -> list[Hits]:
        """Find the k documents of highest inner product; see `Index.search`."""
        rows, scores = self.search_rows(queries, k, threads, allowed)
        return [
            [(self.ids[row], score) for row, score in zip(row_list, score_list, strict=True) if row >= 0]
            for row_list, score_list in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def search_rows(
        self, queries: Any, k: int = 10, threads: int = 1, allowed: Collection[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Like `search`, as arrays.

        Returns:
            Positions in `ids`, int64 [Q, min(k, N)] for N documents to find, -1 where fewer are found, and scores,
            float32, of the same shape.
        """
        if k < 1 or threads < 1:
            raise ValueError(f"k and threads are at least 1, got k={k} and threads={threads}.")
        matrix = self._check(queries)
        mask = self._alive if allowed is None else self._mask(allowed)
        k = min(k, len(self) if mask is None else int(mask.sum()))
        if not k or matrix.shape[0] == 0:
            return np.full((matrix.shape[0], k), -1), np.zeros((matrix.shape[0], k), dtype=np.float32)
        return self._search(matrix, k, threads, mask)

    @property
    def searches_among(self) -> bool:
        """Whether `search` takes `allowed`, and `delete` works."""
        return type(self)._keep is not LocalIndex._keep

    def _mask(self, allowed: Collection[str]) -> np.ndarray:
        """Which of `ids` may be found."""
        if not self.searches_among:
            raise NotImplementedError(
                f"The engine {self.engine!r} cannot search among some documents alone, {CAN_CHANGE} can."
            )
        require_type(allowed, Collection, "Ids of the allowed documents", "pass a list or a set")
        wanted = set(as_ids(allowed))
        rows = self._row_by_id()
        found = [rows[one] for one in wanted if one in rows]
        if wanted and rows and not found:
            raise ValueError(f"None of the {len(wanted):,} allowed documents, {min(wanted)!r} for example, is indexed.")
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        mask[found] = True
        return mask

    def _rows_of(self, ids: Collection[str]) -> list[int]:
        """Places of documents in `ids`; raises a KeyError for one that is not in the index."""
        rows = self._row_by_id()
        try:
            return [rows[one] for one in ids]
        except KeyError as error:
            raise KeyError(f"The document {error.args[0]!r} is not in the index.") from None

    def _row_by_id(self) -> dict[str, int]:
        """Places in `ids` of the documents that are not deleted; an index that was loaded makes it when first asked."""
        with self._lock:
            if self._rows is None:
                self._rows = {one: row for row, one in enumerate(self.ids)}
            return self._rows

    def document_frequencies(self) -> DocumentFrequencies:
        """In how many of the documents each term is active, of an engine that keeps sparse vectors.

        Raises:
            NotImplementedError: Of any other.
        """
        with self._lock:
            if self._frequencies is None:
                self._frequencies = DocumentFrequencies(len(self), self._count_documents(self._alive))
            return self._frequencies

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the index into a folder; see `Index.save`."""
        _require_no_index(path, overwrite)  # before a structure is built to be saved
        with self._lock:
            self.compact()
            arrays = self._save_arrays() | strings_to_arrays("ids", self.ids)
            return self._write(path, overwrite, {"dimensions": self.dimensions}, arrays, self._save_files)

    @classmethod
    def load(cls, path: str | Path, *, memory_map: bool = False, verify: bool = True) -> LocalIndex:
        """Read a saved index; see `Index.load`."""

        def read(metadata: dict[str, Any], data: Path) -> LocalIndex:
            index = cls._opened(path, metadata)
            index.ids, index._rows = arrays_to_strings(data, "ids"), None
            index.dimensions = metadata.get("dimensions")
            if len(index) != metadata.get("documents") or len(set(index.ids)) < len(index):
                raise StorageError(f"The ids of {path} are damaged: build the index again.")
            if index.ids:
                if not isinstance(index.dimensions, int) or index.dimensions < 1:
                    raise StorageError(f"{path} has {index.dimensions!r} dimensions: build the index again.")
                index._load(data, memory_map, verify)
            return index

        return read_folder(path, KIND, VERSION, read, verify)

    def _check(self, vectors: Any) -> Any:
        refuse_texts(vectors)
        matrix = CONVERTERS[self.paradigm](vectors)
        if self.dimensions is not None and matrix.shape[1] != self.dimensions:
            raise ValueError(
                f"The index has {self.dimensions} dimensions and got vectors of {matrix.shape[1]}: "
                "encode queries and documents with the same model."
            )
        return matrix

    @abstractmethod
    def _add(self, vectors: Any) -> None: ...

    @abstractmethod
    def _search(
        self, queries: Any, k: int, threads: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def _keep(self, kept: np.ndarray) -> None:
        """Drop all rows but those of a mask [len(ids)]; an engine without it neither deletes nor takes `allowed`."""
        raise NotImplementedError

    def _count_documents(self, alive: np.ndarray | None) -> np.ndarray:
        """Documents that each term is active in, int64 [V], among those of a mask [len(ids)] or all."""
        raise NotImplementedError(f"The engine {self.engine!r} does not keep terms of documents, {CAN_CHANGE} do.")

    @abstractmethod
    def _load(self, data: Path, memory_map: bool, verify: bool) -> None:
        """Read the engine's files; raise StorageError where their contents would lead outside of the arrays.

        Without `verify`, checks that read all of a large file are left out.
        """

    def _save_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def _save_files(self, data: Path) -> None:
        """Write files of the engine's own format."""
        return
