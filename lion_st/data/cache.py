"""Tables that are computed once, kept in the cache of `datasets`, and memory-mapped by all who read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.files import atomic_folder, lock_file
from lion_st.hooks import table_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

TABLE, FACTS = "table.arrow", "facts.json"


def cached_table(kind: str, identity: Any, write: Callable[[Path], dict[str, Any]]) -> tuple[Dataset, dict[str, Any]]:
    """A table from the cache; the first process that asks for it makes it, and the others wait.

    Args:
        kind: What it is called in the cache.
        identity: All that it depends on, as JSON; the version of lion_st is added.
        write: Writes the table to a path, in Arrow's stream format, and returns facts about it, as JSON. If it raises,
            nothing is kept.

    Returns:
        The memory-mapped table, and the facts.
    """
    import xxhash
    from datasets import Dataset, config

    from lion_st import __version__

    key = xxhash.xxh3_128_hexdigest(json.dumps([__version__, identity]).encode())
    folder = Path(config.HF_DATASETS_CACHE) / "lion_st" / f"{kind}-{key}"
    if not (folder / TABLE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(folder.parent / f".{folder.name}.lock"):
            if not (folder / TABLE).is_file():
                with atomic_folder(folder) as staging:
                    facts = write(staging / TABLE)
                    (staging / FACTS).write_text(json.dumps(facts))
    return Dataset.from_file(str(folder / TABLE)), json.loads((folder / FACTS).read_text())


def identity_of(opened: Path | Dataset) -> list[Any]:
    """What tells one state of a file or of a loaded table from another."""
    if isinstance(opened, Path):
        state = opened.stat()
        return [str(opened.resolve()), state.st_size, state.st_mtime_ns]
    return [table_fingerprint(opened)]
