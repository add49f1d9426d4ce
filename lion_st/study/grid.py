"""The cells of a study, and what a budget of training FLOPs buys each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.errors import UsageError
from lion_st.study.settings import BackboneChoice, Study, digest
from lion_st.training.cost import Lengths
from lion_st.training.recipes import BACKBONES, MNTP_RECIPES, BackboneShape, adapted_backbone

if TYPE_CHECKING:
    from lion_st.training.options.arguments import (
        MntpArguments,
        MntpTrainingArguments,
        RetrieverArguments,
        RetrieverTrainingArguments,
    )


@dataclass(frozen=True)
class MntpStage:
    """The MNTP stage of one backbone: options of `lion-st adapt` and what it costs."""

    backbone: str
    options: Mapping[str, Any]
    batch: int  # blocks of all processes, of one accumulation step
    steps: int
    tokens: int
    flops: float
    configuration: str


@dataclass(frozen=True)
class Cell:
    """One training of the grid, with what its budget buys.

    Attributes:
        options: Of `lion-st train`, without the places of model, data and output.
        tokens: Of all steps, by the plan's lengths.
        flops: Of all steps, by the plan's lengths.
        budget_flops: What they may be at most.
        mntp_flops: Of its backbone's MNTP stage.
        memory: Bytes on each device at the peak, every text at full length.
        non_embedding_parameters: Weights of the linear layers of all blocks.
        temperature: Divisor of its scores in training, and in the contrastive entropy.
        dense_temperature: That of the dense scores of a hybrid model.
        configuration: Hash of all that decides on its result.
    """

    name: str
    backbone: str
    paradigm: str
    objective: str
    seed: int
    label_noise: float
    options: Mapping[str, Any]
    steps: int
    tokens: int
    flops: float
    budget_flops: float
    mntp_flops: float
    memory: float
    non_embedding_parameters: int
    parameters: int
    temperature: float
    dense_temperature: float
    configuration: str


@dataclass(frozen=True)
class Plan:
    """The cells of a study and the MNTP stages of their backbones."""

    study: Study
    stages: tuple[MntpStage, ...]
    cells: tuple[Cell, ...]
    processes: int = 1  # that share the batches of each training

    def rows(self) -> list[dict[str, Any]]:
        """A row for each stage and cell, for a table."""
        speed = self.study.flops_per_second
        rows: list[dict[str, Any]] = [
            {"cell": f"MNTP of {stage.backbone}", "steps": stage.steps, "tokens": stage.tokens,
             "FLOPs": f"{stage.flops:.3g}", "hours": stage.flops / speed / 3600}
            for stage in self.stages
        ]  # fmt: skip
        rows += [
            {
                "cell": cell.name,
                "steps": cell.steps,
                "tokens": cell.tokens,
                "FLOPs": f"{cell.flops:.3g}",
                "hours": cell.flops / speed / 3600,
                "memory, GiB": cell.memory / 2**30,
                "non-embedding parameters": cell.non_embedding_parameters,
            }
            for cell in self.cells
        ]
        return rows

    @property
    def flops(self) -> float:
        """Of everything."""
        return sum(stage.flops for stage in self.stages) + sum(cell.flops for cell in self.cells)


def plan_study(study: Study, processes: int = 1) -> Plan:
    """Fix the steps of every cell by the budget.

    Lengths are measured, where the study asks for it, on the study's own training tuples with the backbone's tokenizer.

    Args:
        study: As `read_study` reads it.
        processes: That share the batches of each training.

    Raises:
        UsageError: If an option of the training is unknown or not read by a cell, the budget does not buy a step, or
            the processes cannot share a batch.
        OSError: If a backbone's configuration, or what is to be measured, cannot be reached.
    """
    shapes = {choice.name: shape_of(choice) for choice in study.backbones}
    stages = {
        choice.name: _stage(study, choice, shapes[choice.name], processes) for choice in study.backbones if study.mntp
    }
    grid = product(study.paradigms, study.objectives, study.label_noise, study.flops)
    axes = product(study.seeds, study.backbones, grid)  # first a whole grid of one seed, to report if cut short
    cells = tuple(
        _cell(study, choice, shapes[choice.name], stages.get(choice.name), processes, seed, *others)
        for seed, choice, others in axes
    )
    return Plan(study, tuple(stages.values()), cells, processes)


def shape_of(choice: BackboneChoice) -> BackboneShape:
    """The shape of a backbone: the recipe's where it names the recipe's model, else of the model's configuration."""
    known = BACKBONES[choice.recipe]
    if choice.model == known.model:
        shape = known.shape
    else:
        from lion_st.training.contract import backbone_config

        shape = BackboneShape.from_config(backbone_config(choice.model))
    layers = len(choice.layers) if choice.layers is not None else choice.num_layers
    if layers is None:
        return shape
    deepest = max(choice.layers) + 1 if choice.layers is not None else layers
    if deepest > shape.num_hidden_layers:
        raise UsageError(
            f"The backbone {choice.name!r} asks for layer {deepest - 1} of {choice.model}, which has "
            f"{shape.num_hidden_layers}: layers are numbered from 0."
        )
    return replace(shape, num_hidden_layers=layers)


def place_of(choice: BackboneChoice) -> str:
    """Where a backbone is: the folder of a source checkout, for those of the project's own, else what was named."""
    return adapted_backbone(choice.recipe) if choice.model == BACKBONES[choice.recipe].model else choice.model


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line."""
    words: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return words


def _cell(
    study: Study,
    choice: BackboneChoice,
    shape: BackboneShape,
    stage: MntpStage | None,
    processes: int,
    seed: int,
    paradigm: str,
    objective: str,
    noise: float,
    budget: float,
) -> Cell:
    from lion_st.training.retriever import resolve_batches, step_memory, step_size, training_cost

    noisy = f"-noise{noise:g}" if len(study.label_noise) > 1 or noise else ""
    budgeted = f"-flops{budget:g}" if len(study.flops) > 1 else ""
    name = f"{choice.name}-{paradigm}-{objective}{noisy}{budgeted}-seed{seed}"
    options = _options(study, choice, paradigm, objective, seed)
    if stage is None:
        options |= {"num_layers": choice.num_layers, "layers": choice.layers}
    # A recipe's way with the teacher's scores is for its own data.
    arguments, training_arguments = read_options({**options, "train_data": study.data["train"]}, name)
    cost = training_cost(arguments, training_arguments, shape)
    lengths = _lengths(study, choice, arguments)
    texts, tokens, squared = step_size(arguments, lengths)
    each = cost.flops(texts, tokens, squared)
    spent = stage.flops if stage is not None else 0.0
    steps = _steps(name, budget, spent if study.includes_mntp else 0.0, each)
    for one, default in (("teacher_normalization", "none"), ("teacher_temperature", 1.0)):
        if getattr(arguments, one) != default:  # said here, as the study's copy of these data has another name
            options[one] = getattr(arguments, one)
    try:
        divided = resolve_batches(arguments, training_arguments, processes)
    except ValueError as error:
        raise UsageError(f"The cell {name} cannot be trained: {error}") from None
    # Where an interrupted cell goes on; at most four checkpoints are written.
    options = {"logging_steps": max(1, steps // 20), "save_steps": max(10, steps // 4), **options, "max_steps": steps}
    base = {"model": choice.model, "layers": choice.layers or choice.num_layers, "data": study.of_data()}
    decides = {"options": options, "evaluation": study.of_evaluation(), "noise": noise, **base}
    if stage is not None:
        decides["mntp"] = stage.configuration
    return Cell(
        name=name,
        backbone=choice.name,
        paradigm=paradigm,
        objective=objective,
        seed=seed,
        label_noise=noise,
        options={key: value for key, value in options.items() if value is not None},
        steps=steps,
        tokens=round(tokens * steps),
        flops=each * steps,
        budget_flops=budget,
        mntp_flops=spent,
        memory=sum(step_memory(arguments, divided, cost, processes).values()),
        non_embedding_parameters=cost.linear_parameters,
        parameters=cost.parameters,
        temperature=arguments.temperature,
        dense_temperature=arguments.dense_temperature,
        configuration=digest(decides),
    )


def _options(study: Study, choice: BackboneChoice, paradigm: str, objective: str, seed: int) -> dict[str, Any]:
    """What the study says of the training of a cell, by conditions too."""
    options: dict[str, Any] = {"backbone": choice.recipe, "paradigm": paradigm, "objective": objective, "seed": seed}
    options |= study.training
    for condition in study.where:
        if condition.holds(choice.name, paradigm, objective):
            options |= condition.options
    return options


def _steps(name: str, budget: float, spent: float, each: float) -> int:
    """The steps that a budget of FLOPs buys, less what the MNTP stage has spent of it."""
    steps = int((budget - spent) // each)
    if steps < 1:
        taken = f" less the {spent:.3g} of its MNTP stage" if spent else ""
        raise UsageError(
            f"The budget of {budget:.3g} FLOPs{taken} does not buy a step of {name}, which takes {each:.3g}: "
            "raise budget.flops, or lower training's batch_size, negatives or document_length."
        )
    return steps


def _stage(study: Study, choice: BackboneChoice, shape: BackboneShape, processes: int) -> MntpStage:
    from lion_st.training.mntp import mntp_cost

    options: dict[str, Any] = {"num_layers": choice.num_layers, "layers": choice.layers, **(study.mntp or {})}
    known = choice.recipe in MNTP_RECIPES and choice.model == MNTP_RECIPES[choice.recipe].model
    options = {"backbone": choice.recipe if known else choice.model, **options}
    arguments, training_arguments = read_mntp_options(options, f"MNTP of {choice.name}")
    steps = int(training_arguments.max_steps or 0)
    each = training_arguments.per_device_train_batch_size
    if each % processes:
        raise UsageError(
            f"{processes} processes cannot share the MNTP batches of {choice.name}, {each} blocks: change "
            "mntp.per_device_train_batch_size."
        )
    blocks = each * training_arguments.gradient_accumulation_steps
    size = arguments.block_size
    masked = blocks * max(1, round(arguments.mask_probability * size))
    flops = steps * mntp_cost(arguments, training_arguments, shape).masked_flops(blocks, size, masked)
    base = {"model": choice.model, "layers": choice.layers or choice.num_layers, "data": study.of_data()["data"]}
    kept = {name: value for name, value in options.items() if value is not None}
    configuration = digest({"options": kept, "hold_out": study.hold_out, **base})
    return MntpStage(choice.name, kept, each, steps, steps * blocks * size, flops, configuration)


def read_options(options: Mapping[str, Any], name: str) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """The arguments of a cell."""
    from lion_st.training.options.command_line import parse_retriever_arguments

    try:
        arguments, training_arguments = parse_retriever_arguments(words_of({"model": "-", **options}), "training")
    except ValueError as error:
        raise UsageError(f"The cell {name} cannot be trained: {error}") from None
    return arguments, training_arguments


def read_mntp_options(options: Mapping[str, Any], name: str) -> tuple[MntpArguments, MntpTrainingArguments]:
    """The arguments of an MNTP stage; see `read_options`."""
    from lion_st.training.options.command_line import parse_mntp_arguments

    try:
        return parse_mntp_arguments(words_of(options), "mntp")
    except ValueError as error:
        raise UsageError(f"{name} cannot be run: {error}") from None


def _lengths(study: Study, choice: BackboneChoice, arguments: RetrieverArguments) -> Lengths:
    limits = arguments.query_length, arguments.document_length
    if study.lengths == "full":
        return Lengths.equal(*limits)
    if not isinstance(study.lengths, str):
        return Lengths.equal(*study.lengths)
    prompts = arguments.query_prompt or "", arguments.document_prompt or ""
    ends = arguments.add_bos, bool(arguments.add_eos)
    return measured_lengths(place_of(choice), tuple(sorted(study.data.items())), *limits, prompts, *ends)


@lru_cache
def measured_lengths(
    model: str,
    data: Sequence[tuple[str, Any]],
    query_length: int,
    document_length: int,
    prompts: tuple[str, str] = ("", ""),
    add_bos: bool | None = None,
    add_eos: bool = False,
    sample: int = 2000,
) -> Lengths:
    """Mean lengths of texts of the training data, in tokens of a model, cut to what is read.

    Args:
        model: Whose tokenizer it is.
        data: `Study.data`, as pairs.
        query_length: Longest query.
        document_length: Longest document.
        prompts: In front of queries and of documents.
        add_bos: As for `LionTransformer`.
        add_eos: The same.
        sample: Tuples that are looked at, evenly spread.
    """
    import numpy as np
    from transformers import AutoTokenizer

    from lion_st.modules.tokenizer_contract import append_eos, leave_out_bos
    from lion_st.study.data import read_training_rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    if add_bos is False:
        leave_out_bos(tokenizer)
    if add_eos:
        append_eos(tokenizer)
    rows = list(read_training_rows(dict(data), sample=sample))
    documents = [text for row in rows for text in (*row.positives, *row.negatives)]
    texts = {"query": [row.query for row in rows], "document": documents}
    found: list[float] = []
    for task, limit, prompt in zip(texts, (query_length, document_length), prompts, strict=True):
        read = [prompt + text for text in texts[task]]
        ids = tokenizer(read, truncation=True, max_length=limit, verbose=False)["input_ids"]
        counts = np.array([len(one) for one in ids], dtype=float)
        found += [float(counts.mean()), float((counts**2).mean())]
    return Lengths(*found)


def output_place(folder: Path, cell: str) -> Path:
    """The folder of a cell in a study's output."""
    return folder / "cells" / cell
