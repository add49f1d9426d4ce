"""The sparse head: one weight per vocabulary term and text, without a logit per token ever held in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Module
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import select_max_active_dims
from torch import nn

from lion_st.kernels import check_finite, splade_pool
from lion_st.modules.lion_transformer import LionTransformer
from lion_st.modules.query_table import Head
from lion_st.modules.soft_top_k import hard_k, soft_top_k

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from typing_extensions import Self

LEARNED_FILE = "learned_sparsity.safetensors"
LEARNED = ("thresholds", "log_top_k")
Activation: TypeAlias = Literal["log1p", "double_log1p"]


class SpladeHead(Head):
    """Max-pools the LM head's logits over a text's real tokens: log1p(relu(max_i h_i . W * scale)), [B, V].

    Once the model is put together the head finds the backbone's LM head, tied or untied, and reads it at every call, so
    that nothing is copied, saved twice or given to the optimizer twice. Its own are only weights that are asked for:

    - `learn_thresholds`: a threshold theta_v of each term, log1p(relu(max_i h_i . W_v * scale - theta_v)), which is a
      bias of the LM head. One below 0 admits terms that the LM head alone would not.
    - `learn_top_k`: k for queries and k for documents, see `lion_st.modules.soft_top_k`: in training the gradient of a
      soft gate, in what comes out a limit like any other, rounded to a whole number.

    Args:
        scale: Factor on the logits. The default, `hidden_size ** -0.25`, is the paper's; 1.0 is that of CSPLADE and
            LACONIC.
        max_active_dims: Keep this many of the largest terms of each text when encoding. None keeps all. Training is
            never truncated.
        query_max_active_dims: The same for `task="query"` alone (`model.encode_query`).
        document_max_active_dims: The same for `task="document"` alone (`model.encode_document`).
        activation: `"log1p"` as above, or `"double_log1p"`, log1p once more, which flattens large weights. It grows
            with its argument, so that the maximum is taken before it all the same.

    Raises:
        ValueError: If a limit is not a positive integer, if the activation is none of these, if the backbone has no LM
            head that can be read, if its own logits are not what this head computes, or if it has no final norm that a
            scale other than 1 could be folded into on the disk.

    References:
        Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025, section 3.1:
        https://arxiv.org/abs/2502.15526. Formal et al., SPLADE v2, 2021: https://arxiv.org/abs/2109.10086. Geng et al.,
        2025: https://arxiv.org/abs/2504.14839 (the double log1p).

    Example:
        ::

            transformer = LionTransformer(backbone, transformer_task="text-generation")
            model = SentenceTransformer(modules=[transformer, SpladeHead()])
            model.encode_query("what is a lion")  # [V]
    """

    config_keys: list[str] = [  # noqa: RUF012
        "scale",
        "max_active_dims",
        "query_max_active_dims",
        "document_max_active_dims",
        "activation",
    ]
    forward_kwargs: set[str] = {"task", "max_active_dims", "output"}  # noqa: RUF012
    folds_scale = True  # into the final norm, on disk; what else reads the states must not see it

    def __init__(
        self,
        scale: float | None = None,
        max_active_dims: int | None = None,
        query_max_active_dims: int | None = None,
        document_max_active_dims: int | None = None,
        activation: Activation = "log1p",
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {activation!r}.")
        limits = {
            "max_active_dims": max_active_dims,
            "query_max_active_dims": query_max_active_dims,
            "document_max_active_dims": document_max_active_dims,
        }
        for name, limit in limits.items():
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {limit!r}.")
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(
                f"scale must be positive and finite, got {scale!r}; leave it out for hidden_size ** -0.25."
            )
        self.scale = scale
        self.max_active_dims = max_active_dims
        self.query_max_active_dims = query_max_active_dims
        self.document_max_active_dims = document_max_active_dims
        self.activation: Activation = activation
        self.thresholds: nn.Parameter | None = None  # [V]
        self.log_top_k: nn.Parameter | None = None  # [2], of queries and documents
        self.prunes = True  # in training, by the k that is learned
        # A tuple keeps the sibling out of this module's own parameters.
        self._siblings: tuple[LionTransformer, ...] = ()

    def on_model_ready(self, model: BaseModel) -> None:
        """Find the backbone's LM head and check that the head's logits are the backbone's own."""
        transformer = model[0]
        if not isinstance(transformer, LionTransformer):
            raise ValueError(
                f"SpladeHead reads the LM head of a LionTransformer, but the first module is a "
                f"{type(transformer).__name__}. Build the model with lion_st.build or lion_st.load."
            )
        self._siblings = (transformer,)
        if self.scale is None:
            self.scale = transformer.get_embedding_dimension() ** -0.25
        if self.scale != 1.0:
            _ = transformer.final_norm  # into which the scale is folded when the model is saved
        if not transformer.checked.get("lm_head"):
            transformer.verify_lm_head()

    @property
    def transformer(self) -> LionTransformer:
        """The backbone whose LM head this head reads."""
        if not self._siblings:
            raise RuntimeError("SpladeHead is not part of a model yet; put it behind a LionTransformer in one.")
        return self._siblings[0]

    def forward(
        self,
        features: dict[str, Any],
        task: str | None = None,
        max_active_dims: int | None = None,
        output: Literal["dense", "sparse"] = "dense",
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Writes `features["sentence_embedding"]` [B, V] from the last hidden states.

        Args:
            features: `"token_embeddings"` [B, L, D] with `"attention_mask"` [B, L], or packed [1, T, D] with
                `"cu_seq_lens_q"` [B + 1].
            task: `"query"` or `"document"`, which picks the limit of active terms.
            max_active_dims: Limit for this call, in place of the saved one.
            output: `"dense"` rows, or `"sparse"` for a CSR tensor that never was dense (no gradient).

        Raises:
            ValueError: If the model is in evaluation mode without gradients, as when it encodes, and a weight is NaN or
                infinite. Training is not checked, which would wait for the GPU at every step.
        """
        lm_head = self.transformer.lm_head
        limit = None if self.training else max_active_dims or self.active_dims(task or features.get("task"))
        embeddings = splade_pool(
            features["token_embeddings"],
            lm_head.weight,
            features.get("attention_mask"),
            scale=(self.scale or 1.0) * lm_head.multiplier,
            bias=self._bias(lm_head.bias),
            softcap=lm_head.softcap,
            output=output,
            k=limit if output == "sparse" else None,
            cu_seqlens=features.get("cu_seq_lens_q"),
        )
        if self.activation == "double_log1p":
            embeddings = _log1p(embeddings)
        if self.log_top_k is not None and self.training and self.prunes:
            is_query = (task or features.get("task")) == "query"
            embeddings = soft_top_k(embeddings, self.log_top_k[0 if is_query else 1])
        encodes = not self.training and not torch.is_grad_enabled()
        if encodes and output == "dense" and not _is_recorded(embeddings):
            check_finite(embeddings)
        if limit is not None and output == "dense":
            embeddings = select_max_active_dims(embeddings, max_active_dims=limit)
        features["sentence_embedding"] = embeddings
        return features

    def active_dims(self, task: str | None = None) -> int | None:
        """The limit of active terms for a task, None for no limit."""
        by_task = {"query": self.query_max_active_dims, "document": self.document_max_active_dims}
        if self.log_top_k is not None:
            by_task = {name: hard_k(log_k) for name, log_k in zip(by_task, self.log_top_k, strict=True)}
        return by_task.get(task or "") or self.max_active_dims

    def learn_thresholds(self) -> None:
        """Have a threshold of each term learned, from 0 or from those that there are."""
        if self.thresholds is None:
            weight = self.transformer.lm_head.weight
            self.thresholds = nn.Parameter(torch.zeros(len(weight), device=weight.device))
        self.thresholds.requires_grad_(True)

    def learn_top_k(self, query: int, document: int) -> None:
        """Have the limits of active terms learned, from these numbers; they should be below those that texts have."""
        limits = torch.tensor([query, document], dtype=torch.float32, device=self.transformer.lm_head.weight.device)
        self.log_top_k = nn.Parameter(limits.log())

    def freeze_top_k(self) -> None:
        """Make whole numbers of limits that were learned, which are settings from then on."""
        if self.log_top_k is not None:
            self.query_max_active_dims, self.document_max_active_dims = map(self.active_dims, ("query", "document"))
            self.log_top_k = None

    def of_result(self, scale: float) -> SpladeHead:
        """A head as it is saved at the end of training, with the same weights: limits that are whole numbers."""
        head = SpladeHead(**self.get_config_dict() | {"scale": scale})
        head.thresholds, head.query_table, head.log_top_k = self.thresholds, self.query_table, self.log_top_k
        head.freeze_top_k()
        return head

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the configuration, and the weights that are the head's own."""
        super().save(output_path, *args, **kwargs)
        own = {name: one.detach().cpu() for name in LEARNED if (one := getattr(self, name)) is not None}
        if own:
            save_file(own, Path(output_path) / LEARNED_FILE)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> Self:
        """Load the configuration, and the weights that are the head's own."""
        head = super().load(model_name_or_path, *args, **kwargs)
        for name, weight in head.own_weights(model_name_or_path, LEARNED_FILE, kwargs).items():
            if name not in LEARNED:
                raise ValueError(f"{LEARNED_FILE} in {model_name_or_path!r} holds {name!r}, which is not known here.")
            setattr(head, name, nn.Parameter(weight))
        return head

    def _bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        if self.thresholds is None:
            return bias
        return -self.thresholds if bias is None else bias - self.thresholds

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the head, the usual activation left out as before there were others."""
        config = super().get_config_dict()
        if self.activation == "log1p":
            del config["activation"]
        return config

    def get_embedding_dimension(self) -> int:
        """Width V of the vectors, the rows of the LM head."""
        return self.transformer.lm_head.weight.shape[0]

    def stock_modules(self) -> list[Module]:
        """The sentence-transformers module that pools a causal LM's own logits the same way, at scale 1."""
        function: Literal["relu", "log1p_relu"] = "relu" if self.activation == "log1p" else "log1p_relu"
        return [SpladePooling("max", function, embedding_dimension=self.get_embedding_dimension())]


def _log1p(rows: torch.Tensor) -> torch.Tensor:
    """log1p of dense rows or of a CSR tensor, which keeps zeros zero."""
    if rows.layout != torch.sparse_csr:
        return rows.log1p()
    parts = (rows.crow_indices(), rows.col_indices(), rows.values().log1p())
    return torch.sparse_csr_tensor(*parts, size=rows.shape, check_invariants=False)


def _is_recorded(tensor: torch.Tensor) -> bool:
    """Whether torch.compile or a CUDA graph records what runs, and no value can be looked at."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
