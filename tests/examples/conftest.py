"""The bundled micro model, small data, and the Hub on loopback."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lion_st
from lion_st.data import save_beir

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hub"))

from hub_clients import TOKENS, connect  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

MICRO = ROOT / "hub_uploads" / "models" / "lion-micro-base"
ANIMALS = {
    "lions": ("what do lions eat", "Lions prey on zebras and wildebeest, mostly at night."),
    "rivers": ("where do rivers end", "Most rivers flow into the sea, some into lakes or deserts."),
    "paris": ("what is the capital of France", "Paris, on the Seine, is the capital of France."),
    "vaccines": ("do vaccines cause autism", "Large studies found no link between vaccines and autism."),
    "bridges": ("why do bridges expand", "Steel expands in heat, so bridges have joints that give way."),
    "moon": ("how far is the moon", "The moon is about 384,000 kilometres from the earth."),
    "bees": ("how do bees find flowers", "Bees find flowers by colour and scent and dance to tell others."),
    "bread": ("why does bread rise", "Yeast turns sugar into gas, which makes the dough of bread rise."),
}


@pytest.fixture(scope="session")
def micro() -> str:
    """Folder of the bundled backbone."""
    return str(MICRO)


@pytest.fixture(scope="session")
def retriever(tmp_path_factory) -> str:
    """A stock sparse checkpoint of the bundled backbone, untrained."""
    model = lion_st.build(MICRO, "sparse", query_length=32, document_length=64, device="cpu")
    return str(lion_st.export(model, tmp_path_factory.mktemp("retriever") / "lion-sp", create_model_card=False))


@pytest.fixture(scope="session")
def tuples(tmp_path_factory) -> str:
    """A JSONL file of queries with a positive and two negatives."""
    passages = [passage for _, passage in ANIMALS.values()]
    file = tmp_path_factory.mktemp("tuples") / "tuples.jsonl"
    with file.open("w") as lines:
        for place, (query, positive) in enumerate(ANIMALS.values()):
            negatives = {f"negative_{n}": passages[(place + n) % len(passages)] for n in (1, 2)}
            lines.write(json.dumps({"query": query, "positive": positive} | negatives) + "\n")
    return str(file)


@pytest.fixture(scope="session")
def test_set(tmp_path_factory) -> str:
    """A BEIR folder."""
    documents = {name: {"title": "", "text": passage} for name, (_, passage) in ANIMALS.items()}
    queries = {f"q-{name}": query for name, (query, _) in ANIMALS.items()}
    qrels = {f"q-{name}": {name: 1} for name in ANIMALS}
    return str(save_beir(tmp_path_factory.mktemp("test_set") / "animals", documents, queries, qrels))


@pytest.fixture
def connected(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    """An empty Hub on loopback, with this process turned to it and allowed to write to `org`."""
    hub = LoopbackHub(TOKENS)
    connect(hub, tmp_path / "home", monkeypatch)
    yield hub
    hub.close()
