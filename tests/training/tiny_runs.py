"""Arguments of training runs that take a second."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lion_st.training.options.arguments import RetrieverArguments, RetrieverTrainingArguments, retriever_arguments
from lion_st.training.recipes import get_recipe

TOPICS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems", "planets")


def write_sentences(path: Path) -> Path:
    """A text for MNTP, a sentence a line."""
    path.write_text("".join(f"Lions number {n} rest in place {n * 7 % 13}, at night {n}.\n" for n in range(99)))
    return path


def write_tuples(path: Path, rows: int = 24, negatives: int = 4, shared: bool = False) -> Path:
    """Pairs with scored negatives, each text once, or with a negative that is the positive of the row after next."""
    lines = []
    for row in range(rows):
        topic = TOPICS[row % len(TOPICS)]
        neighbour = (row + 2) % rows
        others = [TOPICS[(row + n) % len(TOPICS)].capitalize() for n in range(1, negatives + 1)]
        lines.append(
            {
                "query": f"what do {topic} number {row} do",
                "pos": [positive(row)],
                "neg": [
                    positive(neighbour) if shared and n == 0 else f"{other} {row} rest in place {n}."
                    for n, other in enumerate(others)
                ],
                "pos_scores": [5.0 + row % 3],
                "neg_scores": [float(n % 4) - 1 for n in range(negatives)],
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def positive(row: int) -> str:
    return f"{TOPICS[row % len(TOPICS)].capitalize()} number {row} do this and that on day {row}."


class Interruption(Exception):
    """Ends a training, as a killed process does."""


@contextmanager
def interrupted(trainer: type, call: int) -> Iterator[None]:
    """Have a training end within the block, at a call of `training_step`, counted from 1."""
    step, calls = trainer.training_step, count(1)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Interruption
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(trainer, "training_step", stepping)
        yield


def tiny_options(backbone: str, data: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Options of a run of four steps of four queries on a tiny backbone."""
    return {
        "model": backbone,
        "train_data": str(data),
        "output_dir": str(output),
        "batch_size": 4,
        "negatives": 2,
        "mini_batch_size": None,
        "attn_implementation": None,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_peft": False,
        "bf16": False,
        "disable_tqdm": True,
    } | overrides


def tiny_run(
    backbone: str, data: Path, output: Path, paradigm: str = "sparse", objective: str = "cl_kd", **overrides: Any
) -> tuple[RetrieverArguments, RetrieverTrainingArguments]:
    """Arguments of `tiny_options` on a recipe of the backbone micro."""
    recipe = get_recipe("micro", paradigm, objective)
    return retriever_arguments(recipe, **tiny_options(backbone, data, output, **overrides))
