"""Small query encoders for large document models: the index stays as it is, and a query costs next to nothing.

Two kinds are made of a full model: one that looks up a weight for each token of the query and runs no network at all,
and one that keeps the first layers. Both learn from it (`lion_st.training.query_distillation`), and are saved together
with it as a stock Router checkpoint, in which `encode_query` runs the small encoder and `encode_document` the full
model.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, WeightedLayerPooling
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import Tensor, nn

from lion_st.checkpoints import atomic_checkpoint, write_stock_checkpoint
from lion_st.encoding.encode import encode_texts
from lion_st.encoding.fingerprints import text_limit
from lion_st.encoding.vectors import Vectors
from lion_st.hooks import has_adapter
from lion_st.indexes.frequencies import DocumentFrequencies
from lion_st.models import paradigm_of
from lion_st.modules import LionTransformer
from lion_st.modules.backbones import keep_layers
from lion_st.training.query_tables import router_limit
from lion_st.wrong_class import block_sparse_encoder, name_own_class

PROBES = ("lion", "Which animal is called the king of the beasts?", "where do maned lions hunt at night")


def static_query_encoder(
    model: SentenceTransformer | SparseEncoder, weights: Tensor | np.ndarray | None = None
) -> SparseEncoder:
    """An inference-free query encoder for a sparse model: a query's vector holds one weight for each of its tokens.

    Args:
        model: Full model, whose tokenizer and vocabulary it shares.
        weights: [V] weight of each term, such as `idf_weights`; by default ones, to be learned.

    Raises:
        ValueError: If the model is dense, the weights do not fit its vocabulary, or its tokenizer has fewer tokens than
            its vectors have terms, for which stock modules have no place.

    References:
        Geng et al., Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers, 2024:
        https://arxiv.org/abs/2411.04403.

    Example:
        >>> student = static_query_encoder(model, idf_weights(EncodedCorpus("runs/encoded")))  # doctest: +SKIP
    """
    if not isinstance(model[0], LionTransformer):
        _require_plain(model)
    if (paradigm := paradigm_of(model)) != "sparse":
        raise ValueError(f"A static query encoder needs the vocabulary of a sparse model, this one is {paradigm}.")
    terms = model.get_embedding_dimension()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.model_max_length = text_limit(model, "query")
    if len(tokenizer.get_vocab()) != terms:
        raise ValueError(
            f"The model has {terms} terms and its tokenizer {len(tokenizer.get_vocab())} tokens: a stock "
            "SparseStaticEmbedding has one weight for each token. Use a truncated query encoder."
        )
    if weights is None:
        weights = torch.ones(terms)
    weights = torch.as_tensor(weights, dtype=torch.float32).clone()
    if weights.shape != (terms,) or not (torch.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"weights are {terms} finite numbers of at least 0, got the shape {tuple(weights.shape)}.")
    return SparseEncoder(
        modules=[SparseStaticEmbedding(tokenizer, weights)],
        prompts=_prompts(model),
        similarity_fn_name="dot",
        device=str(model.device),
    )


def table_query_encoder(model: SentenceTransformer | SparseEncoder) -> SentenceTransformer | SparseEncoder:
    """The query encoder of a model that was trained with `--query_encoder static` or `idf`, of stock modules.

    Args:
        model: With a table that encodes queries, as a run's checkpoint has it.

    Raises:
        ValueError: If it has none.
    """
    table = getattr(model[1], "query_table", None)
    if table is None:
        raise ValueError("The model encodes queries itself: train it with --query_encoder static.")
    weight = table.weight.detach().cpu()
    if weight.ndim == 1:
        return static_query_encoder(model, weight.relu())
    tokenizer = copy.deepcopy(model.tokenizer)
    module = StaticEmbedding(tokenizer, embedding_weights=weight)
    module.tokenizer.enable_truncation(text_limit(model, "query"))
    return SentenceTransformer(
        modules=[module], prompts=_prompts(model), similarity_fn_name="dot", device=str(model.device)
    )


def truncated_query_encoder(
    model: SentenceTransformer | SparseEncoder, layers: int | Sequence[int]
) -> SentenceTransformer | SparseEncoder:
    """A query encoder of some of the full model's layers, its final norm and its head, as a copy to be trained.

    Args:
        model: Full model of `lion_st.build` or `lion_st.load`, sparse or dense, without an adapter.
        layers: So many first layers; or the layers to keep, numbered from 0 in ascending order, from the end if
            negative: `[0, 6, -1]`.

    Raises:
        ValueError: If these are not fewer layers than the model has, or not in order; or an adapter is attached.

    Example:
        >>> student = truncated_query_encoder(lion_st.load("lion-sp-8b"), [0, 10, 20, -1])  # doctest: +SKIP
    """
    transformer: Any = _require_plain(model)
    decoder = transformer.decoder
    whole = decoder.layers
    wanted = list(range(layers)) if isinstance(layers, int) else list(layers)
    kept = [number + len(whole) if number < 0 else number for number in wanted]
    is_in_order = kept == sorted(set(kept)) and set(kept) <= set(range(len(whole)))
    if not is_in_order or not 0 < len(kept) < len(whole):
        raise ValueError(
            f"layers is a number of at least 1 and below the model's {len(whole)}, or some of them in ascending order "
            f"without repetition, got {layers}."
        )
    try:
        # The others are not copied.
        decoder.layers = nn.ModuleList(layer if number in kept else nn.Identity() for number, layer in enumerate(whole))
        student = copy.deepcopy(model)
    finally:
        decoder.layers = whole
    shortened: Any = student[0]
    keep_layers(shortened.model, kept)
    return student.requires_grad_(True)


def idf_weights(shards: Iterable[tuple[Sequence[str], Vectors]]) -> np.ndarray:
    """Inverse document frequency of each term [V] in encoded documents: log(1 + (N - n + 0.5) / (n + 0.5)).

    Args:
        shards: Ids and sparse vectors, such as an `EncodedCorpus`.

    Raises:
        ValueError: If there is no document.
    """
    frequencies = DocumentFrequencies()
    for _, vectors in shards:
        frequencies.add(vectors)
    if not frequencies.documents:
        raise ValueError("There are no documents to take frequencies from.")
    absent = frequencies.documents - frequencies.counts
    return np.log1p((absent + 0.5) / (frequencies.counts + 0.5)).astype(np.float32)


def save_query_encoder(
    student: SentenceTransformer | SparseEncoder,
    model: SentenceTransformer | SparseEncoder,
    path: str | Path,
    overwrite: bool = False,
) -> Path:
    """Write a query encoder and its full model as one stock Router checkpoint, verified before it takes its place.

    `SparseEncoder(path)` (for a sparse model) or `SentenceTransformer(path)` (for a dense one) loads it without
    lion_st; `encode_query` then runs the student, `encode_document` the full model.

    Args:
        student: Of `static_query_encoder` or `truncated_query_encoder`, trained or not.
        model: The full model that it was made of.
        path: The folder to make.
        overwrite: Replace an earlier checkpoint there, once the new one is verified.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, or if it is not a checkpoint.
        ValueError: If student and model do not fit each other, or the saved vectors differ from theirs.
    """
    if student.get_embedding_dimension() != model.get_embedding_dimension():
        raise ValueError(
            f"The query encoder has {student.get_embedding_dimension()} dimensions and the full model "
            f"{model.get_embedding_dimension()}: give the model that it was made of."
        )
    stock_class: Any = SparseEncoder if paradigm_of(model) == "sparse" else SentenceTransformer
    limits = {"max_active_dims": router_limit(student, model)} if stock_class is SparseEncoder else {}
    with tempfile.TemporaryDirectory() as scratch, atomic_checkpoint(Path(path), overwrite) as folder:
        router = Router.for_query_document(
            _stock_modules(student, Path(scratch) / "query", stock_class),
            _stock_modules(model, Path(scratch) / "document", stock_class),
        )
        options: dict[str, Any] = {"prompts": _prompts(model), "similarity_fn_name": "dot", "device": "cpu"}
        stock_class(modules=[router], **options, **limits).save(str(folder))
        if stock_class is SparseEncoder:
            name_own_class(folder)
        else:
            block_sparse_encoder(folder)
        saved = stock_class(str(folder), device=str(model.device), local_files_only=True)
        for task, live in (("query", student), ("document", model)):
            _require_equal(saved, live, task)
    return Path(path)


def _stock_modules(model: SentenceTransformer | SparseEncoder, folder: Path, stock_class: Any) -> list[Any]:
    if isinstance(model[0], SparseStaticEmbedding | StaticEmbedding):
        return [copy.deepcopy(module).cpu() for module in model]
    folder.mkdir()
    write_stock_checkpoint(model, folder, stock_class.__name__)
    modules = list(stock_class(str(folder), device="cpu", local_files_only=True))
    return [module for module in modules if not isinstance(module, WeightedLayerPooling)]  # see lion_st.wrong_class


def _require_equal(saved: Any, live: Any, task: Any) -> None:
    difference = abs(_probe(saved, task) - _probe(live, task)).max()
    tolerance = 1e-4 if live.dtype in (torch.float32, None) else 0.2
    if not difference <= tolerance:
        raise ValueError(f"The saved {task} encoder's vectors differ from the live one's by {difference:.2g}.")


def _probe(model: Any, task: Any) -> Any:
    vectors: Any = encode_texts(model, PROBES, task)
    return vectors if isinstance(vectors, np.ndarray) else vectors.toarray()


def _prompts(model: SentenceTransformer | SparseEncoder) -> dict[str, str]:
    return {name: prompt or "" for name, prompt in model.prompts.items()}


def _require_plain(model: SentenceTransformer | SparseEncoder) -> LionTransformer:
    first = model[0]
    if not isinstance(first, LionTransformer):
        raise ValueError(
            f"Query encoders are made of models of lion_st.load, this one begins with {type(first).__name__}."
        )
    if (paradigm := paradigm_of(model)) not in ("sparse", "dense"):
        raise ValueError(
            f"Query encoders are made of sparse and dense models, this one is {paradigm}"
            + (": take one of the two folders that lion_st.export writes of it." if paradigm == "hybrid" else ".")
        )
    if has_adapter(first.model):
        raise ValueError("The model has an adapter attached: load it with merge_adapter=True first.")
    return first
