"""Hybrid models are trained by the command, with the objectives and batches of the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from tiny_runs import positive, tiny_options, tiny_run

import lion_st
from lion_st.errors import UsageError
from lion_st.evaluation import evaluate_run
from lion_st.exporting import single_models
from lion_st.losses import HybridLoss, SparsePart
from lion_st.retrieval import ModelRetriever
from lion_st.training import hybrid_evaluation
from lion_st.training.hybrid_evaluation import HybridInformationRetrievalEvaluator
from lion_st.training.recipes import BACKBONES
from lion_st.training.retriever import (
    build_loss,
    build_model,
    build_trainer,
    load_training_tuples,
    train_retriever,
    training_cost,
)

ROWS = 24
SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_retriever.py"


def batch(model, arguments):
    """A batch of tuples, as the trainer gives it to the loss."""
    rows = [load_training_tuples(arguments, 1)[number] for number in range(4)]
    columns = [name for name in rows[0] if name != "label"]
    tasks = {name: "query" if name == "query" else "document" for name in columns}
    features = [
        model.preprocess([row[name] for row in rows], task=tasks[name]) | {"task": tasks[name]} for name in columns
    ]
    return features, torch.tensor([row["label"] for row in rows]) if "label" in rows[0] else None


def gradients(model, terms):
    model.zero_grad(set_to_none=True)
    sum(terms.values()).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def as_terms(loss):
    return loss if isinstance(loss, dict) else {"base_loss": loss}


@pytest.mark.parametrize("objective", ["cl", "kd", "cl_kd", "kl"])
def test_the_joint_loss_is_the_sum_of_those_of_the_two_models_and_caching_changes_nothing(
    tiny_backbone, data, tmp_path, objective
):
    given = dict(negatives=2, dense_temperature=0.05, dense_weight=0.3)
    arguments, _ = tiny_run(tiny_backbone(), data, tmp_path / "run", "hybrid", objective, **given)
    model = build_model(arguments, "cpu").eval()
    features, labels = batch(model, arguments)
    loss = build_loss(model, arguments)
    assert type(loss) is SpladeLoss and isinstance(loss.loss, HybridLoss)
    joint = loss([dict(column) for column in features], labels)
    found = gradients(model, joint)

    sparse, dense = single_models(model)
    total = {}
    for one, paradigm, temperature in ((sparse.eval(), "sparse", 1.0), (dense.eval(), "dense", 0.05)):
        own, _ = tiny_run("m", data, tmp_path / paradigm, paradigm, objective, negatives=2, temperature=temperature)
        terms = as_terms(build_loss(one, own)([dict(column) for column in features], labels))
        total |= {f"{paradigm} {name}": (0.3 if paradigm == "dense" else 1.0) * value for name, value in terms.items()}
    torch.testing.assert_close(sum(joint.values()), sum(total.values()))
    expected = gradients(model, total)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    arguments.mini_batch_size = 3
    cached = build_loss(model, arguments)
    assert type(cached) is CachedSpladeLoss
    model.zero_grad(set_to_none=True)
    again = cached([dict(column) for column in features], labels)
    assert again.keys() == joint.keys()
    for name, value in joint.items():
        torch.testing.assert_close(again[name], value)
    for name, gradient in gradients(model, again).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


def test_regularizers_see_the_sparse_vectors_alone(tiny_backbone, data, tmp_path):
    names = {"flops": "FlopsRegularizer", "l1": "L1Regularizer", "idf_flops": "IdfFlopsRegularizer"}
    rows = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    for regularizer, name in names.items():
        arguments, training = tiny_run(
            tiny_backbone(), data, tmp_path / regularizer, "hybrid", "cl", regularizer=regularizer, max_steps=1
        )
        model = build_model(arguments, "cpu")
        trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 1))
        part = trainer.loss.document_regularizer
        assert isinstance(part, SparsePart) and type(part.regularizer).__name__ == name
        assert part.dense_dimension == 32
        if regularizer == "idf_flops":  # of the terms, and not of terms and dimensions
            assert len(part.regularizer.idf) == BACKBONE_TERMS
            continue
        small = SparsePart(part.regularizer, 5)
        expected = part.regularizer.compute_loss_from_embeddings(rows[:, :7])
        assert small.compute_loss_from_embeddings(rows) == expected


BACKBONE_TERMS = 320


@pytest.mark.parametrize(("objective", "mini_batch_size"), [("cl", 3), ("kd", None), ("cl_kd", None)])
def test_training_improves_the_ranking(tiny_backbone, data, collection, tmp_path, objective, mini_batch_size):
    arguments, training = tiny_run(
        tiny_backbone(), data, tmp_path / "run", "hybrid", objective, max_steps=24, batch_size=8, learning_rate=3e-3,
        mini_batch_size=mini_batch_size, eval_data=[str(collection)], eval_on_start=True, eval_steps=24, save_steps=24,
    )  # fmt: skip
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 1))
    trainer.train()
    found = [log for log in trainer.state.log_history if "eval_ndcg@10" in log]
    assert len(found) == 2 and found[1]["eval_ndcg@10"] > found[0]["eval_ndcg@10"]
    assert {f"eval_own_{kind}dot_ndcg@10" for kind in ("", "sparse_", "dense_")} <= found[0].keys()
    assert found[1]["eval_own_dense_dot_ndcg@10"] > found[0]["eval_own_dense_dot_ndcg@10"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"]
    seen = {"query_active_dims", "document_active_dims", "document_dense_spread", "document_flops"}
    assert seen <= logs[-1].keys() and logs[-1]["document_active_dims"] <= BACKBONE_TERMS
    assert "document_dense_active_dims" not in logs[-1]


def test_evaluations_search_as_the_trained_model_is_searched(tiny_backbone, monkeypatch):
    model = lion_st.build(tiny_backbone(), "hybrid", query_prompt="q: ", device="cpu")
    model[1].fusion_weights = (0.25, 0.75)
    corpus = {f"d{row}": positive(row) for row in range(ROWS)}
    queries = {f"q{row}": f"what do zebras number {row} do" for row in range(0, ROWS, 3)}
    relevant = {f"q{row}": {f"d{row}"} for row in range(0, ROWS, 3)}
    found = []
    for values in (hybrid_evaluation.VALUES_AT_ONCE, 5 * (BACKBONE_TERMS + 32)):  # the last document stands alone
        monkeypatch.setattr(hybrid_evaluation, "VALUES_AT_ONCE", values)
        found.append(HybridInformationRetrievalEvaluator(queries, corpus, relevant, name="own")(model))
    assert found[0] == found[1] and found[0]["own_sparse_dot_ndcg@10"] != found[0]["own_dense_dot_ndcg@10"]
    retriever = ModelRetriever(model)
    retriever.index(corpus)
    run = {key: dict(hits) for key, hits in zip(queries, retriever.search(list(queries.values()), 10), strict=True)}
    measured = evaluate_run({key: dict.fromkeys(one, 1) for key, one in relevant.items()}, run, ["nDCG@10"])
    assert found[0]["own_dot_ndcg@10"] == pytest.approx(measured["nDCG@10"])
    one = HybridInformationRetrievalEvaluator({"q": "zebras"}, {"d": "lions"}, {"q": {"d"}})(model)
    assert one["dot_ndcg@10"] == 1
    with pytest.raises(ValueError, match="are measured by sparse_dot, dense_dot, dot: give no score_functions"):
        HybridInformationRetrievalEvaluator(queries, corpus, relevant, write_predictions=True)


def test_the_script_ends_in_a_checkpoint_that_the_next_run_goes_on_from(tiny_backbone, data, tmp_path):
    options = tiny_options(tiny_backbone(), data, tmp_path / "one", use_peft=True, max_steps=2)
    named = [f"--{name}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, str(SCRIPT), "--backbone", "micro", "--paradigm", "hybrid", *named]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[-1])
    model = lion_st.load(folder, device="cpu")
    assert lion_st.paradigm_of(model) == "hybrid" and model[1].scale != 1.0
    record = json.loads((folder / "training.json").read_text())
    assert record["finished"] and record["settings"]["paradigm"] == "hybrid"
    assert "lion_st.load alone reads" in done.stderr and "without the limits" not in done.stderr
    resumed = lion_st.load(folder / "checkpoint-2", device="cpu")
    texts = ["lions", "what do zebras do"]
    torch.testing.assert_close(
        resumed.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True), rtol=1e-4, atol=1e-5
    )
    for number, given in enumerate((dict(use_peft=True), dict(use_peft=False))):  # a new adapter, and all weights
        second = tiny_run(str(folder), data, tmp_path / f"two-{number}", "hybrid", "kd", max_steps=2, **given)
        again = lion_st.load(train_retriever(*second), device="cpu")
        assert (again.encode("lions") - model.encode("lions")).max() > 1e-3
    pair = lion_st.export(model, tmp_path / "pair", verify=False, create_model_card=False)
    with pytest.raises(ValueError, match="holds two stock checkpoints of a hybrid model: train on"):
        build_model(tiny_run(str(pair), data, tmp_path / "x", "hybrid", "kd")[0], "cpu")
    with pytest.raises(ValueError, match="is a hybrid model, not dense"):
        build_model(tiny_run(str(folder), data, tmp_path / "x", "dense", "kd")[0], "cpu")


def test_options_that_a_run_does_not_read_are_refused(data, tmp_path):
    for paradigm, given, message in (
        ("sparse", dict(dense_weight=0.5), "--dense_weight is read with --paradigm hybrid alone"),
        ("dense", dict(dense_temperature=0.5), "--dense_temperature is read with --paradigm hybrid alone"),
        ("hybrid", dict(token_dimension=8), "--token_dimension is read with --paradigm multi_vector alone"),
        ("hybrid", dict(dense_temperature=0.0), "--dense_temperature must be positive, got 0.0"),
        ("hybrid", dict(dense_weight=-1.0), "--dense_weight must be at least 0, got -1.0"),
        ("hybrid", dict(query_encoder="static"), "of sparse and dense models, this one is hybrid"),
        ("hybrid", dict(learn_thresholds=True), "--learn_thresholds is of sparse models, this one is hybrid"),
        ("hybrid", dict(self_distillation=True), "--self_distillation is of models of one vector, this one is hybrid"),
    ):
        with pytest.raises(UsageError, match=message):
            tiny_run("m", data, tmp_path, paradigm, "cl_kd", **given)
    with pytest.raises(ValueError, match="dense_weight must be a finite number of at least 0, got nan"):
        HybridLoss(torch.nn.Identity(), torch.nn.Identity(), 4, float("nan"))


def test_cost_counts_the_head_and_both_vectors(data, tmp_path):
    shape = BACKBONES["llama-3.2-1b"].shape
    costs = {}
    for paradigm in ("sparse", "hybrid"):
        arguments, training = tiny_run("m", data, tmp_path, paradigm, "cl_kd")
        costs[paradigm] = training_cost(arguments, training, shape)
    assert costs["hybrid"].flops(4, 100, 1000) == costs["sparse"].flops(4, 100, 1000)
    held = {name: cost.memory(1000, 10)["embeddings and gradients"] for name, cost in costs.items()}
    assert held["hybrid"] == (shape.vocab_size + shape.hidden_size) * 10 * (16 + 8)
    assert held["sparse"] == shape.vocab_size * 10 * 16
