"""Checkpoints for everyone else: stock export, cards, publication, and the import of released checkpoints.

The names below are imported on first use.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.exporting import export, merge_backbone
    from lion_st.hub.cards import render_card
    from lion_st.hub.publishing import publish, publish_folder, publish_index
    from lion_st.hub.released import CONTRACTS, Contract, import_released
    from lion_st.hub.repository import Publication

__all__ = [
    "CONTRACTS",
    "Contract",
    "Publication",
    "export",
    "import_released",
    "merge_backbone",
    "publish",
    "publish_folder",
    "publish_index",
    "render_card",
]

__getattr__, __dir__ = attach(__name__)
