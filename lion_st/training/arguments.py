"""What the training scripts take from YAML files and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

if TYPE_CHECKING:
    from peft import LoraConfig

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
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


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
    mask_token: str = field(default="_", metadata={"help": "Token of the vocabulary that stands for a masked one."})
    eval_blocks: int = field(default=256, metadata={"help": "Blocks held out for the reported loss."})
    add_bos: bool | None = field(default=None, metadata={"help": "See lion_st.LionTransformer."})
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
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 1
    report_to: str = "none"

    def settings(self) -> dict[str, Any]:
        """The values that change the result, for the record of a run."""
        return {name: getattr(self, name) for name in RESULT_ARGUMENTS} | {"world_size": self.world_size}
