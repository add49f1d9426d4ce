"""What a model is called, and what its vectors depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def model_name(model: SentenceTransformer | SparseEncoder) -> str:
    """The Hub id or folder name that a model was loaded from, else its backbone's name."""
    card = model.model_card_data
    name = card.model_id or card.base_model or getattr(model[0], "model_name_or_path", None) or "unnamed"
    parts = str(name).rstrip("/").split("/")
    return "/".join(parts[-2:]) if len(parts) == 2 and not str(name).startswith((".", "/")) else parts[-1]


def model_fingerprint(model: SentenceTransformer | SparseEncoder) -> str:
    """SHA-256 over everything that decides a model's vectors: weights, module settings, prompts and lengths."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    settings: dict[str, Any] = {
        "modules": [(type(module).__name__, getattr(module, "get_config_dict", dict)()) for module in model],
        "prompts": dict(model.prompts),
        "max_seq_length": model.max_seq_length,
        "tokenizer": tokenizer_contract(model.tokenizer),
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def text_limit(model: SentenceTransformer | SparseEncoder, kind: Literal["query", "document"]) -> int:
    """Tokens, special ones included, to which a text is cut."""
    limit = getattr(model[0], f"{kind}_length", None) or model.max_seq_length
    if limit is None:
        raise ValueError("The model has no length limit: set model.max_seq_length.")
    return int(limit)


@contextmanager
def limited(
    model: SentenceTransformer | SparseEncoder, kind: Literal["query", "document"], max_tokens: int | None
) -> Iterator[None]:
    """Cut texts of this kind to `max_tokens` while the context lasts; None leaves the model's own limit."""
    if max_tokens is None:
        yield
        return
    if max_tokens < 1:
        raise ValueError(f"max_tokens is at least 1, got {max_tokens}.")
    holder, name = (model[0], f"{kind}_length") if hasattr(model[0], f"{kind}_length") else (model, "max_seq_length")
    before = getattr(holder, name)
    setattr(holder, name, max_tokens)
    try:
        yield
    finally:
        setattr(holder, name, before)


def tokenizer_contract(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer adds to and does with a text: special tokens, sides, and the ids of a probe."""
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "padding_side": tokenizer.padding_side,
        "probe": tokenizer("The maned lion's 1st roar, naïve or not?")["input_ids"],
    }
