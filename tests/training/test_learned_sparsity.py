"""Runs that learn thresholds of terms and how many terms texts keep."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run

import lion_st
from lion_st.errors import UsageError
from lion_st.modules.splade_head import LEARNED_FILE
from lion_st.training.retriever import build_trainer, load_training_tuples, train_retriever
from lion_st.training.starting import build_model

LEARNED = dict(
    learn_thresholds=True,
    learn_top_k=True,
    query_max_active_dims=60,
    document_max_active_dims=90,
    save_total_limit=None,
)


def test_a_killed_run_goes_on_to_the_bit_and_ends_with_whole_numbers(tiny_backbone, data, tmp_path, caplog):
    states, options = [], {"use_peft": True, "mini_batch_size": 3}
    for name in ("whole", "parts"):
        folder = tmp_path / name
        with caplog.at_level(logging.WARNING):
            train_retriever(*tiny_run(tiny_backbone(), data, folder, **LEARNED, **options))
        if name == "parts":  # as if killed after its second step
            for later in (folder / "checkpoint-4", folder / "training.json"):
                shutil.rmtree(later) if later.is_dir() else later.unlink()
            train_retriever(*tiny_run(tiny_backbone(), data, folder, **LEARNED, **options))
        (file,) = (folder / "checkpoint-4").glob(f"*/{LEARNED_FILE}")
        states.append(load_file(file))
    assert states[0].keys() == {"thresholds", "log_top_k"}
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())
    limits = states[0]["log_top_k"].exp()
    assert (states[0]["thresholds"] != 0).sum() > 90 and (limits != torch.tensor([60.0, 90.0])).all()
    result = lion_st.load(tmp_path / "whole", device="cpu")
    assert torch.equal(result[1].thresholds.detach(), states[0]["thresholds"]) and result[1].log_top_k is None
    assert [result[1].active_dims(task) for task in ("query", "document")] == limits.round().int().tolist()
    assert "lion_st.load alone reads" in caplog.text and "--all-terms" not in caplog.text
    state = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["log_history"][0]["document_active_dims"] == 90


def test_caching_changes_no_gradient(tiny_backbone, data, tmp_path):
    found = []
    for mini_batch_size in (None, 3):
        options = dict(optim="sgd", max_grad_norm=0.0, mini_batch_size=mini_batch_size, threshold_learning_rate=0.5)
        folder = train_retriever(
            *tiny_run(tiny_backbone(), data, tmp_path / str(mini_batch_size), **LEARNED, **options)
        )
        (file,) = (folder / "checkpoint-4").glob(f"*/{LEARNED_FILE}")
        found.append(load_file(file))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-4, atol=1e-5)
    assert (found[0]["thresholds"].abs() > 1e-3).any()


def test_a_run_that_learns_neither_keeps_what_was_learned(tiny_backbone, data, tmp_path):
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "first", **LEARNED, objective="cl"))
    again = train_retriever(*tiny_run(str(folder), data, tmp_path / "second", objective="cl"))
    first, second = (lion_st.load(one, device="cpu")[1] for one in (folder, again))
    assert torch.equal(first.thresholds, second.thresholds)
    assert [first.active_dims(task) for task in ("query", "document")] == [
        second.active_dims(task) for task in ("query", "document")
    ]
    arguments, training = tiny_run(str(folder), data, tmp_path / "third", **LEARNED, objective="cl")
    model = build_model(arguments, "cpu")
    training.weight_decay = 0.1
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 0))
    groups = trainer.create_optimizer().param_groups
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    assert decays[id(model[1].thresholds)] == decays[id(model[1].log_top_k)] == 0  # to a limit of one term
    assert decays[id(model[0].model.get_input_embeddings().weight)] == 0.1
    assert torch.equal(model[1].thresholds, first.thresholds) and rates[id(model[1].thresholds)] == 1e-2
    torch.testing.assert_close(model[1].log_top_k.exp(), torch.tensor([60.0, 90.0]))
    assert rates[id(model[1].log_top_k)] == 1e-2


@pytest.mark.parametrize(
    ("paradigm", "options", "message"),
    [
        ("dense", {"learn_thresholds": True}, "--learn_thresholds is read with --paradigm sparse"),
        ("sparse", {"learn_top_k": True, "query_max_active_dims": 9}, "give both"),
        ("sparse", {"learn_thresholds": True, "query_encoder": "static"}, "has no place in the Router"),
        ("sparse", {"learn_thresholds": True, "threshold_learning_rate": 0.0}, "threshold_learning_rate must be"),
        ("sparse", {"threshold_learning_rate": 0.1}, "is read with --learn_thresholds or --learn_top_k alone"),
    ],
)
def test_settings_that_cannot_be_learned_are_refused(data, tmp_path, paradigm, options, message):
    with pytest.raises(UsageError, match=message):
        tiny_run("backbone", data, tmp_path, paradigm, **options)


def test_sharded_weights_are_refused(tiny_backbone, data, tmp_path, monkeypatch):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, learn_thresholds=True)
    monkeypatch.setattr("lion_st.training.sharding.is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="has no sharded form"):
        build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
