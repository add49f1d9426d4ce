"""The LM head of a backbone, read in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lion_st.hooks import has_adapter


@dataclass(frozen=True)
class LMHead:
    """What turns a hidden state h [D] into logits [V]: softcap(multiplier * h . weight + bias)."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V], the multiplier included
    multiplier: float
    softcap: float | None


def read_lm_head(model: PreTrainedModel) -> LMHead:
    """A causal LM's head, tied or untied."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no LM head, which a sparse model needs; load it with "
            'transformer_task="text-generation".'
        )
    config = model.config.get_text_config()
    if has_adapter(model):
        tied = getattr(config, "tie_word_embeddings", False)
        for module in (head, model.get_input_embeddings()) if tied else (head,):
            is_plain = isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
            if not is_plain or type(module).__module__.startswith("peft."):
                raise ValueError(
                    "An adapter on the LM head (or on embeddings tied to it) is not supported: the sparse head "
                    "reads those weights as they are. Leave lm_head and embed_tokens out of target_modules and "
                    "modules_to_save, or train all weights without an adapter."
                )
    multiplier = float(getattr(config, "logit_scale", None) or 1.0)
    multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
    bias = getattr(head, "bias", None)
    return LMHead(
        weight=head.weight,
        bias=bias if bias is None or multiplier == 1.0 else bias * multiplier,
        multiplier=multiplier,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
