"""What is settled of a tokenizer when a model is made: its side and token of padding, its beginning, its lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tokenizers.processors import Sequence as PostProcessors
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel


def configure_tokenizer(
    tokenizer: Any,
    model: PreTrainedModel,
    lengths: Sequence[int | None],
    add_bos: bool | Literal["saved"] | None,
) -> None:
    """Have a tokenizer pad on the left with a token that the model knows, begin texts as told, and cut them.

    Args:
        tokenizer: Of transformers, changed in place; None if the model has none.
        model: The model that reads its ids.
        lengths: Longest query and document, in tokens.
        add_bos: As for `LionTransformer`; `"saved"` leaves beginning and length as they are.

    Raises:
        ValueError: If there is no tokenizer or no token to pad with, if it has more tokens than the model, or if it
            leaves out the beginning-of-sequence token and `add_bos` does not say what to do.
    """
    name = model.name_or_path
    if tokenizer is None:
        raise ValueError(f"{name!r} has no tokenizer; save one beside its weights.")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name!r} has neither a padding nor an end-of-sequence token; set "
                "tokenizer.pad_token and save it beside the weights."
            )
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    if max(len(tokenizer) - 1, tokenizer.pad_token_id) >= rows:
        raise ValueError(
            f"The tokenizer of {name!r} has {len(tokenizer)} tokens, but the model has embeddings for {rows}. Use the "
            "tokenizer the model was trained with, or resize its embeddings."
        )
    if add_bos == "saved":
        return
    limits = [length for length in lengths if length is not None]
    if limits:
        # Without a task a text is cut like the longer of the two, not at the backbone's 128k tokens.
        tokenizer.model_max_length = max(limits)
    _configure_bos(tokenizer, model, add_bos)


def _configure_bos(tokenizer: Any, model: PreTrainedModel, add_bos: bool | None) -> None:
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.config.bos_token_id
    # A "beginning" token that is really the padding or end token (Qwen, GPT-2) is never put in front.
    if bos is None or bos in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        return
    if tokenizer("a")["input_ids"][0] == bos or add_bos is False:
        return
    token = tokenizer.convert_ids_to_tokens(bos)
    if add_bos is None:
        raise ValueError(
            f"{model.name_or_path!r} has the beginning-of-sequence token {token!r} (id {bos}), but its tokenizer does "
            "not add it. Pass add_bos=True to add it to every text, or add_bos=False if the model was trained without "
            "it."
        )
    backend = tokenizer.backend_tokenizer
    put_in_front = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, bos)]
    )
    processors = [processor for processor in (backend.post_processor, put_in_front) if processor is not None]
    backend.post_processor = PostProcessors(processors)
