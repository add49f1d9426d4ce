"""Keeps a checkpoint away from the class of sentence-transformers that would make another model of it without a word.

`SparseEncoder(path)` puts an untrained autoencoder on top of a checkpoint for SentenceTransformer, and gives random
vectors: on a sparse one of 4 V x V weights, 263 GB for Llama 3's vocabulary. It sizes the autoencoder by the last
module, and refuses one that knows no dimension. So the last module is one that does nothing and knows none:
`WeightedLayerPooling` passes texts on that come without the states of all layers.

`SentenceTransformer(path)` takes the transformer of a checkpoint for SparseEncoder, from the top of its folder, and
averages its states. So the transformer lies in a folder of its own, as `modules.json` may say, and the configuration at
the top is of a type that transformers does not know and repeats in its error. So it is for MultiVectorEncoder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling
from sentence_transformers.util import fullname

from lion_st.files import read_json

BLOCK = "2_SentenceTransformer_only"
TRANSFORMER = "0_Transformer"
MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
NOTE = 'This form is for SentenceTransformer. SparseEncoder loads the revision "sparse-encoder" of a sparse model.'


def block_sparse_encoder(folder: Path) -> None:
    """Have `SparseEncoder(folder)` fail at once. `SentenceTransformer(folder)` gives the same vectors as before."""
    block = WeightedLayerPooling(None, num_hidden_layers=0, layer_start=1)
    (folder / BLOCK).mkdir()
    block.save(str(folder / BLOCK))
    modules = read_json(folder / MODULES)
    position = len(modules)
    modules.append({"idx": position, "name": str(position), "path": BLOCK, "type": fullname(block), "note": NOTE})
    (folder / MODULES).write_text(json.dumps(modules, indent=2), encoding="utf-8")


def move_transformer(folder: Path, model_type: str = "SparseEncoder") -> None:
    """Have `SentenceTransformer(folder)` fail at once. Its own class gives the same vectors as before."""
    (folder / TRANSFORMER).mkdir()
    for file in list(folder.iterdir()):
        if file.is_file() and is_of_transformer(file.name):
            file.rename(folder / TRANSFORMER / file.name)
    modules = read_json(folder / MODULES)
    (folder / MODULES).write_text(json.dumps(with_moved_transformer(modules), indent=2), encoding="utf-8")
    name_own_class(folder, model_type)


def name_own_class(folder: Path, model_type: str = "SparseEncoder") -> None:
    """Have `SentenceTransformer(folder)`, which finds no transformer at the top, say in its error what loads it."""
    (folder / "config.json").write_text(json.dumps(own_class_alone(model_type)), encoding="utf-8")


def own_class_alone(model_type: str = "SparseEncoder") -> dict[str, str]:
    """What stands at the top in place of the transformer's configuration."""
    return {"model_type": f"for sentence_transformers.{model_type} alone"}


def is_of_transformer(name: str) -> bool:
    """Whether a file at the top of a checkpoint is the transformer's: weights, configurations, tokenizer."""
    pattern = r"[^/]+\.(json|safetensors|model|jinja|tiktoken)|(merges|vocab)\.txt"
    return name not in (MODULES, SETTINGS) and re.fullmatch(pattern, name) is not None


def with_moved_transformer(modules: list[dict[str, object]]) -> list[dict[str, object]]:
    """The entries of `modules.json` once the transformer has moved, without what blocks SparseEncoder."""
    return [entry | ({} if entry["path"] else {"path": TRANSFORMER}) for entry in modules if entry["path"] != BLOCK]
