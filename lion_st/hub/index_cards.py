"""What a published index or encoded corpus is, and the card that says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_st.encoding.shards import MANIFEST, SETTINGS, EncodedCorpus
from lion_st.encoding.storage import HEADER, StorageError, contents_checksum, read_folder
from lion_st.indexes.base import KIND, VERSION
from lion_st.indexes.factory import require_portable

LOAD_INDEX = """\
```python
import lion_st
from lion_st.indexes import load_index
from lion_st.retrieval import search_texts

index = load_index("{repo_id}", memory_map=True)
print(search_texts(lion_st.load("{model}"{at}), index, ["what do lions eat?"], k=10))
```

```bash
lion-st search {model} {repo_id} "what do lions eat?"{option}
```

`load_index(..., revision="v1")` and `--index-revision v1` name a version. \
"""
LOAD_CORPUS = """\
```python
from lion_st.encoding import EncodedCorpus

for ids, vectors in EncodedCorpus("{repo_id}"):
    print(len(ids), vectors.shape)
```

```bash
lion-st index {repo_id} runs/index
lion-st search {model} runs/index "what do lions eat?"{option}
```

`EncodedCorpus(..., revision="v1")` and `lion-st index --revision v1` name a version. \
"""


@dataclass(frozen=True)
class SavedVectors:
    """An index or an encoded corpus on disk, all of whose checksums were compared.

    Attributes:
        engine: Engine of an index, None for an encoded corpus.
        files: What the paths of its files begin with.
        source: Settings of the encoding: model, its revision, checksum of its weights, prompt, length.
        facts: Further rows of the card.
        replaced: Contents of files that are not published as they are.
    """

    engine: str | None
    paradigm: str
    files: tuple[str, ...]
    source: Mapping[str, Any]
    documents: int
    dimensions: int | None
    facts: Mapping[str, str]
    replaced: Mapping[str, bytes] = field(default_factory=dict)


def read_vectors(folder: Path) -> SavedVectors:
    """Read what an index or an encoded corpus says of itself."""
    if (folder / HEADER).is_file():
        found = read_folder(folder, KIND, VERSION, _of_index)
        require_portable(folder, folder)
    elif (folder / MANIFEST).is_file() or (folder / SETTINGS).is_file():
        found = _of_corpus(EncodedCorpus(folder))
    elif folder.is_dir():
        raise StorageError(
            f"{folder} is neither an index nor an encoded corpus, of `lion-st index` or `lion-st encode`: it has "
            f"neither {HEADER} nor {MANIFEST}."
        )
    else:
        raise FileNotFoundError(f"{folder}: no such folder.")
    if not found.source.get("model"):
        raise StorageError(
            f"{folder} does not say which model made its vectors, so that nobody could search it: build it with "
            "`lion-st index`, or set the index's `source` before it is saved."
        )
    return found


def _of_index(metadata: dict[str, Any], data: Path) -> SavedVectors:
    source = dict(metadata["source"] or {})
    settings = ", ".join(f"{name}={value!r}" for name, value in metadata["parameters"].items() if value is not None)
    facts = {"Engine": f"`{metadata['engine']}`" + (f" ({settings})" if settings else "")}
    if source.get("pruning"):
        facts["Pruning"] = str(source["pruning"])
    return SavedVectors(
        metadata["engine"],
        metadata["paradigm"],
        (HEADER, f"{data.name}/"),
        source,
        metadata["documents"],
        metadata.get("dimensions"),
        facts,
    )


def _of_corpus(corpus: EncodedCorpus) -> SavedVectors:
    for _ in corpus:  # which compares the checksums of all shards
        pass
    manifest = corpus.manifest
    files = (MANIFEST, SETTINGS, *(shard["file"] for shard in manifest["shards"]))
    facts = {"Shards": f"{len(manifest['shards']):,}", "Stored as": manifest["settings"]["dtype"]}
    published = {**manifest, "skipped_examples": []}  # which name local files, and show what is in them
    published["xxh3"] = contents_checksum(published)
    return SavedVectors(
        None,
        corpus.paradigm,
        files,
        manifest["settings"],
        len(corpus),
        manifest["dimensions"],
        facts,
        {MANIFEST: json.dumps(published, indent=1, ensure_ascii=False).encode()},
    )


def render_index_card(
    vectors: SavedVectors, repo_id: str, size: int, license: str | None, model: str | None = None
) -> str:
    """The README.md of a published index or encoded corpus."""
    from huggingface_hub import DatasetCardData

    source = vectors.source
    name = model or source["model"]
    commit = source.get("revision") if name == source["model"] else None  # None of a folder too
    is_on_hub = model is not None or commit is not None
    shown = f"[{name}](https://huggingface.co/{name})" if is_on_hub else f"`{name}`, a local folder"
    rows = {
        "Model": shown + (f" at `{commit}`" if commit else ""),
        "Its weights, xxh3": f"`{source.get('weights_xxh3', 'unknown')}`",
        "Its fingerprint, xxh3": f"`{source.get('model_xxh3', 'unknown')}`",
        "Vectors": vectors.paradigm,
        "Texts": f"{vectors.documents:,}" + (" queries" if source.get("texts") == "query" else " documents"),
        **({"Dimensions": f"{vectors.dimensions:,}"} if vectors.dimensions is not None else {}),
        "Texts were cut to": f"{source['max_tokens']:,} tokens" if source.get("max_tokens") else "unknown",
        **({"Terms of a text": f"the {limit:,} heaviest"} if (limit := source.get("max_active_dims")) else {}),
        **vectors.facts,
        "Size": f"{size / 1e6:,.1f} MB",
    }
    metadata = DatasetCardData(
        license=license,
        task_categories=["text-retrieval"],
        tags=["lion_st", f"{vectors.paradigm}-retrieval", vectors.engine or "vectors"],
        viewer=False,
    )
    what = "encoded corpus" if vectors.engine is None else "index"
    table = "".join(f"| {label} | {value} |\n" for label, value in rows.items())
    usage = (LOAD_CORPUS if vectors.engine is None else LOAD_INDEX).format(
        repo_id=repo_id,
        model=name if is_on_hub else "MODEL",
        at=f', revision="{commit}"' if commit else "",
        option=f" --revision {commit}" if commit else "",
    )
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n"
        f"An {what} of {vectors.paradigm} vectors, published with lion_st. It holds ids and vectors of texts, and not "
        f"the texts.\n\n| | |\n|---|---|\n{table}\n## Load\n\n{usage}"
        "Loading compares the checksums of all files, and searching warns of a model of other weights.\n"
    )
