"""Lion models as classes of vLLM, which imports this module when `--hf-overrides` names one of them.

Apart from `vllm_plugin`, which needs no vLLM. Written for vLLM 0.32, whose interfaces change with its minor releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.model_executor.layers.pooler import DispatchPooler, Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.interfaces_base import VllmModelForPooling
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from lion_st.modules.tokenizing import first_tokens, require_room
from lion_st.serving.vllm_plugin import (
    Contract,
    TextsRequest,
    dense_rows,
    read_contract,
    read_request,
    require_servable,
    sparse_rows,
)


def _contract(vllm_config: Any) -> Contract:
    model = vllm_config.model_config
    return read_contract(model.model, lambda file: get_hf_file_to_dict(file, model.model, model.revision))


def _checked_contract(vllm_config: Any, is_sparse: bool) -> Contract:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    contract = _contract(vllm_config)
    ranks = {
        "tensor-parallel-size": parallel.tensor_parallel_size,
        "pipeline-parallel-size": parallel.pipeline_parallel_size,
    }
    divides = {  # switched on, vLLM warns alone, and ends with the first text that comes in pieces
        "enable-chunked-prefill": vllm_config.scheduler_config.enable_chunked_prefill,
        "enable-prefix-caching": vllm_config.cache_config.enable_prefix_caching,
    }
    require_servable(model.model, contract.pooling, is_sparse, model.hf_config, ranks, divides)
    return contract


def _lengths(metadata: Any) -> torch.Tensor:
    """Tokens of each text of a batch, which holds whole texts."""
    cursor = metadata.get_pooling_cursor()
    if cursor.is_partial_prefill():
        raise RuntimeError("A text was cut into pieces: start vLLM with --no-enable-chunked-prefill.")
    return cursor.num_scheduled_tokens_cpu


class SparsePooler(Pooler):
    """Hidden states of a batch to terms and weights, see `sparse_rows`.

    Args:
        lm_head: Of the model.
        contract: Of the checkpoint.
        config: Of transformers; its `max_active_dims`, if set, is how many terms a text keeps.
    """

    def __init__(self, lm_head: Any, contract: Contract, config: Any) -> None:
        super().__init__()
        self._shared = (lm_head,)  # in a tuple, so that its weight is not a parameter of two modules
        self.contract = contract
        self.terms: int = config.vocab_size  # vLLM pads the head with further rows
        self.limit: int | None = getattr(config, "max_active_dims", None)

    def get_supported_tasks(self) -> set[str]:
        """Name the task of requests that an IO processor makes, and one for requests without it, which get pairs."""
        return {"plugin", "token_classify"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor]:
        """Give [n, 2] of each text."""
        weight = self._shared[0].weight[: self.terms]
        return sparse_rows(hidden_states, _lengths(pooling_metadata), weight, self.contract.is_doubled, self.limit)


class DensePooler(Pooler):
    """Hidden states of a batch to vectors, see `dense_rows`.

    Args:
        contract: Of the checkpoint.
    """

    def __init__(self, contract: Contract) -> None:
        super().__init__()
        self.contract = contract

    def get_supported_tasks(self) -> set[str]:
        """Name the tasks of `/v1/embeddings` and of requests that an IO processor makes."""
        return {"embed", "plugin"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> torch.Tensor:
        """Give [B, D]."""
        return dense_rows(hidden_states, _lengths(pooling_metadata), self.contract.pooling, self.contract.normalize)


def _sparse(base: Any) -> Any:
    class Sparse(base, VllmModelForPooling):
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            contract = _checked_contract(vllm_config, is_sparse=True)
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            if not isinstance(self.lm_head.quant_method, UnquantizedEmbeddingMethod):
                raise ValueError(
                    f"The LM head of {vllm_config.model_config.model!r} is quantised, and its weights are read as they "
                    "are: leave it out of the quantisation."
                )
            pooler = SparsePooler(self.lm_head, contract, vllm_config.model_config.hf_config)
            self.pooler = DispatchPooler(dict.fromkeys(pooler.get_supported_tasks(), pooler))

    Sparse.__name__ = f"LionSparse{base.__name__.removesuffix('ForCausalLM')}"
    return Sparse


def _dense(base: Any) -> Any:
    class Dense(as_embedding_model(base)):  # type: ignore[misc]
        def _init_pooler(self, vllm_config: Any, prefix: str = "") -> Any:
            pooler = DensePooler(_checked_contract(vllm_config, is_sparse=False))
            return DispatchPooler(dict.fromkeys(pooler.get_supported_tasks(), pooler))

    Dense.__name__ = f"LionDense{base.__name__.removesuffix('ForCausalLM')}"
    return Dense


LionSparseLlama, LionDenseLlama = _sparse(LlamaForCausalLM), _dense(LlamaForCausalLM)
LionSparseQwen2, LionDenseQwen2 = _sparse(Qwen2ForCausalLM), _dense(Qwen2ForCausalLM)
LionSparseQwen3, LionDenseQwen3 = _sparse(Qwen3ForCausalLM), _dense(Qwen3ForCausalLM)


class LionIOProcessor(IOProcessor):
    """Puts the checkpoint's prompts in front of texts, cuts them to its lengths, and answers as `/embed_sparse` does.

    Args:
        vllm_config: Of the server.
        renderer: Of the server, which is not needed: texts are tokenized as lion_st does.
    """

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        super().__init__(vllm_config, renderer)
        model = vllm_config.model_config
        architecture = model.architectures[0]
        if not architecture.startswith(("LionSparse", "LionDense")):
            raise ValueError(
                f"--io-processor-plugin lion_st is for architectures of this plug-in, and not for {architecture}: name "
                """one, as with --hf-overrides '{"architectures": ["LionSparseLlama"]}'."""
            )
        self.contract = _contract(vllm_config)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model.tokenizer, revision=model.tokenizer_revision)
        self.lengths = {task: length or model.max_model_len for task, length in self.contract.lengths.items()}
        for task, length in self.lengths.items():
            if length > model.max_model_len:
                raise ValueError(
                    f"The model reads {length} tokens of a {task}, and --max-model-len allows {model.max_model_len}."
                )
            require_room(self.tokenizer, self.contract.prompts[task], length, f"Texts of the task {task!r}")

    def parse_data(self, data: object) -> TextsRequest:
        """Read what a request asks for, see `read_request`."""
        try:
            return read_request(data)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="data") from error

    def pre_process(self, prompt: TextsRequest, request_id: str | None = None, **kwargs: Any) -> list[TokensPrompt]:
        """Tokenize the texts."""
        limit = self.lengths[prompt.task]
        found = first_tokens(self.tokenizer, prompt.texts, limit, self.contract.prompts[prompt.task])
        if found.is_cut.any() and not prompt.truncate:
            raise VLLMValidationError(
                f"`inputs` must have at most {limit} tokens, and {found.is_cut.sum()} of {len(prompt.texts)} have "
                'more: send `"truncate": true` to cut them.'
            )
        return [TokensPrompt(prompt_token_ids=row.tolist()) for row in found.rows]

    def post_process(self, model_output: Sequence[Any], request_id: str | None = None, **kwargs: Any) -> list[Any]:
        """Give of each text its terms and weights, or the numbers of its vector."""
        vectors = [output.outputs.data.float() for output in model_output]
        broken = [place for place, vector in enumerate(vectors) if not bool(vector.isfinite().all())]
        if broken:
            raise VLLMServerError(
                f"The vectors of the texts {broken} hold NaN or infinity, as the model's hidden states do: serve it in "
                "bfloat16 or float32 (--dtype)."
            )
        if self.contract.pooling != "splade":
            return [vector.tolist() for vector in vectors]
        return [[{"index": int(index), "value": value} for index, value in vector.tolist()] for vector in vectors]
