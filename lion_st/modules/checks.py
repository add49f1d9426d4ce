"""Whether a backbone can become a retriever: by its configuration, by its files, and by running tiny inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import cached_file

from lion_st.files import hub_options, read_json
from lion_st.modules import unpadding
from lion_st.modules.adapters import raise_on_wrong_weights
from lion_st.modules.backbones import decoder_of
from lion_st.modules.lm_head import LMHead


def require_decoder_only(config: PretrainedConfig, name: str) -> None:
    """Raise unless a configuration is that of a decoder-only causal LM."""
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "not a decoder-only"
    else:
        return
    raise ValueError(
        f"{name!r} is {kind} model (model_type {config.model_type!r}). Lion retrievers are made of decoder-only causal "
        "language models, such as Llama, Qwen3, Mistral or Gemma; train an encoder with SparseEncoder or "
        "SentenceTransformer."
    )


def saved_names(source: str, options: dict[str, Any]) -> list[str]:
    """The names of the weights in safetensors files, none if there are no such files."""

    def found(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_options(options))

    if options.get("gguf_file"):
        return []
    if index := found("model.safetensors.index.json"):
        return list(read_json(index)["weight_map"])
    if file := found("model.safetensors"):
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    return []


def require_layers(config: PretrainedConfig, source: str, saved: list[str]) -> None:
    """Raise if a configuration asks for more layers than were saved, before a single one is built.

    Raises:
        ValueError: With both numbers.
    """
    numbers = [int(match[2]) for name in saved if (match := re.search(r"(^|\.)(?:layers|h)\.(\d+)\.", name))]
    wanted = getattr(config.get_text_config(), "num_hidden_layers", None)
    there = max(numbers, default=-1) + 1
    if wanted is not None and wanted > there > 0:
        raise_on_wrong_weights(source, [f"model.layers.{there} of {wanted:,} layers, where {there} were saved"], [], [])


@torch.no_grad()
def require_attention(model: PreTrainedModel, causal: bool = False) -> None:
    """Run tiny inputs and compare states of the first token, and of the last.

    Args:
        model: The model of transformers.
        causal: Whether it is meant to be causal.

    Raises:
        ValueError: If it does not attend as it is meant to, to no other token, or depends on padding; if its states are
            not finite.
    """
    decoder = decoder_of(model)
    first = probe_ids(model)
    other_end, other_start = first.clone(), first.clone()
    other_end[-1], other_start[0] = first[0], first[-1]
    ids = torch.stack([first, first, other_end, other_start])
    with evaluating(model):
        outputs = decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        if not outputs.isfinite().all():
            raise ValueError(
                f"{type(model).__name__} computes NaN or infinity in {model.dtype}: its weights are damaged, or too "
                "large for that dtype. Load it in float32 or bfloat16, or its files anew."
            )
        states, ends = outputs[:, 0], outputs[:, -1]
        noise = (states[1] - states[0]).abs().max()
        sees_end = (states[2] - states[0]).abs().max() > 10 * noise
        if causal and sees_end:
            raise ValueError(f"{type(model).__name__} is not causal: the first token sees the last one.")
        if not causal and not sees_end:
            if not (ends[3] - ends[0]).abs().max() > 10 * noise:  # where a causal model sees the other start
                raise ValueError(
                    f"{type(model).__name__} passes nothing from one token to another: its attention writes zeros. "
                    "Look at the weights of its output projections (such as layers.0.self_attn.o_proj); start "
                    "new layers with small random ones."
                )
            raise ValueError(
                f"{type(model).__name__} stays causal with is_causal=False: the first token does not see the last one. "
                "Use an architecture whose attention transformers can make bidirectional, such as Llama, Qwen3, "
                "Mistral or Gemma."
            )
        pads = torch.zeros_like(first)
        padded = decoder(
            input_ids=torch.cat([pads, first])[None],
            attention_mask=torch.cat([torch.zeros_like(pads), torch.ones_like(first)])[None],
            use_cache=False,
        ).last_hidden_state[0, len(pads)]
    drift = relative_difference(padded, states[0])
    if not drift < tolerance(padded):
        raise ValueError(
            f"{type(model).__name__} gives another vector when a text is padded on the left (relative difference "
            f"{drift:.2g}). Use an architecture with rotary or relative positions."
        )


@torch.no_grad()
def require_known_logits(model: PreTrainedModel, head: LMHead) -> None:
    """Compare a model's own logits with those that its states and LM head give."""
    ids = probe_ids(model)[None]
    with evaluating(model):
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits
    logits = (hidden.to(head.weight.dtype) @ head.weight.T).float() * head.multiplier
    if head.bias is not None:
        logits = logits + head.bias.float()
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    error = relative_difference(logits, expected)
    if not error < tolerance(head.weight):
        raise ValueError(
            f"{type(model).__name__} makes its logits in a way the sparse head does not know (relative difference "
            f"{error:.2g})."
        )


@torch.no_grad()
def packed_states_are_equal(transformer: Any) -> bool:
    """Whether a `LionTransformer` on `"sdpa"` gives the states of padded texts for packed ones too.

    Args:
        transformer: Left as it is, on `"sdpa"` and computing its padding.
    """
    model = transformer.model
    probe = probe_ids(model)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=probe.device)
    features = {"input_ids": torch.stack([probe, probe]), "attention_mask": mask}
    with evaluating(model):
        padded = transformer(dict(features))["token_embeddings"][mask.bool()]
        model.set_attn_implementation(unpadding.NAME)
        transformer.runs_packed = True
        try:
            packed = transformer(dict(features))["token_embeddings"][mask.bool()]
        finally:
            model.set_attn_implementation("sdpa")
            transformer.runs_packed = False
    return relative_difference(packed, padded) < tolerance(padded)


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """Ids of four tokens [4], on the model's device."""
    return torch.arange(4, 8, device=model.device) % model.config.get_text_config().vocab_size


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def tolerance(states: torch.Tensor) -> float:
    """Largest relative difference that rounding explains."""
    return 1e-3 if states.dtype == torch.float32 else 0.1


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and then each module back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
