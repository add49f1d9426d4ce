"""Train a sparse retriever on pairs of a query and a passage that answers it, and export it.

    pip install 'lion-st[train]'
    python examples/train_on_own_pairs.py

The other passages of a batch are the negatives. Prints the trainer's log, the folder of the exported model and, with
nothing but sentence-transformers, the best of eight passages for a query. From a checkout it runs as it is, on a CPU;
for a model to use, name a larger backbone and your pairs.
"""

from peft import LoraConfig
from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

import lion_st
from lion_st.data import load_tuples
from lion_st.losses import dot_scores

BACKBONE = "hub_uploads/models/lion-micro-base"  # on a GPU "meta-llama/Llama-3.2-1B", or any decoder-only model
PAIRS = "hub_uploads/datasets/lion-quickstart"  # or a .jsonl file of {"query": "...", "positive": "..."} a line
OUTPUT = "runs/own-pairs"
MAX_STEPS = 200
BATCH_SIZE = 32
LEARNING_RATE = 5e-4  # 1e-4 for models of 1B and more
BF16 = False  # True on a GPU

model = lion_st.build(
    BACKBONE,
    "sparse",
    query_length=32,
    document_length=128,
    lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    as_sparse_encoder=True,
)
pairs = load_tuples(PAIRS, negatives=0)  # rows of "query" and "positive"

loss = SpladeLoss(
    model,
    SparseMultipleNegativesRankingLoss(model, scale=1.0, similarity_fct=dot_scores, gather_across_devices=True),
    query_regularizer_weight=1e-3,  # larger weights make sparser vectors
    query_regularizer=lion_st.FlopsRegularizer(model),
    document_regularizer_weight=1e-3,
    document_regularizer=lion_st.FlopsRegularizer(model),
)
trainer = SparseEncoderTrainer(
    model=model,
    train_dataset=pairs,
    loss=loss,
    args=SparseEncoderTrainingArguments(
        output_dir=f"{OUTPUT}/training",
        max_steps=MAX_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=0.05,
        bf16=BF16,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # a text twice in a batch would be its own negative
        router_mapping={"query": "query", "positive": "document"},  # queries and documents have lengths of their own
        save_strategy="no",
        logging_steps=10,
        report_to="none",
    ),
)
trainer.train()
folder = lion_st.export(model, f"{OUTPUT}/model", "SparseEncoder", overwrite=True)
print(f"\nexported to {folder}")

stock = SparseEncoder(str(folder))  # no lion_st needed from here on
query, passages = pairs[0]["query"], [row["positive"] for row in pairs.select(range(8))]
scores = stock.similarity(stock.encode_query([query]), stock.encode_document(passages)).to_dense()[0]
best = int(scores.argmax())
print(f"query: {query}\n best: {scores[best]:.2f} {passages[best][:80]}")
