"""What the training scripts take from YAML files and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments, SparseEncoderTrainingArguments
from transformers import TrainingArguments

from lion_st.training.recipes import MNTP_RECIPES, RetrieverRecipe, get_recipe

if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import TrlParser

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Training arguments that change the result of a run; the others change its speed, its logs or its place.
RESULT_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
    "max_seconds",
)
MAX_SECONDS_HELP = "Fit steps and schedules into this many seconds of training, if max_steps would take longer."


@dataclass
class LoraArguments:
    """Whether and how a low-rank adapter is trained in place of all weights."""

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "Names of the linear layers with an adapter."}
    )

    def lora_config(self) -> LoraConfig:
        """The adapter's PEFT configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=list(self.lora_target_modules),
        )

    def settings(self) -> dict[str, Any]:
        """Every value, for the record of a run."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass
class MntpArguments(LoraArguments):
    """The MNTP stage: backbone, texts and masking."""

    backbone: str = field(default="", metadata={"help": "Hub name or folder of a causal language model."})
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Files (.txt, .jsonl, also .gz, .xz), or Hub data sets with a text column, as NAME:SUBSET."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens a training block."})
    mask_probability: float = field(default=0.2, metadata={"help": "Share of tokens to predict."})
    random_share: float = field(default=0.1, metadata={"help": "Share of those that become a random token."})
    kept_share: float = field(default=0.1, metadata={"help": "Share of those that stay as they are."})
    z_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared distance of log Z from its target, in training."}
    )
    z_loss_target: float = field(
        default=0.0, metadata={"help": "Target of log Z: terms less likely than exp(-this) are not active."}
    )
    mask_token: str = field(default="_", metadata={"help": "Token of the vocabulary that stands for a masked one."})
    eval_blocks: int = field(default=256, metadata={"help": "Blocks held out for the reported loss."})
    add_bos: bool | None = field(default=None, metadata={"help": "See lion_st.LionTransformer."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    merge: bool = field(default=True, metadata={"help": "Save a backbone with the adapter merged, not the adapter."})

    def __post_init__(self) -> None:
        if not self.backbone:
            raise ValueError("Name the model to adapt with --backbone.")
        if not self.texts:
            raise ValueError("Name the texts to adapt on with --texts.")


@dataclass
class MntpTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the values of the MNTP recipe."""

    output_dir: str = "runs/mntp"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = 5e-5
    max_steps: int = 10_000
    bf16: bool = True
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str = "none"

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        return {name: getattr(self, name) for name in RESULT_ARGUMENTS} | {"world_size": self.world_size}


@dataclass
class RetrieverArguments(LoraArguments):
    """The fine-tuning of a retriever: model, data and objective."""

    backbone: str = field(default="", metadata={"help": "Backbone of the recipe, as `lion-st recipes` lists them."})
    paradigm: str = field(default="sparse", metadata={"help": "sparse (Lion-SP) or dense (Lion-DS)."})
    objective: str = field(default="cl_kd", metadata={"help": "cl, kd or cl_kd."})
    model: str = field(default="", metadata={"help": "Folder or Hub name of the backbone to fine-tune."})
    add_bos: bool | None = field(default=None, metadata={"help": "See lion_st.build."})
    scale: float | None = field(default=None, metadata={"help": "Sparse: factor on the logits; see lion_st.build."})
    pooling: str = field(default="mean_normalized", metadata={"help": "Dense: see lion_st.LlamaPooling."})
    attn_implementation: str | None = field(default=None, metadata={"help": "See lion_st.build."})
    query_length: int = field(default=64, metadata={"help": "Longest query, in tokens."})
    document_length: int = field(default=128, metadata={"help": "Longest document, in tokens."})
    query_prompt: str | None = field(default=None, metadata={"help": "Put in front of queries, and saved."})
    document_prompt: str | None = field(default=None, metadata={"help": "Put in front of documents, and saved."})
    train_data: str = field(default="", metadata={"help": "Source of training tuples; see lion_st.data.load_tuples."})
    train_subset: str | None = field(default=None, metadata={"help": "Subset of the source."})
    train_split: str = field(default="train", metadata={"help": "Split of the source, such as train[:1%]."})
    train_queries: str | None = field(default=None, metadata={"help": "Where query texts are, if not in the source."})
    train_documents: str | None = field(default=None, metadata={"help": "The same for documents."})
    negatives: int = field(default=16, metadata={"help": "Negatives of each query."})
    sampling: str = field(default="random", metadata={"help": "random negatives in every epoch, or the first."})
    drop_short: bool = field(default=False, metadata={"help": "Leave out rows with too few negatives."})
    batch_size: int = field(
        default=128, metadata={"help": "Queries of an optimizer step, over all devices and accumulation steps."}
    )
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Texts embedded at a time (gradient caching). Bounds memory, not the batch."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the student's scores."})
    teacher_temperature: float = field(default=1.0, metadata={"help": "Divisor of the teacher's scores in cl_kd."})
    contrastive_weight: float = field(default=0.5, metadata={"help": "Weight of the contrastive term in cl_kd."})
    distillation_weight: float = field(default=0.5, metadata={"help": "Weight of the KL term in cl_kd."})
    query_regularizer_weight: float = field(default=0.05, metadata={"help": "Sparse: FLOPS weight of queries."})
    document_regularizer_weight: float = field(default=0.04, metadata={"help": "Sparse: FLOPS weight of documents."})
    regularizer_warmup_ratio: float = field(
        default=1 / 3, metadata={"help": "Sparse: share of the steps in which the FLOPS weights rise quadratically."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print settings and estimated cost; train nothing."})

    def __post_init__(self) -> None:
        get_recipe(self.backbone, self.paradigm, self.objective)
        for name in ("model", "train_data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty; name one, or leave it to the recipe.")
        for name in ("batch_size", "query_length", "document_length", "mini_batch_size", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be positive, got {value}.")
        if self.objective != "cl" and self.negatives < 1:
            raise ValueError(f"The objective {self.objective} needs negatives, got --negatives {self.negatives}.")

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        values = super().settings()
        del values["dry_run"], values["mini_batch_size"]
        return values


@dataclass
class RetrieverTrainingArguments(SparseEncoderTrainingArguments, SentenceTransformerTrainingArguments):
    """sentence-transformers' training arguments; batch and accumulation follow from `batch_size` where left out."""

    output_dir: str = "runs/retriever"
    per_device_train_batch_size: int | None = None  # type: ignore[assignment]
    gradient_accumulation_steps: int | None = None  # type: ignore[assignment]
    dataloader_drop_last: bool = True
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str = "none"
    hub_strategy: str = "end"  # the finished result alone

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        return {name: getattr(self, name) for name in RESULT_ARGUMENTS} | {"world_size": self.world_size}


def parse_mntp_arguments(options: Sequence[str] | None = None) -> tuple[MntpArguments, MntpTrainingArguments]:
    """Read the MNTP stage's options from the command line and a YAML file (`--config`).

    Where `--backbone` names a recipe, its values are the defaults.

    Args:
        options: In place of the command line.

    Raises:
        ValueError: If an option is unknown or its value is wrong.
    """

    @dataclass
    class Choice:
        backbone: str = ""

    parser = _parser(MntpArguments, MntpTrainingArguments)
    backbone = _choice(Choice, options).backbone
    if backbone in MNTP_RECIPES:
        parser.set_defaults_with_config(**MNTP_RECIPES[backbone].defaults())
    arguments, training_arguments = parser.parse_args_and_config(options)
    if arguments.backbone in MNTP_RECIPES:
        arguments.backbone = MNTP_RECIPES[arguments.backbone].model
    return arguments, training_arguments


def parse_retriever_arguments(
    options: Sequence[str] | None = None,
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """Read a fine-tuning's options: the recipe of backbone, paradigm and objective, then YAML, then the command line.

    Args:
        options: In place of the command line.

    Raises:
        ValueError: If there is no such recipe, an option is unknown, or a value is wrong.

    Example:
        >>> arguments, _ = parse_retriever_arguments(["--backbone", "micro", "--paradigm", "dense"])
        >>> arguments.temperature
        0.01
    """

    @dataclass
    class Choice:
        backbone: str = ""
        paradigm: str = "sparse"
        objective: str = "cl_kd"

    choice = _choice(Choice, options)
    recipe = get_recipe(choice.backbone, choice.paradigm, choice.objective)
    parser = _parser(RetrieverArguments, RetrieverTrainingArguments)
    unknown = parser.set_defaults_with_config(**recipe.defaults())
    assert not unknown, f"the recipe sets {unknown}, which are no options"
    return parser.parse_args_and_config(options)  # type: ignore[return-value]


def retriever_arguments(
    recipe: RetrieverRecipe, **overrides: Any
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """The arguments of a recipe, for use from Python.

    Args:
        recipe: As `get_recipe` returns it.
        **overrides: Fields of `RetrieverArguments` or `RetrieverTrainingArguments`.

    Raises:
        TypeError: If an override is no such field.

    Example:
        >>> arguments, training = retriever_arguments(get_recipe("micro", "sparse", "cl"), max_steps=10)
        >>> training.max_steps
        10
    """
    values = recipe.defaults() | overrides
    own = {item.name for item in fields(RetrieverArguments)}
    return (
        RetrieverArguments(**{name: value for name, value in values.items() if name in own}),
        RetrieverTrainingArguments(**{name: value for name, value in values.items() if name not in own}),
    )


def _choice(kind: type, options: Sequence[str] | None) -> Any:
    """The few options that decide on the defaults of all others; those are left to the parser of all."""
    return _parser(kind, add_help=False).parse_args_and_config(options, return_remaining_strings=True)[0]


def _parser(*kinds: Any, **settings: Any) -> TrlParser:
    from trl import TrlParser

    return TrlParser(kinds, allow_abbrev=False, **settings)
