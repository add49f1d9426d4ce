"""Opening whatever encodes: Lion checkpoints, and stock Router checkpoints with an encoder for each kind of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def load_encoder(source: str | Path, **options: Any) -> SentenceTransformer | SparseEncoder:
    """Load a checkpoint to encode with: by `lion_st.load`, or with stock modules if it is a Router.

    Args:
        source: Folder or Hub repository.
        options: Further arguments of `lion_st.load`; a Router takes `device`, `dtype`, `revision`, `token` and
            `local_files_only` of them.

    Raises:
        ValueError: If this is neither a Lion checkpoint nor a Router, or a Router does not take an option.
        FileNotFoundError: If the checkpoint cannot be reached.
    """
    from lion_st.models import load

    options = {key: value for key, value in options.items() if value is not None}
    hub: dict[str, Any] = {key: options[key] for key in ("revision", "token", "local_files_only") if key in options}
    if not _is_router(str(source), hub):
        return load(source, **options)
    from sentence_transformers import SentenceTransformer, SparseEncoder

    unknown = options.keys() - hub.keys() - {"device", "dtype"}
    if unknown:
        raise ValueError(f"{source} is a Router of stock modules, which does not take {sorted(unknown)}.")
    # A class other than the one that saved a checkpoint appends or drops modules without a word.
    config = _read_json(str(source), "config_sentence_transformers.json", hub) or {}
    stock: Any = SentenceTransformer if config.get("model_type") == "SentenceTransformer" else SparseEncoder
    if options.get("dtype", "auto") != "auto":
        hub["model_kwargs"] = {"dtype": options["dtype"]}
    return stock(str(source), device=options.get("device"), similarity_fn_name="dot", **hub)


def _is_router(source: str, hub: dict[str, Any]) -> bool:
    modules = _read_json(source, "modules.json", hub) or []
    return any(module["type"].endswith(".Router") for module in modules)


def _read_json(source: str, name: str, hub: dict[str, Any]) -> Any:
    from sentence_transformers.util import load_file_path

    file = load_file_path(source, name, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
