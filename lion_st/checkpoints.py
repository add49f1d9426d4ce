"""How a model lies on disk: stock modules, written so that a failure leaves what was there."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import fullname, load_dir_path, load_file_path

from lion_st.files import atomic_folder, fsync, fsync_tree, is_hub_name, read_json, staging_folder
from lion_st.hooks import model_config
from lion_st.modules import HybridHead, SpladeHead
from lion_st.wrong_class import TRANSFORMER, block_sparse_encoder, move_transformer

NOT_STOCK = "The model's learned thresholds have no place in a stock checkpoint"
WITH_LIMITS = "Write them for lion_st.load alone, with with_limits=True (`lion-st export --with-limits`)"
STOCK_TRANSFORMER = fullname(Transformer)
SPARSE_FORM, DENSE_FORM = "sparse", "dense"  # folders that a hybrid model is exported to
HYBRID_FILE = "hybrid.json"  # beside the two stock checkpoints of a hybrid model
JSON_FILES = (HYBRID_FILE, "modules.json", "config_sentence_transformers.json", "config.json", "adapter_config.json")


def unheld_by_stock(head: Any, model_type: str) -> str | None:
    """Why stock modules of one model do not hold what a head has: two vectors, thresholds, limits of terms, or a table.

    None if they do, or if there is nothing of it.
    """
    if head.query_table is not None:
        return "queries are looked up in a table, and one model encodes all texts"
    if isinstance(head, HybridHead):
        return "a stock model gives one vector of a text, and this one a sparse and a dense one"
    if not isinstance(head, SpladeHead):
        return None
    if head.thresholds is not None:
        return "thresholds of terms are a bias of the LM head, for which stock modules have no place"
    query, document = head.active_dims("query"), head.active_dims("document")
    if query != document:
        return (
            "stock models know one limit of active terms, not one for queries and another for documents "
            f"({query or 'none'} and {document or 'none'})"
        )
    if document is not None and model_type == "SentenceTransformer":
        return (
            f"a stock SentenceTransformer has no limit of active terms (max_active_dims={document}), SparseEncoder has"
        )
    return None


def head_as_run(model: BaseModel) -> Any:
    """The model's head, with the limit of active terms that a `SparseEncoder` has itself, which goes before the head's.

    The model is left as it is.
    """
    head: Any = model[1]
    limit = getattr(model, "max_active_dims", None)
    if limit is None:
        return head
    head = copy.copy(head)
    head.max_active_dims, head.query_max_active_dims, head.document_max_active_dims = limit, None, None
    return head


def write_stock_checkpoint(
    model: BaseModel, folder: Path, model_type: str, resume: bool = False, with_limits: bool = False
) -> None:
    """Write a model of Lion modules as a checkpoint of stock modules, adapters merged, scale folded.

    It is guarded against the class that it is not for; see `lion_st.wrong_class`.

    Args:
        model: `LionTransformer` followed by a head of `lion_st.modules`. It is left as it is.
        folder: Existing folder.
        model_type: `"SentenceTransformer"`, `"SparseEncoder"` or `"MultiVectorEncoder"`: the class that will load it.
        resume: Also keep what folding loses, for training to go on from.
        with_limits: Where stock modules do not hold what the head has, see `unheld_by_stock`, write it as it is: stock
            then refuses the checkpoint, which `lion_st.load` reads. Without, limits and table are left out.
    """
    transformer: Any = model[0]
    head = head_as_run(model)
    if getattr(head, "thresholds", None) is not None and not with_limits:
        raise ValueError(f"{NOT_STOCK}: {unheld_by_stock(head, model_type)}. {WITH_LIMITS}.")
    modules = head.stock_modules()
    folds = isinstance(head, SpladeHead) and head.folds_scale
    is_learned = isinstance(head, SpladeHead) and head.log_top_k is not None
    if (with_limits and unheld_by_stock(head, model_type) is not None) or (resume and is_learned):
        modules = [head if resume or not folds else head.of_result(scale=1.0)]  # folded in
    if folds:
        transformer.save_stock(str(folder), scale=head.scale, resume=head.get_config_dict() if resume else None)
    else:
        transformer.save_stock(str(folder))
    entries = [{"idx": 0, "name": "0", "path": "", "type": STOCK_TRANSFORMER}]
    for position, module in enumerate(modules, start=1):
        name = f"{position}_{type(module).__name__}"
        (folder / name).mkdir()
        module.save(str(folder / name))
        entries.append({"idx": position, "name": str(position), "path": name, "type": fullname(module)})
    (folder / "modules.json").write_text(json.dumps(entries, indent=2), encoding="utf-8")
    config = model_config(model) | {"model_type": model_type}
    limit = head.active_dims("document") if isinstance(head, SpladeHead) else None
    if limit is not None and unheld_by_stock(head, model_type) is None:
        config["max_active_dims"] = limit
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if model_type == "SentenceTransformer":
        block_sparse_encoder(folder)
    else:
        move_transformer(folder, model_type)


@contextmanager
def atomic_checkpoint(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block succeeds; see `lion_st.files.atomic_folder`.

    Raises:
        FileExistsError: If something is there and `overwrite` is False, or if it is not a checkpoint.
    """
    is_occupied = path.is_dir() and any(path.iterdir())
    names = ("config.json", "modules.json", HYBRID_FILE)
    if is_occupied and overwrite and not any((path / name).is_file() for name in names):
        raise FileExistsError(f"{str(path)!r} is not a checkpoint and is not replaced. Remove it yourself first.")
    with atomic_folder(path, replace=overwrite) as folder:
        yield folder


@contextmanager
def atomic_files_in(path: Path) -> Iterator[Path]:
    """A temporary folder in `path` whose files are moved into `path` if the block succeeds.

    Weights of an earlier checkpoint in `path` that the new one does not replace are removed, other files stay.
    """
    path.mkdir(parents=True, exist_ok=True)
    with staging_folder(path / "saving") as staging:
        yield staging
        fsync_tree(staging)
        written = [file.relative_to(staging) for file in sorted(staging.rglob("*")) if file.is_file()]
        for name in written:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, path / name)
        for file in [*path.iterdir(), *(path / TRANSFORMER).glob("*")]:
            if file.is_file() and is_weight_file(file.name) and file.relative_to(path) not in written:
                file.unlink()
        fsync(path)


def is_weight_file(name: str) -> bool:
    """Whether a file at the top of a checkpoint holds weights, or says which files do."""
    pattern = r"(model(-\d{5}-of-\d{5})?|adapter_model|lion_st)\.safetensors|model\.safetensors\.index\.json"
    return re.fullmatch(pattern + r"|adapter_config\.json", name) is not None


def describe_as_written(folder: Path, model: BaseModel, model_type: str) -> None:
    """Have the card that sentence-transformers wrote say what lies in the folder.

    It describes the class of the model in memory: a sparse one as dense vectors of the backbone's width, and a
    checkpoint for one class by the code of the other, which that class refuses.

    Args:
        folder: Checkpoint with a README.md, or without one.
        model: The model that was saved.
        model_type: `"SentenceTransformer"` or `"SparseEncoder"`: the class that loads the folder.
    """
    card = folder / "README.md"
    transformer: Any = model[0]
    head: Any = model[1]
    if not card.is_file() or not isinstance(head, SpladeHead):
        return
    terms = transformer.model.get_output_embeddings().weight.shape[0]
    text = card.read_text(encoding="utf-8")
    if isinstance(head, HybridHead):
        both = f"{terms}-dimensional sparse and a {head.dense.embedding_dimension}-dimensional dense vector space"
        text = re.sub(r"\d+-dimensional dense vector space", both, text)
    else:
        text = re.sub(r"\d+-dimensional dense vector space", f"{terms}-dimensional sparse vector space", text)
        text = re.sub(r"(\*\*Output Dimensionality:\*\*) \d+", rf"\g<1> {terms}", text)
    other = "SparseEncoder" if model_type == "SentenceTransformer" else "SentenceTransformer"
    text = re.sub(rf"\bimport {other}\b", f"import {model_type}", text)
    text = re.sub(rf"(?<![\w.]){other}\(", f"{model_type}(", text)
    if _names_head(folder):
        option = ", as_sparse_encoder=True" if model_type == "SparseEncoder" else ""
        text = re.sub(rf"from sentence_transformers import {model_type}\b", "import lion_st", text)
        text = re.sub(rf'(?<![\w.]){model_type}\(("[^"]*")\)', rf"lion_st.load(\1{option})", text)
    card.write_text(text, encoding="utf-8")


def _names_head(folder: Path) -> bool:
    """Whether a checkpoint asks for the head itself, with what stock modules do not hold."""
    modules = read_json(folder / "modules.json")
    return any(module["type"] in map(fullname, (SpladeHead, HybridHead)) for module in modules)


def is_exported_pair(source: str, hub: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a folder or Hub repository is what a hybrid model was exported to; of the Hub one small file is read."""
    is_place = Path(source).is_dir() or is_hub_name(source)
    return is_place and load_file_path(source, HYBRID_FILE, **hub) is not None


def exported_pair(source: str, hub: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, dict[str, Any]] | None:
    """The sparse one of the two checkpoints that a hybrid model was exported to, and its head's settings.

    Args:
        source: Folder or Hub repository.
        hub: Revision, token and whether to stay offline.

    Returns:
        The folder of the sparse one, on this machine; None of what is not such an export.

    Raises:
        ValueError: If it says that it is such an export, and is not whole.
        OSError: If the sparse one cannot be fetched.
    """
    if not is_exported_pair(source, hub):
        return None
    head = read_json(str(load_file_path(source, HYBRID_FILE, **hub)))
    sparse = load_dir_path(source, SPARSE_FORM, **hub)
    if "embedding_dimension" not in head or sparse is None or not (Path(sparse) / "modules.json").is_file():
        raise ValueError(
            f"{source!r} is not a whole export of a hybrid model: {HYBRID_FILE} lacks settings, or {SPARSE_FORM} "
            "its modules.json. Export the model again."
        )
    return sparse, head


def source_name(source: str | Path, argument: str) -> str:
    """A folder, GGUF file or Hub repository as a string; raises if an argument is none of these."""
    if not isinstance(source, str | Path):
        raise TypeError(f"{argument} is a folder or a Hub repository, got {source!r}, a {type(source).__name__}.")
    if not str(source):
        raise ValueError(f"{argument} is empty; give a folder or a Hub repository.")
    name = str(source)
    is_place = isinstance(source, Path) or "/" in name
    if is_place and not (Path(name).exists() or is_hub_name(source) or name.lower().endswith(".gguf")):
        raise FileNotFoundError(f"There is no folder {name!r}: {argument} is a folder or a Hub repository.")
    return name


def require_json(source: str, hub: dict[str, Any]) -> None:
    """Raise if a file of a checkpoint's configuration is damaged, by its name."""
    for name in JSON_FILES:
        path = load_file_path(source, name, **hub)
        if path is None:
            continue
        expected: Any = list if name == "modules.json" else dict
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            problem = None if isinstance(content, expected) else f"it holds a {type(content).__name__}"
        except ValueError as error:  # of JSON and of UTF-8
            problem = str(error)
        if problem:
            raise ValueError(f"{source!r} has a damaged {name} ({problem}). Restore the file or fetch it again.")


def saved_model_type(source: str, hub: dict[str, Any]) -> str | None:
    """The class of sentence-transformers that a checkpoint says it is for, None if it does not say."""
    return read_config(source, "config_sentence_transformers.json", hub).get("model_type")


def is_router(source: str, hub: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a checkpoint is a Router, with an encoder of its own for queries."""
    return any(module["type"].endswith(".Router") for module in read_config(source, "modules.json", hub))


def read_config(source: str, name: str, hub: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """What a JSON file of a folder or Hub repository holds, empty if there is none; `hub` may name a subfolder."""
    path = load_file_path(source, name, **hub)
    return {} if path is None else read_json(path)
