"""The model that a fine-tuning starts from: made of a backbone, or a retriever that is trained on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.model import BaseModel
from transformers.utils.peft_utils import find_adapter_config_file

from lion_st.checkpoints import is_exported_pair, is_router
from lion_st.encoding.loading import limit_terms
from lion_st.exporting import export, merge_backbone
from lion_st.hooks import has_adapter
from lion_st.models import build, load
from lion_st.modules import SpladeHead
from lion_st.modules.adapters import attach_adapter, merge_adapter
from lion_st.modules.folding import scaled_norm
from lion_st.modules.multi_vector_head import TOKEN_DIMENSION
from lion_st.training.contract import FIXED, is_retriever, transformer_folder
from lion_st.training.options.released_code import released_mntp_folder
from lion_st.training.progress.checkpoints import decided_by_first_rank
from lion_st.training.published import PUBLISHED, output_folder
from lion_st.training.recipes import BACKBONES, mntp_folder

if TYPE_CHECKING:
    from lion_st.training.options.arguments import RetrieverArguments

START = "start"  # in a run's folder: the merged model that its new adapter is on


def build_model(
    arguments: RetrieverArguments, device: str | torch.device | None = None, folder: str | Path | None = None
) -> BaseModel:
    """The model to train: an adapter in float32 on a model in its own dtype, or all weights in float32.

    `--model` may be a backbone or an adapter of one, which becomes a retriever as the options say, or a retriever: a
    stock checkpoint, an import, a folder written in training. That keeps what it is, and its lengths and prompts where
    no others are given. An adapter that it has is merged, or trained on with `train_adapter`.

    Args:
        arguments: Of the run.
        device: Torch device; the best one there is by default.
        folder: The run's folder. A new adapter needs a base on the disk: where that is a model merged with its earlier
            adapter, it is written to `folder/start`, once.

    Raises:
        FileNotFoundError: If the model is not there; after which stage it will be, if a recipe's own.
        ValueError: If options do not fit the model, or a merged model is needed and there is no folder for it.
    """
    _require_adapted(arguments)
    new_adapter = arguments.use_peft and not arguments.train_adapter
    if is_exported_pair(arguments.model):
        raise ValueError(
            f"{arguments.model!r} holds two stock checkpoints of a hybrid model: train on the folder of its run, "
            "or on what `lion-st export --with-limits` writes of it."
        )
    if is_retriever(arguments.model):
        return _train_on(arguments, device, folder)
    source = arguments.model
    if new_adapter and Path(source).suffix != ".gguf" and find_adapter_config_file(source) is not None:
        source = _merged(partial(merge_backbone, source), arguments.model, folder)
    return build(
        source,
        arguments.paradigm,
        query_length=arguments.query_length,
        document_length=arguments.document_length,
        lora=arguments.lora_config() if new_adapter else None,
        train_adapter=arguments.train_adapter,
        load_in_4bit=arguments.load_in_4bit,
        dtype=_dtype(arguments),
        scale=arguments.scale,
        activation=arguments.activation or "log1p",
        pooling=arguments.pooling or "mean_normalized",
        normalize=bool(arguments.normalize),
        query_max_active_dims=arguments.query_max_active_dims,
        document_max_active_dims=arguments.document_max_active_dims,
        token_dimension=arguments.token_dimension or TOKEN_DIMENSION,
        query_prompt=arguments.query_prompt,
        document_prompt=arguments.document_prompt,
        add_bos=arguments.add_bos,
        add_eos=bool(arguments.add_eos),
        causal=bool(arguments.causal),
        num_layers=arguments.num_layers,
        layers=arguments.layers,
        as_sparse_encoder=arguments.paradigm == "sparse",
        attn_implementation=arguments.attn_implementation,
        device=None if device is None else str(device),
    )


def _dtype(arguments: RetrieverArguments) -> str | torch.dtype:
    # Optimizer steps are smaller than bfloat16's rounding of the weights.
    return "auto" if arguments.use_peft else torch.float32


def _require_adapted(arguments: RetrieverArguments) -> None:
    own = {mntp_folder(arguments.backbone): "", released_mntp_folder(arguments.backbone): " --preset released"}
    if arguments.model in own and not Path(arguments.model).is_dir():
        base = BACKBONES[arguments.backbone].model
        raise FileNotFoundError(
            f"There is no adapted backbone in {arguments.model!r}. Make it with `lion-st adapt --backbone "
            f"{arguments.backbone}{own[arguments.model]}`, or fine-tune the unadapted model with --model {base}."
        )

    before = PUBLISHED[arguments.recipe].before if arguments.recipe else None
    if before and arguments.model == output_folder(before, arguments.backbone) and not Path(arguments.model).is_dir():
        raise FileNotFoundError(
            f"The recipe {arguments.recipe} trains on what {before} writes, and {arguments.model!r} is not there: run "
            f"`lion-st train --recipe {before} --backbone {arguments.backbone}` first, or name another --model."
        )


def _train_on(arguments: RetrieverArguments, device: str | torch.device | None, folder: str | Path | None) -> BaseModel:
    """A retriever to train on."""
    given = [f"--{name}" for name in FIXED if getattr(arguments, name) is not None]
    if given:
        raise ValueError(
            f"{arguments.model!r} is a retriever, whose own settings stay as it was trained: leave out "
            f"{', '.join(given)}, or make another retriever of its backbone."
        )
    source = arguments.model
    if is_router(source):
        raise ValueError(
            f"{source!r} is a Router, whose document encoder is not taken out of it: train on a checkpoint of its run, "
            f"such as {source}/checkpoint-1000, with the same --query_encoder, or on the model that it was made of."
        )
    model = _load(source, arguments, device, arguments.load_in_4bit)
    if arguments.train_adapter and not has_adapter(model[0].model):
        raise ValueError(
            f"--train_adapter trains the model's own adapter on, but {source!r} has none: leave it out for a new one."
        )
    if has_adapter(model[0].model) and not arguments.train_adapter:
        if arguments.use_peft:
            if arguments.load_in_4bit:
                model = _load(source, arguments, device)  # what is merged is not rounded
            source = _merged(partial(export, model, create_model_card=False, with_limits=True), source, folder)
            model = _load(source, arguments, device, arguments.load_in_4bit)
        else:
            merge_adapter(model[0].model, model[0].awaits_weights)
            model[0].model.requires_grad_(True)
    if arguments.use_peft and not arguments.train_adapter:
        _attach(model, source, arguments)
    transformer: Any = model[0]
    transformer.query_length, transformer.document_length = arguments.query_length, arguments.document_length
    transformer.tokenizer.model_max_length = max(arguments.query_length, arguments.document_length)
    if arguments.query_max_active_dims or arguments.document_max_active_dims:
        limit_terms(model, source, arguments.query_max_active_dims, arguments.document_max_active_dims)
    model.prompts |= {"query": arguments.query_prompt or "", "document": arguments.document_prompt or ""}
    if not Path(arguments.model).exists():
        model.model_card_data.base_model = arguments.model
    return model


def _load(
    source: str, arguments: RetrieverArguments, device: str | torch.device | None, load_in_4bit: bool = False
) -> Any:
    return load(
        source,
        paradigm=arguments.paradigm,
        as_sparse_encoder=arguments.paradigm == "sparse",
        is_trainable=True,
        load_in_4bit=load_in_4bit,
        dtype=_dtype(arguments),
        attn_implementation=arguments.attn_implementation,
        device=None if device is None else str(device),
    )


@torch.no_grad()
def _attach(model: BaseModel, source: str, arguments: RetrieverArguments) -> None:
    """Attach a new adapter to a retriever, whose base is then what lies on the disk: with the scale folded in."""
    transformer: Any = model[0]
    head = model[1]
    if isinstance(head, SpladeHead) and head.folds_scale and head.scale not in (None, 1.0):
        norm = transformer.final_norm
        for name, folded in scaled_norm(norm, head.scale or 1.0).items():
            norm.get_parameter(name).copy_(folded)
        head.scale = 1.0
    within = Path(source) / "0_Transformer"  # of the form for SparseEncoder
    if within.is_dir():
        transformer.model.name_or_path = str(within)
    elif not Path(source).exists() and transformer_folder(source):
        raise ValueError(
            f"{source!r} is the form for SparseEncoder, whose weights a new adapter cannot name as its base. Name the "
            "form for SentenceTransformer, the main revision of its repository."
        )
    attach_adapter(transformer.model, arguments.lora_config())


def _merged(write: Any, source: str, folder: str | Path | None) -> str:
    """Where the model merged with its adapter lies, written by the first process if it is not there."""
    if folder is None:
        raise ValueError(
            f"{source!r} is an adapter, and a new adapter needs the merged model as its base. Write it with "
            "lion_st.export or lion_st.hub.merge_backbone and start from that, or pass folder=."
        )
    target = Path(folder) / START

    def once() -> str:
        if not (target / "config.json").is_file():
            write(target)
        return str(target)

    return decided_by_first_rank(once)
