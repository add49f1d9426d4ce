"""An index that is read again when it was built anew, and the texts of its documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lion_st.data.records import Record, read_corpus
from lion_st.encoding.storage import HEADER, read_array
from lion_st.indexes import Index, StorageError, load_index


class LiveIndex:
    """A memory-mapped index; whoever searches takes `index` once, and keeps that one until done.

    Args:
        path: Its folder, which another process may write anew.
        check: Raises for an index that is not to be searched.
        verify: Compare all checksums.

    Attributes:
        index: The newest index that could be opened.
    """

    def __init__(self, path: str | Path, check: Callable[[Index], None], verify: bool = True) -> None:
        self.path = Path(path)
        self._check = check
        self._verify = verify
        self._stamp: bytes | None = None
        self.index = self._open()

    def reload(self) -> bool:
        """Open the index again if its folder was written anew; searches go on meanwhile.

        Returns:
            Whether there is a new one.

        Raises:
            StorageError, ValueError, OSError: If what is there cannot be searched. The old one stays; the same folder
                is not tried again before it is written anew.
        """
        if self._header() == self._stamp:
            return False
        self.index = self._open()
        return True

    def _open(self) -> Index:
        self._stamp = self._header()
        index = load_index(self.path, memory_map=True, verify=self._verify)
        self._check(index)
        return index

    def _header(self) -> bytes | None:
        try:
            return (self.path / HEADER).read_bytes()
        except OSError:
            return None


class TextStore:
    """Texts by document id, in files that processes share by memory mapping.

    Args:
        folder: What `TextStore.write` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self._texts = np.memmap(folder / "texts.bin", mode="r") if (folder / "texts.bin").stat().st_size else b""
        self._ends = read_array(folder, "ends", memory_map=True)
        with (folder / "ids.json").open(encoding="utf-8") as file:
            self._rows = {one: row for row, one in enumerate(json.load(file))}

    def get(self, document: str) -> str | None:
        """A document's text; None if there is none."""
        row = self._rows.get(document)
        if row is None:
            return None
        start = int(self._ends[row - 1]) if row else 0
        return bytes(self._texts[start : int(self._ends[row])]).decode()

    @staticmethod
    def write(corpus: Any, folder: str | Path) -> Path:
        """Write the texts of a corpus into a folder, one after the other.

        Args:
            corpus: As `encode_corpus` takes it; records without an id or text are left out, as they are there.
            folder: An empty one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ids, ends, end = [], [], 0
        with (folder / "texts.bin").open("wb") as file:
            for record in read_corpus(corpus):
                if isinstance(record, Record):
                    end += file.write(record.text.encode("utf-8", "replace"))
                    ids.append(record.id)
                    ends.append(end)
        if not ids:
            raise StorageError(f"{corpus} holds no texts: give the documents that were encoded.")
        np.save(folder / "ends.npy", np.array(ends, dtype=np.int64), allow_pickle=False)
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        return folder
