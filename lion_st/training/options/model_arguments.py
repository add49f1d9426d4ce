"""What the training scripts take about the model itself: where it starts from, its contract, its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from lion_st.errors import UsageError
from lion_st.modules.llama_pooling import PoolingName
from lion_st.modules.splade_head import Activation
from lion_st.training.validation import require_positive, require_share

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LoraArguments:
    """Whether and how a low-rank adapter is trained in place of all weights."""

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter's input."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS),
        metadata={"help": "Names of the linear layers with an adapter, or all-linear."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: hold the frozen linear layers in 4 bits; needs 'lion-st[quantized]'."}
    )

    def lora_config(self) -> LoraConfig:
        """The adapter's PEFT configuration."""
        from peft import LoraConfig

        targets = list(self.lora_target_modules)
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets if targets != ["all-linear"] else "all-linear",
        )

    def require_lora_ranges(self) -> None:
        """Refuse an adapter that cannot be made."""
        require_positive(self, "lora_r", "lora_alpha")
        require_share(self, "lora_dropout")
        if self.load_in_4bit and not self.use_peft:
            raise UsageError("--load_in_4bit holds weights that do not train: leave out --use_peft false.")

    def settings(self) -> dict[str, Any]:
        """Every value, for the record of a run."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass
class ModelArguments(LoraArguments):
    """The model to fine-tune: a backbone and what is made of it, or a retriever, which has all that already."""

    model: str = field(
        default="",
        metadata={
            "help": "What is fine-tuned: folder, Hub name or GGUF file of a backbone; or a retriever, which keeps "
            "its prompts, lengths and all that follows here unless another is given."
        },
    )
    train_adapter: bool = field(
        default=False, metadata={"help": "Train the adapter that the model has on, instead of merging it."}
    )
    add_bos: bool | None = field(default=None, metadata={"help": "See lion_st.build."})
    add_eos: bool | None = field(default=None, metadata={"help": "Append the end-of-sequence token to each text."})
    causal: bool | None = field(default=None, metadata={"help": "Leave attention causal: RepLLaMA, ablations."})
    num_layers: int | None = field(default=None, metadata={"help": "Keep the backbone's first so many layers alone."})
    layers: list[int] | None = field(default=None, metadata={"help": "Keep these layers alone, numbered from 0."})
    scale: float | None = field(default=None, metadata={"help": "Sparse: factor on the logits; see lion_st.build."})
    activation: Activation | None = field(
        default=None, metadata={"help": "Sparse: log1p (the default) or double_log1p; see lion_st.SpladeHead."}
    )
    query_max_active_dims: int | None = field(
        default=None,
        metadata={
            "help": "Sparse: keep so many of a query's heaviest terms when encoding, in evaluations and in the result, "
            "which lion_st.load alone then reads; training itself sees all."
        },
    )
    document_max_active_dims: int | None = field(default=None, metadata={"help": "Sparse: the same for documents."})
    pooling: PoolingName | None = field(
        default=None, metadata={"help": "Dense: mean_normalized (the default), mean or last_token."}
    )
    normalize: bool | None = field(default=None, metadata={"help": "Dense: bring each vector to length 1."})
    token_dimension: int | None = field(
        default=None, metadata={"help": "Multi-vector: width of a token's vector, 128 by default."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "See lion_st.build."})
    query_length: int = field(default=64, metadata={"help": "Longest query, in tokens."})
    document_length: int = field(default=128, metadata={"help": "Longest document, in tokens."})
    query_prompt: str | None = field(default=None, metadata={"help": "Put in front of queries, and saved."})
    document_prompt: str | None = field(default=None, metadata={"help": "Put in front of documents, and saved."})
