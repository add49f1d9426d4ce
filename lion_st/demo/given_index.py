"""An index that `lion-st index` built, in place of encoding the collection again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.data.records import Record
from lion_st.encoding.fingerprints import require_same_encoding, text_limit
from lion_st.encoding.reading import records_digest
from lion_st.indexes import StorageError, load_index
from lion_st.retrieval.search import require_term_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def open_index(
    folder: str | Path,
    model: SentenceTransformer | SparseEncoder,
    texts: Mapping[str, str],
    revision: str | None = None,
) -> Any:
    """Open an index of the very documents to show, by the model that shows them.

    Args:
        folder: Folder of an exact index, quantised or pruned as it may be, or its name on the Hub.
        model: The sparse model.
        texts: The documents by id.
        revision: Commit, tag or branch of an index on the Hub.

    Returns:
        The index, which keeps `vectors`.
    """
    index: Any = load_index(folder, memory_map=True, revision=revision)
    require_term_weights(index)
    if index.source is None:
        raise StorageError(f"{folder} does not say what its vectors come from: build it with `lion-st index`.")
    require_same_encoding(folder, index.source, model, text_limit(model, "document"))
    records = [Record(one, texts.get(one, "")) for one in index.ids]
    step = index.source["shard_documents"]
    digests = [records_digest(records[start : start + step]) for start in range(0, len(records), step)]
    is_same = hashlib.sha256(json.dumps(digests).encode()).hexdigest() == index.source["corpus_sha256"]
    if not is_same or len(index) != len(texts):
        raise StorageError(
            f"{folder} holds other documents than the {len(texts):,} to show: give those that were encoded, or an "
            "index of these."
        )
    return index
