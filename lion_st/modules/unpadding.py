"""Attention over packed texts, so that a backbone never computes padding.

The attention function registered here with transformers does what `"sdpa"` does, and over a packed row of texts
(`cu_seq_lens_q` given) lets each token see its own text alone.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lion_st.hooks import attention_implementation, takes_attention_functions

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

logger = logging.getLogger(__name__)

NAME = "lion_varlen"


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' `AttentionInterface`.

    Args:
        module: The attention layer.
        query: [B, H, L, d], or [1, H, T, d] packed.
        key: [B, G, L, d], with G dividing H.
        value: [B, G, L, d].
        attention_mask: As for `"sdpa"`; None for packed texts.
        scaling: Factor on the scores.
        is_causal: Whether a token sees only those before it.
        cu_seq_lens_q: Where each packed text begins, and the end [B + 1], int32.
        max_length_q: The longest packed text.
        **kwargs: As for `"sdpa"`.

    Returns:
        The attended values [B, L, H, d], and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    causal = bool(module.is_causal if is_causal is None else is_causal)
    if query.is_cuda:
        assert max_length_q is not None
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        attended = call_varlen_attn(varlen_attn, query, key, value, cu_seq_lens_q, max_length_q, causal, scaling)
        return attended[None], None
    attend = _as_one_operation if torch.compiler.is_compiling() else attend_text_by_text
    return attend(query, key, value, cu_seq_lens_q, causal, scaling), None


def attend_text_by_text(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    causal: bool = False,
    scaling: float | None = None,
) -> torch.Tensor:
    """Packed attention on any device: torch's own over one text after the other.

    Args:
        query: [1, H, T, d].
        key: [1, G, T, d], with G dividing H.
        value: [1, G, T, d].
        bounds: Where each text begins, and the end [B + 1].
        causal: Whether a token sees only those before it.
        scaling: Factor on the scores, `d ** -0.5` if None.

    Returns:
        [1, T, H, d].
    """
    lengths = bounds.diff().tolist()
    texts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    each = [
        scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True) for q, k, v in texts
    ]
    return torch.cat(each, dim=2).transpose(1, 2).contiguous()


# For a compiled graph, where how many texts there are is not known.
_as_one_operation = torch.library.custom_op("lion_st::attend_text_by_text", attend_text_by_text, mutates_args=())


@_as_one_operation.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)


@torch.library.custom_op("lion_st::attend_text_by_text_backward", mutates_args=())
def _gradients_as_one_operation(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    causal: bool,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend_text_by_text` by its inputs, for which an operation has no autograd within it."""
    lengths, groups = bounds.diff().tolist(), key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = (gradient.transpose(1, 2), query, key, value)
    # The heads of a group side by side: [1, G, H / G, L, d], and keys and values with one for all of them.
    split = [states.float().unflatten(1, (groups, -1)).split(lengths, dim=3) for states in given]
    found: list[tuple[torch.Tensor, ...]] = []
    for g, q, k, v in zip(*split, strict=True):
        scores = scale * q @ k.mT
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        shares = scores.softmax(-1)
        of_shares = g @ v.mT
        of_scores = scale * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
        of_key, of_value = ((one.mT @ other).sum(2) for one, other in ((of_scores, q), (shares, g)))
        found.append(((of_scores @ k).flatten(1, 2), of_key, of_value))
    of_query, of_key, of_value = (torch.cat(parts, dim=2).contiguous() for parts in zip(*found, strict=True))
    return of_query.type_as(query), of_key.type_as(key), of_value.type_as(value)


@_gradients_as_one_operation.register_fake
def _(gradient: torch.Tensor, *states: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(one, memory_format=torch.contiguous_format) for one in states[:3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.causal, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients_as_one_operation(gradient, *ctx.saved_tensors, ctx.causal, ctx.scaling), None, None, None


_as_one_operation.register_autograd(_backward, setup_context=_save)


def call_varlen_attn(
    function: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Call torch's `varlen_attn`, whose options differ from release to release.

    Args:
        function: The function.
        query: [T, H, d].
        key: [T, G, d], with G dividing H.
        value: [T, G, d].
        bounds: Where each text begins, and the end [B + 1], int32.
        longest: The longest text.
        causal: Whether a token sees only those before it.
        scaling: Factor on the scores, `d ** -0.5` if None.

    Returns:
        [T, H, d].
    """
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):  # rotary embeddings leave autocast's dtype
        query, key, value = (states.to(torch.get_autocast_dtype("cuda")) for states in (query, key, value))
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    elif key.shape[1] != query.shape[1]:
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
    if "scale" in parameters:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if "window_size" in parameters:
        options["window_size"] = (-1, 0 if causal else -1)
    else:
        options["is_causal"] = causal
    return function(query, key, value, bounds, bounds, longest, longest, **options)


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model loaded with `"sdpa"` attention cannot run packed texts, None if it can."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or []
    if attention_implementation(model) != "sdpa":
        return f"its attention is {attention_implementation(model)!r}, not 'sdpa'"
    if not takes_attention_functions(model):
        return f"{type(model).__name__} does not take attention functions"
    if getattr(config, "sliding_window", None) is not None or set(layers) - {"full_attention"}:
        return "some of its layers do not attend to whole texts"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    return why_not_here(model)


def why_not_here(model: PreTrainedModel) -> str | None:
    """Why a model cannot run packed texts on the device and in the dtype it has now, None if it can."""
    if model.device.type == "cpu":
        return None
    if model.device.type != "cuda":
        return f"there is no variable-length attention for {model.device.type!r}"
    if varlen_attn is None:
        return f"torch {torch.__version__} has no variable-length attention"
    dtype = model.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    if dtype not in (torch.bfloat16, torch.float16):
        return f"variable-length attention needs half precision, not {dtype}"
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return varlen_failure(varlen_attn, model.device, dtype, heads, groups, width)


@torch.compiler.disable
@functools.cache
def varlen_failure(
    function: Any, device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> str | None:
    """Why variable-length attention does not work for heads of a shape, found by running it once; None if it does.

    A failure is logged once as a warning: models go on with padding, which costs time and memory.

    Args:
        function: torch's `varlen_attn`.
        device: Where.
        dtype: Of queries, keys and values.
        heads: Heads H of the queries.
        groups: Heads G of keys and values.
        width: Dimensions d of a head.
    """
    generator = torch.Generator().manual_seed(0)
    failure = None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            query, key, value = (
                torch.randn(5, count, width, generator=generator).to(device, dtype).requires_grad_()
                for count in (heads, groups, groups)
            )
            bounds = torch.tensor([0, 3, 5], dtype=torch.int32, device=device)
            found = call_varlen_attn(function, query, key, value, bounds, 3, causal=False, scaling=None)
            by_head = [states.transpose(0, 1)[None] for states in (query, key, value)]
            expected = attend_text_by_text(by_head[0], by_head[1], by_head[2], bounds)
            difference = (found.float() - expected[0].float()).abs().max().item()
            if not difference < 0.05:
                failure = f"it differs from torch's own attention by {difference:.2g}"
            torch.autograd.grad(found.float().sum(), (query, key, value))
    except (RuntimeError, TypeError, ValueError) as error:
        failure = failure or str(error).strip().splitlines()[0]
    if failure is None:
        return None
    failure = f"variable-length attention of torch {torch.__version__} fails here ({failure})"
    logger.warning("Padding is computed as well, which costs time and memory: %s.", failure)
    return failure


def packed(features: dict[str, Any]) -> dict[str, Any]:
    """Padded features as sentence-transformers makes them without padding: one row of texts, and where each begins.

    Args:
        features: `"input_ids"` and `"attention_mask"` [B, L], padding on any side.

    Returns:
        A new dictionary with `"input_ids"`, `"position_ids"` and `"seq_idx"` [1, T], `"cu_seq_lens_q"` and
        `"cu_seq_lens_k"` [B + 1], `"max_length_q"` and `"max_length_k"`, without the mask.
    """
    real = features["attention_mask"].bool()
    others = {name: value for name, value in features.items() if name != "attention_mask"}
    return others | packed_texts(features["input_ids"][real], real.sum(1))


def packed_texts(input_ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    """What `packed` gives, of texts that were never padded.

    Args:
        input_ids: One text after the other [T].
        lengths: Tokens of each text [B].
    """
    bounds = pad(lengths.cumsum(0), (1, 0))
    texts = torch.arange(len(lengths), device=lengths.device)
    rows = texts.repeat_interleave(lengths, output_size=len(input_ids))
    longest = int(lengths.max())
    positions = torch.arange(len(input_ids), device=lengths.device) - bounds[rows]
    bounds = bounds.int()
    return {
        "input_ids": input_ids[None],
        "position_ids": positions[None],
        "seq_idx": rows[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def padded(states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Packed states [1, T, D] where the mask [B, L] has its real tokens, zero elsewhere: [B, L, D]."""
    rows = states.new_zeros(*attention_mask.shape, states.shape[-1])
    rows[attention_mask.bool()] = states[0]
    return rows


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
