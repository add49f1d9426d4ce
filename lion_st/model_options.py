"""The options of `lion_st.build` and `lion_st.load`: for type checkers, and which paradigm reads which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

import torch

from lion_st.data.fields import Paradigm
from lion_st.modules.llama_pooling import PoolingName
from lion_st.modules.splade_head import Activation

if TYPE_CHECKING:
    from peft import LoraConfig

SingleVector: TypeAlias = Literal["sparse", "dense"]
# Options of `build` that some paradigms alone read.
READ_BY: dict[str, tuple[Paradigm, ...]] = {
    **dict.fromkeys(
        ("scale", "activation", "max_active_dims", "query_max_active_dims", "document_max_active_dims"),
        ("sparse", "hybrid"),
    ),
    **dict.fromkeys(("pooling", "normalize"), ("dense", "hybrid")),
    "token_dimension": ("multi_vector",),
}


class BuildOptions(TypedDict, total=False):
    """The options of `build` that decide nothing about its type."""

    query_length: int | None
    document_length: int | None
    lora: LoraConfig | None
    train_adapter: bool
    load_in_4bit: bool
    dtype: str | torch.dtype
    scale: float | None
    activation: Activation
    pooling: PoolingName
    normalize: bool
    token_dimension: int
    max_active_dims: int | None
    query_max_active_dims: int | None
    document_max_active_dims: int | None
    query_prompt: str | None
    document_prompt: str | None
    add_bos: bool | None
    add_eos: bool
    causal: bool
    num_layers: int | None
    layers: Sequence[int] | None
    device: str | None
    attn_implementation: str | None
    revision: str | None
    token: bool | str | None


class LoadOptions(TypedDict, total=False):
    """The options of `load` that decide nothing about its type."""

    device: str | None
    dtype: str | torch.dtype
    attn_implementation: str | None
    base: str | Path | None
    merge_adapter: bool
    is_trainable: bool
    load_in_4bit: bool
    revision: str | None
    token: bool | str | None
    local_files_only: bool
