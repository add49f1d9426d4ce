"""Query vectors that are looked up by token, trained together with the encoder of the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules import Module
from sentence_transformers.util import load_file_path
from torch import Tensor, nn

from lion_st.files import hub_options
from lion_st.modules.tokenizing import check_texts, exclusive_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Self

TABLE_FILE = "query_table.safetensors"


class QueryTable(nn.Module):
    """Encodes queries without a network: by a weight, or a vector, for each of their tokens.

    Sparse: a query's vector holds the weight of each token that is there, however often; weights below 0 count as 0.
    Dense: it is the mean of the tokens' vectors. Special tokens do not count. These are what the stock modules
    SparseStaticEmbedding and StaticEmbedding compute.

    Args:
        weight: [V] or [V, D], in float32.
        trainable: Whether it is learned.

    References:
        Ma et al., LightRetriever, 2025: https://arxiv.org/abs/2505.12260. Geng et al., Towards Competitive Search
        Relevance For Inference-Free Learned Sparse Retrievers, 2024: https://arxiv.org/abs/2411.04403.
    """

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        super().__init__()
        if weight.ndim not in (1, 2) or not bool(weight.isfinite().all()):
            raise ValueError(f"A query table is finite and of shape [V] or [V, D], got {tuple(weight.shape)}.")
        self.weight = nn.Parameter(weight.detach().float().clone(), requires_grad=trainable)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors [B, V] or [B, D] of token ids [B, L] without special tokens, and their mask."""
        mask = attention_mask.to(self.weight)
        if self.weight.ndim == 2:
            summed = (nn.functional.embedding(input_ids, self.weight) * mask[..., None]).sum(dim=1)
            return summed / mask.sum(dim=1, keepdim=True).clamp(min=1)
        present = mask.new_zeros(len(input_ids), len(self.weight)).scatter_reduce_(1, input_ids, mask, "amax")
        return present * self.weight.relu()


def query_features(
    transformer: Any, texts: Sequence[Any], prompt: str | None = None, max_length: int | None = None
) -> dict[str, Any]:
    """What a query table reads of N queries: token ids and mask [N, L], without special tokens."""
    check_texts(texts)
    with exclusive_tokenizer():
        encoded = transformer.tokenizer(
            [f"{prompt or ''}{text}" for text in texts],
            padding=True,
            truncation=True,
            max_length=transformer.token_limit("query", max_length),
            add_special_tokens=False,
            return_tensors="pt",
        )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


class Head(Module):
    """The last module of a model, whose queries may be looked up in a table in place of being encoded.

    Attributes:
        query_table: The table; None where the model encodes queries as it does documents.
    """

    query_table: QueryTable | None

    def __init__(self) -> None:
        super().__init__()
        self.query_table = None

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the configuration, and the table if there is one; other weights are the backbone's."""
        self.save_config(output_path)
        if self.query_table is not None:
            weight = self.query_table.weight.detach().cpu().contiguous()
            save_file({"weight": weight}, Path(output_path) / TABLE_FILE)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Self:
        """Load the configuration, and the table if there is one."""
        module = super().load(model_name_or_path, *args, **kwargs)
        if weights := module.own_weights(model_name_or_path, TABLE_FILE, kwargs):
            module.query_table = QueryTable(weights["weight"])
        return module

    @staticmethod
    def own_weights(source: str, name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors in a file of a module's own folder, none if it is not there."""
        file = load_file_path(source, name, **hub_options(options))
        return {} if file is None else load_file(file)
