"""The model classes of lion_st: fast modules in memory, stock modules on disk."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Dense, Module, Normalize, Router
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from sentence_transformers.util import batch_to_device, fullname, select_max_active_dims
from torch import nn
from tqdm.auto import trange

from lion_st.checkpoints import STOCK_TRANSFORMER, atomic_files_in, describe_as_written, write_stock_checkpoint
from lion_st.hooks import has_adapter, write_model_card
from lion_st.modules import HybridHead, LionTransformer, LlamaPooling, MultiVectorHead, SpladeHead
from lion_st.modules.llama_pooling import PoolingName
from lion_st.modules.query_table import QueryTable, query_features
from lion_st.modules.tokenizing import check_texts
from lion_st.wrong_class import move_transformer

# The module classes of ours that a checkpoint may ask for.
LION_MODULES: dict[str, type[Module]] = {
    fullname(kind): kind for kind in (LionTransformer, SpladeHead, LlamaPooling, MultiVectorHead, HybridHead)
}


class LionModel(BaseModel):
    """What the model classes share: fast modules on loading, stock modules on disk."""

    _saved_limit: int | None = None
    _saved_similarity: str | None = None
    _encoded_value = "sentence_embedding"  # what `encode` gives unless another value is asked for

    def _load_module_class_from_ref(self, class_ref: str, *args: Any, **kwargs: Any) -> type:
        if class_ref == STOCK_TRANSFORMER:
            return LionTransformer
        if class_ref in LION_MODULES:
            return LION_MODULES[class_ref]
        if class_ref.startswith("lion_st."):
            raise ValueError(
                f"The checkpoint asks for the module {class_ref!r}; lion_st has {', '.join(LION_MODULES)}. See whether "
                "a newer lion_st wrote it, and load checkpoints from sources you trust."
            )
        return super()._load_module_class_from_ref(class_ref, *args, **kwargs)

    def _load_config_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        modules, _ = super()._load_config_modules(model_name_or_path, *args, **kwargs)
        fast = _fast_modules(list(modules.values()), model_name_or_path, self._saved_limit)  # type: ignore
        _warn_of_similarity(self._saved_similarity, fast[-1], model_name_or_path)
        return OrderedDict((str(position), module) for position, module in enumerate(fast)), {}

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        # The head has it, where a limit for queries or for documents goes before it.
        self._saved_limit = model_config.get("max_active_dims")
        self._saved_similarity = model_config.get("similarity_fn_name")
        super()._parse_model_config({name: value for name, value in model_config.items() if name != "max_active_dims"})

    def _get_model_type(self, *args: Any, **kwargs: Any) -> str:
        # Each class reads checkpoints of all types: the modules decide what a model is.
        return self.model_type

    def _load_default_modules(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        if not Path(model_name_or_path).is_dir():
            raise FileNotFoundError(
                f"{model_name_or_path!r} is neither a folder nor a Hub repository with a modules.json that can be "
                "reached. Check the name, the revision, the token and the connection."
            )
        raise ValueError(
            f"{model_name_or_path!r} is not a saved retriever (it has no modules.json). Make one of a backbone with "
            'lion_st.build(backbone, "sparse", "dense", "multi_vector" or "hybrid"), or load a bare adapter with '
            "lion_st.load(path, paradigm=...)."
        )

    @property
    def query_table(self) -> QueryTable | None:
        """What encodes queries in place of the model; None where the model does."""
        return getattr(self[-1], "query_table", None)

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Tokenize texts; queries without special tokens, where a table encodes them."""
        if inputs and kwargs.get("task") == "query" and self.query_table is not None:
            return query_features(self[0], inputs, prompt, kwargs.get("max_length"))
        return super().preprocess(inputs, prompt=prompt, **kwargs)

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the modules; all heads take the states of packed texts, which are never padded again.

        Raises:
            ValueError: If it trains, has a table for queries or learns limits of terms, and no task is named.
        """
        table, task = self.query_table, kwargs.get("task") or input.get("task")
        learns_limits = getattr(self[-1], "log_top_k", None) is not None
        tells_tasks_apart = self.training and torch.is_grad_enabled() and (table is not None or learns_limits)
        if tells_tasks_apart and task not in ("query", "document"):
            raise ValueError(
                f"This model treats queries otherwise than documents, and trains on a text of the task {task!r}: name "
                "the task of each column with router_mapping of the training arguments."
            )
        if table is not None and task == "query":
            vectors = table(input["input_ids"], input["attention_mask"])
            if kwargs.get("max_active_dims") is not None:
                vectors = select_max_active_dims(vectors, max_active_dims=kwargs["max_active_dims"])
            return input | {
                "sentence_embedding": vectors.to_sparse_csr() if kwargs.get("output") == "sparse" else vectors
            }
        # What stands in for the transformer's own method, as in AdaptiveLayerLoss, takes the features alone.
        packed = {} if "forward" in vars(self[0]) else {"packed_states": True}
        return super().forward(input, **(packed | kwargs))

    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        # Batches are sorted by length: only here does a position in an error mean the caller's.
        check_texts(inputs)
        if kwargs.get("output_value", self._encoded_value) != self._encoded_value:
            kwargs["packed_states"] = False  # the states themselves are asked for, text by text
        return super()._inference(inputs, **kwargs)

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Refuse to leave the prompt's tokens out of a vector, which no head of lion_st does.

        Raises:
            ValueError: If `include_prompt` is False.
        """
        if not include_prompt:
            raise ValueError(
                "The heads of lion_st pool over the prompt's tokens too: include_prompt=False has no effect. Pool with "
                "sentence-transformers' Pooling behind a LionTransformer to leave them out."
            )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Have the backward pass recompute the layers' activations; see transformers' method of this name."""
        model: Any = self.transformers_model
        model.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def tie_weights(self) -> None:
        """Tie the LM head to the embeddings again if the configuration says so, as after sharding."""
        model: Any = self.transformers_model
        model.tie_weights()

    def save(
        self,
        path: str,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Save the model so that `lion_st.load` restores it to the bit.

        With full weights the folder is a stock checkpoint, which `SentenceTransformer(path)` loads without lion_st;
        but not if it has limits of active terms that stock modules do not hold, a table that encodes queries, or two
        vectors of a text, which would be dropped without a word.
        With an adapter attached it holds the adapter alone, which only `lion_st.load` reads: stock would take the
        base for a causal model, so it is made to refuse. `lion_st.export` turns that into a stock checkpoint.

        All files are written beside the folder first and moved into it together, so that a failure, such as a full
        disk, leaves an earlier checkpoint as it was.

        Args:
            path: Folder, made if needed.
            model_name: Name for the model card.
            create_model_card: Write a README.md.
            train_datasets: Accepted for compatibility with sentence-transformers.
            safe_serialization: Only True; pickled weights are never written.

        Raises:
            ValueError: If `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would pickle the weights; Lion checkpoints are safetensors.")
        with atomic_files_in(Path(path)) as folder:
            if has_adapter(self.transformers_model):
                super().save(str(folder), model_name, create_model_card, train_datasets)
                if self.model_type != "SentenceTransformer":
                    move_transformer(folder, self.model_type)
            else:
                write_stock_checkpoint(self, folder, model_type=self.model_type, resume=True, with_limits=True)
                if create_model_card:
                    write_model_card(self, str(folder), model_name)
                    describe_as_written(folder, self, self.model_type)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """Push the model as `save` writes it; `lion-st publish` adds a measured card and the other class's revision.

        Raises:
            ValueError: If it is an adapter of a local base, whose path would be published and which nobody else has.
        """
        if has_adapter(self.transformers_model):
            base = str(getattr(self.transformers_model, "name_or_path", ""))
            if base and Path(base).exists():
                raise ValueError(
                    f"The adapter's base is {base!r} on this machine, which nobody else has. Push what lion_st.export "
                    "writes, with the adapter merged, or train on a base that the Hub has."
                )
        return super().push_to_hub(repo_id, *args, **kwargs)


class LionSentenceTransformer(LionModel, SentenceTransformer):
    """A Lion retriever that returns dense rows: [B, V] floats if sparse, [B, D] if dense, [B, V + D] if hybrid."""

    def _inference(self, inputs: list[Any], **kwargs: Any) -> Any:
        if isinstance(self[-1], SpladeHead):
            refuse_truncation(kwargs.get("truncate_dim"))
        if kwargs.get("output_value") == "token_embeddings":  # stock cuts padding off the end alone
            rows: Any = super()._inference(inputs, **(kwargs | {"output_value": None}))
            return [row["token_embeddings"][row["attention_mask"].bool()] for row in rows]
        return super()._inference(inputs, **kwargs)


class LionMultiVectorEncoder(LionModel, MultiVectorEncoder):  # type: ignore[misc]
    """A Lion retriever of late interaction, which returns for each text the vectors of its tokens, [L, D] floats."""

    _encoded_value = "token_embeddings"


class LionSparseEncoder(LionModel, SparseEncoder):
    """A sparse Lion retriever that returns sparse tensors [B, V], which never were dense rows."""

    def _inference(self, inputs: list[str], **kwargs: Any) -> Any:
        if not kwargs["convert_to_sparse_tensor"] or not inputs:
            return super()._inference(inputs, **kwargs)
        check_texts(inputs)
        del kwargs["convert_to_sparse_tensor"]
        return self._sparse_rows(inputs, **kwargs)

    def _sparse_rows(
        self,
        inputs: list[str],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        save_to_cpu: bool,
        max_active_dims: int | None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        device = self._resolve_inference_device(device)
        self.eval()
        longest_first = sorted(range(len(inputs)), key=lambda position: -len(inputs[position]))
        indices, values = [], []
        for start in trange(0, len(inputs), batch_size, desc="Batches", disable=not show_progress_bar):
            positions = longest_first[start : start + batch_size]
            features = self.preprocess([inputs[position] for position in positions], prompt=prompt, **kwargs)
            with torch.inference_mode():
                rows = self(
                    batch_to_device(features, device), output="sparse", max_active_dims=max_active_dims, **kwargs
                )["sentence_embedding"]
            if save_to_cpu:
                rows = rows.cpu()
            numbers = torch.tensor(positions, device=rows.device)
            row_indices = numbers.repeat_interleave(rows.crow_indices().diff())
            indices.append(torch.stack([row_indices, rows.col_indices()]))
            values.append(rows.values())
        size = (len(inputs), rows.shape[1])
        return torch.sparse_coo_tensor(
            torch.cat(indices, dim=1), torch.cat(values), size, check_invariants=False
        ).coalesce()


def _warn_of_similarity(saved: str | None, head: Module, source: str) -> None:
    """Warn if a checkpoint compares vectors otherwise than by inner products, and they are not all of length 1."""
    if saved in ("cosine", "euclidean", "manhattan") and not getattr(head, "normalize", False):
        warnings.warn(
            f"{source!r} says that its vectors are compared by {saved!r}, and lion_st compares them by inner products, "
            "which rank otherwise unless all vectors are of length 1: give it a Normalize module at its end "
            "(normalize=True of lion_st.build), or the similarity 'dot' that it was trained for.",
            stacklevel=2,
        )


def refuse_truncation(truncate_dim: int | None) -> None:
    """Raise a ValueError if sparse vectors were to be truncated as dense ones are."""
    if truncate_dim is not None:
        raise ValueError(
            f"truncate_dim={truncate_dim} would keep the first terms of the vocabulary, which are mostly zero in a "
            "sparse vector. Set model[1].max_active_dims to keep each text's heaviest terms."
        )


def _fast_modules(modules: list[Module], source: str, max_active_dims: int | None) -> list[Module]:
    """The Lion modules that compute what a checkpoint's modules do."""
    match modules:
        case [Router()]:
            raise ValueError(
                f"{source!r} is a Router, with an encoder for queries and another for documents, of stock modules "
                "already: lion_st.encoding.load_encoder opens it, and `lion-st publish --folder` uploads it with its "
                "README.md. To change the model, use the checkpoint that it was made of."
            )
        case [*computing, WeightedLayerPooling(embedding_dimension=None)]:  # see lion_st.wrong_class
            return _fast_modules(computing, source, max_active_dims)
        case [LionTransformer(), SpladeHead() | LlamaPooling() | MultiVectorHead()]:
            return modules
        case [
            LionTransformer() as transformer,
            Dense(
                module_input_name="token_embeddings",
                module_output_name="token_embeddings",
                activation_function=nn.Identity(),
                bias=False,
                use_residual=False,
            ) as dense,
            MultiVectorMask() as mask,
            Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings"),
        ]:
            return [transformer, MultiVectorHead.of_stock(dense, mask)]
        case [LionTransformer() as transformer, SpladePooling(pooling_strategy="max", activation_function=function)]:
            activation = "log1p" if function == "relu" else "double_log1p"
            saved = {"scale": 1.0, "max_active_dims": max_active_dims, "activation": activation}
            return [transformer, SpladeHead(**(saved | transformer.resumed_head))]
        case [
            LionTransformer(),
            *pooling,
            Normalize(module_input_name="sentence_embedding", module_output_name="sentence_embedding"),
        ]:
            before: Any = _fast_modules([modules[0], *pooling], source, max_active_dims)[1]
            return [modules[0], LlamaPooling(before.embedding_dimension, before.mode, normalize=True)]
        case [
            LionTransformer(),
            Normalize(module_input_name="token_embeddings", module_output_name="token_embeddings"),
            Pooling(pooling_mode="mean", include_prompt=True),
        ]:
            mode: PoolingName = "mean_normalized"
        case [LionTransformer(), Pooling(pooling_mode="mean", include_prompt=True)]:
            mode = "mean"
        case [LionTransformer(), Pooling(pooling_mode="lasttoken", include_prompt=True)]:
            mode = "last_token"
        case _:
            kinds = " + ".join(type(module).__name__ for module in modules)
            raise ValueError(
                f"{source!r} is not a Lion checkpoint: its modules are {kinds}. Load it with SentenceTransformer."
            )
    return [modules[0], LlamaPooling(modules[0].get_embedding_dimension(), mode)]
