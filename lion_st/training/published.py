"""Other people's recipes as data, each with its source and the number that its authors published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lion_st.errors import UsageError
from lion_st.training.recipes import BACKBONES, PAPER_PARADIGMS, RECIPES, RetrieverRecipe, get_recipe

LLAMA_LACONIC = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
QWEN = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b")
ALL = (*LLAMA_LACONIC, *QWEN, "smollm2-135m")


@dataclass(frozen=True)
class PublishedRecipe:
    """A recipe of a paper other than the one that this project is about.

    Attributes:
        source: Paper and address.
        published: What its authors report for the model it makes.
        backbones: That it is offered for; the first is the default.
        own_backbones: Those of them that the authors trained.
        assumed: Settings that the source was not found to state, and that are this project's.
        settings: Fields of `RetrieverRecipe`, the same for all backbones.
        lora_r: Rank of the adapter, for backbones of 8 B weights and for smaller ones; alpha is twice the rank.
        before: The recipe whose result it trains on, if it is a second phase.
    """

    source: str
    published: str
    backbones: tuple[str, ...]
    own_backbones: tuple[str, ...]
    assumed: tuple[str, ...]
    settings: Mapping[str, Any]
    lora_r: tuple[int, int]
    before: str | None = None


_LACONIC = "Xu et al., LACONIC: Dense-Level Effectiveness for Scalable Sparse Retrieval, 2026: arxiv.org/abs/2601.01684"
PUBLISHED: dict[str, PublishedRecipe] = {
    "laconic-pretrain": PublishedRecipe(
        f"{_LACONIC}, first phase: weakly supervised pre-finetuning",
        "none of the first phase alone",
        ALL,
        LLAMA_LACONIC,
        ("max_steps", "learning_rate", "lora_alpha", "lora_r of other sizes than 1B and 8B", "query_length",
         "document_length", "the Hub name of the data: give it with --train_data"),
        dict(paradigm="sparse", objective="cl", train_data="nomic-embed-pretrain-lite", batch_size=2048,
             max_steps=10_000, negatives=0, add_bos=False, scale=1.0, query_prompt="query: ",
             document_prompt="passage: ", query_length=256, document_length=256, query_regularizer_weight=5e-4,
             document_regularizer_weight=5e-4),
        lora_r=(16, 32),
    ),
    "laconic": PublishedRecipe(
        f"{_LACONIC}, second phase: finetuning on curated hard negatives",
        "60.2 nDCG@10 on MTEB's retrieval tasks with Llama-3.1-8B",
        ALL,
        LLAMA_LACONIC,
        ("max_steps (one pass)", "learning_rate", "lora_alpha", "lora_r of other sizes than 1B and 8B"),
        dict(paradigm="sparse", objective="cl", train_data="rlhn/rlhn-680K", batch_size=128, max_steps=5_300,
             negatives=15, query_length=256, document_length=256, query_regularizer_weight=1e-3,
             document_regularizer_weight=1e-3),
        lora_r=(16, 32),
        before="laconic-pretrain",
    ),
    "splade-llama": PublishedRecipe(
        "SPLADE on Llama-3.1-8B with distillation alone, the baseline of Formal et al., Learning Retrieval Models with "
        "Sparse Autoencoders, 2026: arxiv.org/abs/2603.13277",
        "see the paper's tables; this project has not copied a number from them",
        ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", *QWEN, "smollm2-135m"),
        ("llama-3.1-8b",),
        ("train_data and with it teacher_normalization and teacher_temperature", "max_steps", "learning_rate",
         "lora_alpha", "scale", "query_length", "document_length"),
        dict(paradigm="sparse", objective="kl", train_data="lightonai/ms-marco-en-bge", batch_size=128,
             max_steps=10_000, negatives=8, scale=1.0, temperature=10.0, teacher_normalization="minmax",
             teacher_temperature=0.05, query_regularizer_weight=1e-4, document_regularizer_weight=1e-4),
        lora_r=(64, 64),
    ),
    "repllama": PublishedRecipe(
        "Ma et al., Fine-Tuning LLaMA for Multi-Stage Text Retrieval, 2023: arxiv.org/abs/2310.08319",
        "41.2 MRR@10 on MS MARCO's development queries, 55.1 nDCG@10 on 13 sets of BEIR, with Llama-2-7B",
        ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", *QWEN, "smollm2-135m"),
        (),
        ("the backbones: theirs is Llama-2-7B", "lora_r", "lora_alpha", "document_length", "max_steps (one pass)"),
        # Negatives of BM25 and CoCondenser.
        dict(paradigm="dense", objective="cl", train_data="Tevatron/msmarco-passage-aug", batch_size=128,
             max_steps=3_900, negatives=15, causal=True, add_eos=True, pooling="last_token", normalize=True,
             temperature=0.01, query_prompt="query: ", document_prompt="passage: ", query_length=32,
             document_length=196),
        lora_r=(32, 32),
    ),
}  # fmt: skip


def own_backbones() -> list[str]:
    """Backbones that have recipes of the paper's settings."""
    return list(dict.fromkeys(backbone for backbone, _, _ in RECIPES))


def output_folder(name: str, backbone: str) -> str:
    """Where a recipe writes, and the next phase reads."""
    return f"runs/{name}-{backbone}"


def published_recipe(name: str, backbone: str | None = None) -> RetrieverRecipe:
    """A published recipe for a backbone.

    Args:
        name: In `PUBLISHED`.
        backbone: Name in `BACKBONES`; by default the recipe's first.

    Raises:
        UsageError: If there is no such recipe, or it is not offered for that backbone; what there is.

    Example:
        >>> published_recipe("repllama", "llama-3.2-1b").pooling
        'last_token'
    """
    if name not in PUBLISHED:
        raise UsageError(f"There is no published recipe {name!r}: choose from {', '.join(PUBLISHED)}.")
    found = PUBLISHED[name]
    backbone = backbone or found.backbones[0]
    if backbone not in found.backbones:
        raise UsageError(f"The recipe {name} is for {', '.join(found.backbones)}, not {backbone!r}.")
    is_large = backbone.endswith("8b")
    rank = found.lora_r[0 if is_large else 1]
    settings: dict[str, Any] = {
        "model": output_folder(found.before, backbone) if found.before else BACKBONES[backbone].model,
        "mini_batch_size": 8 if is_large else 32,
        "gradient_checkpointing": is_large,
        "lora_r": rank,
        "lora_alpha": 2 * rank,
    }
    if backbone == "smollm2-135m":
        settings["add_bos"] = False  # its tokenizer has a beginning-of-sequence token that it never saw
    return RetrieverRecipe(backbone=backbone, recipe=name, **(settings | dict(found.settings)))


def chosen_recipe(given: Mapping[str, Any]) -> RetrieverRecipe:
    """The recipe that options name: `recipe`, or `backbone`, `paradigm` and `objective`."""
    backbone, paradigm, objective = (given.get(name) or None for name in ("backbone", "paradigm", "objective"))
    if given.get("recipe"):
        found = published_recipe(str(given["recipe"]), backbone)
        for name, wanted in (("paradigm", paradigm), ("objective", objective)):
            if wanted not in (None, getattr(found, name)):
                raise UsageError(
                    f"The recipe {given['recipe']} is {getattr(found, name)}, not {wanted}: leave out --{name}."
                )
        return found
    own = own_backbones()
    if backbone is None:
        raise UsageError(
            f"Name the recipe's backbone with --backbone: {', '.join(own)}. Or a published recipe with --recipe: "
            f"{', '.join(PUBLISHED)}."
        )
    if backbone in BACKBONES and backbone not in own:
        raise UsageError(
            f"The backbone {backbone} is for --recipe {', '.join(PUBLISHED)}. To train it by the paper's settings, "
            f"take those of the nearest, such as --backbone llama-3.2-1b --model {BACKBONES[backbone].model}."
        )
    return get_recipe(backbone, paradigm or "sparse", objective or "cl_kd")


def describe_recipe(name: str, backbone: str | None = None) -> str:
    """One recipe in full, for people to read."""
    if name in PUBLISHED:
        recipe, about = published_recipe(name, backbone), PUBLISHED[name]
        trained = recipe.backbone in about.own_backbones
        lines = [
            f"{name} for {recipe.backbone}",
            f"source: {about.source}",
            f"published: {about.published}" + ("" if trained else f"; the authors did not train {recipe.backbone}"),
            f"settings of this project, not found in the source: {'; '.join(about.assumed)}",
            f"other backbones: {', '.join(one for one in about.backbones if one != recipe.backbone)}",
        ]
        names = [step for step in (about.before, name) if step is not None]
        lines += [f"lion-st train --recipe {step} --backbone {recipe.backbone}" for step in names]
    else:
        known = {"-".join(key): key for key in RECIPES}
        if name not in known:
            raise UsageError(
                f"There is no recipe {name!r}. Choose from {', '.join(PUBLISHED)}, or BACKBONE-PARADIGM-OBJECTIVE of "
                "`lion-st recipes`, such as llama-3.2-1b-sparse-cl_kd."
            )
        recipe = RECIPES[known[name]]
        backbone_name, paradigm, objective = known[name]
        kinds = {"backbone": backbone_name.startswith("llama"), "paradigm": paradigm in PAPER_PARADIGMS}
        others = " and ".join(f"a {kind}" for kind, is_papers in kinds.items() if not is_papers)
        lines = [
            name,
            "source: Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025: "
            "arxiv.org/abs/2502.15526" + (f", for {others} that the paper does not have" if others else ""),
            f"lion-st train --backbone {backbone_name} --paradigm {paradigm} --objective {objective}",
        ]
    settings = {key: value for key, value in recipe.defaults().items() if value is not None}
    width = max(map(len, settings))
    return "\n".join([*lines, "", *(f"{key:<{width}}  {value}" for key, value in settings.items())])
