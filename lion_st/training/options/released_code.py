"""What the paper's released code computes, where that is not what the recipes do: `--preset released`.

https://github.com/HansiZeng/scaling-retriever at commit 89f301c, run as its scripts do, on four GPUs. docs/fidelity.md
lists what differs, and what cannot be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lion_st.errors import UsageError
from lion_st.training.contract import start_options
from lion_st.training.options.reader import merge_layers
from lion_st.training.recipes import PAPER_PARADIGMS, MntpRecipe, RetrieverRecipe, mntp_folder

DEVICES = 4
# Gradients of the gathered terms, NCE and FLOPS, come out divided by the number of devices; those of KL do not.
SHARE = 1 / DEVICES
# Accumulation steps of the contrastive objectives, whose negatives and FLOPS are those of one such step; and rows of a
# device under kd, whose FLOPS are over that many.
ACCUMULATION = {"llama-3.2-1b": 1, "llama-3.2-3b": 2, "llama-3-8b": 4}
DISTILLED_ROWS = {"llama-3.2-1b": 256, "llama-3.2-3b": 128, "llama-3-8b": 64}
# The dense scripts count epochs, the sparse ones steps.
EPOCHS = {"llama-3.2-1b": 7, "llama-3.2-3b": 3, "llama-3-8b": 1}
DISTILLED_EPOCHS = {"llama-3.2-1b": 56, "llama-3.2-3b": 24, "llama-3-8b": 8}
# Files of the authors' archive, which their README.md links to, where their scripts look for them.
DOCUMENTS = "data/msmarco-full/full_collection/raw.tsv"
TRAIN_DATA = {
    "cl": "data/train/msmarco_train.jsonl",
    "cl_kd": "data/train/msmarco_train_teacher_scores.jsonl",
    "kd": "data/train/msmarco_qrel_added_query_teacher_scores.jsonl",
}


def recipe_options(recipe: RetrieverRecipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning before what was given: those of the recipe, under those of the preset, if one is,
    under those of the retriever that is trained on, if it is one.
    """
    values = recipe.defaults(given.get("train_data"))
    if not is_released(recipe.backbone, given.get("preset")):
        return start_options(values, given)
    if recipe.objective not in TRAIN_DATA:
        raise UsageError(f"--preset released has the objectives {', '.join(TRAIN_DATA)}, not {recipe.objective}.")
    if recipe.paradigm not in PAPER_PARADIGMS:
        raise UsageError(f"--preset released has the paradigms {', '.join(PAPER_PARADIGMS)}, not {recipe.paradigm}.")
    backbone, distilled = recipe.backbone, recipe.objective == "kd"
    preset: dict[str, Any] = {
        "model": released_mntp_folder(backbone),
        "train_adapter": True,
        "batch_sampler": "batch_sampler",
        "teacher_normalization": "none",
        "teacher_temperature": 1.0,
        "train_subset": None,
        "output_dir": f"{values['output_dir']}-released",
    }
    if given.get("train_data") is None:
        preset |= {"train_data": TRAIN_DATA[recipe.objective], "train_documents": DOCUMENTS}
    if distilled:
        preset["per_device_train_batch_size"] = DISTILLED_ROWS[backbone]
    else:
        preset["gradient_accumulation_steps"] = ACCUMULATION[backbone]
    if recipe.paradigm == "dense":
        preset["num_train_epochs"] = (DISTILLED_EPOCHS if distilled else EPOCHS)[backbone]
    return start_options(merge_layers(values, preset), given)


def mntp_options(recipe: MntpRecipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the MNTP stage before what was given: those of the recipe, under those of the preset, if one is.

    Raises:
        UsageError: If there is no such preset, or the released code has no such backbone.
    """
    values = recipe.defaults()
    if not is_released(recipe.backbone, given.get("preset")):
        return values
    preset = {
        "rows_per_document": 1,
        "num_train_epochs": 1.0,
        "stop_after_steps": recipe.max_steps,
        "merge": False,
        "output_dir": released_mntp_folder(recipe.backbone),
    }
    return merge_layers(values, preset)


def released_mntp_folder(backbone: str) -> str:
    """Where the MNTP stage of the preset writes its adapter and the fine-tuning trains it on."""
    return f"{mntp_folder(backbone)}-released"


def ramp_micro_batches(backbone: str, objective: str, batch_size: int) -> int:
    """Micro-batches of an optimizer step on the authors' devices: their FLOPS weights rise with each."""
    if objective == "kd":
        return max(1, batch_size // (DEVICES * DISTILLED_ROWS[backbone]))
    return ACCUMULATION[backbone]


def require_files(train_data: list[str]) -> None:
    """Refuse a run on the authors' files where they are not."""
    for path in train_data:
        if path in TRAIN_DATA.values():
            for file in (path, DOCUMENTS):
                if not Path(file).is_file():
                    raise FileNotFoundError(
                        f"--preset released trains on the authors' own {file}, which is not there. Get it from the "
                        "archive that https://github.com/HansiZeng/scaling-retriever links to, or name other data "
                        "with --train_data."
                    )


def is_released(backbone: str, preset: str | None) -> bool:
    """Whether a preset is named."""
    if preset is None:
        return False
    if preset != "released":
        raise UsageError(f"--preset is {preset!r}: there is 'released' alone.")
    if backbone not in ACCUMULATION:
        raise UsageError(f"--preset released is of the released code, whose backbones are {', '.join(ACCUMULATION)}.")
    return True
