"""A training that has collapsed ends within 50 steps, and leaves the good checkpoints as they were."""

import pytest
import torch
from tiny_runs import tiny_run
from transformers import TrainerCallback

from lion_st.errors import EXPECTED
from lion_st.training.progress.checkpoints import checkpoint_damage
from lion_st.training.progress.collapse import TrainingCollapsed, VectorStatistics
from lion_st.training.retriever import build_model, build_trainer, load_training_tuples, train_retriever

LONG = dict(max_steps=41, save_steps=1000, logging_steps=1000, batch_size=8)


class AtStep(TrainerCallback):
    """Does something to the model after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.action(model)


def trainer_of(backbone, data, output, callbacks=(), paradigm="sparse", objective="cl_kd", **settings):
    arguments, training = tiny_run(backbone, data, output, paradigm, objective, **settings)
    tuples = load_training_tuples(arguments, 0)
    return build_trainer(build_model(arguments, "cpu"), arguments, training, tuples, callbacks=list(callbacks))


def set_to_nan(model):
    model[0].final_norm.weight[0] = torch.nan


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_weights_that_are_lost_are_not_saved(tiny_backbone, data, tmp_path, paradigm):
    settings = dict(save_steps=2, save_total_limit=1, logging_steps=1000, max_steps=60)
    trainer = trainer_of(tiny_backbone(), data, tmp_path, [AtStep(4, set_to_nan)], paradigm, **settings)
    with pytest.raises(TrainingCollapsed, match=r"at step 4: the norm of the weights is nan\. Lower --learning_rate"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint_damage(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_a_lost_loss_ends_the_run_without_a_log_or_a_checkpoint(tiny_backbone, data, tmp_path, paradigm):
    trainer = trainer_of(tiny_backbone(), data, tmp_path, [AtStep(3, set_to_nan)], paradigm, **LONG)
    with pytest.raises(TrainingCollapsed, match=r"at step 20: the (loss|norm of the weights) is nan"):
        trainer.train()


def test_a_lost_gradient_in_the_log_ends_the_run(tiny_backbone, data, tmp_path):
    trainer = trainer_of(tiny_backbone(), data, tmp_path, max_steps=2)
    logs = {"loss": 1.0, "grad_norm": float("inf")}
    with pytest.raises(TrainingCollapsed, match="the gradient's norm is inf"):
        trainer.guard.on_log(trainer.args, trainer.state, None, logs=logs)
    trainer.args.fp16 = True  # whose scaling leaves such steps out
    trainer.guard.on_log(trainer.args, trainer.state, None, logs=logs)


def test_too_heavy_a_regularizer_is_named(tiny_backbone, data, tmp_path):
    weights = dict(document_regularizer_weight=1e3, query_regularizer_weight=1e3, regularizer_warmup_ratio=0.0)
    with pytest.raises(
        TrainingCollapsed, match=r"all (query|document) vectors are empty\. Lower --(query|document)_reg"
    ) as end:
        train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **LONG, **weights))
    assert isinstance(end.value, EXPECTED)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert not (tmp_path / "out" / "modules.json").exists()


def test_vectors_that_are_all_the_same_end_the_run(tiny_backbone, data, tmp_path):
    def blind(model):
        model[0].model.get_input_embeddings().weight.fill_(0.1)

    options = LONG | dict(learning_rate=1e-8)
    trainer = trainer_of(tiny_backbone(), data, tmp_path, [AtStep(1, blind)], "dense", **options)
    with pytest.raises(TrainingCollapsed, match=r"at step 40: all query vectors are the same\. Lower --learning_rate"):
        trainer.train()


def test_documents_that_keep_nearly_all_terms_end_the_run_after_the_ramp(tiny_backbone, data, tmp_path):
    def shift(model):  # every token now says yes to every term
        model[0].lm_head.weight.abs_()
        model[0].final_norm.register_forward_hook(lambda module, args, states: states.abs())

    options = LONG | dict(learning_rate=1e-8, regularizer_warmup_ratio=0.25)
    trainer = trainer_of(tiny_backbone(tied=False), data, tmp_path, [AtStep(1, shift)], **options)
    with pytest.raises(
        TrainingCollapsed, match=r"at step 40: documents activate 3\d\d of 3\d\d terms, .* Raise --document_regularizer"
    ):
        trainer.train()
    # Without a regularizer that is what was asked for.
    options |= dict(document_regularizer_weight=0.0)
    trainer_of(tiny_backbone(tied=False), data, tmp_path, [AtStep(1, shift)], **options).train()


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_each_log_says_what_the_vectors_are_like(tiny_backbone, data, tmp_path, mini_batch_size):
    """Against the vectors themselves, which the same model gives for the same batch."""
    options = dict(max_steps=1, batch_size=8, learning_rate=1e-30, mini_batch_size=mini_batch_size)
    trainer = trainer_of(tiny_backbone(), data, tmp_path, **options)
    features, _ = trainer.collect_features(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        trainer.model.train()
        vectors = [trainer.model(feature)["sentence_embedding"] for feature in features]
    trainer.train()
    logs = next(log for log in trainer.state.log_history if "loss" in log)
    for task, rows in (("query", vectors[0]), ("document", torch.cat(vectors[1:]))):
        mean = rows.mean(0)
        assert logs[f"{task}_active_dims"] == pytest.approx((rows > 0).sum(1).float().mean().item(), abs=1e-3)
        assert logs[f"{task}_empty"] == 0
        assert logs[f"{task}_flops"] == pytest.approx(mean.square().sum().item(), rel=1e-3)
        spread = 1 - mean.square().sum() / rows.square().sum(1).mean()
        assert logs[f"{task}_spread"] == pytest.approx(spread.item(), abs=1e-3)
        uses = (rows > 0).sum(0)
        assert logs[f"{task}_dead_terms"] == pytest.approx((uses == 0).float().mean().item(), abs=1e-4)
        assert logs[f"{task}_always_active_terms"] == pytest.approx((uses == len(rows)).float().mean().item(), abs=1e-4)
    found = (vectors[0] @ torch.cat(vectors[1:]).T).argmax(1) == torch.arange(8)
    assert logs["in_batch_accuracy"] == pytest.approx(found.float().mean().item(), abs=1e-4)
    assert {"contrastive_loss", "distillation_loss"} <= logs.keys()
    assert logs["tokens_per_second"] > 0 and logs["peak_memory_gib"] > 0.1
    assert {type(value) for value in logs.values()} <= {int, float}  # what every reporter takes


def test_terms_are_dead_or_always_active_over_all_steps_since_the_last_log(tiny_backbone, data, tmp_path):
    trainer = trainer_of(tiny_backbone(), data, tmp_path, max_steps=4, logging_steps=2, batch_size=8)
    seen = []
    trainer.model.register_forward_hook(lambda model, inputs, output: seen.append(output))
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    calls = [output["sentence_embedding"] for output in seen if output.get("task") == "document"]
    for log, part in zip(logs, (calls[: len(calls) // 2], calls[len(calls) // 2 :]), strict=True):
        uses = (torch.cat(part) > 0).sum(0)
        assert log["document_dead_terms"] == pytest.approx((uses == 0).float().mean().item(), abs=1e-4)


def test_dense_vectors_have_no_terms_to_log(tiny_backbone, data, tmp_path):
    trainer = trainer_of(tiny_backbone(), data, tmp_path, (), "dense", "cl", max_steps=1)
    trainer.train()
    logs = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < logs["document_spread"] < 1
    assert not {name for name in logs if "terms" in name or "empty" in name or "flops" in name}
    assert 0 <= logs["in_batch_accuracy"] <= 1


def test_empty_vectors_are_counted():
    model = torch.nn.Identity()
    statistics = VectorStatistics(model, counts_terms=True)
    statistics.begin()
    model({"sentence_embedding": torch.tensor([[0.0, 0, 0], [1, 2, 0]]), "task": "query"})
    model({"sentence_embedding": torch.tensor([[0.0, 0, 3]]), "task": "query"})
    statistics.end()
    model({"sentence_embedding": torch.ones(9, 3), "task": "query"})
    means = {name: value.item() for name, value in statistics.means().items()}
    assert means["query_active_dims"] == 1
    assert means["query_empty"] == pytest.approx(1 / 3)
    assert means["query_spread"] == pytest.approx(1 - 14 / 9 / (14 / 3))


def test_token_vectors_are_looked_at_text_by_text():
    statistics = VectorStatistics(torch.nn.Identity(), counts_terms=False)
    statistics.begin()
    query, other = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[-1.0, 0], [0, 0]])
    statistics._observe(None, None, {"sentence_embedding": torch.stack([query, other]), "task": "query"})
    documents = torch.tensor([[[1.0, 0], [0, 1], [0, 0]], [[-1.0, 0], [0, 0], [0, 0]]])
    statistics._observe(None, None, {"sentence_embedding": documents, "task": "document"})
    means = {name: value.item() for name, value in statistics.means().items()}
    mean = torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0]]).mean(dim=0)
    assert means["query_spread"] == pytest.approx(1 - mean.square().sum().item(), rel=1e-5)
    assert means["in_batch_accuracy"] == 1
    statistics.end()
