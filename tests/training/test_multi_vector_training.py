"""Multi-vector models are trained by the command, with the objectives and batches of the others."""

import json

import pytest
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorMarginMSELoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from tiny_runs import tiny_run

from lion_st.losses import (
    CachedContrastiveDistillationLoss,
    ContrastiveDistillationLoss,
    maxsim_scores,
    pairwise_maxsim_scores,
)
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


@pytest.mark.parametrize(
    ("objective", "mini_batch_size", "expected"),
    [
        ("cl", None, MultiVectorMultipleNegativesRankingLoss),
        ("cl", 2, CachedMultiVectorMultipleNegativesRankingLoss),
        ("kd", None, MultiVectorMarginMSELoss),
        ("cl_kd", None, ContrastiveDistillationLoss),
        ("cl_kd", 2, CachedContrastiveDistillationLoss),
        ("listwise", None, ContrastiveDistillationLoss),
    ],
)
def test_each_objective_has_its_loss(data, tmp_path, objective, mini_batch_size, expected):
    given = dict(mini_batch_size=mini_batch_size, temperature=0.5)
    arguments, _ = tiny_run("m", data, tmp_path, "multi_vector", objective, **given)
    loss = build_loss(None, arguments)
    assert type(loss) is expected
    if objective == "kd":
        assert loss.similarity_fct.func is pairwise_maxsim_scores and loss.similarity_fct.keywords == {"scale": 2.0}
    else:
        assert loss.scale == 2.0 and loss.gather_across_devices
    if objective == "cl":
        assert loss.similarity_fct is maxsim_scores


@pytest.mark.parametrize(("objective", "mini_batch_size"), [("cl", 3), ("kd", None), ("cl_kd", 3)])
def test_training_improves_the_ranking(tiny_backbone, data, collection, tmp_path, objective, mini_batch_size):
    arguments, training = tiny_run(
        tiny_backbone(), data, tmp_path / "run", "multi_vector", objective, token_dimension=16, max_steps=24,
        batch_size=8, learning_rate=3e-3, mini_batch_size=mini_batch_size, eval_data=[str(collection)],
        eval_on_start=True, eval_steps=24, save_steps=24,
    )  # fmt: skip
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 1))
    trainer.train()
    found = [log["eval_ndcg@10"] for log in trainer.state.log_history if "eval_ndcg@10" in log]
    assert len(found) == 2 and found[1] > found[0] + 0.1
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < logs[0]["loss"] and logs[-1]["in_batch_accuracy"] > logs[0]["in_batch_accuracy"]
    assert trainer.state.best_metric == found[1]


def test_a_run_ends_in_a_stock_checkpoint_that_the_next_one_goes_on_from(tiny_backbone, data, tmp_path):
    first = tiny_run(tiny_backbone(), data, tmp_path / "one", "multi_vector", "cl_kd", use_peft=True, max_steps=2)
    folder = train_retriever(*first)
    model = MultiVectorEncoder(str(folder), device="cpu")
    assert model.encode_query("lions").shape[1] == 128
    record = json.loads((folder / "training.json").read_text())
    assert record["finished"] and record["settings"]["paradigm"] == "multi_vector"
    second = tiny_run(str(folder), data, tmp_path / "two", "multi_vector", "kd", max_steps=2)
    again = MultiVectorEncoder(str(train_retriever(*second)), device="cpu")
    assert (again.encode_query("lions") - model.encode_query("lions")).abs().max() > 1e-3
    with pytest.raises(ValueError, match="leave out --token_dimension"):
        build_model(tiny_run(str(folder), data, tmp_path / "x", "multi_vector", "kd", token_dimension=8)[0], "cpu")


def test_memory_is_that_of_the_vectors_of_all_tokens(data, tmp_path):
    shape = BACKBONES["llama-3.2-1b"].shape
    held = []
    for paradigm, given in (("dense", {}), ("multi_vector", {}), ("multi_vector", {"token_dimension": 64})):
        arguments, training = tiny_run("m", data, tmp_path, paradigm, "cl_kd", document_length=100, **given)
        parts = training_cost(arguments, training, shape).memory(1000, 10)
        held.append(parts["embeddings and gradients"])
    assert held[1] / held[0] == 100 * 128 / 2048
    assert held[2] == held[1] / 2
