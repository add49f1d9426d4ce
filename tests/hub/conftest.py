"""The Hub on loopback as fixtures."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import TOKENS, connect
from loopback_hub import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """An empty Hub; the token `hf_dummy` may write to `org`, `hf_other` to `other`."""
    server = LoopbackHub(TOKENS)
    yield server
    server.close()


@pytest.fixture
def connected(hub, tmp_path, monkeypatch) -> LoopbackHub:
    """The Hub, with this process's huggingface_hub turned to it and logged in."""
    connect(hub, tmp_path / "home", monkeypatch)
    return hub


@pytest.fixture(scope="session")
def uploads() -> Path:
    """The folders that are uploaded to the Hub."""
    return Path(__file__).parents[2] / "hub_uploads"
