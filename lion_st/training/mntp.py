"""Masked next-token prediction (MNTP): teaches a causal language model to use attention in both directions."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback, set_seed
from transformers.modeling_outputs import ModelOutput

from lion_st.checkpoints import atomic_files_in
from lion_st.data.sources import files_checksum, parse_source
from lion_st.data.text import token_blocks
from lion_st.files import require_writable
from lion_st.modules import LionTransformer
from lion_st.modules.adapters import SETTINGS
from lion_st.modules.folding import save_merged
from lion_st.modules.loading import cast_weights
from lion_st.training.cost import TrainingCost
from lion_st.training.progress.callbacks import EpochCallback, SecondsBudget, StopAfter, require_all_steps
from lion_st.training.progress.checkpoints import checkpoint_to_resume, decided_by_first_rank
from lion_st.training.progress.record import RunLog
from lion_st.training.recipes import BackboneShape
from lion_st.training.sharding import reading_for_shards, refuse_with_quantization
from lion_st.training.trainers import GuardedTrainer
from lion_st.training.validation import (
    recomputes_activations,
    refuse_float16_on_cpus,
    refuse_several_gpus,
    warn_of_slow_training,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from lion_st.training.options.arguments import MntpArguments, MntpTrainingArguments


class MntpCollator:
    """Masks blocks of tokens for MNTP.

    Of each block the same number of tokens is chosen, never the first nor a special token; by default 80 % of them
    become the mask token, 10 % a random token and 10 % stay. What is chosen depends on the seed, the epoch and the
    block alone: not on the batch, the process, or whether the run was resumed.

    Args:
        vocab_size: Random tokens are drawn from [0, vocab_size).
        mask_token_id: What a masked token becomes.
        special_token_ids: Tokens never chosen.
        mask_probability: Share of each block's tokens that are chosen.
        random_share: Share of the chosen tokens that become a random token.
        kept_share: Share of the chosen tokens that stay. The more of them, the sooner a state also names the token
            that follows it where that can be seen, which is what lexical matching starts from.
        seed: Seed of the choice.

    References:
        BehnamGhader et al., LLM2Vec, 2024, section 2.2: https://arxiv.org/abs/2404.05961.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_token_id: int,
        special_token_ids: Sequence[int] = (),
        mask_probability: float = 0.2,
        random_share: float = 0.1,
        kept_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be between 0 and 1, got {mask_probability!r}.")
        if random_share < 0 or kept_share < 0 or random_share + kept_share > 1:
            raise ValueError(
                f"random_share ({random_share!r}) and kept_share ({kept_share!r}) must be at least 0 and at most 1 "
                "together."
            )
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.special_token_ids = np.asarray(special_token_ids, dtype=np.int64)
        self.mask_probability = mask_probability
        self.random_share = random_share
        self.kept_share = kept_share
        self.seed = seed
        self.epoch = 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Mask rows of `input_ids`, all of the same length.

        Returns:
            `input_ids` [B, L] with tokens masked, `positions` [B, M] of the chosen tokens in ascending order, and
            `labels` [B, M], the tokens that were there.
        """
        original = np.asarray([row["input_ids"] for row in rows], dtype=np.int64)  # [B, L]
        blocks = original.copy()
        positions = np.stack([self._mask(block) for block in blocks])
        labels = np.take_along_axis(original, positions, axis=1)
        return {
            "input_ids": torch.from_numpy(blocks),
            "positions": torch.from_numpy(positions),
            "labels": torch.from_numpy(labels),
        }

    def _mask(self, block: np.ndarray) -> np.ndarray:
        """Mask one block [L] in place; the chosen positions [M]."""
        generator = np.random.default_rng([self.seed, self.epoch, zlib.crc32(block.tobytes())])
        maskable = np.flatnonzero(~np.isin(block, self.special_token_ids))
        maskable = maskable[maskable > 0]
        count = max(1, round(self.mask_probability * len(block)))
        if len(maskable) < count:
            raise ValueError(
                f"A block of {len(block)} tokens has {len(maskable)} that are not special tokens, fewer than the "
                f"{count} to mask. Drop empty documents from the text, or lower mask_probability."
            )
        positions = np.sort(generator.choice(maskable, count, replace=False))
        fate = generator.random(count)
        mask_share = 1 - self.random_share - self.kept_share
        masked = positions[fate < mask_share]
        random = positions[(fate >= mask_share) & (fate < 1 - self.kept_share)]
        block[masked] = self.mask_token_id
        block[random] = generator.integers(self.vocab_size, size=len(random))
        return positions


class MntpTrainer(GuardedTrainer):
    """Transformers' Trainer on blocks masked by `MntpCollator`: other masks in each epoch, fixed ones to evaluate."""

    data_collator: MntpCollator

    def __init__(self, *args: Any, cost: TrainingCost, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cost = cost
        # The loss is a mean over equally many tokens of each block: accumulated steps are averaged as they are.
        self.model_accepts_loss_kwargs = False
        self.add_callback(EpochCallback(partial(setattr, self.data_collator, "epoch")))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step, with an LM head over the masked tokens alone."""
        blocks, length = inputs["input_ids"].shape
        return int(self.cost.masked_flops(blocks, length, inputs["positions"].numel()))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the masks of epoch 0, whatever the epoch."""
        collator = self.data_collator
        epoch, collator.epoch = collator.epoch, 0
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            collator.epoch = epoch


def masked_next_token_forward(
    transformer: LionTransformer, z_loss_weight: float = 0.0, z_loss_target: float = 0.0
) -> Any:
    """Give the transformer's causal LM a forward pass that computes the MNTP loss, and return the LM.

    The state of position i - 1 predicts the masked token i. States are gathered before the LM head, so that logits
    exist for the masked tokens alone: [B, M, V] in place of [B, L, V].

    Args:
        transformer: A module with an LM head. Its model is changed: it is then called with `input_ids` [B, L],
            `positions` [B, M] and `labels` [B, M], and returns `loss`, the mean cross-entropy in float32.
        z_loss_weight: Weight of the squared distance of log Z (the logits' log-sum-exp) from its target in training.
            Cross-entropy does not see log Z; a sparse retriever does, as it reads the logits themselves.
        z_loss_target: Where log Z is drawn to. A logit is then above 0, and the term active, where its probability
            exceeds exp(-target).

    References:
        Chowdhery et al., PaLM, 2022, section 5 (the z-loss, with target 0): https://arxiv.org/abs/2204.02311.
    """
    model: Any = transformer.model
    transformer.verify_lm_head()
    multiplier, softcap = transformer.lm_head.multiplier, transformer.lm_head.softcap

    def forward(self: Any, input_ids: Tensor, positions: Tensor, labels: Tensor, **kwargs: Any) -> ModelOutput:
        states = self.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, D]
        index = (positions - 1)[..., None].expand(-1, -1, states.shape[-1])
        logits = self.get_output_embeddings()(states.gather(1, index)).float()  # [B, M, V]
        if multiplier != 1:  # a product by 1 is another tensor of this size
            logits = logits * multiplier
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        if self.training and z_loss_weight:
            loss = loss + z_loss_weight * (logits.logsumexp(-1) - z_loss_target).square().mean()
        return ModelOutput(loss=loss)

    model.forward = MethodType(forward, model)
    return model


class _LossBefore(TrainerCallback):
    """Measures the loss "before" on the blocks and masks of "after", of the model made bidirectional.

    A model whose weights are sharded can be run from the beginning of training on, and not earlier.
    """

    def __init__(self, trainer: MntpTrainer, record: RunLog) -> None:
        self.trainer = trainer
        self.record = record

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, unless the run has done so before it was interrupted."""
        if "eval_loss_before" not in self.record.content:
            self.record.content["eval_loss_before"] = self.trainer.evaluate()["eval_loss"]


def adapt_mntp(arguments: MntpArguments, training_arguments: MntpTrainingArguments) -> Path:
    """Adapt a causal language model to bidirectional attention with masked next-token prediction.

    Called again with the same arguments it resumes from its last checkpoint, and does nothing once it has finished.

    Args:
        arguments: Backbone, texts and masking.
        training_arguments: Those of transformers' Trainer, with the recipe's values as defaults.

    Returns:
        The output folder: a backbone to build on (`merge`) or an adapter of one, with its tokenizer, and the report
        `mntp.json`: loss on held-out blocks before and after, tokens, seconds, steps.

    Raises:
        ValueError: If the backbone cannot be adapted, its vocabulary has no such mask token, the text is too short,
            the output folder belongs to a run with other settings, or this process sees several GPUs.
        FileNotFoundError: If the backbone or a text is not there.

    References:
        BehnamGhader et al., LLM2Vec, 2024, section 2.2: https://arxiv.org/abs/2404.05961. Zeng et al., Scaling Sparse
        and Dense Retrieval in Decoder-Only LLMs, 2025, section 3.1: https://arxiv.org/abs/2502.15526.

    Example:
        ::

            adapt_mntp(
                MntpArguments(backbone="meta-llama/Llama-3.2-1B", texts=["Salesforce/wikitext:wikitext-103-raw-v1"]),
                MntpTrainingArguments(output_dir="runs/llama-3.2-1b-mntp"),
            )
            lion_st.build("runs/llama-3.2-1b-mntp", "sparse")
    """
    refuse_several_gpus(training_arguments)
    refuse_float16_on_cpus(training_arguments)
    warn_of_slow_training(training_arguments)
    refuse_with_quantization(arguments, training_arguments)
    output = Path(training_arguments.output_dir)
    blocks_a_step = training_arguments.per_device_train_batch_size * training_arguments.gradient_accumulation_steps
    record = RunLog(
        output / "mntp.json",
        arguments.settings() | training_arguments.settings(),
        decided_by_first_rank(partial(files_checksum, arguments.texts, output)),
        tokens_a_step=blocks_a_step * training_arguments.world_size * arguments.block_size,
        accumulates=True,  # its loss is a mean over equally many tokens of each block
    )
    if record.is_finished:
        if training_arguments.process_index == 0:
            print(f"{output} is adapted already; nothing to do.")
        return output
    require_writable(output)
    for source in arguments.texts:
        parse_source(source)  # before the backbone is read
    checkpoint = checkpoint_to_resume(output, training_arguments.resume_from_checkpoint)
    set_seed(training_arguments.seed)
    with reading_for_shards(training_arguments):
        transformer, dtype = _load_transformer(arguments)
    trainer = _build_trainer(transformer, arguments, training_arguments)
    trainer.add_callback(_LossBefore(trainer, record))
    trainer.add_callback(record)
    if training_arguments.max_seconds is not None:
        trainer.add_callback(SecondsBudget(training_arguments.max_seconds))
    if training_arguments.stop_after_steps is not None:
        trainer.add_callback(StopAfter(training_arguments.stop_after_steps))
    output.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    require_all_steps(trainer, output)
    trainer.guard.require_sound(trainer.state)
    after = trainer.evaluate()["eval_loss"]
    model = trainer.whole_model()
    if trainer.is_world_process_zero():
        _save(model, transformer, arguments, dtype, output)
        record.update(eval_loss_after=after, finished=True)
    trainer.accelerator.wait_for_everyone()
    return output


def _load_transformer(arguments: MntpArguments) -> tuple[LionTransformer, torch.dtype]:
    """The backbone, and the dtype it is published in."""
    transformer = LionTransformer(
        arguments.backbone,
        transformer_task="text-generation",
        query_length=None,
        document_length=None,
        add_bos=arguments.add_bos,
        num_layers=arguments.num_layers,
        layers=arguments.layers,
        model_kwargs={"dtype": "auto", "load_in_4bit": arguments.load_in_4bit}
        | ({"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}),
    )
    transformer.verify_bidirectional()
    dtype = transformer.model.dtype
    if Path(arguments.backbone).is_dir():
        # What an adapter names as its base must not depend on where it is read from.
        transformer.model.name_or_path = str(Path(arguments.backbone).resolve())
    if not arguments.use_peft:
        # Steps of 5e-5 are lost in bfloat16's rounding.
        cast_weights(transformer.model, torch.float32, transformer.awaits_weights)
    return transformer, dtype


def _build_trainer(
    transformer: LionTransformer, arguments: MntpArguments, training_arguments: MntpTrainingArguments
) -> MntpTrainer:
    tokenizer: Any = transformer.tokenizer
    mask_token_id = tokenizer.convert_tokens_to_ids(arguments.mask_token)
    if mask_token_id is None or mask_token_id == tokenizer.unk_token_id:
        raise ValueError(
            f"The vocabulary of {arguments.backbone!r} has no token {arguments.mask_token!r}; "
            "pass a token it has with --mask_token."
        )
    model = masked_next_token_forward(transformer, arguments.z_loss_weight, arguments.z_loss_target)
    if arguments.use_peft:
        from peft import get_peft_model

        with warnings.catch_warnings():  # PEFT asks for it by its old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(model, arguments.lora_config())
    train, held_out = _split_blocks(tokenizer, arguments, training_arguments.seed)
    return MntpTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=MntpCollator(
            vocab_size=len(tokenizer),
            mask_token_id=mask_token_id,
            special_token_ids=tokenizer.all_special_ids,
            mask_probability=arguments.mask_probability,
            random_share=arguments.random_share,
            kept_share=arguments.kept_share,
            seed=training_arguments.seed,
        ),
        cost=mntp_cost(arguments, training_arguments, BackboneShape.from_config(transformer.config)),
    )


def mntp_cost(
    arguments: MntpArguments, training_arguments: MntpTrainingArguments, shape: BackboneShape
) -> TrainingCost:
    """Counts the operations of an MNTP run's steps."""
    return TrainingCost(
        shape,
        has_head=False,
        lora_r=arguments.lora_r if arguments.use_peft else None,
        gradient_checkpointing=recomputes_activations(training_arguments),
        loads_head=True,
    )


def _split_blocks(tokenizer: Any, arguments: MntpArguments, seed: int) -> tuple[Dataset, Dataset]:
    blocks = token_blocks(arguments.texts, tokenizer, arguments.block_size, arguments.rows_per_document)
    if len(blocks) <= arguments.eval_blocks:
        raise ValueError(
            f"The text has {len(blocks)} blocks of {arguments.block_size} tokens, of which {arguments.eval_blocks} "
            "are held out: give more text or fewer --eval_blocks."
        )
    split = blocks.train_test_split(test_size=arguments.eval_blocks, seed=seed)
    return split["train"], split["test"]


def _save(model: Any, transformer: LionTransformer, arguments: MntpArguments, dtype: torch.dtype, output: Path) -> None:
    with atomic_files_in(output) as folder:
        if arguments.use_peft and not arguments.merge:
            model.save_pretrained(folder)
            if transformer.kept_layers is not None:  # of a base that has more
                kept = {"layers": transformer.kept_layers}
                Path(folder, SETTINGS).write_text(json.dumps(kept), encoding="utf-8")
        else:
            transformer.model = model.get_base_model() if arguments.use_peft else model.to(dtype)
            save_merged(transformer.model, str(folder))
        transformer.processor.save_pretrained(folder)
