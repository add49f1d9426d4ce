"""What the training scripts take from YAML files and the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformerTrainingArguments, SparseEncoderTrainingArguments
from transformers import TrainingArguments

from lion_st.errors import UsageError
from lion_st.losses.distillation import Distillation
from lion_st.training.evaluation import EvaluationArguments
from lion_st.training.learned_sparsity import LearnedSparsityArguments
from lion_st.training.options.model_arguments import LoraArguments, ModelArguments
from lion_st.training.options.reader import merge_layers, resolve_steps
from lion_st.training.options.released_code import is_released, recipe_options
from lion_st.training.prompts import PromptArguments
from lion_st.training.published import chosen_recipe
from lion_st.training.query_tables import QueryEncoderArguments
from lion_st.training.recipes import DENSE_TEMPERATURE, Objective, Paradigm, RetrieverRecipe
from lion_st.training.regularizers import RegularizerArguments
from lion_st.training.sharding import resolve_fsdp
from lion_st.training.teacher import TeacherArguments
from lion_st.training.validation import (
    SHARDING_BUILT,
    as_sources,
    refuse_liger,
    refuse_unread,
    rename_checkpointing,
    require_at_least_0,
    require_positive,
    require_read,
    require_share,
    require_training_ranges,
    resolve_compilation,
    unread_options,
)
from lion_st.training.zero import resolve_deepspeed

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
)
PRESET_HELP = "released: compute what the paper's released code does, in place of the recipe; see docs/fidelity.md."
PARADIGM_HELP = (
    "sparse (Lion-SP), dense (Lion-DS), multi_vector (a vector of each token, as in ColBERT) or hybrid (a sparse and a "
    "dense vector of one pass)."
)
MAX_SECONDS_HELP = "Fit steps and schedules into this many seconds of training, if max_steps would take longer."
# These too, which hardly anyone sets: recorded where they are not at their defaults.
FURTHER_RESULT_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "batch_sampler",
    "data_seed",
    "dataloader_drop_last",
    "early_stopping_patience",
    "eval_data",
    "eval_share",
    "eval_split",
    "learning_rate_mapping",
    "lr_scheduler_kwargs",
    "max_seconds",
    "metric_for_best_model",
    "multi_dataset_batch_sampler",
    "neftune_noise_alpha",
    "optim_args",
    "prompts",
    "router_mapping",
    "stop_after_steps",
    "train_sampling_strategy",
)
_NOT_READ = {
    "parallelism_config": SHARDING_BUILT,
    "save_only_model": "a run could not go on from such a checkpoint",
}
NOT_READ_BY_MNTP = {
    **_NOT_READ,
    "label_smoothing_factor": "the loss is cross-entropy of the masked tokens",
    "auto_find_batch_size": "a smaller batch is another run; lower --per_device_train_batch_size",
    "do_predict": "there is no test set",
    "push_to_hub": "`lion-st publish --folder` publishes the finished backbone",
}
NOT_READ_BY_RETRIEVER = {
    **_NOT_READ,
    "data_seed": "--seed is that of batches and negatives too",
    "dataloader_multiprocessing_context": "workers begin in Python's own way",
    "label_smoothing_factor": "the losses are of scores, which have no classes",
    "neftune_noise_alpha": "noise on embeddings is not built",
    "train_sampling_strategy": "batches are those of --batch_sampler",
    "auto_find_batch_size": "a smaller batch is another run; --mini_batch_size bounds memory",
    "do_predict": "`lion-st evaluate` scores the result on a test set",
}


@dataclass
class MntpArguments(LoraArguments):
    """The MNTP stage: backbone, texts and masking."""

    backbone: str = field(default="", metadata={"help": "Hub name, folder or GGUF file of a causal language model."})
    texts: list[str] = field(
        default_factory=list,
        metadata={"help": "Files (.txt, .jsonl, also .gz, .xz), or Hub data sets with a text column, as NAME:SUBSET."},
    )
    preset: Literal["released"] | None = field(default=None, metadata={"help": PRESET_HELP})
    rows_per_document: int = field(
        default=64,
        metadata={"help": "Rows, or lines of a .txt file, that begin with one beginning-of-sequence token together."},
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
    num_layers: int | None = field(default=None, metadata={"help": "Keep the backbone's first so many layers alone."})
    layers: list[int] | None = field(default=None, metadata={"help": "Keep these layers alone, numbered from 0."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    merge: bool = field(default=True, metadata={"help": "Save a backbone with the adapter merged, not the adapter."})

    def __post_init__(self) -> None:
        self.backbone, self.texts = os.fspath(self.backbone), as_sources(self.texts)
        if not self.backbone:
            raise UsageError("Name the model to adapt with --backbone.")
        if not self.texts:
            raise UsageError("Name the texts to adapt on with --texts.")
        require_positive(self, "block_size", "eval_blocks")
        require_at_least_0(self, "z_loss_weight")
        self.require_lora_ranges()


@dataclass
class MntpTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the values of the MNTP recipe."""

    output_dir: str = "runs/mntp"
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = 5e-5
    max_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Optimizer steps; 10,000 unless --num_train_epochs is given."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Passes over the data, in place of --max_steps."}
    )
    bf16: bool = field(default=True, metadata={"help": "Mixed precision in bfloat16, unless --fp16 is given."})
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})
    stop_after_steps: int | None = field(
        default=None, metadata={"help": "Stop after so many steps, with the schedule still that of --num_train_epochs."}
    )
    logging_nan_inf_filter: bool = False  # which logs a loss that is not a number as 0
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 2
    report_to: str = "none"

    def __post_init__(self) -> None:
        self.bf16 = self.bf16 and not self.fp16
        deepspeed = _resolve(self, NOT_READ_BY_MNTP, 10_000)
        super().__post_init__()
        self.deepspeed = deepspeed

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        return _settings(self, MntpTrainingArguments)


@dataclass
class RetrieverArguments(
    RegularizerArguments, LearnedSparsityArguments, TeacherArguments, QueryEncoderArguments, ModelArguments
):
    """The fine-tuning of a retriever: model, data and objective."""

    recipe: str | None = field(default=None, metadata={"help": "A published recipe, see `lion-st recipes`."})
    backbone: str = field(default="", metadata={"help": "Backbone of the recipe, as `lion-st recipes` lists them."})
    paradigm: Paradigm = field(default="sparse", metadata={"help": PARADIGM_HELP})
    objective: Objective = field(
        default="cl_kd",
        metadata={
            "help": "cl: contrastive. kd: MarginMSE on a teacher's margins. cl_kd: contrastive and --distillation. Of "
            "a query's own documents alone, kl: KL divergence from the teacher; margin_mse_kl: both; listwise: softmax "
            "cross-entropy on graded labels; rank: the teacher's order (RankNet)."
        },
    )
    distillation: Distillation = field(
        default="kl_div", metadata={"help": "What cl_kd learns from the teacher beside the labels."}
    )
    margin_mse_weight: float = field(
        default=0.05, metadata={"help": "Weight of MarginMSE beside KL, in margin_mse_kl."}
    )
    preset: Literal["released"] | None = field(default=None, metadata={"help": PRESET_HELP})
    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Source of training tuples, or several; see lion_st.data.load_tuples."},
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each of several sources, each batch being of one; else they go by their sizes."},
    )
    train_subset: str | None = field(default=None, metadata={"help": "Subset of the source."})
    train_split: str = field(default="train", metadata={"help": "Split of the source, such as train[:1%%]."})
    train_queries: str | None = field(default=None, metadata={"help": "Where query texts are, if not in the source."})
    train_documents: str | None = field(default=None, metadata={"help": "The same for documents."})
    negatives: int = field(default=16, metadata={"help": "Negatives of each query."})
    sampling: Literal["random", "first"] = field(
        default="random", metadata={"help": "random negatives in every epoch, or the first."}
    )
    drop_short: bool = field(default=False, metadata={"help": "Leave out rows with too few negatives."})
    batch_size: int = field(
        default=128, metadata={"help": "Queries of an optimizer step, over all devices and accumulation steps."}
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Texts embedded at a time (gradient caching): bounds memory, not the batch; 0 for all at once."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Divisor of the student's scores."})
    dense_temperature: float = field(
        default=DENSE_TEMPERATURE,
        metadata={"help": "Hybrid: divisor of the dense scores; --temperature of the sparse."},
    )
    dense_weight: float = field(
        default=1.0, metadata={"help": "Hybrid: weight of the dense vectors' loss beside the sparse vectors'."}
    )
    contrastive_weight: float = field(default=0.5, metadata={"help": "Weight of the contrastive term in cl_kd."})
    distillation_weight: float = field(default=0.5, metadata={"help": "Weight of --distillation in cl_kd."})
    query_regularizer_weight: float = field(default=0.05, metadata={"help": "Sparse: FLOPS weight of queries."})
    document_regularizer_weight: float = field(default=0.04, metadata={"help": "Sparse: FLOPS weight of documents."})
    regularizer_warmup_ratio: float = field(
        default=1 / 3, metadata={"help": "Sparse: share of the steps in which the FLOPS weights rise quadratically."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Print settings and estimated cost; train nothing."})
    dry_run_devices: int | None = field(default=None, metadata={"help": "Estimate the cost on so many GPUs."})

    def __post_init__(self) -> None:
        chosen_recipe(vars(self))
        is_released(self.backbone, self.preset)
        self.model, self.train_data = os.fspath(self.model), as_sources(self.train_data)
        for name in ("model", "train_data"):
            if not getattr(self, name):
                raise UsageError(f"--{name} is empty; name one, or leave it to the recipe.")
        if len(set(self.train_data)) < len(self.train_data):
            raise UsageError(f"--train_data names a source twice: {', '.join(self.train_data)}.")
        weights = self.train_weights
        if weights is not None and (len(weights) != len(self.train_data) or not all(weight > 0 for weight in weights)):
            raise UsageError(
                f"--train_weights are {weights}: give a positive one for each of --train_data, "
                f"{', '.join(self.train_data)}."
            )
        if self.mini_batch_size == 0:
            self.mini_batch_size = None
        require_positive(self, "batch_size", "query_length", "document_length", "mini_batch_size", "dry_run_devices")
        require_positive(self, "temperature", "dense_temperature", "teacher_temperature")
        require_positive(self, "query_max_active_dims", "document_max_active_dims")
        require_positive(self, "token_dimension")
        self.require_teachers()
        require_at_least_0(self, "query_regularizer_weight", "document_regularizer_weight", "negatives")
        require_at_least_0(self, "contrastive_weight", "distillation_weight", "margin_mse_weight", "dense_weight")
        require_share(self, "regularizer_warmup_ratio")
        self.require_regularizer()
        self.require_query_encoder()
        self.require_learned_sparsity()
        self.require_lora_ranges()
        if self.objective != "cl" and self.negatives < 1:
            raise ValueError(f"The objective {self.objective} needs negatives, got --negatives {self.negatives}.")

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        left_out = {"dry_run", "dry_run_devices", "mini_batch_size", *unread_options(vars(self))}
        return {name: value for name, value in super().settings().items() if name not in left_out}


@dataclass
class RetrieverTrainingArguments(
    EvaluationArguments, PromptArguments, SparseEncoderTrainingArguments, SentenceTransformerTrainingArguments
):
    """sentence-transformers' training arguments; batch and accumulation follow from `batch_size` where left out."""

    output_dir: str = "runs/retriever"
    per_device_train_batch_size: int | None = None  # type: ignore[assignment]
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int | None = None  # type: ignore[assignment]
    dataloader_drop_last: bool = True
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})
    logging_nan_inf_filter: bool = False  # which logs a loss that is not a number as 0
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 2
    report_to: str = "none"
    hub_strategy: str = "end"  # the finished result alone
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Passes over the data, in place of --max_steps."}
    )
    batch_sampler: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "batch_sampler (random) or no_duplicates: no text is twice in the batch of all devices, where it "
            "would be its own negative, nor a document that is judged relevant to another query. Left out, random with "
            "the objective kd, else no_duplicates."
        },
    )

    def __post_init__(self) -> None:
        deepspeed = _resolve(self, NOT_READ_BY_RETRIEVER, -1)
        if self.warmup_steps and self.warmup_ratio:
            merge_layers({"warmup_steps": self.warmup_steps, "warmup_ratio": self.warmup_ratio})
        self.complete_evaluation(self)
        super().__post_init__()
        self.complete_schedule()
        self.deepspeed = deepspeed
        self.require_prompts()

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        return _settings(self, RetrieverTrainingArguments)


def retriever_arguments(
    recipe: RetrieverRecipe, **overrides: Any
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """The arguments of a recipe, for use from Python.

    Args:
        recipe: As `get_recipe` returns it.
        **overrides: Fields of `RetrieverArguments` or `RetrieverTrainingArguments`. Of two that say the same thing,
            such as `max_steps` and `num_train_epochs`, the one given here takes the place of the recipe's.

    Raises:
        TypeError: If an override is not such a field.
        UsageError: If an override is not read by this setting, or two of them contradict each other.

    Example:
        >>> from lion_st.training import get_recipe
        >>> arguments, training = retriever_arguments(get_recipe("micro", "sparse", "cl"), max_steps=10)
        >>> training.max_steps
        10
        >>> _, training = retriever_arguments(get_recipe("micro", "sparse", "cl"), num_train_epochs=2)
        >>> training.max_steps, training.num_train_epochs
        (-1, 2)
    """
    values = merge_layers(recipe_options(recipe, overrides), overrides)
    own = {item.name for item in fields(RetrieverArguments)}
    arguments = RetrieverArguments(**{name: value for name, value in values.items() if name in own})
    require_read(arguments, overrides)
    training = RetrieverTrainingArguments(**{name: value for name, value in values.items() if name not in own})
    training.require_prompts(arguments.train_data)
    return arguments, training


def _resolve(arguments: Any, unread: Mapping[str, str], default_steps: int) -> Any:
    """Refuse and complete training arguments before transformers does; returns what `deepspeed` is to be after it."""
    refuse_unread(arguments, unread)
    deepspeed = resolve_deepspeed(arguments)
    resolve_fsdp(arguments)
    resolve_compilation(arguments)
    refuse_liger(arguments)
    rename_checkpointing(arguments)
    require_training_ranges(arguments)
    resolve_steps(arguments, default_steps)
    return deepspeed


def _settings(arguments: TrainingArguments, kind: type) -> dict[str, Any]:
    """The arguments that change the result, the further ones where they are not left at their defaults."""
    settings = {name: getattr(arguments, name) for name in RESULT_ARGUMENTS} | {"world_size": arguments.world_size}
    for item in fields(kind):
        if item.name in FURTHER_RESULT_ARGUMENTS:
            value = getattr(arguments, item.name)
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if value not in (default, None) and value != {}:
                settings[item.name] = value
    return settings
