"""Checkpoints for everyone else: stock export, backbones merged from adapters."""

from __future__ import annotations

from lion_st.hub.export import export, merge_backbone

__all__ = ["export", "merge_backbone"]
