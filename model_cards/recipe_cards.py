"""Write the cards of the paper's six models, which say how to train them: python model_cards/recipe_cards.py."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from lion_st.hub.card_data import BaseModelData
from lion_st.hub.card_text import (
    ACTIVATION,
    POOLING,
    card_frame,
    hub_link,
    render,
    setting_value,
    vector_description,
)
from lion_st.hub.cards import card_metadata
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
    """Write the card of one of the paper's models, marked as not trained here."""
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
        "train_commands": f"lion-st adapt --backbone {backbone}\n"
        f"lion-st train --backbone {backbone} --paradigm {paradigm} --objective {OBJECTIVE}",
        "trained_folder": recipe.defaults()["output_dir"],
        "training": _settings(backbone, paradigm),
        "llm2vec": True,
    }
    return render(context)


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


if __name__ == "__main__":
    for recipe in product(SIZES, PAPER_PARADIGMS):
        file = Path(__file__).with_name(f"{recipe_name(*recipe)}.md")
        file.write_text(render_recipe_card(*recipe), encoding="utf-8")
        print(file)
