"""What is settled of a tokenizer when a model is made: its side and token of padding, its beginning, its lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as PostProcessors
from transformers import PreTrainedModel

from lion_st.modules.tokenizing import special_ids


def configure_tokenizer(
    tokenizer: Any,
    model: PreTrainedModel,
    lengths: Sequence[int | None],
    add_bos: bool | Literal["saved"] | None,
    add_eos: bool = False,
) -> None:
    """Have a tokenizer pad on the left with a token that the model knows, begin and end texts as told, and cut them.

    Args:
        tokenizer: Of transformers, changed in place; None if the model has none.
        model: The model that reads its ids.
        lengths: Longest query and document, in tokens.
        add_bos: As for `LionTransformer`; `"saved"` leaves beginning, end and length as they are.
        add_eos: Append the end-of-sequence token.

    Raises:
        ValueError: If there is no tokenizer or no token to pad with, if it has more tokens than the model, if it
            leaves out the beginning-of-sequence token and `add_bos` does not say what to do, if it cannot begin or end
            texts as told, also once it is saved and loaded, or if a length is below 1.
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
    embeddings: Any = model.get_input_embeddings()
    rows = len(embeddings.weight)  # an adapter's has no num_embeddings
    if max(len(tokenizer) - 1, tokenizer.pad_token_id) >= rows:
        raise ValueError(
            f"The tokenizer of {name!r} has {len(tokenizer)} tokens, but the model has embeddings for {rows}. Use the "
            "tokenizer the model was trained with, or resize its embeddings."
        )
    if add_bos == "saved":
        return
    limits = [length for length in lengths if length is not None]
    if any(isinstance(length, float) or length < 1 for length in limits):
        raise ValueError(f"Lengths of queries and documents are whole numbers above 0 or None, got {list(lengths)}.")
    if limits:
        # Without a task a text is cut like the longer of the two, not at the backbone's 128k tokens.
        tokenizer.model_max_length = max(limits)
    before = tokenizer("a")["input_ids"]
    _configure_bos(tokenizer, model, add_bos)
    if add_eos:
        append_eos(tokenizer)
    if tokenizer("a")["input_ids"] != before:
        _require_kept(tokenizer)


def keep_lengths(tokenizer: Any, *lengths: int | None) -> None:
    """Have a tokenizer cut no text that is shorter than these lengths, which may have been changed since it was made.

    A stock model reads its own length there alone.
    """
    tokenizer.model_max_length = max([tokenizer.model_max_length, *filter(None, lengths)])


def _configure_bos(tokenizer: Any, model: PreTrainedModel, add_bos: bool | None) -> None:
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.config.bos_token_id
    # A "beginning" token that is really the padding or end token (Qwen, GPT-2) is never put in front.
    if bos is None or bos in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        return
    if add_bos is False:
        leave_out_bos(tokenizer)
        return
    if tokenizer("a")["input_ids"][0] == bos:
        return
    token = tokenizer.convert_ids_to_tokens(bos)
    if add_bos is None:
        raise ValueError(
            f"{model.name_or_path!r} has the beginning-of-sequence token {token!r} (id {bos}), but its tokenizer does "
            "not add it. Pass add_bos=True to add it to every text, or add_bos=False if the model was trained without "
            "it."
        )
    before, after = special_ids(tokenizer)
    _surround(tokenizer, [bos, *before], after)


def leave_out_bos(tokenizer: Any) -> None:
    """Have a tokenizer put no beginning-of-sequence token in front of texts, in place."""
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return
    if tokenizer.num_special_tokens_to_add() != 1:
        raise ValueError(
            f"{type(tokenizer).__name__} adds {tokenizer.num_special_tokens_to_add()} special tokens to a text, not "
            "the beginning-of-sequence token alone. Save a tokenizer without it, and name it as the base."
        )
    if getattr(tokenizer, "add_bos_token", False):
        tokenizer.add_bos_token = False
    _surround(tokenizer, [], [])


def append_eos(tokenizer: Any) -> None:
    """Have a tokenizer put the end-of-sequence token behind each text, also behind one that is cut, in place."""
    eos, token = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is None:
        raise ValueError("add_eos=True, but the tokenizer has no end-of-sequence token; set tokenizer.eos_token first.")
    before = tokenizer("a")["input_ids"]
    if before[-1] == eos:
        return
    if {"add_bos_token", "add_eos_token"} & tokenizer.init_kwargs.keys():
        tokenizer.add_eos_token = True  # such a tokenizer makes its post-processor of its flags whenever it is loaded
    else:
        in_front, behind = special_ids(tokenizer)
        _surround(tokenizer, in_front, [*behind, eos])
    if tokenizer("a")["input_ids"] != [*before, eos]:
        raise ValueError(
            f"{type(tokenizer).__name__} does not append {token!r} (id {eos}) when told to: 'a' becomes "
            f"{tokenizer('a')['input_ids']}, was {before}. Save a tokenizer that does beside the weights."
        )


def _require_kept(tokenizer: Any) -> None:
    """Raise unless a tokenizer begins and ends texts in the same way once it is saved and loaded."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        loaded = type(tokenizer).from_pretrained(folder)
    before, after = (one("a")["input_ids"] for one in (tokenizer, loaded))
    if before != after:
        raise ValueError(
            f"{type(tokenizer).__name__} makes its special tokens anew whenever it is loaded: 'a' is {before} as told, "
            f"and would be {after} in a checkpoint. Leave add_bos and add_eos out, or save a tokenizer of another "
            "class beside the weights."
        )


def _surround(tokenizer: Any, before: Sequence[int], after: Sequence[int]) -> None:
    """Have a tokenizer put these special tokens before and behind each text, and no others.

    Of the post-processors, `TemplateProcessing` adds tokens and only one of them may; `ByteLevel` moves offsets alone.
    """
    backend = tokenizer.backend_tokenizer
    names = {number: tokenizer.convert_ids_to_tokens(number) for number in (*before, *after)}
    parts = [" ".join(names[number] for number in numbers) for numbers in (before, after)]
    single = f"{parts[0]} $A {parts[1]}".strip()
    template = TemplateProcessing(
        single=single,
        pair=f"{single} {single.replace('$A', '$B:1')}",
        special_tokens=[(name, number) for number, name in names.items()],
    )
    earlier = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else {}
    byte_level = [one for one in earlier.get("processors", [earlier]) if one.get("type") == "ByteLevel"]
    kept = [ByteLevel(trim_offsets=one.get("trim_offsets", True)) for one in byte_level]
    backend.post_processor = PostProcessors([*kept, template])
