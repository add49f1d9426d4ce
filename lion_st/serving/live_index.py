"""An index that is read again when it was built anew, and the texts of its documents."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.data.lookup import hashes_of
from lion_st.data.records import Record, read_corpus
from lion_st.encoding.storage import folder_stamp, read_array
from lion_st.files import atomic_folder, lock_folder
from lion_st.indexes import Index, StorageError, load_index

ARRAYS = ("keys", "starts", "ends")  # of the texts, by rising hashes of the ids


class LiveIndex:
    """A memory-mapped index and the texts of its documents; whoever searches takes `opened` once, until done.

    Args:
        path: Its folder, which another process may write anew.
        check: Raises for an index that is not to be searched.
        verify: Compare all checksums.
        corpus: Its documents, which are read anew with it; None without texts.
        texts: Folder for their texts, which processes share.

    Attributes:
        opened: The newest index that could be opened, and its texts.
    """

    def __init__(
        self,
        path: str | Path,
        check: Callable[[Index], None],
        verify: bool = True,
        corpus: str | None = None,
        texts: str | Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._check = check
        self._verify = verify
        self._corpus = corpus
        self._texts = texts
        self._stamp: bytes | None = None
        self.opened = self._open()

    @property
    def index(self) -> Index:
        """The newest index that could be opened."""
        return self.opened[0]

    def reload(self) -> bool:
        """Open the index and read its texts again if its folder was written anew; searches go on meanwhile.

        Returns:
            Whether there is a new one.

        Raises:
            StorageError, ValueError, OSError: If what is there cannot be searched, or its texts cannot be read. The old
                ones stay; the same folder is not tried again before it is written anew.
        """
        if folder_stamp(self.path) == self._stamp:
            return False
        earlier = self.opened[1]
        self.opened = self._open()
        if earlier is not None and earlier.folder != self.opened[1].folder:  # type: ignore[union-attr]
            earlier.remove()
        return True

    def _open(self) -> tuple[Index, TextStore | None]:
        self._stamp = folder_stamp(self.path)
        index = load_index(self.path, memory_map=True, verify=self._verify)
        self._check(index)
        if self._corpus is None or self._texts is None:
            return index, None
        return index, TextStore.of_index(self._corpus, self.path, self._texts)


class TextStore:
    """Texts by document id, in files that processes share by memory mapping: ids are found by their hashes.

    Args:
        folder: What `TextStore.write` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder = Path(folder)
        self._texts = np.memmap(folder / "texts.bin", mode="r") if (folder / "texts.bin").stat().st_size else b""
        self._keys, self._starts, self._ends = (read_array(folder, name, memory_map=True) for name in ARRAYS)

    def get(self, document: str) -> str | None:
        """A document's text; None if there is none."""
        (key,) = hashes_of([document])
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        return bytes(self._texts[int(self._starts[place]) : int(self._ends[place])]).decode()

    @classmethod
    def of_index(cls, corpus: str, index: Path, shared: str | Path) -> TextStore:
        """The texts of an index as it is now, which the first of several processes reads from the corpus.

        Args:
            corpus: As `encode_corpus` takes it.
            index: Folder of the index.
            shared: Folder of the texts.
        """
        folder = Path(shared) / hashlib.sha256(folder_stamp(index) or b"").hexdigest()[:16]
        with lock_folder(Path(shared)):
            if not folder.exists():
                with atomic_folder(folder) as staging:
                    cls.write(corpus, staging)
            return cls(folder)

    def remove(self) -> None:
        """Remove the files; processes that have them open, where the system keeps these, read on."""
        with lock_folder(self.folder.parent):
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def write(corpus: Any, folder: str | Path) -> Path:
        """Write the texts of a corpus into a folder, one after the other.

        Args:
            corpus: As `encode_corpus` takes it; records without an id or text, or with an id seen before, are left out,
                as they are there.
            folder: An empty one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ends: dict[str, int] = {}  # of the texts by id, in their order
        end = 0
        with (folder / "texts.bin").open("wb") as file:
            for record in read_corpus(corpus):
                if isinstance(record, Record) and record.id not in ends:
                    end += file.write(record.text.encode("utf-8", "replace"))
                    ends[record.id] = end
        if not ends:
            raise StorageError(f"{corpus} holds no texts: give the documents that were encoded.")
        keys, stops = hashes_of(ends), np.fromiter(ends.values(), np.int64, len(ends))
        order = np.argsort(keys)
        for name, array in zip(ARRAYS, (keys, np.concatenate([[0], stops[:-1]]), stops), strict=True):
            np.save(folder / f"{name}.npy", array[order], allow_pickle=False)
        return folder
