"""A decoder-only language model read as a bidirectional encoder."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers.base.modules import Transformer
from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_TO_AUTO_MODEL
from sentence_transformers.util import load_file_path
from tokenizers.processors import Sequence as PostProcessors
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from lion_st.hooks import has_adapter
from lion_st.modules import unpadding
from lion_st.modules.adapters import (
    attach_adapter,
    load_adapter_weights,
    merged_state_dict,
    raise_on_wrong_weights,
    save_adapter,
)
from lion_st.modules.backbones import as_plain_weights, choose_layers, gguf_options, keep_layers
from lion_st.modules.tokenizing import exclusive_tokenizer, leading_parts, require_room

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

logger = logging.getLogger(__name__)

# What a stock Transformer needs to hand every token's logits to SpladePooling.
STOCK_SPARSE: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "token_embeddings",
    "processing_kwargs": {"text": {"logits_to_keep": 0}},
}
STOCK_DENSE: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
# A checkpoint with its scale folded in keeps the unfolded norm here, so that training resumes to the bit.
RESUME_FILE = "lion_st.safetensors"
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class LMHead:
    """What turns a hidden state h [D] into logits [V]: softcap(multiplier * h . weight + bias)."""

    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V], the multiplier included
    multiplier: float
    softcap: float | None


class LionTransformer(Transformer):
    """Loads a decoder-only causal LM of transformers and reads it with attention in both directions.

    `forward` always gives the last hidden states [B, L, D], after the final norm, as `features["token_embeddings"]`;
    for a sparse model the LM head is left to `SpladeHead`. The models of `lion_st.build` and `lion_st.load` hand them
    packed from module to module, [1, T, D], wherever padding is left out.

    The tokenizer contract is settled on loading and saved with the model: a beginning-of-sequence token where the
    tokenizer has one, padding on the left, the end-of-sequence token as padding where there is none, and the lengths.

    Many threads may encode with one model: a call changes nothing that another one reads, and limits of one call are
    passed to it. Do not change the model's own settings, such as `query_length`, while threads encode.

    Args:
        model_name_or_path: Hub name, folder or GGUF file of a causal LM, or of a PEFT adapter of one. The weights of a
            GGUF file are rounded to bfloat16 unless `model_kwargs` names another dtype.
        transformer_task: `"text-generation"` keeps the LM head, which a sparse model needs; `"feature-extraction"`
            (dense) does not load it.
        query_length: Longest query in tokens (`task="query"`), special tokens and prompt included.
        document_length: Longest document in tokens (`task="document"`).
        add_bos: What to do when the backbone has a beginning-of-sequence token that its tokenizer does not add: True
            adds it, False accepts the tokenizer as it is. By default that is an error, because the wrong choice
            costs most of a retriever's quality and shows nowhere. `"saved"` also keeps the tokenizer's length.
        num_layers: Keep the backbone's first so many layers alone.
        layers: Keep these layers alone, numbered from 0, in ascending order.
        model_kwargs: Passed to `from_pretrained`. Two keys are for adapters: `base` (path or name of the base model,
            in place of the one in the adapter's configuration) and `is_trainable`.
        **kwargs: As for `sentence_transformers.base.modules.Transformer`; `unpad_inputs=False` computes padding,
            True insists on leaving it out, and by default it is left out where attention allows it.

    Raises:
        ValueError: If the backbone is not decoder-only, stays causal, depends on its padding, or its tokenizer breaks
            the contract; if weights and configuration do not match.
        FileNotFoundError: If an adapter's base model cannot be reached.

    References:
        Zeng et al., Scaling Sparse and Dense Retrieval in Decoder-Only LLMs, 2025, section 3.1:
        https://arxiv.org/abs/2502.15526. BehnamGhader et al., LLM2Vec, 2024: https://arxiv.org/abs/2404.05961.

    Example:
        ::

            transformer = LionTransformer("meta-llama/Llama-3.2-1B", transformer_task="feature-extraction")
            features = transformer(transformer.preprocess(["A lion is a large cat."], task="document"))
            features["token_embeddings"]  # [1, L, 2048]
    """

    forward_kwargs: set[str] = Transformer.forward_kwargs | {"packed_states"}

    def __init__(
        self,
        model_name_or_path: str,
        *,
        transformer_task: str = "feature-extraction",
        query_length: int | None = 64,
        document_length: int | None = 128,
        add_bos: bool | Literal["saved"] | None = None,
        num_layers: int | None = None,
        layers: Sequence[int] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if transformer_task not in ("text-generation", "feature-extraction"):
            raise ValueError(
                f'transformer_task must be "text-generation" (sparse) or "feature-extraction" (dense), '
                f"got {transformer_task!r}."
            )
        model_kwargs = dict(model_kwargs or {})
        self.adapter_base: str | None = model_kwargs.pop("base", None)
        self.is_trainable: bool = model_kwargs.pop("is_trainable", False)
        self.wanted_layers = (num_layers, layers)
        self.kept_layers: tuple[int, ...] | None = None
        folder, gguf = gguf_options(model_name_or_path)
        if gguf:
            kwargs["tokenizer_name_or_path"] = folder
            kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {}) | gguf
        # Whether padding is left out of the backbone's work; settled once the model stands.
        self.runs_packed = False
        self._prompts_with_room: set[tuple[str, int]] = set()
        self.resumed_head: dict[str, Any] = {}
        if not gguf and (found := self._base_with_tokenizer(model_name_or_path, model_kwargs)):
            base, revision = found
            kwargs["tokenizer_name_or_path"], gguf = gguf_options(base)
            of_adapter = dict(kwargs.get("processor_kwargs") or {})
            of_adapter.pop("revision", None)
            kwargs["processor_kwargs"] = of_adapter | ({"revision": revision} if revision else {}) | gguf
        stock = STOCK_SPARSE if transformer_task == "text-generation" else STOCK_DENSE
        # Both messages are about what is done on purpose here and checked: a head left out, the base's tokenizer.
        with (
            _without_message("transformers.modeling_utils", "LOAD REPORT"),
            _without_message("sentence_transformers.base.modules.transformer", "tokenizer_name_or_path"),
        ):
            super().__init__(
                model_name_or_path,
                transformer_task=transformer_task,
                query_length=query_length,
                document_length=document_length,
                model_kwargs=model_kwargs,
                **(copy.deepcopy(stock) | kwargs),
            )
        self._configure_tokenizer(add_bos)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LionTransformer:
        """Load a saved module; its tokenizer and lengths are taken as saved.

        Raises:
            ValueError: If the checkpoint is a causal model, which this class would silently make another model of.
        """
        kwargs["init_defaults"] = {"query_length": None, "document_length": None, "add_bos": "saved"}
        module = super().load(model_name_or_path, *args, **kwargs)
        if module.loaded_causal and not has_adapter(module.model):
            raise ValueError(
                f"The checkpoint {model_name_or_path!r} is a causal model: its config.json does not say "
                '"is_causal": false. Load it with SentenceTransformer, or make a Lion retriever of its backbone with '
                "lion_st.build."
            )
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        if resume_file := load_file_path(model_name_or_path, RESUME_FILE, **hub):
            module._unfold(resume_file)
        return module

    # ---- loading ----

    def _base_with_tokenizer(
        self, model_name_or_path: str, model_kwargs: dict[str, Any]
    ) -> tuple[str, str | None] | None:
        """The base model, and its revision, of an adapter that was saved without a tokenizer of its own."""
        names = ("token", "cache_dir", "revision", "local_files_only")
        hub = {name: model_kwargs[name] for name in names if model_kwargs.get(name)}
        if find_adapter_config_file(model_name_or_path, **hub) is None:
            return None
        if cached_file(model_name_or_path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            return None
        from peft import PeftConfig

        if self.adapter_base:
            return self.adapter_base, None
        adapter = PeftConfig.from_pretrained(model_name_or_path, **hub)
        return adapter.base_model_name_or_path, adapter.revision

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PretrainedConfig, bool]:
        if backend != "torch":
            raise ValueError(f"LionTransformer runs on PyTorch alone, got backend={backend!r}.")
        hub = {key: config_kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in config_kwargs}
        location = {key: config_kwargs[key] for key in ("revision", "subfolder") if config_kwargs.get(key)}
        folder, gguf = gguf_options(model_name_or_path)
        is_adapter = not gguf and find_adapter_config_file(folder, **hub, **location) is not None
        if is_adapter:
            from peft import PeftConfig

            self.adapter_config = PeftConfig.from_pretrained(model_name_or_path, **hub, **location)
            base = self.adapter_base or self.adapter_config.base_model_name_or_path
            # The revision recorded in the adapter is that of the base it was trained on.
            revision = None if self.adapter_base else self.adapter_config.revision
            self.adapter_base, self.base_revision = base, revision
            options = {key: value for key, value in config_kwargs.items() if key not in ("revision", "subfolder")}
            try:
                folder, gguf = gguf_options(base)
                config = AutoConfig.from_pretrained(folder, revision=revision, **options, **gguf)
            except (OSError, ValueError) as error:
                raise FileNotFoundError(
                    f"The adapter {model_name_or_path!r} belongs to the base model {base!r}, which cannot be read "
                    f"({str(error).splitlines()[0]}). Fetch that model, or name where it is: "
                    'lion_st.load(path, base="path/to/base").'
                ) from error
        else:
            try:
                config = AutoConfig.from_pretrained(folder, **config_kwargs, **gguf)
            except ValueError as error:
                if not gguf:
                    raise
                raise ValueError(
                    f"transformers cannot read the GGUF file {model_name_or_path!r}: {error} Convert it, or name the "
                    "model that it was made of."
                ) from error
        _require_decoder_only(config, model_name_or_path)
        text_config = config.get_text_config()
        self.loaded_causal = getattr(text_config, "is_causal", True) is not False
        # As a config_kwarg it would be dropped without a word.
        text_config.is_causal = config.is_causal = False
        return config, is_adapter

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> PreTrainedModel:
        source, options = model_name_or_path, dict(model_kwargs)
        if is_peft_model:
            source = str(self.adapter_base)
            options |= {"revision": self.base_revision}
            options.pop("subfolder", None)
        if options.get("revision") is None:
            options.pop("revision", None)
        folder, gguf = gguf_options(source)
        if gguf:
            options |= gguf
            if options.get("dtype") in (None, "auto"):
                options["dtype"] = torch.bfloat16
        _require_layers(config, folder, options)
        auto_class = TRANSFORMER_TASK_TO_AUTO_MODEL[transformer_task]
        try:
            model, report = auto_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"The weights in {source!r} do not match its configuration: {error} Restore the weights and "
                "configuration that were saved together."
            ) from error
        # A backbone's LM head is rightly left out of a dense model.
        unexpected = [key for key in report["unexpected_keys"] if not key.startswith("lm_head.")]
        raise_on_wrong_weights(
            source, sorted(report["missing_keys"]), sorted(unexpected), sorted(report["mismatched_keys"], key=str)
        )
        if gguf:
            as_plain_weights(model, source)
        self.kept_layers = choose_layers(config.get_text_config().num_hidden_layers, *self.wanted_layers)
        if self.kept_layers is not None:
            keep_layers(model, self.kept_layers)
        if is_peft_model:
            attach_adapter(model, self.adapter_config, revision=self.base_revision)
            names = ("token", "cache_dir", "local_files_only", "subfolder", "revision")
            hub = {key: model_kwargs[key] for key in names if model_kwargs.get(key)}
            load_adapter_weights(model, model_name_or_path, **hub)
            if not self.is_trainable:
                model.requires_grad_(False)
        return model

    def _configure_tokenizer(self, add_bos: bool | Literal["saved"] | None) -> None:
        tokenizer: Any = self.tokenizer
        if tokenizer is None:
            raise ValueError(f"{self.model.name_or_path!r} has no tokenizer; save one beside its weights.")
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"The tokenizer of {self.model.name_or_path!r} has neither a padding nor an end-of-sequence token; "
                    "set tokenizer.pad_token and save it beside the weights."
                )
            tokenizer.pad_token = tokenizer.eos_token
        rows = self.model.get_input_embeddings().num_embeddings
        if max(len(tokenizer) - 1, tokenizer.pad_token_id) >= rows:
            raise ValueError(
                f"The tokenizer of {self.model.name_or_path!r} has {len(tokenizer)} tokens, but the model has "
                f"embeddings for {rows}. Use the tokenizer the model was trained with, or resize its embeddings."
            )
        if add_bos == "saved":
            return
        lengths = [length for length in (self.query_length, self.document_length) if length is not None]
        if lengths:
            # Without a task a text is cut like the longer of the two, not at the backbone's 128k tokens.
            tokenizer.model_max_length = max(lengths)
        self._configure_bos(add_bos)

    def _configure_bos(self, add_bos: bool | None) -> None:
        tokenizer: Any = self.tokenizer
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.config.bos_token_id
        # A "beginning" token that is really the padding or end token (Qwen, GPT-2) is never put in front.
        if bos is None or bos in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            return
        if tokenizer("a")["input_ids"][0] == bos or add_bos is False:
            return
        token = tokenizer.convert_ids_to_tokens(bos)
        if add_bos is None:
            raise ValueError(
                f"{self.model.name_or_path!r} has the beginning-of-sequence token {token!r} (id {bos}), but its "
                "tokenizer does not add it. Pass add_bos=True to add it to every text, or add_bos=False if the model "
                "was trained without it."
            )
        backend = tokenizer.backend_tokenizer
        put_in_front = TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, bos)]
        )
        processors = [processor for processor in (backend.post_processor, put_in_front) if processor is not None]
        backend.post_processor = PostProcessors(processors)

    # ---- running ----

    @property
    def decoder(self) -> Any:
        """The backbone without its LM head."""
        return self.model.get_decoder()

    @property
    def lm_head(self) -> LMHead:
        """The LM head, tied or untied, read in place.

        Raises:
            ValueError: If there is none, or if an adapter sits on it or on the embeddings it is tied to.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(self.model).__name__} has no LM head, which a sparse model needs; load it with "
                'transformer_task="text-generation".'
            )
        if has_adapter(self.model):
            tied = getattr(self.config.get_text_config(), "tie_word_embeddings", False)
            for module in (head, self.model.get_input_embeddings()) if tied else (head,):
                if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) or type(module).__module__.startswith(
                    "peft."
                ):
                    raise ValueError(
                        "An adapter on the LM head (or on embeddings tied to it) is not supported: the sparse head "
                        "reads those weights as they are. Leave lm_head and embed_tokens out of target_modules and "
                        "modules_to_save, or train all weights without an adapter."
                    )
        config = self.config.get_text_config()
        multiplier = float(getattr(config, "logit_scale", None) or 1.0)
        multiplier /= float(getattr(config, "logits_scaling", None) or 1.0)
        bias = getattr(head, "bias", None)
        return LMHead(
            weight=head.weight,
            bias=bias if bias is None or multiplier == 1.0 else bias * multiplier,
            multiplier=multiplier,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def preprocess(  # type: ignore[override]
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenize texts to `input_ids` and `attention_mask` [B, L], padded on the left.

        Args:
            inputs: Texts.
            prompt: Put in front of every text.
            **kwargs: `task` ("query" or "document") picks the length, `max_length` is another one for this call.

        Many threads may call this at a time. A long text is read only as far as its first tokens need.

        Raises:
            TypeError: If a value is not a text.
            ValueError: If a text is empty, only white space, or not valid Unicode.
        """
        check_texts(inputs)
        with exclusive_tokenizer():
            limit = self.token_limit(kwargs.get("task"), kwargs.get("max_length"))
            if limit is not None:
                self._require_room(prompt or "", limit, kwargs.get("task"))
                inputs = leading_parts(self.tokenizer, inputs, limit, prompt or "")
            return super().preprocess(inputs, prompt=prompt, **kwargs)

    def _require_room(self, prompt: str, limit: int, task: str | None) -> None:
        if (prompt, limit) not in self._prompts_with_room:
            texts = {"query": "Queries", "document": "Documents"}.get(task or "", "Texts")
            require_room(self.tokenizer, prompt, limit, texts)
            self._prompts_with_room.add((prompt, limit))

    def token_limit(self, task: str | None = None, max_length: int | None = None) -> int | None:
        """Tokens, special ones and prompt included, to which a text is cut; None for no limit.

        Args:
            task: `"query"` or `"document"`, whose lengths may differ.
            max_length: A limit of one call, in place of the model's own.
        """
        by_task = {"query": self.query_length, "document": self.document_length}
        return max_length or by_task.get(task or "") or self.max_seq_length

    def forward(self, features: dict[str, Any], packed_states: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The features with `"token_embeddings"`, the last hidden states.

        Args:
            features: `"input_ids"` [B, L] with `"attention_mask"`, or [1, T] of packed texts with `"cu_seq_lens_q"`.
                They are left as they are.
            packed_states: Where padding is left out of the backbone's work, return the features and states of packed
                texts, [1, T, D] without `"attention_mask"`, instead of [B, L, D] with zeros at padding.
        """
        mask = features.get("attention_mask")
        packs = self.runs_packed and mask is not None and not mask.all() and unpadding.why_not_here(self.model) is None
        inputs = unpadding.packed(features) if packs else features
        names = ("input_ids", "attention_mask", "position_ids", "seq_idx")
        bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        given = {name: inputs[name] for name in names + bounds if name in inputs}
        states = self.decoder(**given, use_cache=False).last_hidden_state
        if packs and not packed_states:
            return features | {"token_embeddings": unpadding.padded(states, features["attention_mask"])}
        return inputs | {"token_embeddings": states}

    def _can_flatten_inputs(self) -> bool:
        # Only the decoder runs, whatever the task, and it has no use for positions of logits.
        task = self.transformer_task
        self.transformer_task = "feature-extraction"
        try:
            return super()._can_flatten_inputs()
        finally:
            self.transformer_task = task

    # ---- checks by running ----

    def on_model_ready(self, model: BaseModel) -> None:
        """Check by running that the backbone reads in both directions and not its padding, then leave padding out.

        Raises:
            ValueError: Also if one of the model's prompts leaves no room for a text.
        """
        for name, prompt in model.prompts.items() if model is not None else ():
            task = {"query": "query", "document": "document", "passage": "document", "corpus": "document"}.get(name)
            if (limit := self.token_limit(task)) is not None:
                self._require_room(prompt or "", limit, task)
        self.verify_bidirectional()
        self._configure_unpadding()

    @torch.no_grad()
    def _configure_unpadding(self) -> None:
        """Run packed texts from now on, if the backbone can and gives the same states."""
        if self.runs_packed or self.can_flatten_inputs or self.unpad_inputs is False:
            return
        reason = unpadding.why_not(self.model)
        if reason is None:
            probe = self._probe_ids()
            features = {"input_ids": torch.stack([probe, probe]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
            features["attention_mask"][1, :2] = 0
            features["attention_mask"] = features["attention_mask"].to(probe.device)
            real = features["attention_mask"].bool()
            with _evaluating(self.model):
                padded = self(dict(features))["token_embeddings"][real]
                self.model.set_attn_implementation(unpadding.NAME)
                self.runs_packed = True
                packed = self(dict(features))["token_embeddings"][real]
            if _relative_difference(packed, padded) < _tolerance(padded):
                return
            self.model.set_attn_implementation("sdpa")
            self.runs_packed = False
            reason = f"{type(self.model).__name__} gives other states for packed texts"
        if self.unpad_inputs:
            raise ValueError(f"unpad_inputs=True, but {reason}. Leave it out to compute padding as well.")
        logger.info("Padding is computed as well: %s.", reason)

    @torch.no_grad()
    def verify_bidirectional(self) -> None:
        """Run tiny inputs and compare the first token's state.

        Raises:
            ValueError: Naming the architecture, if a state does not see later tokens or depends on left padding.
        """
        first = self._probe_ids()
        last = first.clone()
        last[-1] = first[0]
        mask = torch.ones(3, len(first), dtype=torch.long, device=first.device)
        with _evaluating(self.model):
            states = self.decoder(
                input_ids=torch.stack([first, first, last]), attention_mask=mask, use_cache=False
            ).last_hidden_state[:, 0]
            noise = (states[1] - states[0]).abs().max()
            change = (states[2] - states[0]).abs().max()
            if not change > 10 * noise:
                raise ValueError(
                    f"{type(self.model).__name__} stays causal with is_causal=False: the first token does not see the "
                    "last one. Use an architecture whose attention transformers can make bidirectional, such as Llama, "
                    "Qwen3, Mistral or Gemma."
                )
            pads = torch.zeros_like(first)
            padded = self.decoder(
                input_ids=torch.cat([pads, first])[None],
                attention_mask=torch.cat([torch.zeros_like(pads), torch.ones_like(first)])[None],
                use_cache=False,
            ).last_hidden_state[0, len(pads)]
        drift = _relative_difference(padded, states[0])
        if not drift < _tolerance(padded):
            raise ValueError(
                f"{type(self.model).__name__} gives another vector when a text is padded on the left (relative "
                f"difference {drift:.2g}). Use an architecture with rotary or relative positions."
            )

    @torch.no_grad()
    def verify_lm_head(self) -> None:
        """Compare the backbone's own logits with those of `lm_head`.

        Raises:
            ValueError: Naming the architecture, if its logits are made in another way.
        """
        head, ids = self.lm_head, self._probe_ids()[None]
        with _evaluating(self.model):
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            expected = self.model(input_ids=ids, use_cache=False).logits
        logits = (hidden.to(head.weight.dtype) @ head.weight.T).float() * head.multiplier
        if head.bias is not None:
            logits = logits + head.bias.float()
        if head.softcap is not None:
            logits = torch.tanh(logits / head.softcap) * head.softcap
        error = _relative_difference(logits, expected)
        if not error < _tolerance(head.weight):
            raise ValueError(
                f"{type(self.model).__name__} makes its logits in a way the sparse head does not know (relative "
                f"difference {error:.2g})."
            )

    def _probe_ids(self) -> torch.Tensor:
        return torch.arange(4, 8, device=self.model.device) % self.config.get_text_config().vocab_size

    # ---- saving ----

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save an attached adapter alone, or all weights as they are, with tokenizer and configuration.

        Args:
            output_path: Existing folder.
        """
        if has_adapter(self.model):
            save_adapter(self.model, output_path)
            self._save_contract(output_path)
        else:
            self.save_stock(output_path)

    def save_stock(self, output_path: str, scale: float = 1.0, resume: dict[str, Any] | None = None) -> None:
        """Save what a stock Transformer loads: all weights, adapters merged, the logit scale folded in.

        Args:
            output_path: Existing folder.
            scale: The sparse head's factor on the logits.
            resume: Also keep the unfolded norm and this configuration of the head, so that training resumes to the
                bit.
        """
        self.save_merged(output_path, scale=scale)
        if resume is not None:
            norm = {name: parameter.detach().cpu() for name, parameter in self.final_norm.named_parameters()}
            save_file(norm, f"{output_path}/{RESUME_FILE}", metadata={"head": json.dumps(resume)})
        self._save_contract(output_path)

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the module; with an adapter also the dtype and layers of its base, which it does not say."""
        config = super().get_config_dict()
        if has_adapter(self.model):
            config["model_kwargs"] = {"dtype": str(self.model.dtype).removeprefix("torch.")}
            if self.kept_layers is not None:
                config["layers"] = list(self.kept_layers)
        return config

    def __repr__(self) -> str:
        return super().__repr__().replace("Transformer(", "LionTransformer(", 1)

    def _save_contract(self, output_path: str) -> None:
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    @torch.no_grad()
    def save_merged(self, output_path: str, scale: float = 1.0) -> None:
        """Save the model's weights and configuration with adapters merged and the scale folded in, model untouched.

        Args:
            output_path: Existing folder.
            scale: Factor on the logits, folded into the final norm. Where the product is not exact in the model's
                dtype, that one tensor is saved in float32.
        """
        weights = merged_state_dict(self.model)
        if scale != 1.0:
            name = next(name for name, module in self.model.named_modules() if module is self.final_norm)
            for key, tensor in _scaled_norm(self.final_norm, scale).items():
                weights[f"{name}.{key}"] = tensor
        config = copy.deepcopy(self.model.config)
        with torch.device("meta"):
            shell = type(self.model)(config)
        shell.load_state_dict(weights, assign=True)
        if shell.can_generate():
            shell.generation_config = self.model.generation_config
        shell.save_pretrained(output_path, max_shard_size="5GB")

    @property
    def final_norm(self) -> Any:
        """The norm in front of the LM head.

        Raises:
            ValueError: If the decoder has none with a weight that a scale could be folded into.
        """
        for name in FINAL_NORM_NAMES:
            if isinstance(getattr(getattr(self.decoder, name, None), "weight", None), torch.Tensor):
                return getattr(self.decoder, name)
        raise ValueError(
            f"{type(self.model).__name__} has no final norm that a logit scale could be folded into; "
            "build the model with scale=1.0."
        )

    @torch.no_grad()
    def _unfold(self, resume_file: str) -> None:
        with safe_open(resume_file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                self.final_norm.get_parameter(name).copy_(file.get_tensor(name))
            self.resumed_head = json.loads(file.metadata()["head"])


def check_texts(inputs: Sequence[Any]) -> None:
    """Raise unless every value is a text with something to read in it.

    Raises:
        TypeError: Naming the first value that is not a `str`, and its position.
        ValueError: Naming the first text that is empty, only white space, or not valid Unicode.
    """
    for position, text in enumerate(inputs):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {position} is {_shortened(text)}, a {type(text).__name__}. Pass strings; drop or fill in "
                "missing values first."
            )
        if not text or text.isspace():
            raise ValueError(
                f"Text {position} is {_shortened(text)}, which has nothing to encode. Drop empty texts first."
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Text {position} is {_shortened(text)}, which is not valid Unicode ({error.reason}). Repair it with "
                'text.encode("utf-8", "replace").decode().'
            ) from error


def _relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def _tolerance(states: torch.Tensor) -> float:
    """Largest relative difference that rounding explains."""
    return 1e-3 if states.dtype == torch.float32 else 0.1


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require_layers(config: PretrainedConfig, source: str, options: dict[str, Any]) -> None:
    """Raise if a configuration asks for more layers than were saved, before a single one is built."""
    names = ("token", "cache_dir", "revision", "local_files_only", "subfolder")
    hub = {name: options[name] for name in names if options.get(name)}

    def found(name: str) -> str | None:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)

    if options.get("gguf_file"):
        return
    if index := found("model.safetensors.index.json"):
        tensors = list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    elif file := found("model.safetensors"):
        with safe_open(file, framework="pt") as weights:
            tensors = list(weights.keys())
    else:
        return
    numbers = [int(match[2]) for name in tensors if (match := re.search(r"(^|\.)(?:layers|h)\.(\d+)\.", name))]
    wanted = getattr(config.get_text_config(), "num_hidden_layers", None)
    saved = max(numbers, default=-1) + 1
    if wanted is not None and wanted > saved > 0:
        raise_on_wrong_weights(source, [f"model.layers.{saved} of {wanted:,} layers, where {saved} were saved"], [], [])


def _require_decoder_only(config: PretrainedConfig, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "not a decoder-only"
    else:
        return
    raise ValueError(
        f"{name!r} is {kind} model (model_type {config.model_type!r}). Lion retrievers are made of decoder-only causal "
        "language models, such as Llama, Qwen3, Mistral or Gemma; train an encoder with SparseEncoder or "
        "SentenceTransformer."
    )


@contextmanager
def _without_message(logger_name: str, text: str) -> Iterator[None]:
    logger = logging.getLogger(logger_name)

    def drop(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def _scaled_norm(norm: Any, scale: float) -> dict[str, torch.Tensor]:
    """Parameters of the norm whose output is `scale` times this one's; float32 where its dtype cannot hold them."""
    probe = copy.deepcopy(norm).float().cpu()
    sample = torch.linspace(-1.0, 1.0, probe.weight.numel())
    # Gemma's norm multiplies by 1 + weight, the others by weight.
    for offset in (0.0, 1.0):
        for parameter in probe.parameters():
            parameter.fill_(0.0)
        probe.weight.fill_(-offset)
        if not probe(sample[None]).any():
            break
    else:
        raise ValueError(f"The scale cannot be folded into {type(norm).__name__}; build the model with scale=1.0.")
    scaled = {}
    for name, parameter in norm.named_parameters():
        shift = offset if name == "weight" else 0.0
        exact = ((parameter.double() + shift) * scale - shift).float().cpu()
        rounded = exact.to(parameter.dtype)
        scaled[name] = rounded if torch.equal(rounded.float(), exact) else exact
    return scaled
