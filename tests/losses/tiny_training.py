"""A tiny float64 sparse encoder and a global batch, importable by the processes of a distributed test."""

import torch
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch import Tensor, nn

from lion_st.losses import (
    CachedContrastiveDistillationLoss,
    ContrastiveDistillationLoss,
    DfFlopsRegularizer,
    FlopsRegularizer,
    HybridLoss,
    IdfFlopsRegularizer,
    L1Regularizer,
    SparsePart,
    TargetRegularizer,
    TeacherTerms,
    dot_scores,
    maxsim_scores,
)

VOCABULARY, WIDTH, LENGTH, NEGATIVES = 50, 24, 6, 2


class TinyEncoder(nn.Module):
    """Bag of token embeddings -> WIDTH non-negative term weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.terms = nn.Linear(8, WIDTH, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        mask = features["attention_mask"][:, :, None]
        tokens = self.embedding(features["input_ids"]) * mask
        return {"sentence_embedding": self.terms(tokens.sum(dim=1) / mask.sum(dim=1)).relu().log1p()}


class TinyTokenEncoder(TinyEncoder):
    """Token embeddings -> a vector [L, WIDTH] of each token, no more of them than the longest text has."""

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        mask = features["attention_mask"].bool()
        longest = int(mask.sum(dim=1).max())
        vectors = self.terms(self.embedding(features["input_ids"])) * mask[:, :, None]
        found = {"token_embeddings": vectors[:, :longest], "attention_mask": mask[:, :longest]}
        return found | {"sentence_embedding": found["token_embeddings"]}


def encoder_of(name: str) -> TinyEncoder:
    """The encoder that a loss of `LOSSES` is for."""
    return TinyTokenEncoder() if name.startswith("multi_vector") else TinyEncoder()


def columns_and_labels(rows: slice, batch: int = 6) -> tuple[list[dict[str, Tensor]], Tensor]:
    """`rows` of a global batch of queries, positives and two columns of negatives, with teacher scores."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for _ in range(2 + NEGATIVES):
        lengths = torch.randint(1, LENGTH + 1, (batch, 1), generator=generator)
        ids = torch.randint(VOCABULARY, (batch, LENGTH), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        columns.append({"input_ids": ids[rows], "attention_mask": mask[rows]})
    labels = torch.randn(batch, 1 + NEGATIVES, generator=generator, dtype=torch.float64)
    return columns, 3 * labels[rows]


LOSSES = {
    "dense": lambda model: ContrastiveDistillationLoss(model, scale=5.0),
    "margin_mse": lambda model: ContrastiveDistillationLoss(model, distillation="margin_mse", distillation_weight=0.1),
    "contrastive alone": lambda model: ContrastiveDistillationLoss(model, distillation_weight=0.0),
    "distillation alone": lambda model: ContrastiveDistillationLoss(model, contrastive_weight=0.0),
    "margin_mse and kl": lambda model: ContrastiveDistillationLoss(model, distillation="margin_mse_kl"),
    "listwise": lambda model: ContrastiveDistillationLoss(model, distillation="listwise", contrastive_weight=0.0),
    "ranknet": lambda model: ContrastiveDistillationLoss(model, distillation="ranknet"),
    "cached listwise": lambda model: CachedContrastiveDistillationLoss(
        model, distillation="listwise", mini_batch_size=2
    ),
    "cached": lambda model: CachedContrastiveDistillationLoss(model, scale=5.0, mini_batch_size=1),
    "sparse": lambda model: splade(SpladeLoss, model),
    "multi_vector": lambda model: ContrastiveDistillationLoss(model, scale=0.5),
    "multi_vector cached": lambda model: CachedContrastiveDistillationLoss(model, scale=0.5, mini_batch_size=1),
    "multi_vector contrastive": lambda model: stock_multi_vector(MultiVectorMultipleNegativesRankingLoss, model),
    "multi_vector contrastive cached": lambda model: stock_multi_vector(
        CachedMultiVectorMultipleNegativesRankingLoss, model, mini_batch_size=1
    ),
    "hybrid": lambda model: hybrid(SpladeLoss, model),
    "cached hybrid": lambda model: hybrid(CachedSpladeLoss, model, mini_batch_size=1),
    "cached sparse": lambda model: splade(CachedSpladeLoss, model, mini_batch_size=1),
    "several teachers": lambda model: ContrastiveDistillationLoss(model, teachers=TEACHERS),
    "cached several teachers": lambda model: CachedContrastiveDistillationLoss(
        model, teachers=TEACHERS, mini_batch_size=1
    ),
}
TEACHERS = TeacherTerms([1.0, 0.5], separate=True, by_agreement=True)
REGULARIZERS = {
    "df_flops": lambda model: DfFlopsRegularizer(model, alpha=0.5, beta=2.0),
    "idf_flops": lambda model: IdfFlopsRegularizer(model, torch.linspace(1.0, 4.0, WIDTH)),
    "l1": L1Regularizer,
    "target": lambda model: TargetRegularizer(model, target=5.0, multiplier=1.0),
}
for name, make in REGULARIZERS.items():
    LOSSES[name] = lambda model, make=make: splade(SpladeLoss, model, make(model))
    LOSSES[f"cached {name}"] = lambda model, make=make: splade(CachedSpladeLoss, model, make(model), mini_batch_size=1)


def hybrid(kind: type[SpladeLoss], model: nn.Module, **settings) -> SpladeLoss:
    """The joint loss, with the last 3 dimensions in the place of a dense vector."""
    joint = HybridLoss(
        SparseMultipleNegativesRankingLoss(model, similarity_fct=dot_scores, gather_across_devices=True),
        ContrastiveDistillationLoss(model, scale=5.0),
        dense_dimension=3,
        dense_weight=0.4,
    )
    flops = SparsePart(FlopsRegularizer(model), 3)
    return kind(model, joint, 0.7, 0.3, document_regularizer=flops, query_regularizer=flops, **settings)


class stock_multi_vector(nn.Module):
    """A contrastive loss of sentence-transformers with the scores of the recipes."""

    def __init__(self, kind: type[nn.Module], model: nn.Module, **settings) -> None:
        super().__init__()
        self.loss = kind(model, scale=0.5, similarity_fct=maxsim_scores, gather_across_devices=True, **settings)

    def forward(self, columns: list[dict[str, Tensor]], labels: Tensor) -> dict[str, Tensor]:
        return {"contrastive_loss": self.loss(columns)}


def splade(
    kind: type[SpladeLoss], model: nn.Module, document_regularizer: nn.Module | None = None, **settings
) -> SpladeLoss:
    return kind(
        model,
        ContrastiveDistillationLoss(model),
        document_regularizer_weight=0.04,
        query_regularizer_weight=0.05,
        document_regularizer=document_regularizer or FlopsRegularizer(model, columns=1 + NEGATIVES),
        query_regularizer=FlopsRegularizer(model),
        **settings,
    )


def value_and_gradients(loss: nn.Module, encoder: TinyEncoder, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    columns, labels = columns_and_labels(rows)
    if getattr(loss, "distillation", None) == "listwise":
        labels = labels.abs()  # grades
    if getattr(loss, "teachers", None) is not None:
        labels = torch.stack([labels, labels.roll(1, dims=1)], dim=1)  # [B, teachers, 1 + n]
    value = torch.stack(list(loss(columns, labels).values())).sum()
    value.backward()
    return value.detach(), {name: parameter.grad for name, parameter in encoder.named_parameters()}
