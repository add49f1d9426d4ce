"""Cards of the paper's six models: how to train them with lion_st."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lion_st.files import atomic_write, require_free
from lion_st.hub.card_data import BaseModelData
from lion_st.hub.cards import (
    ACTIVATION,
    POOLING,
    card_frame,
    card_metadata,
    hub_link,
    render,
    setting_value,
    vector_description,
)
from lion_st.training.cost import TrainingCost
from lion_st.training.recipes import BACKBONES, MNTP_RECIPES, PAPER_PARADIGMS, Paradigm, get_recipe

OBJECTIVE = "cl_kd"
SIZES = {"llama-3.2-1b": "1b", "llama-3.2-3b": "3b", "llama-3-8b": "8b"}
# Inner products that the authors' repository gives for their checkpoint: (query, scores of the two passages).
PUBLISHED_PASSAGES = ("Paris is the capital of France.", "George Orwell wrote '1984'.")
PUBLISHED_SCORES = {
    "lion-sp-1b": (
        ("What is the capital of France?", "14.835160", "0.026406"),
        ("Who wrote '1984'?", "0.005473", "13.909823"),
    ),
    "lion-ds-1b": (
        ("What is the capital of France?", "0.287761", "0.132120"),
        ("Who wrote '1984'?", "0.104066", "0.292190"),
    ),
}
RELEASED = {
    "lion-sp-1b": "hzeng/Lion-SP-1B-llama3-marco-mntp",
    "lion-sp-8b": "hzeng/Lion-SP-8B-llama3-marco-mntp",
    "lion-ds-1b": "hzeng/Lion-DS-1B-llama3-marco-mntp",
    "lion-ds-8b": "hzeng/Lion-DS-8B-llama3-marco-mntp",
}
LICENSES = {"llama-3.2-1b": "llama3.2", "llama-3.2-3b": "llama3.2", "llama-3-8b": "llama3"}


def recipe_name(backbone: str, paradigm: Paradigm) -> str:
    """The paper's name of a model in the form of a Hub repository's, such as lion-sp-8b."""
    return f"lion-{'sp' if paradigm == 'sparse' else 'ds'}-{SIZES[backbone]}"


def render_recipe_card(backbone: str, paradigm: Paradigm) -> str:
    """Write the card of one of the paper's models, marked as not trained here.

    Args:
        backbone: "llama-3.2-1b", "llama-3.2-3b" or "llama-3-8b".
        paradigm: "sparse" (Lion-SP) or "dense" (Lion-DS).

    Returns:
        Markdown with a YAML header.

    Raises:
        ValueError: If the paper has no such model.
    """
    if backbone not in SIZES or paradigm not in ("sparse", "dense"):
        raise ValueError(f"backbone is {', '.join(SIZES)} and paradigm sparse or dense, got {backbone}, {paradigm}.")
    base = BaseModelData((BACKBONES[backbone].model,), LICENSES[backbone], languages=("en",))
    recipe, mntp = get_recipe(backbone, paradigm, OBJECTIVE), MNTP_RECIPES[backbone]
    shape = BACKBONES[backbone].shape
    name = recipe_name(backbone, paradigm)
    repo_id = f"lion-st/{name}"
    dimensions = shape.vocab_size if paradigm == "sparse" else shape.hidden_size
    lengths = f"queries {recipe.query_length} tokens, documents {recipe.document_length} tokens"
    datasets = [recipe.train_data, mntp.texts[0].partition(":")[0]]
    metadata = card_metadata(repo_id, paradigm, base, datasets=datasets)
    parameters = TrainingCost(shape, has_head=paradigm == "sparse", lora_r=None).parameters
    context = card_frame(paradigm, dimensions, base.names, repo_id, lengths) | {
        "metadata": metadata.to_yaml(),
        "reads": "in both directions",
        "pooling": POOLING["mean_normalized"],
        "activation": ACTIVATION["log1p"],
        "properties": [
            ("Base model", hub_link(BACKBONES[backbone].model)),
            ("Parameters", f"about {parameters / 1e9:.1f} billion"),
            ("Vector", vector_description(paradigm, dimensions)),
            ("Lengths", lengths),
            ("Score", "inner product"),
            ("Licence", base.license),
        ],
        "recipe": True,
        "base": BACKBONES[backbone].model,
        "published_passages": PUBLISHED_PASSAGES,
        "published_scores": PUBLISHED_SCORES.get(name),
        "released": RELEASED.get(name),
        "train_commands": _commands(backbone, paradigm),
        "trained_folder": recipe.defaults()["output_dir"],
        "training": _settings(backbone, paradigm),
        "llm2vec": True,
    }
    return render(context)


def write_recipe_cards(folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Write the six cards into a folder, each as `<name>.md`.

    Args:
        folder: Made if needed.
        overwrite: Replace earlier cards.

    Returns:
        The files.

    Raises:
        FileExistsError: If one of them is there and `overwrite` is False; nothing is written then.
    """
    recipes = [(backbone, paradigm) for backbone in SIZES for paradigm in PAPER_PARADIGMS]
    files = {Path(folder) / f"{recipe_name(*recipe)}.md": recipe for recipe in recipes}
    for file in files:
        require_free(file, overwrite)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file, recipe in files.items():
        atomic_write(file, render_recipe_card(*recipe))
    return list(files)


def _commands(backbone: str, paradigm: str) -> str:
    choice = f"--backbone {backbone} --paradigm {paradigm} --objective {OBJECTIVE}"
    return f"lion-st adapt --backbone {backbone}\nlion-st train {choice}"


def _settings(backbone: str, paradigm: str) -> list[tuple[str, str]]:
    """The settings of both stages, as a card lists them."""
    stages: list[tuple[str, dict[str, Any]]] = [
        ("MNTP", vars(MNTP_RECIPES[backbone])),
        ("fine-tuning", vars(get_recipe(backbone, paradigm, OBJECTIVE))),
    ]
    of_sparse_alone = ("query_regularizer_weight", "document_regularizer_weight", "regularizer_warmup_ratio")
    rows = []
    for stage, settings in stages:
        for name, value in settings.items():
            if name in ("backbone", "paradigm") or value is None or (paradigm == "dense" and name in of_sparse_alone):
                continue
            rows.append((f"{stage}: {name}", setting_value(value)))
    return rows
