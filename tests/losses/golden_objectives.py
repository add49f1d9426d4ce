"""The golden models, batches and objectives, importable by the processes of a distributed test."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    SparseDistillKLDivLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from lion_st.losses import ContrastiveDistillationLoss, FlopsRegularizer, dot_scores, pairwise_dot_scores

# Of the dense paradigm, whose temperature is 0.01.
SCALE = {"sparse": 1.0, "dense": 100.0}
RELEASED = ("nce", "kldiv", "marginmse", "nce_kldiv")
OURS = ("nce_stock", "nce_ours")


class GoldenEncoder(nn.Module):
    """The paper's encoders in a few lines of plain torch."""

    def __init__(self, path: Path, paradigm: str) -> None:
        super().__init__()
        loader = LlamaForCausalLM if paradigm == "sparse" else LlamaModel
        self.llama = loader.from_pretrained(path, dtype=torch.float32)
        self.llama.config.is_causal = False
        self.paradigm = paradigm

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = dict(input_ids=features["input_ids"], attention_mask=mask, position_ids=positions)
        if self.paradigm == "sparse":
            logits = self.llama(**inputs).logits * self.llama.config.hidden_size**-0.25
            logits = logits.masked_fill(mask[:, :, None] == 0, -torch.inf)
            # One term's two largest logits differ by 2e-7, which rounding decides: the first of such a pair wins.
            first = (logits >= logits.amax(dim=1, keepdim=True) - 1e-6).int().argmax(dim=1, keepdim=True)
            return {"sentence_embedding": torch.log1p(F.relu(logits.gather(1, first).squeeze(1)))}
        hidden = F.normalize(self.llama(**inputs).last_hidden_state, dim=-1) * mask[:, :, None]
        return {"sentence_embedding": hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)}

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.llama.named_parameters()}


def texts(batch: dict[str, Tensor], name: str, rows: slice | None = None) -> dict[str, Tensor]:
    return {key: batch[f"{name}.{key}"][rows or slice(None)].clone() for key in ("input_ids", "attention_mask")}


def training_batch(case: Path, objective: str, rank: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Columns (query, positive, negatives) and label of one rank's batch, as the objective reads it."""
    batch = load_file(case / "losses" / f"batch_rank{rank}.safetensors")
    queries = texts(batch, "q")
    if objective == "marginmse":
        label = batch["teacher_pos_scores"] - batch["teacher_neg_scores"]
        return [queries, texts(batch, "pos"), texts(batch, "neg")], label
    if objective == "kldiv":
        documents = [slice(column, None, 4) for column in range(4)]
    else:
        documents = [slice(0, 4), *(slice(4 + column, None, 3) for column in range(3))]
    return [queries, *(texts(batch, "c", rows) for rows in documents)], batch["teacher_scores"]


def objective_loss(model: nn.Module, objective: str, paradigm: str) -> nn.Module:
    """The loss of one golden objective; `OURS` are contrastive losses with the default, invariant scaling."""
    sparse, scale = paradigm == "sparse", SCALE[paradigm]
    pairwise = partial(pairwise_dot_scores, scale=scale)
    if objective == "nce_stock":
        ranking = SparseMultipleNegativesRankingLoss if sparse else MultipleNegativesRankingLoss
        loss = ranking(model, scale=scale, similarity_fct=dot_scores, gather_across_devices=True)
    elif objective in ("nce", "nce_ours"):
        loss = ContrastiveDistillationLoss(
            model,
            contrastive_weight=1.0,
            distillation_weight=0.0,
            scale=scale,
            released_scaling=objective == "nce",
        )
    elif objective == "nce_kldiv":
        loss = ContrastiveDistillationLoss(model, scale=scale, released_scaling=True)
    elif objective == "kldiv":
        loss = (SparseDistillKLDivLoss if sparse else DistillKLDivLoss)(model, pairwise, temperature=1.0)
    else:
        loss = (SparseMarginMSELoss if sparse else MarginMSELoss)(model, similarity_fct=pairwise)
    if not sparse:
        return loss
    gathered = dict(released_scaling=objective in ("nce", "nce_kldiv"))
    local = dict(gather_across_devices=False)
    settings = local if objective in ("kldiv", "marginmse") else gathered
    columns = {"kldiv": 4, "marginmse": 2}.get(objective, 1)
    return SpladeLoss(
        model,
        loss,
        # The released KL objective adds up the FLOPS of its four columns; the regularizer takes their mean.
        document_regularizer_weight=0.04 * (4 if objective == "kldiv" else 1),
        query_regularizer_weight=0.05,
        document_regularizer=FlopsRegularizer(model, columns=columns, **settings),
        query_regularizer=FlopsRegularizer(model, **settings),
    )


def total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.stack(list(loss.values())).sum() if isinstance(loss, dict) else loss
