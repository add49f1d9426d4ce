"""What the vLLM plug-in makes of checkpoints, requests and hidden states; the server itself where vLLM is installed."""

import ast
import itertools
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import encode_texts
from lion_st.modules import SpladeHead
from lion_st.serving import vllm_plugin
from lion_st.serving.vllm_plugin import (
    BACKBONES,
    dense_rows,
    read_contract,
    read_request,
    require_servable,
    sparse_rows,
)

ROOT = Path(__file__).parents[2]
ONE = {"tensor-parallel-size": 1, "pipeline-parallel-size": 1}
WHOLE = {"enable-chunked-prefill": False, "enable-prefix-caching": False}


def reader(folder: Path) -> Any:
    return lambda name: json.loads((folder / name).read_text()) if (folder / name).is_file() else None


@pytest.fixture(scope="module")
def models(tiny_backbone) -> dict[str, Any]:
    settings: dict[str, Any] = {"query_length": 12, "document_length": 24}
    # vLLM's attention on CPUs takes heads of 32 dimensions and more.
    llama, qwen3 = tiny_backbone("llama", tied=False, head_dim=64), tiny_backbone("qwen3", head_dim=64)
    found = {
        "sparse": lion_st.build(llama, "sparse", **settings),
        "doubled": lion_st.build(qwen3, "sparse", activation="double_log1p", **settings),
        "mean_normalized": lion_st.build(llama, "dense", **settings),
        "last_token": lion_st.build(qwen3, "dense", pooling="last_token", normalize=True, **settings),
    }
    found["sparse"].prompts.update({"query": "find: ", "document": ""})
    return found


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("exported")
    return {
        name: lion_st.export(model, made / name, verify=False, create_model_card=False)
        for name, model in models.items()
    }


def test_contracts_say_what_the_models_do(exported):
    found = {name: read_contract(name, reader(folder)) for name, folder in exported.items()}
    assert {name: (one.pooling, one.is_doubled, one.normalize) for name, one in found.items()} == {
        "sparse": ("splade", False, False),
        "doubled": ("splade", True, False),
        "mean_normalized": ("mean_normalized", False, False),
        "last_token": ("last_token", False, True),
    }
    assert found["sparse"].prompts == {"query": "find: ", "document": ""}
    assert found["sparse"].lengths == {"query": 12, "document": 24}
    assert found["last_token"].prompts == {"query": "", "document": ""}


@pytest.mark.parametrize("name", ["sparse", "doubled", "mean_normalized", "last_token"])
def test_pooled_states_are_the_vectors_of_lion_st(name, models, exported):
    """The states come from the exported checkpoint, as in vLLM, whose head has further rows behind the vocabulary."""
    contract = read_contract(name, reader(exported[name]))
    stock = lion_st.load(exported[name])
    ids = [stock[0].tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in TEXTS]
    backbone = stock[0].model.get_decoder() if contract.pooling == "splade" else stock[0].model
    with torch.inference_mode():
        states = torch.cat([backbone(torch.tensor([one])).last_hidden_state[0] for one in ids])
    lengths = torch.tensor([len(one) for one in ids], dtype=torch.int32)
    expected = encode_texts(models[name], TEXTS, "document")
    if contract.pooling != "splade":
        actual = dense_rows(states, lengths, contract.pooling, contract.normalize)
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        return
    weight = stock[0].lm_head.weight
    padded = torch.cat([weight, torch.full((4, weight.shape[1]), 100.0)])
    rows = sparse_rows(states, lengths, padded[: len(weight)], contract.is_doubled, None)
    for row, place in zip(rows, range(len(TEXTS)), strict=True):
        one = expected[[place]]
        assert row[:, 0].tolist() == one.indices.tolist()
        np.testing.assert_allclose(row[:, 1], one.data, atol=1e-5)
    heaviest = sparse_rows(states, lengths, weight, contract.is_doubled, 5)
    assert [row[:, 1].sort().values.tolist() for row in heaviest] == [
        row[:, 1].sort().values[-5:].tolist() for row in rows
    ]


def test_states_that_are_not_finite_spoil_one_text_alone():
    torch.manual_seed(0)
    states, weight, lengths = torch.randn(9, 16), torch.randn(50, 16), torch.tensor([4, 2, 3])
    good = sparse_rows(states, lengths, weight, False, None)
    good_dense = dense_rows(states, lengths, "mean_normalized", False)
    states[4, 3] = torch.inf
    rows = sparse_rows(states, lengths, weight, False, None)
    assert rows[1].shape == (1, 2) and rows[1].isnan().all()
    dense = dense_rows(states, lengths, "mean_normalized", False)
    assert not dense[1].isfinite().all()
    for place in (0, 2):
        torch.testing.assert_close(rows[place], good[place])
        torch.testing.assert_close(dense[place], good_dense[place])


def test_other_checkpoints_are_refused_by_what_they_are(models, exported, tmp_path):
    with pytest.raises(ValueError, match=r"form for SparseEncoder.*main revision"):
        folder = lion_st.export(
            models["sparse"], tmp_path / "encoder", "SparseEncoder", verify=False, create_model_card=False
        )
        read_contract("encoder", reader(folder))
    with pytest.raises(ValueError, match=r"no modules\.json"):
        read_contract("empty", reader(tmp_path))
    limited = lion_st.load(exported["sparse"])
    head = next(module for module in limited if isinstance(module, SpladeHead))
    head.query_max_active_dims = 5
    limited.save(str(tmp_path / "limited"), create_model_card=False)
    with pytest.raises(ValueError, match=r"Transformer \+ SpladeHead.*lion-st serve"):
        read_contract("limited", reader(tmp_path / "limited"))
    dense = reader(exported["mean_normalized"])
    with pytest.raises(ValueError, match="truncates its vectors to 8 dimensions"):
        read_contract("short", lambda name: dense(name) | {"truncate_dim": 8} if "config_" in name else dense(name))
    for file in ("config_sentence_transformers.json", "sentence_bert_config.json"):
        read = reader(exported["sparse"])
        with pytest.raises(ValueError, match=f"has no {file}, or it could not be read"):
            read_contract("unreachable", lambda name, file=file, read=read: None if name == file else read(name))


@pytest.mark.parametrize(
    ("pooling", "is_sparse", "config", "ranks", "message"),
    [
        ("splade", False, {}, {}, "override its architecture with LionSparse"),
        ("mean", True, {}, {}, "override its architecture with LionDense"),
        ("splade", True, {"is_causal": True}, {}, '"is_causal": false'),
        ("splade", True, {"is_causal": None}, {}, '"is_causal": false'),
        ("splade", True, {}, {"tensor-parallel-size": 2}, "--tensor-parallel-size 2 .*--data-parallel-size"),
        ("splade", True, {"vocab_size": 2**24 + 1}, {}, "16,777,217 terms"),
        ("splade", True, {"max_active_dims": 0}, {}, "at least 1, got 0"),
        ("splade", True, {"max_active_dims": True}, {}, "at least 1, got True"),
    ],
)
def test_what_would_give_other_vectors_is_refused(pooling, is_sparse, config, ranks, message):
    settings = {"is_causal": False, "vocab_size": 320} | config
    if settings["is_causal"] is None:
        del settings["is_causal"]
    with pytest.raises(ValueError, match=message):
        require_servable("model", pooling, is_sparse, SimpleNamespace(**settings), ONE | ranks, WHOLE)


@pytest.mark.parametrize("option", ["enable-chunked-prefill", "enable-prefix-caching"])
def test_texts_in_pieces_are_refused(option):
    config = SimpleNamespace(is_causal=False, vocab_size=320)
    for pooling in ("splade", "mean"):
        with pytest.raises(ValueError, match=f"--{option} computes a text in pieces.*leave it out"):
            require_servable("model", pooling, pooling == "splade", config, ONE, WHOLE | {option: True})


def test_good_configurations_are_served():
    for pooling, ranks in (("splade", ONE), ("mean_normalized", ONE | {"tensor-parallel-size": 2})):
        config = SimpleNamespace(is_causal=False, vocab_size=2**24, max_active_dims=400)
        require_servable("model", pooling, pooling == "splade", config, ranks, WHOLE)


def test_requests_are_read_and_refused_by_what_is_wrong():
    assert read_request({"inputs": "a"}) == (["a"], "document", True)
    assert read_request({"inputs": ["a", "b"], "prompt_name": "query", "truncate": False}) == (
        ["a", "b"], "query", False,
    )  # fmt: skip
    for data, message in (
        ("text", "looks like"),
        ({"inputs": []}, "not empty"),
        ({"inputs": 5}, "list of texts"),
        ({"inputs": ["a", 5]}, "Text 1 is 5"),
        ({"inputs": ["a", " "]}, "Text 1"),
        ({"inputs": "\ud800"}, "valid Unicode"),
        ({"inputs": "a", "truncate": "yes"}, "true or false, got 'yes'"),
        ({"inputs": "a", "truncate": 0}, "true or false, got 0"),
        ({"inputs": "a", "prompt_name": "title"}, "query, document, passage, corpus, got 'title'"),
        ({"inputs": "a", "prompt_name": ["query"]}, "got \\['query'\\]"),
        ({"inputs": "a", "k": 5}, "got \\['k'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_request(data)


def test_entry_points_name_what_is_there(monkeypatch):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    named = {group: EntryPoint("lion_st", entries["lion_st"], group).load() for group, entries in groups.items()}
    assert named == {
        "vllm.general_plugins": vllm_plugin.register,
        "vllm.io_processor_plugins": vllm_plugin.io_processor,
    }
    registered = {}
    registry = SimpleNamespace(register_model=lambda model_arch, model_cls: registered.update({model_arch: model_cls}))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may load a plug-in more than once
    assert registered.keys() == {f"Lion{kind}{backbone}" for kind in ("Sparse", "Dense") for backbone in BACKBONES}
    source = (ROOT / "lion_st/serving/vllm_models.py").read_text()
    body = ast.parse(source).body
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    assigned = [name for node in body if isinstance(node, ast.Assign) for name in ast.walk(node.targets[0])]
    classes |= {name.id for name in assigned if isinstance(name, ast.Name)}
    assert {value for value in registered.values()} == {f"lion_st.serving.vllm_models:{name}" for name in registered}
    assert registered.keys() | {vllm_plugin.io_processor().rsplit(".", 1)[1]} <= classes


def test_a_server_of_other_models_imports_nothing_by_it():
    heavy = {"torch", "transformers", "vllm"}
    code = f"import sys, lion_st.serving.vllm_plugin; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_vllm_gives_the_vectors_of_lion_st(models, exported):
    pytest.importorskip("vllm")
    served = {
        "LionSparseLlama": "sparse",
        "LionSparseQwen3": "doubled",
        "LionDenseLlama": "mean_normalized",
        "LionDenseQwen3": "last_token",
    }
    arguments = [str(part) for architecture, name in served.items() for part in (exported[name], architecture)]
    script = Path(__file__).with_name("vllm_vectors.py")
    out = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-2000:]
    answers = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{"architecture"')]
    assert [one["architecture"] for one in answers] == list(served)
    for one, task in itertools.product(answers, ("query", "document")):
        expected: Any = encode_texts(models[served[one["architecture"]]], TEXTS, task)
        if "Dense" in one["architecture"]:
            np.testing.assert_allclose(one[task], expected, atol=1e-4)
            continue
        for place, terms in enumerate(one[task]):
            assert [term["index"] for term in terms] == expected[[place]].indices.tolist()
            np.testing.assert_allclose([term["value"] for term in terms], expected[[place]].data, atol=1e-4)
