"""The losses train under sentence-transformers' own trainers, and the regulariser ramp follows the steps."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from ranks import run_ranks
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.callbacks.splade_callbacks import SpladeRegularizerWeightSchedulerCallback
from sentence_transformers.sparse_encoder.losses import CachedSpladeLoss, SpladeLoss
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch.nn.functional import normalize

from lion_st.losses import (
    CachedContrastiveDistillationLoss,
    ContrastiveDistillationLoss,
    FlopsRegularizer,
    MicroBatchRegularizerWeightSchedulerCallback,
)

REGULARIZERS = Path(__file__).parents[1] / "data" / "golden" / "regularizers.json"
SPARSE_KINDS = {
    "SentenceTransformer": (SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    "SparseEncoder": (SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments),
}


def four_rows(texts):
    queries, documents = texts[:4], texts[4:]
    return Dataset.from_dict(
        {
            "query": queries,
            "positive": documents,
            "negative_1": documents[1:] + documents[:1],
            "negative_2": documents[2:] + documents[:2],
            "label": [[3.0, 1.0, -1.0], [0.5, 2.0, 1.0], [4.0, -2.0, 0.0], [1.0, 1.0, 1.0]],
        }
    )


def make_sparse_model(backbone, kind="SentenceTransformer"):
    transformer = Transformer(
        backbone,
        transformer_task="text-generation",
        processing_kwargs={"text": {"logits_to_keep": 0}},
        modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
        module_output_name="token_embeddings",
    )
    return SPARSE_KINDS[kind][0](modules=[transformer, SpladePooling("max")], device="cpu")


def run_trainer(model, loss, texts, folder, kind="SentenceTransformer", resume=None, callbacks=(), **settings):
    """Train on four rows; the log lines that hold a loss."""
    _, trainer_class, arguments_class = SPARSE_KINDS[kind]
    defaults = dict(
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    arguments = arguments_class(output_dir=str(folder), **(defaults | settings))
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=four_rows(texts), loss=loss, callbacks=list(callbacks)
    )
    trainer.train(resume_from_checkpoint=resume)
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture
def sparse_model(tiny_backbone):
    return lambda kind="SentenceTransformer": make_sparse_model(tiny_backbone(), kind)


@pytest.fixture
def dense_model(tiny_backbone):
    def make():
        transformer = Transformer(tiny_backbone())
        pooling = Pooling(transformer.get_embedding_dimension())
        return SentenceTransformer(modules=[transformer, pooling], device="cpu")

    return make


@pytest.fixture
def train(texts, tmp_path):
    return lambda model, loss, *args, **kwargs: run_trainer(model, loss, texts, tmp_path / "run", *args, **kwargs)


def splade(model, kind=SpladeLoss, **settings):
    return kind(
        model,
        ContrastiveDistillationLoss(model),
        document_regularizer_weight=0.04,
        query_regularizer_weight=0.05,
        document_regularizer=FlopsRegularizer(model),
        query_regularizer=FlopsRegularizer(model),
        **settings,
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss_class", [ContrastiveDistillationLoss, CachedContrastiveDistillationLoss])
def test_dense(dense_model, train, loss_class):
    model = dense_model()
    before = weights(model)
    logs = train(model, loss_class(model), max_steps=4, learning_rate=1e-2)
    assert logs[-1]["loss"] < logs[0]["loss"]
    for line in logs:
        assert line["contrastive_loss"] + line["distillation_loss"] == pytest.approx(line["loss"], abs=2e-4)
    assert any(not torch.equal(before[name], weight) for name, weight in weights(model).items())


@pytest.mark.parametrize("loss_class", [ContrastiveDistillationLoss, CachedContrastiveDistillationLoss])
def test_several_dimensions(dense_model, train, texts, loss_class):
    model, weights = dense_model(), {32: 1.0, 8: 0.5}
    whole = ContrastiveDistillationLoss(model)
    row = four_rows(texts)
    columns = [model.encode(row[name], convert_to_tensor=True) for name in row.column_names if name != "label"]
    terms = [
        weight
        * whole.compute_loss_from_embeddings([normalize(one[:, :size]) for one in columns], torch.tensor(row["label"]))
        for size, weight in weights.items()
    ]
    (line,) = train(model, MatryoshkaLoss(model, loss_class(model), [*weights], [*weights.values()]), max_steps=1)
    assert line["loss"] == pytest.approx(sum(terms).item(), rel=1e-4)


def test_adaptive_layers(dense_model, train):
    model = dense_model()
    logs = train(model, AdaptiveLayerLoss(model, ContrastiveDistillationLoss(model)), max_steps=4, learning_rate=1e-3)
    assert logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_sparse(sparse_model, train, kind, cached):
    model = sparse_model(kind)
    loss = splade(model, CachedSpladeLoss, mini_batch_size=3) if cached else splade(model)
    callback = SpladeRegularizerWeightSchedulerCallback(loss, warmup_ratio=0.5)
    logs = train(model, loss, kind, max_steps=4, learning_rate=1e-3, callbacks=[callback])
    assert logs[0]["document_regularizer_loss"] == 0.0 < logs[-1]["document_regularizer_loss"]
    components = ("contrastive_loss", "distillation_loss", "document_regularizer_loss", "query_regularizer_loss")
    for line in logs:
        assert sum(line[name] for name in components) == pytest.approx(line["loss"], abs=3e-4)
    assert logs[-1]["contrastive_loss"] < logs[0]["contrastive_loss"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_in_two_accumulated_halves_makes_the_step_of_the_whole(dense_model, train, cached):
    # Distillation alone: an accumulated contrastive loss cannot see the negatives of the other half.
    steps = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = dense_model()
        kind = CachedContrastiveDistillationLoss if cached else ContrastiveDistillationLoss
        loss = kind(model, contrastive_weight=0.0)
        before = weights(model)
        train(
            model,
            loss,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        steps.append({name: weight - before[name] for name, weight in weights(model).items()})
    assert max(step.abs().max() for step in steps[0].values()) > 1e-3
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-6)


def test_a_cached_batch_makes_the_step_of_the_uncached_one(sparse_model, train):
    steps = []
    for kind, settings in ((SpladeLoss, {}), (CachedSpladeLoss, dict(mini_batch_size=3))):
        model = sparse_model()
        before = weights(model)
        train(model, splade(model, kind, **settings), max_steps=1, learning_rate=1e-2)
        steps.append({name: weight - before[name] for name, weight in weights(model).items()})
    assert max(step.abs().max() for step in steps[0].values()) > 1e-3
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-6)


def steps_of_a_share(backbone, texts, folder, cached):
    """What two steps change in each weight, this process training on its share of the four rows."""
    model = make_sparse_model(backbone)
    loss = splade(model, CachedSpladeLoss, mini_batch_size=1) if cached else splade(model)
    callback = SpladeRegularizerWeightSchedulerCallback(loss)
    before = weights(model)
    share = 4 // (dist.get_world_size() if dist.is_initialized() else 1)
    run_trainer(model, loss, texts, folder, callbacks=[callback], per_device_train_batch_size=share, learning_rate=1e-4)
    return {name: weight - before[name] for name, weight in weights(model).items()}


def steps_of_a_share_both_ways(*arguments):
    return [steps_of_a_share(*arguments, cached) for cached in (False, True)]


def test_two_processes_make_the_steps_of_one(tiny_backbone, texts, tmp_path):
    arguments = (tiny_backbone(), texts, tmp_path)
    expected = steps_of_a_share_both_ways(*arguments)
    assert max(step.abs().max() for step in expected[0].values()) > 1e-3
    for actual in run_ranks(2, steps_of_a_share_both_ways, *arguments):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


def ramp(train, model, callback_class, accumulation=1, **settings):
    """Document weight of every forward pass of a run of six steps, ramped over three of them."""
    loss, seen = splade(model), []
    loss.register_forward_pre_hook(lambda module, _: seen.append(module.document_regularizer_weight))
    train(
        model,
        loss,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-4,
        callbacks=[callback_class(loss, warmup_ratio=0.5)],
        **settings,
    )
    return seen


def test_the_ramp_counts_optimizer_steps(sparse_model, train):
    by_step = [0.04 * min(1.0, step / 3) ** 2 for step in range(6)]
    assert ramp(train, sparse_model(), SpladeRegularizerWeightSchedulerCallback) == pytest.approx(by_step)
    accumulated = ramp(train, sparse_model(), SpladeRegularizerWeightSchedulerCallback, accumulation=2)
    assert accumulated == pytest.approx([weight for weight in by_step for _ in range(2)])


def test_the_released_ramp_counts_micro_batches(sparse_model, train):
    golden = json.loads(REGULARIZERS.read_text())["reg_weight_scheduler_step_values"]
    seen = ramp(train, sparse_model(), MicroBatchRegularizerWeightSchedulerCallback, accumulation=2)
    expected = golden["lambda=0.04,T=3"]
    assert seen == pytest.approx(expected + [0.04] * (12 - len(expected)), rel=1e-12)


@pytest.mark.parametrize(
    "callback", [SpladeRegularizerWeightSchedulerCallback, MicroBatchRegularizerWeightSchedulerCallback]
)
def test_the_ramp_continues_when_training_resumes(sparse_model, train, tmp_path, callback):
    whole = ramp(train, sparse_model(), callback, accumulation=2, save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    resumed = ramp(train, sparse_model(), callback, accumulation=2, resume=checkpoint)
    assert resumed == pytest.approx(whole[4:])


@pytest.mark.parametrize("values", ["lambda=0.05,T=10", "lambda=0.008,T=350"])
def test_the_stock_ramp_is_the_released_one_one_step_later(sparse_model, values):
    golden = json.loads(REGULARIZERS.read_text())["reg_weight_scheduler_step_values"][values]
    weight, warmup = (float(part.split("=")[1]) for part in values.split(","))
    callback = SpladeRegularizerWeightSchedulerCallback(splade(sparse_model()))
    callback.warmup_steps = int(warmup)
    assert [callback._calculate_weight_value(step, weight) for step in range(1, 1 + len(golden))] == golden
    assert callback._calculate_weight_value(0, weight) == 0.0
