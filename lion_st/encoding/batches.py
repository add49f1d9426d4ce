"""Texts through a model, in batches of like length under a budget of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from lion_st.encoding.fingerprints import Kind, input_module, prompt_for
from lion_st.encoding.vectors import Vectors, keep_top_terms, to_csr, to_dense

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

MAX_TEXTS_PER_BATCH = 256


class EncodedTexts(NamedTuple):
    """Vectors in the order of their texts, and what they cost."""

    vectors: Vectors  # CSR [N, V] or array [N, D], float32
    tokens: int  # real tokens that went through the model
    truncated: int  # texts longer than the model's limit


def encode_in_batches(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    kind: Kind,
    tokens_per_batch: int,
    limit: int,
    progress: Any,
) -> EncodedTexts:
    """Encode in batches of like length; the batches depend on the texts alone, and so do the vectors' bits."""
    import torch

    from lion_st.models import paradigm_of

    if not texts:
        raise ValueError(f"There is no {kind} to encode.")
    prompt = prompt_for(model, kind)
    lengths = _token_counts(input_module(model, kind).tokenizer, texts, limit, prompt or "")
    real = np.minimum(lengths, limit)
    order = np.argsort(-real, kind="stable")
    convert = to_csr if paradigm_of(model) == "sparse" else to_dense
    batches: list[np.ndarray] = []
    start = 0
    while start < len(order):
        count = min(max(1, tokens_per_batch // int(real[order[start]])), MAX_TEXTS_PER_BATCH)
        batches.append(order[start : start + count])
        start += count
    parts: list[Any] = []
    tokens = 0
    started = time.monotonic()
    model.eval()
    batched_texts = [[texts[row] for row in batch] for batch in batches]
    tokenize = partial(_tokenize, model, prompt=prompt, task=kind, max_length=limit)
    tokenized = _one_ahead(tokenize, batched_texts)
    for batch, features in zip(batches, tokenized, strict=True):
        with torch.inference_mode():
            parts.append(convert(_forward(model, features, kind)))
        if progress is not None:
            progress.update(len(batch))
            tokens += int(real[batch].sum())
            progress.set_postfix_str(f"{tokens / max(1e-9, time.monotonic() - started):,.0f} tokens/s", refresh=False)
    back = np.argsort(order)
    vectors = np.concatenate(parts)[back] if convert is to_dense else sparse.vstack(parts, format="csr")[back]
    return EncodedTexts(vectors, int(real.sum()), int((lengths > limit).sum()))


def _one_ahead(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """The function's results in order, each computed by a thread while its predecessor is in use."""
    if len(items) == 1:
        yield function(items[0])
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(function, items[0])
        for item in items[1:]:
            result = coming.result()
            coming = thread.submit(function, item)
            yield result
        yield coming.result()


def _forward(model: SentenceTransformer | SparseEncoder, features: dict[str, Any], kind: Kind) -> Any:
    from sentence_transformers.util import batch_to_device

    from lion_st.modules import SpladeHead

    features = batch_to_device(features, model.device)
    is_fused = any(isinstance(module, SpladeHead) for module in model)
    vectors = model(features, task=kind, **({"output": "sparse"} if is_fused else {}))["sentence_embedding"]
    limit = getattr(model, "max_active_dims", None)  # a stock SparseEncoder's own
    return vectors if limit is None else keep_top_terms(to_csr(vectors), limit)


def _tokenize(model: SentenceTransformer | SparseEncoder, texts: Sequence[str], **options: Any) -> dict[str, Any]:
    from lion_st.modules.tokenizing import exclusive_tokenizer

    with exclusive_tokenizer():
        return model.preprocess(texts, **options)


def _token_counts(tokenizer: Any, texts: Sequence[str], limit: int, prompt: str) -> np.ndarray:
    """Tokens of each text with its prompt; of a text that is much longer than the limit, more than the limit."""
    from lion_st.modules.tokenizing import exclusive_tokenizer, leading_parts

    with exclusive_tokenizer():
        parts = [f"{prompt}{part}" for part in leading_parts(tokenizer, texts, limit, prompt)]
        encoded = tokenizer(parts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)
