"""From publication to the users' own commands: the stock packages on a Hub on loopback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest
from hub_clients import TOKENS, connect, environment, run_python
from loopback_hub import LoopbackHub

import lion_st
from lion_st.evaluation.metrics import evaluate_run
from lion_st.hub import publish, publish_folder

NAME = "org/lion-sp-mini"


@pytest.fixture(scope="module")
def published(tiny_backbone, tmp_path_factory):
    """A Hub with a published sparse model in a private repository, and the live model."""
    hub = LoopbackHub(TOKENS)
    model = lion_st.build(tiny_backbone(), "sparse", query_prompt="query: ", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        connect(hub, tmp_path_factory.mktemp("publisher"), patch)
        publish(model, NAME, license="mit", private=True)
    yield hub, model
    hub.close()


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


STOCK = """
import numpy
from sentence_transformers import SentenceTransformer, SparseEncoder

name, texts, out, blocks = arguments
vectors, errors = {}, []
for kind, revision in ((SentenceTransformer, None), (SparseEncoder, "sparse-encoder")):
    model = kind(name, revision=revision, device="cpu")
    for task in ("query", "document"):
        rows = getattr(model, f"encode_{task}")(texts, convert_to_tensor=True)
        vectors[f"{kind.__name__} {task}"] = (rows.to_dense() if rows.is_sparse else rows).numpy()
numpy.savez(out, **vectors)
for settings in ({"token": False}, {"token": "hf_wrong"}, {"token": "hf_other"}):
    try:
        SentenceTransformer(name, cache_folder=f"{out}.cache", device="cpu", **settings)
        errors.append(None)
    except Exception as error:
        errors.append(str(error))
dimensions = SentenceTransformer(name, device="cpu").get_embedding_dimension()
try:
    SparseEncoder(name, device="cpu")
    errors.append(None)
except ValueError as error:
    errors.append(str(error))
for block in blocks:
    exec(block, {})
assert "lion_st" not in sys.modules
answer([errors, dimensions])
"""


def test_stock_packages_load_what_was_published(published, texts, tmp_path):
    """The same vectors where lion_st cannot be imported, nothing without the right token, and the card's own code."""
    hub, model = published
    blocks = [block for block in python_blocks(hub.files(NAME)["README.md"].decode()) if "import lion_st" not in block]
    assert len(blocks) == 2
    arguments = [NAME, texts, str(tmp_path / "vectors.npz"), blocks]
    errors, dimensions = run_python(hub, tmp_path, STOCK, arguments, stock=True)
    assert all(errors), errors
    assert "Cannot determine the embedding dimension" in errors[-1]  # SparseEncoder on main
    assert dimensions == model.get_embedding_dimension()
    with np.load(tmp_path / "vectors.npz") as vectors:
        assert len(vectors.files) == 4
        for key in vectors.files:
            live = getattr(model, f"encode_{key.split()[1]}")(texts)
            assert abs(vectors[key] - live).max() < 1e-5, key


def test_the_cards_code_for_lion_st_finds_documents(published, tmp_path, monkeypatch, capsys):
    hub, _ = published
    connect(hub, tmp_path, monkeypatch)
    (block,) = [block for block in python_blocks(hub.files(NAME)["README.md"].decode()) if "import lion_st" in block]
    exec(block, {})
    assert {name for name, _ in eval(capsys.readouterr().out)[0]} == {"a", "b"}


DATASETS = """
from datasets import load_dataset

rows = load_dataset("org/lion-quickstart")
qrels = load_dataset("org/lion-quickstart", "scifact-qrels", split="test")
answer([{split: len(part) for split, part in rows.items()}, rows["train"].column_names, len(qrels)])
"""


def test_the_quickstart_data_set_loads_from_the_hub(connected, uploads, tmp_path):
    publish_folder(uploads / "datasets" / "lion-quickstart", "org/lion-quickstart")
    splits, columns, judgements = run_python(connected, tmp_path, DATASETS, stock=True)
    assert splits == {"train": 36_084} and judgements == 339
    assert columns == ["query_id", "document_ids", "scores", "source"]


def add_scifact(hub: LoopbackHub, texts: list[str]) -> None:
    """mteb's data set of the task SciFact, with our texts: the first four ask, and the others are relevant in turn."""
    dataset = mteb.get_task("SciFact").metadata.dataset
    part = {"corpus": "corpus.jsonl", "queries": "queries.jsonl"}
    configs = [{"config_name": name, "data_files": [{"split": name, "path": path}]} for name, path in part.items()] + [
        {"config_name": "default", "data_files": [{"split": "test", "path": "qrels/test.jsonl"}]}
    ]
    lines = {
        "corpus.jsonl": [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)],
        "queries.jsonl": [{"_id": f"q{n}", "text": text} for n, text in enumerate(texts[:4])],
        "qrels/test.jsonl": [{"query-id": f"q{n}", "corpus-id": f"d{n + 4}", "score": 1} for n in range(4)],
    }
    files = {path: "\n".join(map(json.dumps, rows)).encode() for path, rows in lines.items()}
    card = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    repository = hub.add(dataset["path"], files | {"README.md": card}, kind="dataset")
    repository.refs[f"refs/tags/{dataset['revision']}"] = repository.refs["refs/heads/main"]


def test_mteb_scores_both_revisions_as_the_stock_command_line(published, texts, tmp_path):
    hub, model = published
    add_scifact(hub, texts)
    card = hub.files(NAME)["README.md"].decode()
    assert f"\nmteb run -m {NAME} --model-revision sparse-encoder -t SciFact\n" in card
    scores = model.encode_query(texts[:4]) @ model.encode_document(texts).T
    run = {f"q{q}": {f"d{d}": float(score) for d, score in enumerate(row)} for q, row in enumerate(scores)}
    expected = evaluate_run({f"q{n}": {f"d{n + 4}": 1} for n in range(4)}, run, ("nDCG@10", "MRR@10"))
    command = [str(Path(sys.executable).parent / "mteb"), "run", "-m", NAME, "-t", "SciFact", "--no-co2-tracker"]
    started = {
        revision: subprocess.Popen(
            [*command, "--output-folder", revision, *options],
            env=environment(hub, tmp_path / f"home-{revision}") | {"MTEB_CACHE": str(tmp_path / f"cache-{revision}")},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for revision, options in {"main": [], "sparse-encoder": ["--model-revision", "sparse-encoder"]}.items()
    }
    for revision, process in started.items():
        output, _ = process.communicate()
        result = next((tmp_path / revision).rglob("SciFact.json"), None)
        assert result is not None, output
        assert "org__lion-sp-mini" in str(result)
        measured = json.loads(result.read_text())["scores"]["test"][0]
        assert measured["ndcg_at_10"] == pytest.approx(expected["nDCG@10"], abs=1e-4), revision
        assert measured["mrr_at_10"] == pytest.approx(expected["MRR@10"], abs=1e-4), revision
