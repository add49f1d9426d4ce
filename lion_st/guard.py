"""Keeps `SparseEncoder(path)` away from a sparse checkpoint that is written for SentenceTransformer.

Stock code would put an untrained autoencoder of 4 V x V weights on top of V-wide vectors: 263 GB for Llama 3's
vocabulary, and random vectors where that much fits. It sizes the autoencoder by the last module, and refuses one that
knows no dimension. So the last module is one that does nothing and knows none: `WeightedLayerPooling` passes texts on
that come without the states of all layers.
"""

from __future__ import annotations

import json
from pathlib import Path

from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling
from sentence_transformers.util import fullname

GUARD = "2_SentenceTransformer_only"
NOTE = 'This form is for SentenceTransformer. SparseEncoder loads the revision "sparse-encoder".'


def add_guard(folder: Path) -> None:
    """Have `SparseEncoder(folder)` fail at once. `SentenceTransformer(folder)` gives the same vectors as before.

    Args:
        folder: A sparse checkpoint with the model type "SentenceTransformer".
    """
    guard = WeightedLayerPooling(None, num_hidden_layers=0, layer_start=1)
    (folder / GUARD).mkdir()
    guard.save(str(folder / GUARD))
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    position = len(modules)
    modules.append({"idx": position, "name": str(position), "path": GUARD, "type": fullname(guard), "note": NOTE})
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
