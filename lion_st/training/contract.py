"""What a retriever that is trained on brings along, read without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_st.encoding.fingerprints import PROMPT_NAMES
from lion_st.files import is_hub_name, read_json

# Options that decide what a retriever is: given for one that is there already, they would make another of it.
FIXED = ("add_bos", "add_eos", "causal", "num_layers", "layers", "scale", "activation", "pooling", "normalize",
         "token_dimension")  # fmt: skip
# Options that may change when it is trained on; where they are not given they stay.
KEPT = ("query_length", "document_length", "query_prompt", "document_prompt")


def is_retriever(source: str) -> bool:
    """Whether a folder or Hub repository holds a retriever, and not a backbone or an adapter of one."""
    return _file(source, "modules.json") is not None


def start_options(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options under those that were given, with a retriever's own in place of a recipe's where it is trained on.

    Args:
        values: Of a recipe.
        given: By the user.
    """
    model = str(given.get("model") or values.get("model") or "")
    # A recipe's own folder may be one that is not made yet, whose name the Hub need not be asked for.
    if not model or not (Path(model).is_dir() or given.get("model")) or not is_retriever(model):
        return dict(values)
    return {name: value for name, value in values.items() if name not in FIXED + KEPT} | _saved(model)


def backbone_config(source: str) -> Any:
    """The configuration of the backbone in a retriever, in an adapter of one, or of one.

    Raises:
        OSError: If it cannot be reached.
    """
    from lion_st.modules.loading import read_config

    folder = transformer_folder(source) if is_retriever(source) else ""
    if (adapter := _file(source, "adapter_config.json", folder)) is None:
        return read_config(source, {"subfolder": folder})
    base = read_json(adapter)
    config = read_config(base["base_model_name_or_path"], {"revision": base.get("revision")})
    if layers := _read(source, "sentence_bert_config.json", folder).get("layers"):  # of the base
        config.get_text_config().num_hidden_layers = len(layers)
    return config


def _saved(source: str) -> dict[str, Any]:
    settings = _read(source, "config_sentence_transformers.json")
    transformer = _read(source, "sentence_bert_config.json", transformer_folder(source))
    lengths = {name: transformer[name] for name in KEPT[:2] if transformer.get(name)}
    prompts = settings.get("prompts", {})
    names = {task: (*PROMPT_NAMES[task], settings.get("default_prompt_name")) for task in PROMPT_NAMES}
    found = {task: next((name for name in names[task] if name in prompts), None) for task in names}
    return lengths | {f"{task}_prompt": prompts.get(name) or None for task, name in found.items()}


def transformer_folder(source: str) -> str:
    """Where in a retriever's folder its transformer lies: empty for the top."""
    return str(_read(source, "modules.json")[0]["path"])


def load_heads(model: Any, folder: str) -> None:
    """Give the modules behind a model's transformer their weights of a checkpoint of the same model, in place."""
    modules = list(model)[1:]
    for module, entry in zip(modules, _read(folder, "modules.json")[1:], strict=True):
        module.load_state_dict(type(module).load(folder, subfolder=entry["path"]).state_dict())


def _read(source: str, name: str, subfolder: str = "") -> Any:
    file = _file(source, name, subfolder)
    return {} if file is None else read_json(file)


def _file(source: str, name: str, subfolder: str = "") -> str | None:
    from sentence_transformers.util import load_file_path

    if not Path(source).is_dir() and not is_hub_name(source):
        return None
    return load_file_path(source, name, subfolder=subfolder)
