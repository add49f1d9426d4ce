"""What running a backbone showed, kept in its checkpoint, so that loading it need not run it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

import lion_st
from lion_st.files import read_json
from lion_st.hooks import has_adapter

VERDICT_FILE = "lion_st_checks.json"
CHECKS = ("bidirectional", "lm_head", "packed")
# What decides how a checkpoint computes, beside the names, types and shapes of its weights. Of an adapter's base it is
# the configuration alone, as its tokenizer may be there or not.
DECISIVE = (
    "config.json",
    "adapter_config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def write_verdict(folder: Path, model: Any, found: Mapping[str, bool], attention: str | None) -> None:
    """Keep in a checkpoint what the checks of its model found, bound to its files and to what they ran with.

    Weights that train on and their dtype change nothing of it: the checks are about an architecture.
    """
    digest = _digest(folder, model)
    if not found or digest is None:
        return
    verdict = {"found": dict(found), "attention": attention, **_versions(), "digest": digest}
    (folder / VERDICT_FILE).write_text(json.dumps(verdict, indent=2), encoding="utf-8")


def read_verdict(file: str | Path, model: Any, attention: str | None) -> dict[str, bool]:
    """What the checks of a checkpoint found, empty unless it holds for these files, versions and this attention."""
    try:
        verdict = read_json(file)
        found = {name: verdict["found"][name] for name in CHECKS if name in verdict["found"]}
        expected = {"attention": attention, **_versions(), "digest": _digest(Path(file).parent, model)}
        holds = expected["digest"] is not None and all(verdict[name] == value for name, value in expected.items())
    except (OSError, ValueError, KeyError, TypeError):  # damaged: the checks are made again
        return {}
    return found if holds and all(isinstance(passed, bool) for passed in found.values()) else {}


def _versions() -> dict[str, str]:
    return {"lion_st": lion_st.__version__, "transformers": transformers.__version__}


def _digest(folder: Path, model: Any) -> str | None:
    """SHA-256 over what decides how a checkpoint, and the base of an adapter, computes; None if that is not there."""
    folders = [folder]
    if has_adapter(model):
        base = _base_folder(next(iter(model.peft_config.values())))
        if base is None:
            return None
        folders.append(base)
    digest = hashlib.sha256()
    for number, place in enumerate(folders):
        files = [place / name for name in (DECISIVE[:1] if number else DECISIVE) if (place / name).is_file()]
        weights = [file for file in sorted(place.glob("*.safetensors")) if file.name.startswith(("model", "adapter_"))]
        for file in files + weights:
            content = _header(file) if file in weights else file.read_bytes()
            digest.update(f"{number} {file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _base_folder(adapter: Any) -> Path | None:
    """Where the files of an adapter's base lie on this machine; None if they do not, or it is a GGUF file."""
    base = str(adapter.base_model_name_or_path)
    if Path(base).exists():
        return Path(base) if Path(base).is_dir() else None
    try:
        config = cached_file(base, "config.json", revision=adapter.revision, local_files_only=True)
    except OSError:
        return None
    return None if config is None else Path(config).parent


def _header(file: Path) -> bytes:
    """The header of a safetensors file: names, types, shapes and places of its tensors."""
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))
