"""Train a dense retriever on the scores of a cross-encoder: contrastive loss and distillation at once.

    pip install 'lion-st[train]'
    python examples/distil_from_a_teacher.py

The teacher scores each query with its positive and its negatives; the retriever learns from the positives and from all
scores. Prints a row with its scores, the trainer's log and the folder of the exported model. From a checkout it runs on
a CPU; for a model to use, name a larger backbone, a stronger teacher and more tuples.
"""

from peft import LoraConfig
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers

import lion_st
from lion_st.data import load_tuples

BACKBONE = "hub_uploads/models/lion-micro-base"  # on a GPU "meta-llama/Llama-3.2-1B", or any decoder-only model
TEACHER = "cross-encoder/ms-marco-MiniLM-L6-v2"
TUPLES = "hub_uploads/datasets/lion-quickstart"  # or a .jsonl file of {"query", "positive", "negative_1", ...} a line
NEGATIVES = 4
ROWS = 2000
OUTPUT = "runs/distilled"
MAX_STEPS = 200
BATCH_SIZE = 16
LEARNING_RATE = 5e-4  # 1e-4 for models of 1B and more
BF16 = False  # True on a GPU

# To mine negatives for pairs, see sentence_transformers.util.mine_hard_negatives.
tuples = load_tuples(TUPLES, negatives=NEGATIVES, sampling="first")
tuples = tuples.select(range(min(ROWS, len(tuples))))
documents = ["positive", *(f"negative_{n}" for n in range(1, NEGATIVES + 1))]
rows = [{name: row[name] for name in ("query", *documents)} for row in tuples]

teacher = CrossEncoder(TEACHER)
scores = teacher.predict([(row["query"], row[name]) for row in rows for name in documents]).reshape(len(rows), -1)
scored = tuples.from_list([row | {"label": label} for row, label in zip(rows, scores.tolist(), strict=True)])
print("query:", scored[0]["query"])
for name, score in zip(documents, scored[0]["label"], strict=True):
    print(f"{score:8.2f}  {scored[0][name][:80]}")

lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
model = lion_st.build(BACKBONE, "dense", query_length=32, document_length=128, lora=lora)
trainer = SentenceTransformerTrainer(
    model=model,
    train_dataset=scored,
    loss=lion_st.ContrastiveDistillationLoss(model, scale=100.0),  # 1.0 for sparse models, inside a SpladeLoss
    args=SentenceTransformerTrainingArguments(
        output_dir=f"{OUTPUT}/training",
        max_steps=MAX_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=0.05,
        bf16=BF16,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        router_mapping={"query": "query"} | dict.fromkeys(documents, "document"),
        save_strategy="no",
        logging_steps=10,
        report_to="none",
    ),
)
trainer.train()
folder = lion_st.export(model, f"{OUTPUT}/model", overwrite=True)
vector = SentenceTransformer(str(folder)).encode_query(rows[0]["query"])  # no lion_st needed
print(f"\nexported to {folder}; a query is {vector.shape[0]} numbers")
