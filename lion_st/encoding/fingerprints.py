"""What a model is called, and what its vectors depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import xxhash

from lion_st.data.fields import TASKS, Task
from lion_st.encoding.storage import StorageError
from lion_st.hooks import hub_commit, times_written

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

NO_LIMIT = 1_000_000  # tokens of a text
SOME_VALUES = 32  # of a tensor
HASHING_THREADS = 4  # as many tensors of a GPU are on the host at a time

PROMPT_NAMES: dict[Task, tuple[str, ...]] = {"query": ("query",), "document": ("document", "passage", "corpus")}


def model_name(model: SentenceTransformer | SparseEncoder) -> str:
    """The Hub id or folder name that a model was loaded from, else its backbone's name."""
    backbone = getattr(input_module(model, "document"), "model", None)
    card = model.model_card_data
    name = card.model_id or getattr(backbone, "name_or_path", None) or card.base_model or "unnamed"
    parts = str(name).rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) == 2 and not str(name).startswith((".", "/")) else parts[-1]


def model_revision(model: SentenceTransformer | SparseEncoder) -> str | None:
    """The Hub commit that a model's configuration was loaded from, None for a local one."""
    inner: Any = getattr(input_module(model, "document"), "model", None)
    return hub_commit(getattr(inner, "config", None))


def model_fingerprint(model: SentenceTransformer | SparseEncoder) -> str:
    """A digest of everything that decides a model's vectors: weights, module settings, prompts and lengths."""
    require_encoder(model)
    settings: dict[str, Any] = {
        "modules": [(type(module).__name__, _config(module)) for module in model],
        "prompts": dict(model.prompts),
        "max_seq_length": model.max_seq_length,
        "tokenizers": [tokenizer_contract(input_module(model, task).tokenizer) for task in TASKS],
    }
    if getattr(input_module(model, "document"), "causal", False):  # which the same weights need not be
        settings["causal"] = True
    for name in ("max_active_dims", "truncate_dim", "default_prompt_name"):  # which not every class of model has
        if getattr(model, name, None) is not None:
            settings[name] = getattr(model, name)
    routes = getattr(next(iter(model)), "sub_modules", {})  # of a Router, whose settings are not those of its modules
    for name, route in routes.items():
        settings[f"route {name}"] = [(type(module).__name__, _config(module)) for module in route]
    digest = hashlib.sha256(weights_fingerprint(model).encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


_digests: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def weights_fingerprint(model: SentenceTransformer | SparseEncoder) -> str:
    """A digest of the names, types and values of all weights as they are in memory, trained or merged as they may be.

    Every value counts: a sample would miss what an adapter of a few layers changes. They are read again only where a
    tensor was replaced or changed in place, or a few values of each show what `.data` hides, as when weights are
    averaged. xxh3 (128 bits, about as fast as memory) tells models apart, and does not keep out those who would forge
    one.
    """
    require_encoder(model)
    state = sorted(model.state_dict(keep_vars=True).items())
    written = [0 if tensor.is_inference() else times_written(tensor) for _, tensor in state]
    facts = [(name, t.data_ptr(), times, t.dtype, t.shape) for (name, t), times in zip(state, written, strict=True)]
    key = facts, _some_values([tensor for _, tensor in state])
    if model in _digests and _digests[model][0] == key:
        return _digests[model][1]
    with ThreadPoolExecutor(HASHING_THREADS) as threads:  # they run without Python's lock
        parts = list(threads.map(lambda one: xxhash.xxh3_128_digest(_contents(one[1])), state))
    digest = xxhash.xxh3_128()
    for (name, tensor), part in zip(state, parts, strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(part)
    _digests[model] = (key, digest.hexdigest())
    return _digests[model][1]


def model_settings(model: SentenceTransformer | SparseEncoder) -> dict[str, Any]:
    """What decides on vectors besides weights, tokens and limits: attention, pooling and activation, of documents.

    The modules of lion_st are described by the stock ones that compute the same.
    """
    first, *heads = _route(model, "document")
    config: Any = getattr(getattr(first, "model", None), "config", None)
    text: Any = None if config is None else config.get_text_config()
    modules: list[Any] = []
    for head in heads:
        modules += head.stock_modules() if hasattr(head, "stock_modules") else [head]
        if hasattr(head, "sparse_head"):  # of a hybrid model
            modules += head.dense.stock_modules()
    return {
        "is_causal": getattr(text, "is_causal", None),
        "scale": next((head.scale for head in heads if hasattr(head, "scale")), 1.0),
        "modules": [f"{type(module).__name__} {json.dumps(_config(module), default=str)}" for module in modules],
    }


def _config(module: Any) -> dict[str, Any]:
    """A module's settings, without a width that a stock one learns of its first text."""
    config: dict[str, Any] = getattr(module, "get_config_dict", dict)()
    return config | ({"embedding_dimension": None} if type(module).__name__ == "SpladePooling" else {})


def encodes_alike(model: SentenceTransformer | SparseEncoder, settings: Mapping[str, Any]) -> bool:
    """Whether a model has the weights, attention and head that settings of an encoding name."""
    return settings.get("weights_xxh3") == weights_fingerprint(model) and not _other_settings(model, settings)


def _other_settings(model: SentenceTransformer | SparseEncoder, settings: Mapping[str, Any]) -> list[str]:
    own = model_settings(model)
    found = settings.get("model_settings", own)  # which earlier versions did not note
    return [f"{name} {found.get(name)!r}, not {own[name]!r}" for name in own if found.get(name) != own[name]]


def require_same_encoding(
    place: str | Path, settings: Mapping[str, Any], model: SentenceTransformer | SparseEncoder, limit: int
) -> None:
    """Refuse vectors of documents that a model would encode otherwise.

    Args:
        place: Where they are, for the message.
        settings: What an encoded corpus or index says of them.
        model: The model.
        limit: Tokens to which it cuts documents.
    """
    if settings.get("weights_xxh3") != weights_fingerprint(model):
        raise StorageError(
            f"{place} was encoded by {settings['model']!r} with other weights or in another type than those of "
            f"{model_name(model)!r}: encode the documents with this model."
        )
    if others := _other_settings(model, settings):
        raise StorageError(
            f"{place} was encoded with the weights of {model_name(model)!r} and other settings, with "
            f"{'; '.join(others)}: encode the documents with this model."
        )
    if settings["max_tokens"] != limit:
        raise StorageError(
            f"{place} holds texts cut to {settings['max_tokens']} tokens, not to {limit}: encode the documents with "
            f"max_tokens={limit}."
        )
    kept, terms = settings.get("max_active_dims"), term_limit(model, "document")
    if kept != terms:
        raise StorageError(
            f"{place} holds {kept or 'all'} terms of a text, and the model keeps {terms or 'all'}: encode them "
            "with this limit, or ask for that one (--document-max-active-dims)."
        )
    prompt = prompt_for(model, "document")
    if settings["prompt"] != prompt:
        raise StorageError(
            f"{place} was encoded with the prompt {settings['prompt']!r}, and the model's for documents is {prompt!r}: "
            "encode the documents with this model."
        )
    contract = tokenizer_contract(input_module(model, "document").tokenizer)
    if settings.get("tokenizer", contract) != contract:
        raise StorageError(
            f"{place} was encoded from other tokens than {model_name(model)!r} makes of a text, such as other special "
            "ones: encode the documents with this model."
        )


def _some_values(tensors: Sequence[Any]) -> bytes:
    """Numbers at even steps through each tensor."""
    import torch

    by_device: dict[Any, list[Any]] = {}
    for tensor in tensors:
        step = max(1, tensor.numel() // SOME_VALUES)
        by_device.setdefault(tensor.device, []).append(tensor.detach().flatten()[::step].float())
    return b"".join(torch.cat(parts).cpu().numpy().tobytes() for parts in by_device.values())


def _contents(tensor: Any) -> Any:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def require_encoder(model: Any) -> None:
    """Check that a model is one."""
    from sentence_transformers.base.model import BaseModel

    if not isinstance(model, BaseModel):
        raise TypeError(f"Pass a model, not {model!r}: lion_st.load(path) makes one of a checkpoint.")


def input_module(model: SentenceTransformer | SparseEncoder, task: Task) -> Any:
    """The module that tokenizes texts of a kind: the first one, or the first one of a Router's route."""
    return _route(model, task)[0]


def _route(model: SentenceTransformer | SparseEncoder, task: Task) -> list[Any]:
    """The modules that texts of a kind go through."""
    from sentence_transformers.base.modules import Router

    require_encoder(model)
    first, *others = list(model)
    route: Any = first.sub_modules[task] if isinstance(first, Router) else [first]
    return [*route, *others]


def text_limit(model: SentenceTransformer | SparseEncoder, task: Task, max_tokens: int | None = None) -> int:
    """Tokens, special ones included, to which a text is cut.

    Args:
        model: A sparse or dense model.
        task: Whether the text is a query or a document.
        max_tokens: The limit of one call, in place of the model's own; it is passed on, never set on the model, which
            other threads may be using.
    """
    module = input_module(model, task)
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    if isinstance(module, StaticEmbedding):  # it cuts by itself
        if max_tokens is not None:
            raise ValueError(f"max_tokens={max_tokens} has no effect on a StaticEmbedding: leave it out.")
        return int((module.tokenizer.truncation or {}).get("max_length", NO_LIMIT))
    if max_tokens is not None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is at least 1, got {max_tokens}.")
        return max_tokens
    limit = getattr(module, f"{task}_length", None) or module.max_seq_length
    if limit is None:
        raise ValueError("The model has no length limit: set model.max_seq_length.")
    return int(limit)


def term_limit(model: SentenceTransformer | SparseEncoder, task: Task) -> int | None:
    """Terms of a text that a sparse model keeps, the heaviest ones; None if it keeps all, or has none."""
    head: Any = list(model)[-1]
    of_head = head.active_dims(task) if hasattr(head, "active_dims") else None
    return min((limit for limit in (of_head, getattr(model, "max_active_dims", None)) if limit), default=None)


def prompt_for(model: SentenceTransformer | SparseEncoder, task: Task) -> str | None:
    """The prompt that `encode_query` or `encode_document` would put in front of a text."""
    name = next((name for name in PROMPT_NAMES[task] if name in model.prompts), model.default_prompt_name)
    return model.prompts.get(name) if name is not None else None


def tokenizer_contract(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer adds to and does with a text: special tokens, sides, and the ids of a probe."""
    from tokenizers import Tokenizer

    from lion_st.modules.tokenizing import exclusive_tokenizer

    if isinstance(tokenizer, Tokenizer):  # of a StaticEmbedding
        return {"tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}
    with exclusive_tokenizer():
        probe = tokenizer("The maned lion's 1st roar, naïve or not?")["input_ids"]
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "padding_side": tokenizer.padding_side,
        "probe": probe,
    }
