"""Texts through a model, in batches of like length under a budget of tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import truncate_embeddings

from lion_st.data.fields import Task
from lion_st.encoding.fingerprints import input_module, prompt_for
from lion_st.encoding.pipeline import HostCopy, computed_ahead, done_behind
from lion_st.encoding.vectors import HybridVectors, Vectors, keep_top_terms, stack, to_csr, to_dense, to_token_vectors
from lion_st.model_classes import LionModel, refuse_truncation
from lion_st.models import paradigm_of
from lion_st.modules import SpladeHead
from lion_st.modules.tokenizing import exclusive_tokenizer, first_tokens, leading_parts, require_room
from lion_st.modules.unpadding import packed_texts, why_not_here

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder

MAX_TEXTS_PER_BATCH = 256
TEXTS_AT_ONCE = 4096  # are tokenized, and cut into batches of like length, while the model reads those before


class EncodedTexts(NamedTuple):
    """Vectors in the order of their texts, and what they cost."""

    vectors: Vectors  # float32: CSR [N, V], array [N, D], `TokenVectors` or `HybridVectors`
    tokens: int  # real tokens that went through the model
    truncated: int  # texts longer than the model's limit


class TokenizedTexts(NamedTuple):
    """Texts as the model takes them, in batches."""

    order: np.ndarray  # [N], the texts' places, longest first, one batch after the other
    batches: list[dict[str, Any]]  # the model's features, on the host
    lengths: np.ndarray  # [N], tokens that the model reads of each text
    truncated: int  # texts that have more


class BatchEncoder:
    """Encodes texts of one kind in three steps, each of which another thread may do: `tokenize`, `run`, `collect`.

    The batches depend on the texts alone, and so do the vectors' bits.

    Args:
        model: A sparse, dense, multi-vector or hybrid model.
        task: Whether the texts are queries or documents.
        limit: Tokens to which texts are cut.
        tokens_per_batch: Padded tokens per batch.
        progress: A tqdm bar.

    Raises:
        ValueError: If the prompt leaves no room for a text, or a sparse model has a `truncate_dim`.
    """

    def __init__(
        self,
        model: SentenceTransformer | SparseEncoder,
        task: Task,
        limit: int,
        tokens_per_batch: int,
        progress: Any = None,
    ) -> None:
        self.model: Any = model
        self.task: Task = task
        self.limit = limit
        self.tokens_per_batch = tokens_per_batch
        self.progress = progress
        self.prompt = prompt_for(model, task) or ""
        self.module = input_module(model, task)
        self.paradigm = paradigm_of(model)
        self.truncate_dim: int | None = getattr(model, "truncate_dim", None)  # of a dense model's vectors
        if self.paradigm in ("sparse", "hybrid"):
            refuse_truncation(self.truncate_dim)
        self.tokens = 0
        self.started = time.monotonic()
        self._takes_token_ids = _takes_token_ids(model, task)
        if self._takes_token_ids:
            texts = "Queries" if task == "query" else "Documents"
            require_room(self.module.tokenizer, self.prompt, limit, texts)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """All three steps; where there are many texts, the first and the last one go on while the model runs."""
        if len(texts) <= TEXTS_AT_ONCE:
            tokenized = self.tokenize(texts)
            return self.collect(tokenized, self.run(tokenized))
        parts: list[EncodedTexts] = []
        sections = (texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))
        with done_behind() as behind:
            for tokenized in computed_ahead(self.tokenize, sections):
                copies = self.run(tokenized)
                behind(lambda *given: parts.append(self.collect(*given)), tokenized, copies)
        vectors, tokens, truncated = zip(*parts, strict=True)
        return EncodedTexts(stack(vectors), sum(tokens), sum(truncated))

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize N texts and make batches of them."""
        if self._takes_token_ids:
            rows, is_cut = first_tokens(self.module.tokenizer, texts, self.limit, self.prompt)
            lengths, truncated = np.array([len(row) for row in rows]), int(is_cut.sum())
        else:
            whole = self._token_counts(texts)
            lengths, truncated = np.minimum(whole, self.limit), int((whole > self.limit).sum())
        order = np.argsort(-lengths, kind="stable")
        batches = []
        for places in self._cut_into_batches(order, lengths):
            if self._takes_token_ids:
                features = self._features([rows[place] for place in places])
            else:
                with exclusive_tokenizer():
                    features = self.model.preprocess(
                        [texts[place] for place in places], prompt=self.prompt, task=self.task, max_length=self.limit
                    )
            batches.append(features)
        return TokenizedTexts(order, batches, lengths, truncated)

    def run(self, tokenized: TokenizedTexts) -> list[Any]:
        """Encode the batches; on a GPU this returns before the last of their vectors are there."""
        options: dict[str, Any] = {"task": self.task}
        if any(isinstance(module, SpladeHead) for module in self.model):
            options["output"] = "sparse"
        self.model.eval()
        copies: list[Any] = []
        first = 0
        for batch in tokenized.batches:
            features = {name: _moved(value, self.model.device) for name, value in batch.items()}
            with torch.inference_mode():
                output = self.model(features, **options)
                if self.paradigm == "multi_vector":  # stock models have no other place for it than the mask
                    counts = output["attention_mask"].bool()[..., None]
                    vectors = torch.where(counts, output["token_embeddings"], 0.0)
                else:
                    vectors = output["sentence_embedding"]
                if self.truncate_dim is not None:
                    vectors = truncate_embeddings(vectors, self.truncate_dim)
                if self.paradigm == "hybrid":
                    copies.append((HostCopy(output["sparse_embedding"]), HostCopy(output["dense_embedding"])))
                else:
                    copies.append(HostCopy(vectors))
            count = vectors.shape[0]
            self._report(count, int(tokenized.lengths[tokenized.order[first : first + count]].sum()))
            first += count
        return copies

    def collect(self, tokenized: TokenizedTexts, copies: Sequence[Any]) -> EncodedTexts:
        """Wait for the vectors and put them in the order of the texts."""
        back = np.argsort(tokenized.order)
        vectors = stack([self._convert(copy) for copy in copies])[back]
        return EncodedTexts(vectors, int(tokenized.lengths.sum()), tokenized.truncated)

    def _cut_into_batches(self, order: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        batches: list[np.ndarray] = []
        start = 0
        while start < len(order):
            count = min(max(1, self.tokens_per_batch // max(1, int(lengths[order[start]]))), MAX_TEXTS_PER_BATCH)
            batches.append(order[start : start + count])
            start += count
        return batches

    def _features(self, rows: list[np.ndarray]) -> dict[str, Any]:
        """What the module's `preprocess` and `forward` would make of these tokens, without padding where it can be."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.from_numpy(np.concatenate(rows))
        module = self.module
        if module.can_flatten_inputs or (module.runs_packed and why_not_here(module.model) is None):
            features = packed_texts(ids, lengths)
        else:
            places = torch.arange(int(lengths.max()))
            is_left = module.tokenizer.padding_side == "left"
            mask = places.flip(0) < lengths[:, None] if is_left else places < lengths[:, None]
            padded = torch.full(mask.shape, module.tokenizer.pad_token_id)
            padded[mask] = ids
            features = {"input_ids": padded, "attention_mask": mask.long()}
        if self.model.device.type != "cuda":
            return features
        return {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in features.items()}

    def _convert(self, copy: Any) -> Any:
        if self.paradigm == "hybrid":
            sparse, dense = (side.get() for side in copy)
            return HybridVectors(to_csr(sparse), to_dense(dense), self.model[1].fusion_weights)
        vectors = copy.get()
        if self.paradigm != "sparse":
            return to_dense(vectors) if self.paradigm == "dense" else to_token_vectors(vectors)
        limit = getattr(self.model, "max_active_dims", None)  # a stock SparseEncoder's own
        return to_csr(vectors) if limit is None else keep_top_terms(to_csr(vectors), limit)

    def _token_counts(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text with its prompt; of a text much longer than the limit, more than the limit."""
        tokenizer = self.module.tokenizer
        if isinstance(self.module, StaticEmbedding):
            found = tokenizer.encode_batch([f"{self.prompt}{text}" for text in texts], add_special_tokens=False)
            return np.array([len(one.ids) + sum(len(part.ids) for part in one.overflowing) for one in found])
        with exclusive_tokenizer():
            parts = [f"{self.prompt}{part}" for part in leading_parts(tokenizer, texts, self.limit, self.prompt)]
            encoded = tokenizer(parts, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)

    def _report(self, texts: int, tokens: int) -> None:
        self.tokens += tokens
        if self.progress is not None:
            self.progress.update(texts)
            speed = self.tokens / max(1e-9, time.monotonic() - self.started)
            self.progress.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)


def _takes_token_ids(model: Any, task: Task) -> bool:
    """Whether token ids are all that a model reads of a text; stock modules may read more, or other ones."""
    module = input_module(model, task)
    if not isinstance(model, LionModel) or (task == "query" and model.query_table is not None):
        return False
    if task == "query" and module.query_expansion is not None:
        return False
    settings = {name for part in module.processing_kwargs.values() for name in part}
    return set(module.modality_config) == {"text"} and settings <= {"logits_to_keep"}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value
