"""Build a retriever from a decoder-only backbone, and load any Lion checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Module
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import load_file_path
from transformers.utils.peft_utils import find_adapter_config_file

from lion_st.checkpoints import HYBRID_FILE, exported_pair, require_json, saved_model_type, source_name
from lion_st.hooks import has_adapter, note_hub_commit
from lion_st.kernels.bfloat16 import warn_of_slow_weights
from lion_st.model_classes import LionMultiVectorEncoder, LionSentenceTransformer, LionSparseEncoder
from lion_st.model_options import READ_BY, Paradigm, SingleVector
from lion_st.modules import HybridHead, LionTransformer, LlamaPooling, MultiVectorHead, SpladeHead, adapters
from lion_st.modules.backbones import gguf_options
from lion_st.modules.llama_pooling import PoolingName
from lion_st.modules.splade_head import Activation

if TYPE_CHECKING:
    from peft import LoraConfig
    from typing_extensions import Unpack

    from lion_st.model_options import BuildOptions, LoadOptions


@overload
def build(
    backbone: str | Path, paradigm: Literal["multi_vector"], **options: Unpack[BuildOptions]
) -> LionMultiVectorEncoder: ...


@overload
def build(
    backbone: str | Path,
    paradigm: SingleVector | Literal["hybrid"],
    *,
    as_sparse_encoder: Literal[False] = ...,
    **options: Unpack[BuildOptions],
) -> LionSentenceTransformer: ...


@overload
def build(
    backbone: str | Path, paradigm: SingleVector, *, as_sparse_encoder: Literal[True], **options: Unpack[BuildOptions]
) -> LionSparseEncoder: ...


@overload
def build(
    backbone: str | Path, paradigm: Paradigm, *, as_sparse_encoder: bool = ..., **options: Unpack[BuildOptions]
) -> LionSentenceTransformer | LionSparseEncoder | LionMultiVectorEncoder: ...


def build(
    backbone: str | Path,
    paradigm: Paradigm,
    *,
    query_length: int | None = 64,
    document_length: int | None = 128,
    lora: LoraConfig | None = None,
    train_adapter: bool = False,
    load_in_4bit: bool = False,
    dtype: str | torch.dtype = "auto",
    scale: float | None = None,
    activation: Activation = "log1p",
    pooling: PoolingName = "mean_normalized",
    normalize: bool = False,
    token_dimension: int = 128,
    max_active_dims: int | None = None,
    query_max_active_dims: int | None = None,
    document_max_active_dims: int | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    add_bos: bool | None = None,
    add_eos: bool = False,
    causal: bool = False,
    num_layers: int | None = None,
    layers: Sequence[int] | None = None,
    as_sparse_encoder: bool = False,
    device: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: bool | str | None = None,
) -> LionSentenceTransformer | LionSparseEncoder | LionMultiVectorEncoder:
    """Make a retriever of a decoder-only backbone: a bidirectional transformer with a head.

    All that decides on its vectors is saved with the model and part of what `lion_st.export` writes.

    Args:
        backbone: Hub name, folder or GGUF file of a causal LM, or of a PEFT adapter of one (MNTP), which is merged.
        paradigm: `"sparse"` (Lion-SP, one weight per vocabulary term), `"dense"` (Lion-DS), `"multi_vector"` (a vector
            of each token, as in ColBERT, by a projection that is random until it is trained) or `"hybrid"` (both of
            the first two of one pass, with the options of both, see `HybridHead`).
        query_length: Longest query, in tokens.
        document_length: Longest document, in tokens.
        lora: Train this adapter instead of all weights.
        train_adapter: Train the backbone's own adapter on, instead of merging it.
        load_in_4bit: Hold the frozen linear layers below an adapter in 4 bits (QLoRA; needs bitsandbytes). Embeddings,
            norms and the LM head stay as they are. `lion_st.export` merges into the weights that the 4 bits stand for.
        dtype: Of the weights; `"auto"` is the backbone's own, bfloat16 of a GGUF file. An adapter's are always float32.
        scale: Sparse: factor on the logits, `hidden_size ** -0.25` by default.
        activation: Sparse: see `SpladeHead`.
        pooling: Dense: see `LlamaPooling`.
        normalize: Dense: bring each vector to length 1 (RepLLaMA).
        token_dimension: Multi-vector: width of a token's vector.
        max_active_dims: Sparse: largest number of terms a text keeps when encoded; see `SpladeHead`.
        query_max_active_dims: The same for queries.
        document_max_active_dims: The same for documents.
        query_prompt: Put in front of queries by `encode_query`, and saved.
        document_prompt: Put in front of documents by `encode_document`, and saved.
        add_bos: See `LionTransformer`.
        add_eos: Append the end-of-sequence token to each text (RepLLaMA).
        causal: Leave the attention causal (RepLLaMA, ablations): a token sees those before it alone.
        num_layers: Keep the backbone's first so many layers alone.
        layers: Keep these layers alone, such as `[0, 4, 8, 29]`.
        as_sparse_encoder: Return a `SparseEncoder` (sparse tensors) instead of a `SentenceTransformer`.
        device: Torch device; the best one there is by default.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
        revision: Hub revision of the backbone.
        token: Hub token.

    Returns:
        The model, ready for `encode_query`, `encode_document` and sentence-transformers' trainers: a
        `MultiVectorEncoder` if it is multi-vector, else a `SentenceTransformer` or a `SparseEncoder`.

    Raises:
        ValueError: If the backbone cannot become a retriever, the arguments do not fit each other, or one is given that
            the paradigm does not read.
        FileNotFoundError: If there is no such folder or file.

    References:
        Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025: https://arxiv.org/abs/2502.15526.

    Example:
        ::

            model = lion_st.build("meta-llama/Llama-3.2-1B", "sparse", lora=LoraConfig(r=16, lora_alpha=32))
            model.encode_query("what is a lion").shape  # (128256,)
    """
    _require_paradigm(paradigm, as_sparse_encoder)
    _require_read_options(paradigm, locals())
    backbone = source_name(backbone, "backbone")
    _require_device(device)
    _, is_gguf = gguf_options(backbone)
    hub: dict[str, Any] = {"token": token, "revision": revision}
    if not is_gguf and any(load_file_path(backbone, name, **hub) for name in ("modules.json", HYBRID_FILE)):
        raise ValueError(f"{backbone!r} is a saved retriever, not a backbone; open it with lion_st.load.")
    if load_in_4bit and lora is None and not train_adapter:
        raise ValueError(
            "load_in_4bit holds weights that do not train: give lora= or train_adapter=True, or leave it out."
        )
    transformer = LionTransformer(
        backbone,
        transformer_task="text-generation" if paradigm in ("sparse", "hybrid") else "feature-extraction",
        query_length=query_length,
        document_length=document_length,
        add_bos=add_bos,
        add_eos=add_eos,
        causal=causal,
        num_layers=num_layers,
        layers=layers,
        model_kwargs={
            "dtype": dtype,
            "token": token,
            "revision": revision,
            "is_trainable": train_adapter,
            "load_in_4bit": load_in_4bit,
        }
        | ({"attn_implementation": attn_implementation} if attn_implementation else {}),
        processor_kwargs={"token": token, "revision": revision},
        config_kwargs={"token": token, "revision": revision},
    )
    _resolve_adapter(transformer, backbone, lora, train_adapter, revision)
    of_terms: dict[str, Any] = {
        "scale": scale,
        "max_active_dims": max_active_dims,
        "query_max_active_dims": query_max_active_dims,
        "document_max_active_dims": document_max_active_dims,
        "activation": activation,
    }
    width = transformer.get_embedding_dimension()
    head: Module
    if paradigm == "sparse":
        head = SpladeHead(**of_terms)
    elif paradigm == "hybrid":
        head = HybridHead(width, pooling, normalize, **of_terms)
    elif paradigm == "dense":
        head = LlamaPooling(width, pooling, normalize)
    else:
        head = MultiVectorHead(width, token_dimension)
    prompts = {"query": query_prompt or "", "document": document_prompt or ""}
    model_class, similarity = _model_class(paradigm, as_sparse_encoder)
    model = model_class(modules=[transformer, head], prompts=prompts, similarity_fn_name=similarity, device=device)
    note_hub_commit(getattr(transformer.model, "config", None), backbone, revision)
    if not Path(backbone).exists():
        model.model_card_data.base_model = backbone
        model.model_card_data.base_model_revision = revision
    warn_of_slow_weights(transformer.model)
    return model


@overload
def load(
    path_or_repo: str | Path, *, paradigm: Literal["multi_vector"], **options: Unpack[LoadOptions]
) -> LionMultiVectorEncoder: ...


@overload
def load(
    path_or_repo: str | Path,
    *,
    paradigm: SingleVector | Literal["hybrid"] | None = ...,
    as_sparse_encoder: Literal[False] = ...,
    **options: Unpack[LoadOptions],
) -> LionSentenceTransformer: ...


@overload
def load(
    path_or_repo: str | Path,
    *,
    paradigm: SingleVector | None = ...,
    as_sparse_encoder: Literal[True],
    **options: Unpack[LoadOptions],
) -> LionSparseEncoder: ...


@overload
def load(
    path_or_repo: str | Path,
    *,
    paradigm: Paradigm | None = ...,
    as_sparse_encoder: bool = ...,
    **options: Unpack[LoadOptions],
) -> LionSentenceTransformer | LionSparseEncoder | LionMultiVectorEncoder: ...


def load(
    path_or_repo: str | Path,
    *,
    paradigm: Paradigm | None = None,
    as_sparse_encoder: bool = False,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    base: str | Path | None = None,
    merge_adapter: bool = False,
    is_trainable: bool = False,
    load_in_4bit: bool = False,
    revision: str | None = None,
    token: bool | str | None = None,
    local_files_only: bool = False,
) -> LionSentenceTransformer | LionSparseEncoder | LionMultiVectorEncoder:
    """Load a Lion checkpoint with the fast modules, whoever wrote it.

    That is an exported (stock) checkpoint of any model type, the two that a hybrid model is exported or published to,
    a folder written in training with or without an adapter, or a bare PEFT adapter.

    Args:
        path_or_repo: Folder or Hub repository.
        paradigm: Needed for a bare adapter alone, which does not say whether it is `"sparse"` or `"dense"`. Any other
            checkpoint is compared with it.
        as_sparse_encoder: Return a `SparseEncoder` (sparse tensors) instead of a `SentenceTransformer`.
        device: Torch device; the best one there is by default.
        dtype: Of the weights; `"auto"` is that of the checkpoint or of an adapter's base.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
        base: Where an adapter's base model is now, if not where the adapter says.
        merge_adapter: Merge an adapter into the weights: faster to encode with, no longer to be trained.
        is_trainable: Let an adapter's weights train on.
        load_in_4bit: Hold the linear layers in 4 bits, see `build`.
        revision: Hub revision of the checkpoint.
        token: Hub token.
        local_files_only: Do not reach for the network.

    Returns:
        The model with its tokenizer contract, prompts and lengths as saved; a `MultiVectorEncoder` of a multi-vector
        checkpoint, which type checkers know with `paradigm="multi_vector"`.

    Raises:
        ValueError: If this is not a Lion checkpoint, or its weights do not match its configuration.
        FileNotFoundError: If the checkpoint or an adapter's base cannot be reached.

    Example:
        ::

            model = lion_st.load("runs/quickstart/lion-sp", as_sparse_encoder=True)
            model.encode_document(["A lion is a large cat."])  # sparse [1, V]
    """
    source = source_name(path_or_repo, "path_or_repo")
    _require_device(device)
    if load_in_4bit and merge_adapter:
        raise ValueError("load_in_4bit would round what merge_adapter merges to 4 bits: leave one of them out.")
    options: dict[str, Any] = {"is_trainable": is_trainable, "load_in_4bit": load_in_4bit}
    if dtype != "auto":
        options["dtype"] = dtype
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if base is not None:
        options["base"] = str(base)
    hub: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    require_json(source, hub)
    whole, pair = source, exported_pair(source, hub)
    if pair is not None:
        source = pair[0]
    if load_file_path(source, "modules.json", **hub) is None and find_adapter_config_file(source, **hub) is not None:
        if paradigm is None:
            raise ValueError(
                f"{source!r} is a bare adapter, which does not say what it was trained for; pass "
                'paradigm="sparse" or paradigm="dense".'
            )
        model = _load_bare_adapter(source, paradigm, as_sparse_encoder, options, hub, device)
    else:
        model_class, similarity = _model_class(saved_model_type(source, hub), as_sparse_encoder)
        model = model_class(source, device=device, model_kwargs=options, similarity_fn_name=similarity, **hub)
        if pair is not None:
            modules = [model[0], _exported_head(whole, pair[1])]
            model = model_class(modules=modules, device=device, similarity_fn_name=similarity, prompts=model.prompts)
            model[0].model.name_or_path = whole
        if paradigm not in (None, paradigm_of(model)):
            raise ValueError(f"{whole!r} is a {paradigm_of(model)} model, not {paradigm}.")
    _require_paradigm(paradigm_of(model), as_sparse_encoder)
    note_hub_commit(getattr(model[0].model, "config", None), whole, revision)
    if merge_adapter and has_adapter(model[0].model):
        adapters.merge_adapter(model[0].model, model[0].awaits_weights)
    warn_of_slow_weights(model[0].model)
    return model


def paradigm_of(model: BaseModel) -> Paradigm:
    """Whether a model's vectors are sparse (one weight per vocabulary term), dense, both, or several of each text.

    Args:
        model: Any `SentenceTransformer`, `SparseEncoder` or `MultiVectorEncoder`, with stock or Lion modules.

    Raises:
        TypeError: If it is not a model, but a path for example.
    """
    if not isinstance(model, BaseModel):
        raise TypeError(f"Pass a model, not {model!r}: lion_st.load(path) makes one of a checkpoint.")
    if isinstance(model, MultiVectorEncoder):
        return "multi_vector"
    modules = list(model)
    if any(isinstance(module, HybridHead) for module in modules):
        return "hybrid"
    if any(isinstance(module, LlamaPooling) for module in modules):
        return "dense"
    sparse = isinstance(model, SparseEncoder) or any(isinstance(m, SpladeHead | SpladePooling) for m in modules)
    return "sparse" if sparse else "dense"


def _require_paradigm(paradigm: str, as_sparse_encoder: bool) -> None:
    if paradigm not in get_args(Paradigm):
        raise ValueError(f"paradigm must be one of {get_args(Paradigm)}, got {paradigm!r}.")
    if as_sparse_encoder and paradigm != "sparse":
        raise ValueError(f"as_sparse_encoder=True needs a sparse model, this one is {paradigm}; leave it out.")


def _require_read_options(paradigm: str, given: Mapping[str, Any]) -> None:
    """Raise if an option of `build` was given that models of a paradigm do not have."""
    defaults = inspect.signature(build).parameters
    for name, paradigms in READ_BY.items():
        if paradigm not in paradigms and given[name] != defaults[name].default:
            raise ValueError(
                f"{name}={given[name]!r} changes nothing of a {paradigm} model, it is for {' and '.join(paradigms)} "
                "ones: leave it out."
            )


def _resolve_adapter(
    transformer: LionTransformer, backbone: str, lora: LoraConfig | None, train_adapter: bool, revision: str | None
) -> None:
    """Merge the adapter that a backbone comes with, unless that is what trains, and attach a new one."""
    if train_adapter and (lora is not None or not has_adapter(transformer.model)):
        problem = "lora= is another adapter" if lora is not None else f"{backbone!r} has no adapter"
        raise ValueError(f"train_adapter=True trains the backbone's own adapter on, but {problem}: leave one out.")
    if has_adapter(transformer.model) and not train_adapter:
        if lora is not None:
            raise ValueError(
                f"{backbone!r} is an adapter, and a new adapter cannot name its merged weights as its base. Save them "
                "first: lion_st.hub.merge_backbone(adapter, folder), then build on the folder."
            )
        adapters.merge_adapter(transformer.model, transformer.awaits_weights)
        transformer.model.requires_grad_(True)
    if lora is not None:
        adapters.attach_adapter(transformer.model, lora, revision=revision)


def _model_class(kind: str | None, as_sparse_encoder: bool) -> tuple[type[Any], str]:
    """The class of a model of a paradigm or of a saved model type, and how its vectors are compared."""
    if kind in ("multi_vector", LionMultiVectorEncoder.model_type):
        return LionMultiVectorEncoder, "maxsim"
    return LionSparseEncoder if as_sparse_encoder else LionSentenceTransformer, "dot"


def _require_device(device: str | torch.device | None) -> None:
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r}, but torch {torch.__version__} finds no CUDA GPU here. Leave device out for the "
            'best one there is, pass "cpu", or install a torch that is built for your GPU.'
        )


def _exported_head(source: str, settings: dict[str, Any]) -> HybridHead:
    try:
        return HybridHead(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source!r} has a {HYBRID_FILE} that this version cannot read ({error}): export the model again."
        ) from None


def _load_bare_adapter(
    source: str,
    paradigm: Paradigm,
    as_sparse_encoder: bool,
    options: dict[str, Any],
    hub: dict[str, Any],
    device: str | None,
) -> Any:
    _require_paradigm(paradigm, as_sparse_encoder)
    if paradigm not in get_args(SingleVector):
        lacks = "projection of a multi-vector" if paradigm == "multi_vector" else "head of a hybrid"
        raise ValueError(
            f"{source!r} is a bare adapter, without the {lacks} model: load the folder that model.save_pretrained or "
            "training wrote, or build a new one on the adapter with lion_st.build."
        )
    transformer = LionTransformer(
        source,
        transformer_task="text-generation" if paradigm == "sparse" else "feature-extraction",
        model_kwargs=options | hub,
        config_kwargs=dict(hub),
        processor_kwargs=dict(hub),
    )
    head = SpladeHead() if paradigm == "sparse" else LlamaPooling(transformer.get_embedding_dimension())
    model_class, similarity = _model_class(paradigm, as_sparse_encoder)
    return model_class(modules=[transformer, head], similarity_fn_name=similarity, device=device)
