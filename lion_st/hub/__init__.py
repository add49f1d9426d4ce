"""Checkpoints on disk and on the Hub."""

from __future__ import annotations
