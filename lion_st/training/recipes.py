"""The paper's settings as data: three backbones, two paradigms, three objectives, and the MNTP stage before them.

Multi-vector models, which the paper does not have, are a third paradigm with the settings of dense ones; hybrid models
are a fourth, with those of sparse ones.

Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025: https://arxiv.org/abs/2502.15526,
section 4 (experimental setup). The backbones `mini` and `micro` are this project's own, small enough for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lion_st.data.fields import Paradigm
from lion_st.data.quickstart import QUICKSTART_REPOSITORY
from lion_st.errors import UsageError

Objective: TypeAlias = Literal["cl", "kd", "cl_kd", "kl", "margin_mse_kl", "listwise", "rank"]
PAPER_PARADIGMS: tuple[Paradigm, ...] = ("sparse", "dense")
PARADIGMS: tuple[Paradigm, ...] = (*PAPER_PARADIGMS, "multi_vector", "hybrid")
WITH_TERMS: tuple[Paradigm, ...] = ("sparse", "hybrid")  # with a weight for each term
OBJECTIVES: tuple[Objective, ...] = ("cl", "kd", "cl_kd")  # the paper's
# Others, with the settings of cl_kd: a query learns from its own documents alone.
FURTHER_OBJECTIVES: tuple[Objective, ...] = ("kl", "margin_mse_kl", "listwise", "rank")
# Fields of a recipe that belong to its data.
OF_TRAIN_DATA = ("train_subset", "teacher_normalization", "teacher_temperature")
TRAINING_QUERIES = {
    "lightonai/ms-marco-en-bge": 808_728,
    "sentence-transformers/msmarco": 532_751,  # queries of MS MARCO with a judgement
    QUICKSTART_REPOSITORY: 36_084,
}


@dataclass(frozen=True)
class BackboneShape:
    """What the cost of running a decoder depends on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def from_config(cls, config: Any) -> BackboneShape:
        """The shape in a transformers configuration."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            tie_word_embeddings=bool(config.tie_word_embeddings),
        )


@dataclass(frozen=True)
class Backbone:
    """A causal language model that the recipes start from, and its shape."""

    model: str
    shape: BackboneShape


@dataclass(frozen=True)
class MntpRecipe:
    """The MNTP stage of one backbone."""

    backbone: str
    model: str
    texts: tuple[str, ...] = ("sentence-transformers/msmarco-corpus:passage",)
    block_size: int = 512
    mask_probability: float = 0.2
    mask_token: str = "_"
    kept_share: float = 0.1
    z_loss_weight: float = 0.0
    z_loss_target: float = 0.0
    add_bos: bool | None = None
    per_device_train_batch_size: int = 32
    max_steps: int = 10_000
    learning_rate: float = 5e-5
    use_peft: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    gradient_checkpointing: bool = True

    def defaults(self) -> dict[str, Any]:
        """Values for the options of `lion-st adapt`."""
        values = dict(vars(self), backbone=self.model, texts=list(self.texts), output_dir=mntp_folder(self.backbone))
        del values["model"]
        return values


@dataclass(frozen=True)
class RetrieverRecipe:
    """One setting of the fine-tuning: backbone x paradigm x objective.

    Attributes:
        backbone: Name in `BACKBONES`.
        paradigm: `"sparse"` (Lion-SP), `"dense"` (Lion-DS), `"multi_vector"` (a vector of each token, as ColBERT) or
            `"hybrid"` (a sparse and a dense vector of one pass).
        objective: `"cl"` (contrastive), `"kd"` (MarginMSE on a teacher's margins) or `"cl_kd"` (contrastive and
            KL divergence from the teacher, half each); or of the teacher or of grades alone `"kl"`, `"margin_mse_kl"`
            (both), `"listwise"` (softmax cross-entropy on graded labels), `"rank"` (the teacher's order, RankNet).
        model: What is fine-tuned: the folder that the MNTP recipe writes.
        train_data: Source for `lion_st.data.load_tuples`.
        batch_size: Queries of an optimizer step, over all devices and accumulation steps.
        max_steps: Optimizer steps.
        negatives: Negatives of each query.
        recipe: Its name, if it is not of the paper; see `lion_st.training.published`.
        add_bos: As for `lion_st.build`, as are the next ones, None being the default there.
        temperature: Divisor of the student's scores.
        teacher_normalization: Of the teacher's scores of `train_data`, see `lion_st.data.load_tuples`.
        teacher_temperature: Divisor of the teacher's scores after that.
        query_regularizer_weight: Weight of the queries' FLOPS after the ramp.
        document_regularizer_weight: Weight of the documents' FLOPS after the ramp.
        regularizer_warmup_ratio: Share of `max_steps` in which both weights rise quadratically.
        mini_batch_size: Texts embedded at a time under gradient caching: bounds memory, not the batch.
    """

    backbone: str
    paradigm: Paradigm
    objective: Objective
    model: str
    train_data: str
    batch_size: int
    max_steps: int
    negatives: int
    train_subset: str | None = None
    recipe: str | None = None
    add_bos: bool | None = None
    add_eos: bool | None = None
    causal: bool | None = None
    scale: float | None = None
    pooling: str | None = None
    normalize: bool | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_length: int = 64
    document_length: int = 128
    temperature: float = 1.0
    teacher_normalization: str = "none"
    teacher_temperature: float = 1.0
    query_regularizer_weight: float = 0.05
    document_regularizer_weight: float = 0.04
    regularizer_warmup_ratio: float = 1 / 3
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.04
    bf16: bool = True
    use_peft: bool = True
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    mini_batch_size: int | None = None
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None

    @property
    def epochs(self) -> float:
        """Passes over the training queries of `train_data` that `max_steps` amounts to."""
        return self.batch_size * self.max_steps / TRAINING_QUERIES[self.train_data]

    def defaults(self, train_data: str | Sequence[str] | None = None) -> dict[str, Any]:
        """Values for the options of `lion-st train`.

        Args:
            train_data: Data that are given in place of the recipe's, for which its subset and what it does with the
                teacher's scores are not meant.
        """
        name = f"{self.recipe}-{self.backbone}" if self.recipe else f"{self.backbone}-{self.paradigm}-{self.objective}"
        values = dict(vars(self), output_dir=f"runs/{name}")
        if train_data is not None and train_data not in (self.train_data, [self.train_data]):
            values = {name: value for name, value in values.items() if name not in OF_TRAIN_DATA}
        return values


BACKBONES = {
    "llama-3.2-1b": Backbone("meta-llama/Llama-3.2-1B", BackboneShape(2048, 8192, 16, 32, 8, 64, 128_256, True)),
    "llama-3.2-3b": Backbone("meta-llama/Llama-3.2-3B", BackboneShape(3072, 8192, 28, 24, 8, 128, 128_256, True)),
    "llama-3-8b": Backbone("meta-llama/Meta-Llama-3-8B", BackboneShape(4096, 14_336, 32, 32, 8, 128, 128_256, False)),
    "llama-3.1-8b": Backbone("meta-llama/Llama-3.1-8B", BackboneShape(4096, 14_336, 32, 32, 8, 128, 128_256, False)),
    "qwen3-0.6b": Backbone("Qwen/Qwen3-0.6B-Base", BackboneShape(1024, 3072, 28, 16, 8, 128, 151_936, True)),
    "qwen3-4b": Backbone("Qwen/Qwen3-4B-Base", BackboneShape(2560, 9728, 36, 32, 8, 128, 151_936, True)),
    "qwen3-8b": Backbone("Qwen/Qwen3-8B-Base", BackboneShape(4096, 12_288, 36, 32, 8, 128, 151_936, False)),
    "smollm2-135m": Backbone(
        "HuggingFaceTB/SmolLM2-135M-Instruct", BackboneShape(576, 1536, 30, 9, 3, 64, 49_152, True)
    ),
    "mini": Backbone("lion-st/lion-mini-base", BackboneShape(384, 1152, 6, 6, 3, 64, 20_480, True)),
    "micro": Backbone("lion-st/lion-micro-base", BackboneShape(256, 768, 4, 4, 2, 64, 16_384, True)),
}
# Batch and steps by backbone: the longer schedules of small models spend the compute of large ones. In the paper they
# are 7, 3 and 1 passes over its 532,751 queries, and 56, 24 and 8 for kd.
_CONTRASTIVE = {"llama-3.2-1b": (112, 33_250), "llama-3.2-3b": (128, 12_600), "llama-3-8b": (128, 4_200)}
_DISTILLED = {"llama-3.2-1b": (1024, 29_400), "llama-3.2-3b": (512, 25_200), "llama-3-8b": (512, 8_400)}
# A list's scores, published between 0 and 1, then span 20, about as those of a cross-encoder do before its sigmoid.
_MS_MARCO_TEACHER: tuple[str, float] = ("minmax", 0.05)
_MINI_BATCHES = {"llama-3.2-1b": 32, "llama-3.2-3b": 16, "llama-3-8b": 16}
DENSE_TEMPERATURE = 0.01


def mntp_folder(backbone: str) -> str:
    """Where the MNTP stage of a backbone writes and its fine-tuning reads."""
    return f"runs/{backbone}-mntp"


def adapted_backbone(name: str) -> str:
    """A backbone of the project's own, which is adapted already: its folder in a source checkout, else its Hub name."""
    repository = BACKBONES[name].model
    checkout = Path(__file__).parents[2] / "hub_uploads" / "models" / repository.partition("/")[2]
    return str(checkout) if checkout.is_dir() else repository


def _paper_recipe(backbone: str, paradigm: Paradigm, objective: Objective) -> RetrieverRecipe:
    batch_size, max_steps = (_DISTILLED if objective == "kd" else _CONTRASTIVE)[backbone]
    distilled = objective == "kd"
    normalization, teacher_temperature = _MS_MARCO_TEACHER if objective == "cl_kd" else ("none", 1.0)
    return RetrieverRecipe(
        backbone,
        paradigm,
        objective,
        model=mntp_folder(backbone),
        train_data="sentence-transformers/msmarco" if distilled else "lightonai/ms-marco-en-bge",
        train_subset="bert-ensemble-margin-mse" if distilled else None,
        batch_size=batch_size,
        max_steps=max_steps,
        negatives=1 if distilled else 16,
        temperature=DENSE_TEMPERATURE if paradigm == "dense" else 1.0,
        teacher_normalization=normalization,
        teacher_temperature=teacher_temperature,
        mini_batch_size=_MINI_BATCHES[backbone],
        gradient_checkpointing=backbone == "llama-3-8b",
    )


def _micro_recipe(paradigm: Paradigm, objective: Objective) -> RetrieverRecipe:
    # A minute or two on two CPU cores, for a backbone that starts sparse and names its own terms.
    return RetrieverRecipe(
        "micro",
        paradigm,
        objective,
        model=adapted_backbone("micro"),
        train_data=QUICKSTART_REPOSITORY,
        batch_size=32,
        max_steps=50 if paradigm in WITH_TERMS else 40,
        negatives=1,
        query_length=32,
        temperature=DENSE_TEMPERATURE if paradigm == "dense" else 1.0,
        learning_rate=3e-4 if paradigm in WITH_TERMS else 1e-3,
        use_peft=False,
        attn_implementation="eager",  # the backward pass of fused attention is slow on a CPU
    )


def _mini_recipe(paradigm: Paradigm, objective: Objective) -> RetrieverRecipe:
    """Minutes on two CPU cores. At a higher rate batches of 32 undo what the backbone knows of its own terms."""
    return replace(
        _micro_recipe(paradigm, objective),
        backbone="mini",
        model=adapted_backbone("mini"),
        max_steps=150,
        query_length=40,
        learning_rate=1e-4 if paradigm in WITH_TERMS else 3e-4,
    )


def _smollm2_recipe(paradigm: Paradigm, objective: Objective) -> RetrieverRecipe:
    """Not the paper's: the 1B setting for a model so small that all its weights are trained."""
    return replace(
        _paper_recipe("llama-3.2-1b", paradigm, objective),
        backbone="smollm2-135m",
        model=mntp_folder("smollm2-135m"),
        add_bos=False,  # its tokenizer has a beginning-of-sequence token that the model never saw
        use_peft=False,
        learning_rate=5e-5,
        mini_batch_size=128,
    )


RECIPES: dict[tuple[str, str, str], RetrieverRecipe] = {
    (backbone, paradigm, objective): {
        "micro": _micro_recipe,
        "mini": _mini_recipe,
        "smollm2-135m": _smollm2_recipe,
    }.get(backbone, partial(_paper_recipe, backbone))(paradigm, objective)
    for backbone in (*_CONTRASTIVE, "smollm2-135m", "mini", "micro")
    for paradigm in PARADIGMS
    for objective in OBJECTIVES
}
MNTP_RECIPES = {name: MntpRecipe(name, BACKBONES[name].model) for name in (*_CONTRASTIVE, "smollm2-135m")}
# A sparse start: without it all terms are active and fine-tuning spends its first steps on undoing that.
MNTP_RECIPES["smollm2-135m"] = replace(
    MNTP_RECIPES["smollm2-135m"],
    mask_probability=0.3,
    kept_share=0.4,
    z_loss_weight=0.02,
    z_loss_target=6.0,
    add_bos=False,
    use_peft=False,
)


def get_recipe(backbone: str, paradigm: str, objective: str) -> RetrieverRecipe:
    """The recipe of a setting.

    Raises:
        ValueError: If there is none; the message lists what there is.

    Example:
        >>> get_recipe("llama-3.2-1b", "sparse", "cl_kd").max_steps
        33250
    """
    recipe = RECIPES.get((backbone, paradigm, objective))
    if recipe is None and objective in FURTHER_OBJECTIVES and (backbone, paradigm, "cl_kd") in RECIPES:
        like = RECIPES[backbone, paradigm, "cl_kd"]
        temperature = like.teacher_temperature if objective in ("kl", "margin_mse_kl") else 1.0
        recipe = replace(like, objective=objective, teacher_temperature=temperature)
    if recipe is None:
        raise UsageError(
            f"There is no recipe for backbone {backbone!r}, paradigm {paradigm!r}, objective {objective!r}. Choose a "
            f"backbone of {', '.join(dict.fromkeys(key[0] for key in RECIPES))}; a paradigm of "
            f"{', '.join(PARADIGMS)}; an objective of "
            f"{', '.join(OBJECTIVES + FURTHER_OBJECTIVES)}. To fine-tune another model, take the nearest recipe and "
            "name it with --model."
        )
    return recipe


def recipes_table() -> list[dict[str, Any]]:
    """A row for each stage of each backbone, for people to read."""
    rows: list[dict[str, Any]] = [
        {
            "backbone": recipe.backbone,
            "stage": "mntp",
            "batch": recipe.per_device_train_batch_size,
            "steps": recipe.max_steps,
            "learning rate": recipe.learning_rate,
            "data": ", ".join(recipe.texts),
        }
        for recipe in MNTP_RECIPES.values()
    ]
    for recipe in RECIPES.values():
        rows.append(
            {
                "backbone": recipe.backbone,
                "stage": f"{recipe.paradigm} {recipe.objective}",
                "batch": recipe.batch_size,
                "epochs": f"{recipe.epochs:.2g}",
                "steps": recipe.max_steps,
                "negatives": recipe.negatives,
                "temperature": (
                    f"{recipe.temperature}/{DENSE_TEMPERATURE}" if recipe.paradigm == "hybrid" else recipe.temperature
                ),
                "teacher": (
                    "" if recipe.objective == "cl" else f"{recipe.teacher_normalization}/{recipe.teacher_temperature}"
                ),
                "learning rate": recipe.learning_rate,
                "lengths": f"{recipe.query_length}/{recipe.document_length}",
                "FLOPS": (
                    f"{recipe.query_regularizer_weight}/{recipe.document_regularizer_weight}"
                    if recipe.paradigm in WITH_TERMS
                    else ""
                ),
                "data": recipe.train_data + (f":{recipe.train_subset}" if recipe.train_subset else ""),
            }
        )
    order = list(BACKBONES)
    rows.sort(key=lambda row: order.index(row["backbone"]))
    columns = list(rows[-1])
    return [{column: row.get(column, "") for column in columns} for row in rows]
