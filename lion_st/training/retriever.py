"""Fine-tuning of a retriever: model, loss and trainer of a recipe, and the run from data to stock checkpoint."""

from __future__ import annotations

import logging
import os
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import SpladeLoss
from torch import nn
from transformers import TrainerCallback, set_seed

from lion_st.data.fields import TASKS
from lion_st.data.tuples import load_tuples, reader_of, set_epoch
from lion_st.losses import MicroBatchRegularizerWeightSchedulerCallback
from lion_st.modules.multi_vector_head import TOKEN_DIMENSION
from lion_st.training.cost import Lengths, TrainingCost
from lion_st.training.evaluation import EarlyStopping, build_evaluator, hold_out_share
from lion_st.training.learned_sparsity import attach_learned_sparsity
from lion_st.training.mixing import WeightedBatchSampler
from lion_st.training.objectives import build_loss, has_terms, uncacheable
from lion_st.training.options.released_code import ramp_micro_batches
from lion_st.training.progress.callbacks import SecondsBudget
from lion_st.training.progress.checkpoints import checkpoint_to_resume
from lion_st.training.progress.collapse import CollapseGuard
from lion_st.training.prompts import column_prompts, source_prompts
from lion_st.training.query_tables import attach_query_table
from lion_st.training.recipes import BackboneShape
from lion_st.training.regularizers import prepare_regularizers
from lion_st.training.runs import export_run, require_places, run_log
from lion_st.training.self_distillation import EmaCallback, EmaTeacher
from lion_st.training.sharding import (
    build_device,
    reading_for_shards,
    refuse_unsharded,
    sharding_of,
    share_checks,
)
from lion_st.training.starting import build_model
from lion_st.training.teacher import report_teacher, teacher_weights
from lion_st.training.trainers import TRAINERS, RetrieverTrainerMixin
from lion_st.training.validation import (
    recomputes_activations,
    refuse_float16_on_cpus,
    refuse_several_gpus,
    warn_of_slow_training,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from lion_st.training.options.arguments import RetrieverArguments, RetrieverTrainingArguments

logger = logging.getLogger(__name__)


def build_trainer(
    model: Any,
    arguments: RetrieverArguments,
    training_arguments: RetrieverTrainingArguments,
    train_dataset: Dataset | DatasetDict,
    callbacks: list[TrainerCallback] | None = None,
    loss: nn.Module | None = None,
) -> RetrieverTrainerMixin:
    """sentence-transformers' trainer of a model, with the recipe's loss, lengths, prompts and batches.

    Args:
        model: As `build_model` makes it.
        arguments: Objective and prompts; `training_arguments.prompts` has those of single sources.
        training_arguments: Those of sentence-transformers' trainers. What is left out is filled in, in a copy: column
            tasks (`router_mapping`) and prompts, batch sampler, batch and accumulation.
        train_dataset: As `load_tuples` makes it, which draws other negatives each epoch, or any other with columns of
            texts in this order, the query first, and perhaps a `label`. Of several in a `DatasetDict` each batch is of
            one. `eval_share` is held out of tuples of `load_tuples`.
        callbacks: Of the trainer.
        loss: In place of the objective's own, see `build_loss`.

    Raises:
        ValueError: If the batch cannot be divided as asked, the data are fewer than one batch, or what to evaluate on
            cannot be read.
        TypeError: If the data are a stream (IterableDataset).
        FileNotFoundError: If a collection to evaluate on is not there.
    """
    refuse_float16_on_cpus(training_arguments)
    warn_of_slow_training(training_arguments)
    refuse_unsharded(arguments, training_arguments)
    share_checks(model[0])
    training_arguments = resolve_batches(arguments, training_arguments)
    is_one = not isinstance(train_dataset, dict)
    sources = {" and ".join(arguments.train_data): train_dataset} if is_one else train_dataset
    _require_datasets(sources)
    training_arguments.require_prompts(sources)
    prompts = source_prompts(arguments, training_arguments.prompts, sources)
    sources, held_out = hold_out_share(sources, training_arguments, prompts)
    if held_out is not None:
        train_dataset = next(iter(sources.values())) if is_one else type(train_dataset)(sources)
    evaluator = build_evaluator(training_arguments, arguments.paradigm, held_out)
    _require_batches(sources, training_arguments)
    if arguments.reads_scores and training_arguments.process_index == 0:
        report_teacher(sources, arguments.objective, arguments.teacher_temperature)
    if training_arguments.dataloader_num_workers:
        _leave_tokenizing_to_the_workers()
    tasks = _column_tasks(training_arguments.router_mapping, sources)
    training_arguments.router_mapping = tasks
    training_arguments.prompts = column_prompts(prompts, tasks, not is_one, model[0])
    _choose_samplers(arguments, training_arguments)
    rates = _attach_query_table(model, arguments, sources) | attach_learned_sparsity(model, arguments)
    training_arguments.learning_rate_mapping = rates | cast(dict, training_arguments.learning_rate_mapping or {})
    loss = build_loss(model, arguments) if loss is None else loss
    ramp = _ramp(loss, arguments) if isinstance(loss, SpladeLoss) else None
    further = prepare_regularizers(loss, model, sources, arguments.regularizer_warmup_ratio)
    if training_arguments.max_seconds is not None:
        further.append(SecondsBudget(training_arguments.max_seconds, ramp))
    if training_arguments.early_stopping_patience is not None:
        further.append(EarlyStopping(training_arguments.early_stopping_patience))
    trainer = TRAINERS[arguments.paradigm](
        model=model,
        args=training_arguments,
        train_dataset=train_dataset,
        loss=loss,
        evaluator=evaluator,
        callbacks=[*([] if ramp is None else [ramp]), *(callbacks or []), *further],
        guard=CollapseGuard(
            ramp, regularized=arguments.document_regularizer_weight > 0 and arguments.regularizer != "target"
        ),
    )
    trainer.epoch_listeners += [
        partial(set_epoch, source) for source in sources.values() if reader_of(source) is not None
    ]
    if arguments.self_distillation:
        trainer.self_teacher = EmaTeacher(
            model, arguments.ema_decay, 1 / arguments.temperature, arguments.mini_batch_size
        )
        trainer.add_callback(EmaCallback(trainer.self_teacher))
    trainer.cost = training_cost(arguments, training_arguments, BackboneShape.from_config(model[0].config))
    return trainer


def _require_datasets(sources: dict[str, Dataset]) -> None:
    """Refuse a stream, whose rows are not there to be drawn from."""
    from datasets import Dataset

    for name, source in sources.items():
        if not isinstance(source, Dataset):
            raise TypeError(
                f"Batches are chosen among all rows of {name}, of which a {type(source).__name__} has no count: load a "
                "Dataset, without streaming."
            )


def _require_batches(sources: dict[str, Dataset], training_arguments: RetrieverTrainingArguments) -> None:
    """Refuse data that fill no batch."""
    needed = training_arguments.per_device_train_batch_size * training_arguments.world_size
    for name, source in sources.items():
        if len(source) < needed:
            raise ValueError(
                f"{name} has {len(source)} tuples, fewer than a batch of {needed}: give more data, or a smaller "
                "--batch_size."
            )


def _column_tasks(router_mapping: Any, sources: dict[str, Dataset]) -> dict[str, str]:
    """The task of each column of texts, which decides on its length.

    The first is of queries, as the losses take it, whatever its name, unless another task was given for it.
    """
    tasks: dict[str, str] = {}
    for name, source in sources.items():
        first, *others = (column for column in source[0] if column != "label")
        if "query" in others:
            raise ValueError(
                f"The columns of {name} begin with {first!r}, which the losses would take for the query: put 'query' "
                "first with select_columns(['query', ...])."
            )
        tasks |= {first: "query"} | dict.fromkeys(others, "document")
    given = dict(router_mapping or {})
    for column, task in given.items():
        if column not in tasks or task not in TASKS:
            raise ValueError(
                f"--router_mapping says {column!r} is {task!r}: it maps columns, {', '.join(tasks)}, to 'query' or "
                "'document'."
            )
    return tasks | given


def _choose_samplers(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> None:
    if training_arguments.batch_sampler is None:
        # A text twice in a batch would be its own negative; `get_batch_sampler` looks at all devices.
        training_arguments.batch_sampler = (
            BatchSamplers.NO_DUPLICATES if arguments.objective in ("cl", "cl_kd") else BatchSamplers.BATCH_SAMPLER
        )
    if arguments.train_weights is not None:
        training_arguments.multi_dataset_batch_sampler = partial(WeightedBatchSampler, weights=arguments.train_weights)


def _attach_query_table(model: Any, arguments: RetrieverArguments, sources: dict[str, Dataset]) -> dict[str, float]:
    """Give the model a table for its queries if one is asked for, and that its learning rate."""
    if arguments.query_encoder != "full":
        attach_query_table(model, arguments, sources)
        return {r"query_table\.weight": arguments.query_encoder_learning_rate}
    if getattr(model, "query_table", None) is not None:
        raise ValueError(
            f"A table encodes the queries of {arguments.model!r}: train it on with --query_encoder static."
        )
    return {}


def _ramp(loss: SpladeLoss, arguments: RetrieverArguments) -> SpladeRegularizerWeightSchedulerCallback:
    if arguments.regularizer == "target":  # which finds its own way
        return SpladeRegularizerWeightSchedulerCallback(loss, warmup_ratio=1e-9)
    ratio = arguments.regularizer_warmup_ratio or 1e-9  # one step, the least there is; of 0 it would make 1/3
    if arguments.preset is None:
        return SpladeRegularizerWeightSchedulerCallback(loss, warmup_ratio=ratio)
    micro_batches = ramp_micro_batches(arguments.backbone, arguments.objective, arguments.batch_size)
    return MicroBatchRegularizerWeightSchedulerCallback(loss, warmup_ratio=ratio, micro_batches=micro_batches)


def _leave_tokenizing_to_the_workers() -> None:
    """Switch off the tokenizers' own threads: a process that is forked after they have run waits for them for ever."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "false").lower() not in ("false", "0", "off", "no", ""):
        logger.warning("TOKENIZERS_PARALLELISM is set to false: the data loader's workers would wait for it for ever.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def resolve_batches(
    arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments, devices: int | None = None
) -> RetrieverTrainingArguments:
    """The training arguments with the batch of each device and the accumulation steps that together are `batch_size`.

    What is left out follows from the rest; with both left out there is one accumulation step, which keeps all
    in-batch negatives, and memory is bounded by `mini_batch_size`. `kd` of other than sparse models, which has no
    negatives across queries, accumulates instead.

    Args:
        arguments: With the batch.
        training_arguments: With what was given of its division.
        devices: In place of the number of processes.

    Returns:
        A copy.
    """
    world_size = devices or training_arguments.world_size
    if devices is None:
        refuse_several_gpus(training_arguments)
    total, each, steps = (
        arguments.batch_size,
        training_arguments.per_device_train_batch_size,
        training_arguments.gradient_accumulation_steps,
    )
    if each is None and steps is None and arguments.mini_batch_size and uncacheable(arguments):
        each = min(arguments.mini_batch_size, total // world_size)
    if each is None:
        steps = steps or 1
        each = total // (world_size * steps)
    elif steps is None:
        steps = total // (world_size * each)
    if each * steps * world_size != total or not each:
        raise ValueError(
            f"A batch of {total} cannot be divided into {world_size} device(s) x {each} queries x {steps} accumulation "
            "step(s). Choose --per_device_train_batch_size and --gradient_accumulation_steps whose product with the "
            "number of devices is the batch, or leave them out, or change --batch_size."
        )
    if steps > 1 and not uncacheable(arguments):
        logger.warning(
            "With %d accumulation steps in-batch negatives and FLOPS are of %d queries at a time, not of %d. Lower "
            "--mini_batch_size to save memory instead.",
            steps,
            each * world_size,
            total,
        )
    resolved = copy(training_arguments)
    resolved.per_device_train_batch_size = each
    resolved.gradient_accumulation_steps = steps
    return resolved


def train_retriever(arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments) -> Path:
    """Train a retriever and write it as a stock checkpoint.

    Called again with the same arguments it resumes from its last checkpoint, and does nothing once it has finished.

    With `push_to_hub` the result is pushed too, as one commit to `hub_model_id`; `lion-st publish` adds the card, the
    revision for SparseEncoder and tags. The checkpoints before it are pushed only where `hub_strategy` says so: the
    trainer adds its pickled arguments to them, which the result replaces.

    Args:
        arguments: Model, data and objective.
        training_arguments: Those of sentence-transformers' trainers.

    Returns:
        The output folder: a checkpoint for `SentenceTransformer(folder)`, beside the trainer's own checkpoints and
        `training.json` with settings, steps, seconds and floating point operations spent.

    Raises:
        ValueError: If the settings do not fit each other, the model or the data, the output folder belongs to a run
            with other settings or data, or all its checkpoints are damaged.
        FileNotFoundError: If the model or the data are not there.
        TrainingCollapsed: If it ends without a useful model: NaN, or vectors that are empty, alike or never sparse.
        OSError: If the finished result cannot be pushed; how to publish it.

    Example:
        ::

            recipe = get_recipe("llama-3.2-1b", "sparse", "cl_kd")
            folder = train_retriever(*retriever_arguments(recipe, output_dir="runs/lion-sp-1b"))
            SentenceTransformer(str(folder)).encode_query("what is a lion")
    """
    refuse_float16_on_cpus(training_arguments)
    refuse_unsharded(arguments, training_arguments)
    training_arguments = resolve_batches(arguments, training_arguments)
    record = run_log(arguments, training_arguments)
    if record.is_finished:
        if training_arguments.process_index == 0:
            print(f"{record.folder} is trained already; nothing to do.")
        return record.folder
    checkpoint = checkpoint_to_resume(record.folder, training_arguments.resume_from_checkpoint)
    require_places(arguments, training_arguments)
    set_seed(training_arguments.seed)
    with reading_for_shards(training_arguments):
        model = build_model(arguments, build_device(training_arguments), record.folder)
    tuples = load_training_tuples(arguments, training_arguments.seed)
    trainer = build_trainer(model, arguments, training_arguments, tuples, callbacks=[record])
    trainer.train(resume_from_checkpoint=checkpoint)
    return export_run(trainer, record)


def load_training_tuples(arguments: RetrieverArguments, seed: int) -> Dataset | DatasetDict:
    """The training tuples, with the teacher's scores where the objective reads them; of several sources, by name."""
    from datasets import DatasetDict

    tuples = {
        source: load_tuples(
            source,
            negatives=arguments.negatives,
            teacher_scores=arguments.reads_scores,
            teachers=teacher_weights(arguments.teachers) or None,
            combine=arguments.combine,
            teachers_apart=arguments.weight_by_agreement,
            teacher_normalization=arguments.teacher_normalization,
            split=arguments.train_split,
            subset=arguments.train_subset,
            queries=arguments.train_queries,
            documents=arguments.train_documents,
            sampling=arguments.sampling,
            drop_short=arguments.drop_short,
            seed=seed,
        )
        for source in arguments.train_data
    }
    return DatasetDict(tuples) if len(tuples) > 1 else tuples[arguments.train_data[0]]


def training_cost(
    arguments: RetrieverArguments, training_arguments: RetrieverTrainingArguments, shape: BackboneShape
) -> TrainingCost:
    """Counts the operations of a run's steps."""
    tokens = arguments.document_length * (arguments.token_dimension or TOKEN_DIMENSION)
    is_learned = arguments.query_encoder == "static"
    table = shape.vocab_size * (1 if arguments.paradigm == "sparse" else shape.hidden_size) if is_learned else 0
    return TrainingCost(
        shape,
        has_head=has_terms(arguments),
        lora_r=arguments.lora_r if arguments.use_peft else None,
        load_in_4bit=arguments.load_in_4bit,
        cached=arguments.mini_batch_size is not None and not uncacheable(arguments),
        gradient_checkpointing=recomputes_activations(training_arguments),
        vector_width=tokens if arguments.paradigm == "multi_vector" else None,
        has_dense=arguments.paradigm == "hybrid",
        table_parameters=table,
        averages_weights=arguments.self_distillation,
    )


def step_size(arguments: RetrieverArguments, lengths: Lengths) -> tuple[int, float, float]:
    """Texts that the network reads in a step, their tokens, and the sum of their squared lengths."""
    queries = arguments.batch_size * (arguments.query_encoder == "full")  # else a table has them
    documents = arguments.batch_size * (1 + arguments.negatives)
    tokens = queries * lengths.query + documents * lengths.document
    return queries + documents, tokens, queries * lengths.query_squared + documents * lengths.document_squared


def step_memory(
    arguments: RetrieverArguments,
    training_arguments: RetrieverTrainingArguments,
    cost: TrainingCost,
    devices: int | None = None,
) -> dict[str, float]:
    """What is held on each device at the peak of a step of divided batches, every text at full length."""
    devices = devices or training_arguments.world_size
    each: Any = training_arguments.per_device_train_batch_size
    documents = 1 + arguments.negatives
    lengths = [arguments.document_length] * documents
    if arguments.query_encoder == "full":
        lengths.append(arguments.query_length)
    at_once = each * sum(lengths)
    if cost.cached and arguments.mini_batch_size is not None:
        at_once = arguments.mini_batch_size * max(lengths)
    return cost.memory(
        at_once,
        each * (1 + documents),
        arguments.objective,
        gathered_texts=(devices - 1) * each * documents,
        half_precision=training_arguments.bf16 or training_arguments.fp16,
        devices=devices,
        sharding=sharding_of(training_arguments),
    )
