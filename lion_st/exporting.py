"""Stock checkpoints: what the classes of sentence-transformers load without lion_st."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.util import batch_to_device

from lion_st.checkpoints import (
    DENSE_FORM,
    HYBRID_FILE,
    NOT_STOCK,
    SPARSE_FORM,
    WITH_LIMITS,
    atomic_checkpoint,
    describe_as_written,
    head_as_run,
    unheld_by_stock,
    write_stock_checkpoint,
)
from lion_st.hooks import has_adapter, write_model_card
from lion_st.model_classes import LionSentenceTransformer, LionSparseEncoder
from lion_st.models import load, paradigm_of
from lion_st.modules import HybridHead, LionTransformer, LlamaPooling, MultiVectorHead, SpladeHead
from lion_st.modules.checks import evaluating
from lion_st.modules.folding import save_merged
from lion_st.modules.hybrid_head import without_lm_head

ModelType: TypeAlias = Literal["SentenceTransformer", "SparseEncoder", "MultiVectorEncoder"]
# paradigm -> the classes that its checkpoints can be for, the first by default
CLASSES: dict[str, tuple[ModelType, ...]] = {
    "sparse": ("SentenceTransformer", "SparseEncoder"),
    "dense": ("SentenceTransformer",),
    "multi_vector": ("MultiVectorEncoder",),
    "hybrid": ("SentenceTransformer",),  # with_limits alone; stock has a folder for each vector
}
STOCK_CLASSES: dict[str, type[BaseModel]] = {
    "SentenceTransformer": SentenceTransformer,
    "SparseEncoder": SparseEncoder,
    "MultiVectorEncoder": MultiVectorEncoder,
}
PROBE_TEXTS = (
    "Which animal is called the king of the beasts?",
    "lion",
    "Lions live in prides of related females, their cubs and a few males, mostly on the grasslands of Africa, where "
    "they hunt zebra and wildebeest at night and rest for most of the day.",
)


def export(
    model: BaseModel | str | Path,
    path: str | Path,
    model_type: ModelType | None = None,
    overwrite: bool = False,
    verify: bool = True,
    create_model_card: bool = True,
    with_limits: bool = False,
) -> Path:
    """Write a stock sentence-transformers checkpoint: adapters merged, scale folded in, safetensors only.

    The model itself is left as it is. The folder appears whole or not at all. Of a hybrid model it holds two stock
    checkpoints, `sparse` for `SparseEncoder` and `dense` for `SentenceTransformer`, and `hybrid.json` with the weights
    of their scores; `lion_st.load(folder)` makes one model of them again. The backbone lies in both.

    A scale that is a power of two (hidden size 256, 4096, 65,536) folds exactly. Any other rounds the final norm's
    weights once in bfloat16, about as much as the norm's own output is rounded; that tensor is saved in float32, so
    that loading with `dtype=torch.float32` has the full product.

    Args:
        model: A model of `lion_st.build` or `lion_st.load`, or a checkpoint to load first.
        path: The folder to make.
        model_type: The class that will load it. Of a sparse model `"SentenceTransformer"`, which is the default, gives
            dense rows and `"SparseEncoder"` sparse tensors; the weights are the same. A dense model has
            `"SentenceTransformer"` alone, a multi-vector one `"MultiVectorEncoder"`. Leave it out of a hybrid one.
        overwrite: Replace an earlier checkpoint at `path`; it survives any failure.
        verify: Load the result with the stock class and compare vectors before it takes its place. This needs the
            model's memory once more.
        create_model_card: Write sentence-transformers' README.md, which looks the base model up on the Hub.
        with_limits: Where stock modules do not hold the model's limits of active terms, or its thresholds, write a
            checkpoint that `lion_st.load` alone reads and stock classes refuse, in place of an error.
            `"SparseEncoder"` holds one limit, the same for queries and documents; `"SentenceTransformer"` none. Of a
            hybrid model this is one checkpoint, with the backbone once.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False, or if it is not a checkpoint.
        ValueError: If the model cannot be expressed in stock modules: another model class, a type that is not of its
            paradigm, limits of active terms that stock does not have, unless `with_limits`; or if the vectors differ.
        OSError: If writing fails, such as on a full disk; what was at `path` is untouched.

    Example:
        ::

            lion_st.export(model, "lion-sp-1b")
            SentenceTransformer("lion-sp-1b").encode_query("what is a lion")
    """
    if isinstance(model, str | Path):
        model = load(model)
    path = Path(path)
    forms: dict[str, tuple[BaseModel, ModelType | None]] = {"": (model, model_type)}
    hybrid = isinstance(model[1], HybridHead) and not with_limits
    if hybrid:
        if model_type is not None:
            raise ValueError(
                f"A hybrid model exports as a folder for each vector: leave out model_type={model_type!r}."
            )
        sparse, dense = single_models(model)
        forms = {SPARSE_FORM: (sparse, "SparseEncoder"), DENSE_FORM: (dense, "SentenceTransformer")}
    written = [(name, part, _require_exportable(part, kind, with_limits)) for name, (part, kind) in forms.items()]
    with atomic_checkpoint(path, overwrite) as folder:
        try:
            for name, part, kind in written:
                (folder / name).mkdir(exist_ok=True)
                write_stock_checkpoint(part, folder / name, kind, resume=hybrid, with_limits=with_limits)
                if create_model_card:
                    write_model_card(part, str(folder / name))
                    describe_as_written(folder / name, part, kind)
            if hybrid:
                head: Any = model[1]
                (folder / HYBRID_FILE).write_text(json.dumps(head.get_config_dict(), indent=2), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"The export to {str(path)!r} failed ({error}); nothing there was changed. Free some disk space or "
                "choose another folder, and export again."
            ) from error
        if verify:
            for name, part, kind in written:
                _verify(part, folder / name, kind)
    return path


def single_models(model: BaseModel) -> tuple[LionSparseEncoder, LionSentenceTransformer]:
    """The sparse and the dense model of a hybrid one, on the same weights in memory.

    Raises:
        ValueError: If the model is not hybrid.
    """
    transformer: Any = model[0]
    head: Any = model[1]
    if not isinstance(head, HybridHead):
        raise ValueError(f"single_models takes a hybrid model apart, this one is {paradigm_of(model)}.")
    settings: dict[str, Any] = {
        "prompts": {name: prompt or "" for name, prompt in model.prompts.items()},
        "similarity_fn_name": "dot",
        "device": str(model.device),
    }
    return (
        LionSparseEncoder(modules=[transformer, head.sparse_head()], **settings),
        LionSentenceTransformer(modules=[without_lm_head(transformer), head.dense], **settings),
    )


def merge_backbone(
    adapter: str | Path, path: str | Path, base: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Merge an adapter of a causal LM (such as one adapted with MNTP) and save it as a backbone to build on.

    Args:
        adapter: Adapter folder or Hub repository.
        path: The folder to make: weights, configuration with `is_causal: false`, and tokenizer.
        base: Where the base model is, if not where the adapter says.
        overwrite: Replace an earlier checkpoint at `path`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False.
        FileNotFoundError: If the base model cannot be reached.
        ValueError: If `adapter` is not an adapter or does not fit its base.

    Example:
        ::

            backbone = lion_st.hub.merge_backbone("runs/mntp", "runs/llama-3.2-1b-mntp")
            model = lion_st.build(backbone, "sparse", lora=LoraConfig(r=16))
    """
    options: dict[str, Any] = {"dtype": "auto"} | ({} if base is None else {"base": str(base)})
    transformer = LionTransformer(
        str(adapter), transformer_task="text-generation", add_bos="saved", model_kwargs=options
    )
    if not has_adapter(transformer.model):
        raise ValueError(f"{str(adapter)!r} is not an adapter (it has no adapter_config.json); build on it directly.")
    with atomic_checkpoint(Path(path), overwrite) as folder:
        save_merged(transformer.model, str(folder))
        transformer.processor.save_pretrained(str(folder))
    return Path(path)


def _require_exportable(model: BaseModel, model_type: ModelType | None, with_limits: bool) -> ModelType:
    """The class that the model is exported for; raises where it cannot be."""
    if model_type not in (None, *get_args(ModelType)):
        raise ValueError(f"model_type must be one of {get_args(ModelType)}, got {model_type!r}.")
    modules: list[Any] = list(model)
    match modules:
        case [LionTransformer(), SpladeHead() | LlamaPooling() | MultiVectorHead()]:
            pass
        case _:
            kinds = " + ".join(type(module).__name__ for module in modules)
            raise ValueError(f"export writes models of lion_st.build or lion_st.load, this one is {kinds}.")
    paradigm = paradigm_of(model)
    model_type = CLASSES[paradigm][0] if model_type is None else model_type
    if model_type not in CLASSES[paradigm]:
        allowed = " or ".join(CLASSES[paradigm])
        raise ValueError(f"A {paradigm} model exports as model_type={allowed!r} alone, not as {model_type!r}.")
    if modules[1].query_table is not None and not with_limits:
        raise ValueError(
            "A table encodes this model's queries. Training ends with a Router of the two; write one of a checkpoint "
            "with lion_st.training.query_encoders.save_query_encoder(table_query_encoder(model), model, folder)."
        )
    problem = unheld_by_stock(head_as_run(model), model_type)
    if problem is not None and not with_limits and getattr(modules[1], "thresholds", None) is not None:
        raise ValueError(f"{NOT_STOCK}: {problem}. {WITH_LIMITS}.")
    if problem is not None and not with_limits:
        raise ValueError(
            f"The model's limits of active terms have no place in this form: {problem}. Write them for lion_st.load "
            "alone with with_limits=True (`lion-st export --with-limits`), or leave them out (`--all-terms`; in "
            "Python, set model[1].max_active_dims, its query_ and document_max_active_dims, and max_active_dims of a "
            "SparseEncoder itself to None)."
        )
    return model_type


@torch.no_grad()
def _verify(model: BaseModel, folder: Path, model_type: str) -> None:
    if unheld_by_stock(head_as_run(model), model_type) is not None:
        stock: BaseModel = load(folder, device=str(model.device), local_files_only=True)
    else:
        stock = STOCK_CLASSES[model_type](str(folder), device=str(model.device), local_files_only=True)
    expected, actual = _probe(model), _probe(stock)
    difference = (expected - actual).abs().max().item()
    # In half precision, merging and folding round weights that the live model keeps apart. The result is as near to
    # float32 as the live model, but not the same; a wrong one (causal, unscaled) is several times further away.
    size = max(expected.abs().max().item(), 1.0 if paradigm_of(model) == "sparse" else 0.0)
    is_half = model.dtype in (torch.float16, torch.bfloat16)
    tolerance = (0.1 if is_half else 1e-3) * size
    if not difference <= tolerance:
        raise ValueError(
            f"The exported model's vectors differ from the live model's by {difference:.2g}, more than {tolerance:.2g} "
            f"({model.dtype}). Nothing was written."
            + (" Load the model with dtype=torch.float32 and export that." if is_half else "")
        )


def _probe(model: BaseModel) -> torch.Tensor:
    transformer, *heads = list(model)
    features = batch_to_device(model.preprocess(list(PROBE_TEXTS), task="document"), model.device)
    with evaluating(model):
        features = transformer(features)
        for head in heads:
            terms = SpladeHead.get_embedding_dimension(head) if isinstance(head, SpladeHead) else None
            features = head(features, **({} if terms is None else {"max_active_dims": terms}))  # all of them
    if paradigm_of(model) == "multi_vector":  # the vectors that count, whichever side the padding is on
        return features["token_embeddings"][features["attention_mask"].bool()].float()
    return features["sentence_embedding"].float()
