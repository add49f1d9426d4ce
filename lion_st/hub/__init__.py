"""Checkpoints for everyone else: stock export, cards, publication, and the import of released checkpoints.

All names but `export` and `merge_backbone` are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lion_st.exporting import export, merge_backbone

if TYPE_CHECKING:
    from lion_st.hub.cards import render_card
    from lion_st.hub.publishing import Publication, publish, publish_folder
    from lion_st.hub.recipe_cards import render_recipe_card, write_recipe_cards
    from lion_st.hub.released import CONTRACTS, Contract, import_released

_HOME = {
    "CONTRACTS": "released",
    "Contract": "released",
    "Publication": "publishing",
    "import_released": "released",
    "publish": "publishing",
    "publish_folder": "publishing",
    "render_card": "cards",
    "render_recipe_card": "recipe_cards",
    "write_recipe_cards": "recipe_cards",
}

__all__ = [
    "CONTRACTS",
    "Contract",
    "Publication",
    "export",
    "import_released",
    "merge_backbone",
    "publish",
    "publish_folder",
    "render_card",
    "render_recipe_card",
    "write_recipe_cards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
