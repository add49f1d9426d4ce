"""A decoder-only language model read as a bidirectional encoder."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import load_file_path
from transformers import PretrainedConfig, PreTrainedModel

from lion_st.files import hub_options
from lion_st.hooks import attention_implementation, has_adapter, without_message
from lion_st.modules import unpadding
from lion_st.modules.adapters import (
    attach_adapter,
    base_with_tokenizer,
    find_adapter_config,
    layers_of_base,
    load_adapter_weights,
    read_adapter_config,
    save_adapter,
    without_wrapper,
)
from lion_st.modules.backbones import choose_layers, decoder_of, gguf_options, keep_layers
from lion_st.modules.checks import (
    packed_states_are_equal,
    require_attention,
    require_decoder_only,
    require_known_logits,
)
from lion_st.modules.folding import RESUME_FILE, final_norm, save_merged, save_unfolded, unfold
from lion_st.modules.lm_head import LMHead, read_lm_head
from lion_st.modules.loading import hold_places, load_backbone, read_base_config, read_config
from lion_st.modules.tokenizer_contract import configure_tokenizer, keep_lengths
from lion_st.modules.tokenizing import check_texts, exclusive_tokenizer, leading_parts, require_room
from lion_st.modules.verdict import VERDICT_FILE, read_verdict, write_verdict

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
        add_bos: Whether texts begin with the beginning-of-sequence token, where the backbone has one; by default as its
            tokenizer does. If that leaves it out this is an error, because the wrong choice costs most of a
            retriever's quality and shows nowhere. `"saved"` keeps the beginning, end and length of the tokenizer.
        add_eos: Append the end-of-sequence token to each text.
        causal: Leave attention causal, as in RepLLaMA and for ablations. `"saved"` is what the checkpoint says.
        num_layers: Keep the backbone's first so many layers alone.
        layers: Keep these layers alone, numbered from 0, in ascending order.
        model_kwargs: Passed to `from_pretrained`, but for `base` (path or name of an adapter's base model, in place of
            the one in its configuration), `is_trainable` (the adapter) and `load_in_4bit` (see `lion_st.build`).
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
        add_eos: bool = False,
        causal: bool | Literal["saved"] = False,
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
        self.causal = causal
        folder, gguf = gguf_options(model_name_or_path)
        if gguf:
            kwargs["tokenizer_name_or_path"] = folder
            kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {}) | gguf
        # Whether padding is left out of the backbone's work; settled once the model stands.
        self.runs_packed = False
        self.awaits_weights = False  # whether another process has them, and made the checks, see `hold_places`
        self.checked: dict[str, bool] = {}  # what the checks by running found, in this process or by the checkpoint
        self._prompts_with_room: set[tuple[str, int]] = set()
        self.resumed_head: dict[str, Any] = {}
        if not gguf and (found := base_with_tokenizer(model_name_or_path, self.adapter_base, model_kwargs)):
            base, revision = found
            kwargs["tokenizer_name_or_path"], gguf = gguf_options(base)
            of_adapter = dict(kwargs.get("processor_kwargs") or {})
            of_adapter.pop("revision", None)
            kwargs["processor_kwargs"] = of_adapter | ({"revision": revision} if revision else {}) | gguf
        stock = STOCK_SPARSE if transformer_task == "text-generation" else STOCK_DENSE
        # Both messages are about what is done on purpose here and checked: a head left out, the base's tokenizer.
        with (
            without_message("transformers.modeling_utils", "LOAD REPORT"),
            without_message("sentence_transformers.base.modules.transformer", "tokenizer_name_or_path"),
        ):
            super().__init__(
                model_name_or_path,
                transformer_task=transformer_task,
                query_length=query_length,
                document_length=document_length,
                model_kwargs=model_kwargs,
                **(copy.deepcopy(stock) | kwargs),
            )
        configure_tokenizer(self.tokenizer, self.model, (self.query_length, self.document_length), add_bos, add_eos)
        self.loaded_attention = attention_implementation(self.model)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LionTransformer:
        """Load a saved module; its tokenizer and lengths are taken as saved.

        Raises:
            ValueError: If the checkpoint may be a causal model, which this class would silently make another model of.
        """
        kwargs["init_defaults"] = {"query_length": None, "document_length": None, "add_bos": "saved", "causal": "saved"}
        module = super().load(model_name_or_path, *args, **kwargs)
        if module.stated_causal is None and not has_adapter(module.model):
            raise ValueError(
                f"The checkpoint {model_name_or_path!r} is a causal model: its config.json does not say "
                '"is_causal": false. Load it with SentenceTransformer, or make a Lion retriever of its backbone with '
                "lion_st.build."
            )
        hub = hub_options(kwargs)
        if resume_file := load_file_path(model_name_or_path, RESUME_FILE, **hub):
            module.resumed_head = unfold(module.model, resume_file, has_weights=not module.awaits_weights)
        if verdict := load_file_path(model_name_or_path, VERDICT_FILE, **hub):
            module.checked = read_verdict(verdict, module.model, module.loaded_attention)
        return module

    # ---- loading ----

    def _load_config(
        self, model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]
    ) -> tuple[PretrainedConfig, bool]:
        if backend != "torch":
            raise ValueError(f"LionTransformer runs on PyTorch alone, got backend={backend!r}.")
        hub = hub_options(config_kwargs)
        folder, gguf = gguf_options(model_name_or_path)
        is_adapter = not gguf and find_adapter_config(folder, **hub) is not None
        if is_adapter:
            self.adapter_config = read_adapter_config(model_name_or_path, **hub)
            # PEFT saves adapters as not to be trained.
            self.adapter_config.inference_mode = not self.is_trainable
            # The revision recorded in the adapter is that of the base it was trained on.
            self.base_revision = None if self.adapter_base else self.adapter_config.revision
            self.adapter_base = self.adapter_base or self.adapter_config.base_model_name_or_path
            config = read_base_config(model_name_or_path, str(self.adapter_base), self.base_revision, config_kwargs)
            if self.wanted_layers == (None, None):
                self.wanted_layers = (None, layers_of_base(model_name_or_path, **hub))
        else:
            config = read_config(model_name_or_path, config_kwargs)
        require_decoder_only(config, model_name_or_path)
        text_config = config.get_text_config()
        # Stated by models of ours, and by few others.
        self.stated_causal: bool | None = getattr(text_config, "is_causal", None)
        if self.causal == "saved":  # an adapter, whose base may be of any kind, says so in its own configuration
            self.causal = self.stated_causal is True and not is_adapter
        # As a config_kwarg it would be dropped without a word.
        text_config.is_causal = config.is_causal = self.causal
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
        model = load_backbone(transformer_task, source, config, options)
        self.kept_layers = choose_layers(config.get_text_config().num_hidden_layers, *self.wanted_layers)
        self.awaits_weights = hold_places(model)
        if self.kept_layers is not None:
            keep_layers(model, self.kept_layers)
        if is_peft_model:
            attach_adapter(model, self.adapter_config, revision=self.base_revision)
            load_adapter_weights(model, model_name_or_path, **hub_options(model_kwargs))
            if not self.is_trainable:
                model.requires_grad_(False)
        return model

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, without_wrapper(value) if name == "model" else value)  # of peft's get_peft_model

    # ---- running ----

    @property
    def decoder(self) -> Any:
        """The backbone without its LM head."""
        return decoder_of(self.model)

    @property
    def lm_head(self) -> LMHead:
        """The LM head, tied or untied, read in place.

        Raises:
            ValueError: If there is none, or if an adapter sits on it or on the embeddings it is tied to.
        """
        return read_lm_head(self.model)

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
                They are left as they are, but where the backbone's configuration says `output_hidden_states`: then they
                get `"all_layer_embeddings"`, as AdaptiveLayerLoss reads them, and padding is computed.
            packed_states: Where padding is left out of the backbone's work, return the features and states of packed
                texts, [1, T, D] without `"attention_mask"`, instead of [B, L, D] with zeros at padding.
        """
        mask = features.get("attention_mask")
        keeps_all = bool(self.model.config.output_hidden_states)
        packs = self.runs_packed and not keeps_all and mask is not None and not mask.all()
        packs = packs and unpadding.why_not_here(self.model) is None
        inputs = unpadding.packed(features) if packs else features
        names = ("input_ids", "attention_mask", "position_ids", "seq_idx")
        bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        given = {name: inputs[name] for name in names + bounds if name in inputs}
        output = self.decoder(**given, use_cache=False)
        states = output.last_hidden_state
        if keeps_all:
            features["all_layer_embeddings"] = output.hidden_states
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
        """Check by running in which directions the backbone reads, and that not its padding, then leave padding out.

        What the checkpoint's verdict says, see `lion_st.modules.verdict`, is not run again.

        Raises:
            ValueError: Also if one of the model's prompts leaves no room for a text.
        """
        for name, prompt in model.prompts.items() if model is not None else ():
            task = {"query": "query", "document": "document", "passage": "document", "corpus": "document"}.get(name)
            if (limit := self.token_limit(task)) is not None:
                self._require_room(prompt or "", limit, task)
        if not self.checked.get("bidirectional"):  # or causal, as it is meant to be
            self.verify_bidirectional()
        self._configure_unpadding()

    def _configure_unpadding(self) -> None:
        """Run packed texts from now on, if the backbone can and gives the same states."""
        if self.runs_packed or self.awaits_weights or self.can_flatten_inputs or self.unpad_inputs is False:
            return
        reason = unpadding.why_not(self.model)
        if reason is None:
            if "packed" not in self.checked:
                self.checked["packed"] = packed_states_are_equal(self)
            if self.checked["packed"]:
                self.model.set_attn_implementation(unpadding.NAME)
                self.runs_packed = True
                return
            reason = f"{type(self.model).__name__} gives other states for packed texts"
        if self.unpad_inputs:
            raise ValueError(f"unpad_inputs=True, but {reason}. Leave it out to compute padding as well.")
        logger.info("Padding is computed as well: %s.", reason)

    def verify_bidirectional(self) -> None:
        """Check that states see later tokens, or not in a causal model; a ValueError names the architecture."""
        if self.awaits_weights:
            return
        require_attention(self.model, causal=bool(self.causal))
        self.checked["bidirectional"] = True

    def verify_lm_head(self) -> None:
        """Compare the backbone's own logits with those of `lm_head`.

        Raises:
            ValueError: Naming the architecture, if its logits are made in another way.
        """
        if self.awaits_weights:
            return
        require_known_logits(self.model, self.lm_head)
        self.checked["lm_head"] = True

    # ---- saving ----

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save an attached adapter alone, or all weights as they are, with tokenizer and configuration.

        Args:
            output_path: Existing folder.
        """
        if has_adapter(self.model):
            save_adapter(self.model, output_path)
            self._save_contract(output_path, self.get_config_dict())
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
        save_merged(self.model, output_path, scale)
        if resume is not None:
            save_unfolded(self.model, output_path, resume)
        self._save_contract(output_path, super().get_config_dict())

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved of the module; with an adapter also what that does not say of the model that it is on."""
        config = super().get_config_dict()
        if has_adapter(self.model):
            config["model_kwargs"] = {"dtype": str(self.model.dtype).removeprefix("torch.")}
            config |= {"layers": list(self.kept_layers)} if self.kept_layers is not None else {}
            config |= {"causal": True} if self.causal else {}
        return config

    def __repr__(self) -> str:
        return super().__repr__().replace("Transformer(", "LionTransformer(", 1)

    def _save_contract(self, output_path: str, config: dict[str, Any]) -> None:
        keep_lengths(self.tokenizer, self.query_length, self.document_length)
        self.processor.save_pretrained(output_path)
        Path(output_path, self.config_file_name).write_text(json.dumps(config, indent=4), encoding="utf-8")
        write_verdict(Path(output_path), self.model, self.checked, self.loaded_attention)

    @property
    def final_norm(self) -> Any:
        """The norm in front of the LM head; a ValueError if there is none that a scale could be folded into."""
        return final_norm(self.model)
