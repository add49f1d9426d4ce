r"""First stage of a dense retriever: learn the embeddings of a teacher, cosine by cosine, from unlabelled texts.

python training_scripts/mini/distil_embeddings.py --backbone runs/lion-mini-base --data_dir runs/mini-data \
    --teacher sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/lion-mini-distilled

Texts are those of `queries.parquet` and `documents.parquet`, or some of each; the teacher's vectors are as wide as the
backbone's, and are kept in the output folder for the next run. The output is a backbone to fine-tune with
train_retriever.py. (Kim et al., EmbedDistill, 2023: https://arxiv.org/abs/2301.12005)
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, load_from_disk
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from transformers import HfArgumentParser, set_seed

import lion_st
from lion_st.kernels.bfloat16 import multiplies_bfloat16
from lion_st.training.options.arguments import MAX_SECONDS_HELP
from lion_st.training.progress.callbacks import SecondsBudget


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "Bidirectional backbone."})
    data_dir: str = field(metadata={"help": "Folder of queries.parquet and documents.parquet."})
    teacher: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Encoder of sentence-transformers."}
    )
    max_length: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    queries: int | None = field(default=None, metadata={"help": "Take so many of the queries; all by default."})
    documents: int | None = field(default=None, metadata={"help": "Take so many of the documents; all by default."})


@dataclass
class DistillationArguments(SentenceTransformerTrainingArguments):
    output_dir: str = "runs/lion-mini-distilled"
    per_device_train_batch_size: int = 512
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    num_train_epochs: float = 2
    bf16: bool = torch.cuda.is_available() or multiplies_bfloat16()
    dataloader_drop_last: bool = True
    use_cpu: bool = not torch.cuda.is_available()
    logging_steps: float = 50
    save_strategy: str = "no"
    report_to: str = "none"
    max_seconds: float | None = field(default=None, metadata={"help": MAX_SECONDS_HELP})


def labelled_texts(arguments: Arguments, cache: Path, seed: int) -> Dataset:
    """Texts and the teacher's vectors of them, as unit vectors in float16."""
    if cache.is_dir():
        return load_from_disk(str(cache))
    texts: list[str] = []
    for name, count in (("documents", arguments.documents), ("queries", arguments.queries)):
        found = [
            text
            for text in pq.read_table(Path(arguments.data_dir) / f"{name}.parquet")["text"].to_pylist()
            if text.strip()
        ]
        texts += found if count is None else random.Random(seed).sample(found, min(count, len(found)))
    teacher = SentenceTransformer(arguments.teacher)
    teacher.max_seq_length = min(teacher.max_seq_length, arguments.max_length)
    if teacher.device.type == "cuda":
        teacher.half()
    elif multiplies_bfloat16():
        teacher.bfloat16()
    vectors = teacher.encode(texts, batch_size=128, normalize_embeddings=True, convert_to_tensor=True)
    vectors = vectors.half().cpu().numpy()
    labels = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    dataset = Dataset(pa.table({"text": texts, "label": labels}))
    dataset.save_to_disk(str(cache))
    return dataset


def main() -> None:
    arguments, training_arguments = HfArgumentParser((Arguments, DistillationArguments)).parse_args_into_dataclasses()
    set_seed(training_arguments.seed)
    texts = labelled_texts(arguments, Path(training_arguments.output_dir) / "teacher", training_arguments.seed)
    model = lion_st.build(
        arguments.backbone,
        "dense",
        dtype=torch.float32,
        query_length=arguments.max_length,
        document_length=arguments.max_length,
    )
    start = time.monotonic()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training_arguments,
        train_dataset=texts,
        loss=EmbedDistillLoss(model),
        callbacks=[] if training_arguments.max_seconds is None else [SecondsBudget(training_arguments.max_seconds)],
    )
    trainer.train()
    output = Path(training_arguments.output_dir)
    model[0].model.to(torch.bfloat16).save_pretrained(output)
    model.tokenizer.save_pretrained(output)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    report = {
        "texts": len(texts),
        "steps": trainer.state.global_step,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "seconds": round(time.monotonic() - start, 1),
    }
    (output / "distillation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
