"""Train the tokenizer and the causal language model of lion-micro-base from plain text.

python training_scripts/pretrain_micro.py --texts openstax.txt.xz standard_ebooks.txt.xz --output_dir runs/micro-causal
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from lion_st.data.text import iter_blocks, iter_documents
from lion_st.kernels.bfloat16 import multiplies_bfloat16
from lion_st.training.options.arguments import MAX_SECONDS_HELP
from lion_st.training.progress.callbacks import SecondsBudget


@dataclass
class MicroArguments:
    texts: list[str] = field(metadata={"help": "Text files: .txt or .jsonl, optionally .xz."})
    vocab_size: int = field(default=16_384, metadata={"help": "Size of the byte-level BPE vocabulary."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth of the model."})
    block_size: int = field(default=128, metadata={"help": "Tokens a training block."})
    eval_blocks: int = field(default=256, metadata={"help": "Blocks held out for the reported loss."})


@dataclass
class MicroTrainingArguments(TrainingArguments):
    output_dir: str = "runs/micro-causal"
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 32
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    weight_decay: float = 0.05
    adam_beta2: float = 0.95
    bf16: bool = torch.cuda.is_available() or multiplies_bfloat16()
    use_cpu: bool = not torch.cuda.is_available()
    num_train_epochs: float = 1.0
    logging_steps: float = 50
    save_steps: float = 500
    save_total_limit: int = 1
    torch_compile: bool = True
    report_to: str = "none"
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lower-cased text: with 16k entries every one should be a term, none a spelling variant."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_max_length=2048,
    )


def main() -> None:
    arguments, training_arguments = TrlParser((MicroArguments, MicroTrainingArguments)).parse_args_and_config()
    set_seed(training_arguments.seed)
    output = Path(training_arguments.output_dir)
    documents = [document for path in arguments.texts for document in iter_documents(path)]
    random.Random(training_arguments.seed).shuffle(documents)
    if (output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(documents, arguments.vocab_size)
        tokenizer.save_pretrained(output)
    tokens = np.concatenate(list(iter_blocks(documents, tokenizer, arguments.block_size)))
    blocks = Dataset.from_dict({"input_ids": tokens})
    split = blocks.train_test_split(test_size=arguments.eval_blocks, seed=training_arguments.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 3,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64,
        num_key_value_heads=max(1, arguments.hidden_size // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    trainer = Trainer(
        model=model,
        args=training_arguments,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    if training_arguments.max_seconds is not None:
        trainer.add_callback(SecondsBudget(training_arguments.max_seconds))
    start, before = time.time(), trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    report = {
        "parameters": model.num_parameters(),
        "tokens_in_corpus": len(split["train"]) * arguments.block_size,
        "steps": trainer.state.global_step,
        "eval_loss_before": before,
        "eval_loss_after": trainer.evaluate()["eval_loss"],
        "seconds": time.time() - start,
    }
    model.to(torch.bfloat16).save_pretrained(output)
    (output / "pretraining.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
