r"""First stage of a dense retriever: vectors of terms whose mean retrieves, below layers that add next to nothing yet.

python training_scripts/mini/start_dense.py --backbone hub_uploads/models/lion-mini-base --data_dir runs/mini-data \
    --num_layers 1 --output_dir runs/lion-mini-start

Each term begins as a random vector as long as its idf, so that cosines of means are near those of TF-IDF, and all of
them learn by a contrastive loss from `queries.parquet` and `documents.parquet` (text, and the id of the positive). The
backbone gives its tokenizer and the shapes of its layers. The output is a retriever of the same architecture, pooled by
the mean, to search with, to mine with and for `lion-st train --model`. (Achlioptas, Database-friendly
Random Projections, 2001: https://doi.org/10.1145/375551.375608)
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy, embedding_bag, normalize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import lion_st

LONGEST = 0.995  # share of the terms whose vectors are not shortened
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "Folder or Hub name that gives the tokenizer and the configuration."})
    data_dir: str = field(metadata={"help": "Folder of queries.parquet and documents.parquet."})
    output_dir: str = field(default="runs/lion-mini-start", metadata={"help": "Folder to write."})
    num_layers: int | None = field(default=None, metadata={"help": "Layers; as many as the backbone's by default."})
    query_length: int = field(default=64, metadata={"help": "Longest query, in tokens."})
    document_length: int = field(default=128, metadata={"help": "Longest document, in tokens."})
    batch_size: int = field(default=2048, metadata={"help": "Queries of a step."})
    max_steps: int = field(default=800, metadata={"help": "Steps."})
    learning_rate: float = field(default=0.01, metadata={"help": "Adam's, falling to 0."})
    temperature: float = field(default=0.05, metadata={"help": "Divisor of the cosines."})
    deviation: float = field(
        default=0.3, metadata={"help": "Standard deviation of the first vectors, for an idf of 8."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of vectors, layers and batches."})


class Bags:
    """Texts as token ids, to be drawn by row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> None:
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        self.lengths = np.array([len(row) for row in ids])
        self.ends = np.cumsum(self.lengths)
        self.ids = torch.tensor(np.concatenate(ids))

    def __getitem__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [T] of these rows, and where each begins [B]."""
        lengths = self.lengths[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places = np.arange(lengths.sum()) + np.repeat(self.ends[rows] - lengths - starts, lengths)
        return self.ids[torch.from_numpy(places)].to(DEVICE), torch.from_numpy(starts).to(DEVICE)

    def frequencies(self, terms: int) -> torch.Tensor:
        """The number of texts with each term [terms]."""
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        pairs = np.unique(rows.astype(np.int64) * terms + self.ids.numpy())
        return torch.from_numpy(np.bincount(pairs % terms, minlength=terms))


def learn(
    queries: Bags, documents: Bags, positives: np.ndarray, shape: tuple[int, int], arguments: Arguments
) -> tuple[torch.Tensor, list[float]]:
    """Vectors of the terms [V, D], and the losses of the steps."""
    generator = np.random.default_rng(arguments.seed)
    idf = torch.log((len(documents.lengths) + 1) / (documents.frequencies(shape[0]) + 1)).float()
    vectors = torch.nn.Parameter((torch.randn(shape) * arguments.deviation * (idf / 8)[:, None]).to(DEVICE))
    optimizer = torch.optim.Adam([vectors], lr=arguments.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / arguments.max_steps)
    )
    losses = []
    for step in range(arguments.max_steps):
        rows = generator.choice(len(positives), min(arguments.batch_size, len(positives)), replace=False)
        rows = rows[np.unique(positives[rows], return_index=True)[1]]  # a document is the positive of one row
        asked, found = (
            normalize(embedding_bag(ids, vectors, starts, mode="mean"))
            for ids, starts in (queries[rows], documents[positives[rows]])
        )
        scores, labels = asked @ found.T / arguments.temperature, torch.arange(len(rows), device=DEVICE)
        loss = cross_entropy(scores, labels) + cross_entropy(scores.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(json.dumps({"step": step, "loss": round(losses[-1], 3)}), flush=True)
    return vectors.detach().cpu(), losses


def on_a_sphere(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of one length [V, D], whose first dimension takes what the others do not need.

    RMSNorm keeps such vectors as they are, and a weight of 0 in the first dimension leaves the given ones, less their
    least important direction and turned at random.
    """
    directions = torch.linalg.svd(vectors, full_matrices=False)[2][:-1]
    turned = vectors @ directions.T @ torch.linalg.qr(torch.randn(len(directions), len(directions)))[0]
    turned /= torch.quantile(turned.norm(dim=1), LONGEST)
    turned /= turned.norm(dim=1, keepdim=True).clamp(min=1)
    first = (1 - turned.square().sum(1)).clamp(min=0).sqrt()
    return torch.cat([first[:, None], turned], 1) * vectors.shape[1] ** 0.5


def backbone_of(vectors: torch.Tensor, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of these term vectors. Its layers are new and write little, yet enough to be seen to read both ways."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(on_a_sphere(vectors))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
        model.model.norm.weight[0] = 0
    return model


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(arguments.backbone)
    queries, documents = (pq.read_table(Path(arguments.data_dir) / f"{n}.parquet") for n in ("queries", "documents"))
    places = {key: place for place, key in enumerate(documents["document_id"].to_pylist())}
    config = AutoConfig.from_pretrained(arguments.backbone)
    if arguments.num_layers is not None:
        config.num_hidden_layers = arguments.num_layers
    vectors, losses = learn(
        Bags(tokenizer, queries["text"].to_pylist(), arguments.query_length),
        Bags(tokenizer, documents["text"].to_pylist(), arguments.document_length),
        np.array([places[key] for key in queries["positive"].to_pylist()]),
        (config.vocab_size, config.hidden_size),
        arguments,
    )
    with TemporaryDirectory() as backbone:
        backbone_of(vectors, config).save_pretrained(backbone)
        tokenizer.save_pretrained(backbone)
        lengths = {"query_length": arguments.query_length, "document_length": arguments.document_length}
        model = lion_st.build(
            backbone, "dense", dtype=torch.float32, pooling="mean", normalize=True, device="cpu", **lengths
        )
        lion_st.export(model, arguments.output_dir, overwrite=True, create_model_card=False)
    report = {
        "pairs": len(queries),
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "seconds": round(time.monotonic() - start, 1),
    }
    (Path(arguments.output_dir) / "start.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
