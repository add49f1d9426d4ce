"""A run that learns from the moving average of its own weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_tuples

import lion_st
from lion_st.errors import UsageError
from lion_st.training.cost import TrainingCost
from lion_st.training.recipes import BACKBONES
from lion_st.training.retriever import build_trainer, load_training_tuples, train_retriever
from lion_st.training.self_distillation import EMA_FILE, EmaTeacher
from lion_st.training.starting import build_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tuples without a teacher's scores."""
    file = write_tuples(tmp_path_factory.mktemp("tuples") / "tuples.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [{name: row[name] for name in ("query", "pos", "neg")} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


def scores_of(model, rows):
    """Scores of each query and its documents, encoded one by one, without dropout."""
    model.eval()
    queries = model.encode_query(rows["query"], convert_to_tensor=True)
    columns = [model.encode_document(rows[name], convert_to_tensor=True) for name in list(rows)[1:]]
    return torch.stack([(queries * column).sum(1) for column in columns], dim=1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("paradigm", "mini_batch_size"), [("sparse", 2), ("dense", None)])
def test_the_teacher_is_the_model_with_its_averaged_weights(tiny_backbone, tmp_path, lora, paradigm, mini_batch_size):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear") if lora else None
    model = lion_st.build(tiny_backbone(), paradigm, lora=adapter, device="cpu")
    teacher = EmaTeacher(model, decay=0.25, scale=3.0, mini_batch_size=mini_batch_size)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    expected = {name: one.detach().clone().double() for name, one in trained.items()}
    assert teacher.averages.keys() == expected.keys()
    assert all("lora_" in name for name in expected) if lora else len(expected) == len(list(model.parameters()))
    with torch.no_grad():
        for step in (1, 2, 3):
            for one in trained.values():
                one += 0.05 * torch.randn_like(one)
            teacher.update(step)
            decay = min(0.25, (1 + step) / (10 + step))
            for name, one in trained.items():
                expected[name] = decay * expected[name] + (1 - decay) * one.double()
    for name, one in expected.items():
        torch.testing.assert_close(teacher.averages[name].double(), one)

    rows = {"query": ["what do lions do", "rivers"], "positive": ["Lions rest.", "Rivers flow on and on."],
            "negative_1": ["Poems.", "Storms rage at night."]}  # fmt: skip
    columns = [model.preprocess(texts, task="query" if name == "query" else "document") for name, texts in rows.items()]
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    model.train()
    found = teacher.scores(columns)
    assert model.training and model[0].training and not found.requires_grad
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    with torch.no_grad():
        for name, one in trained.items():
            one.copy_(expected[name])
    torch.testing.assert_close(found, 3.0 * scores_of(model, rows), rtol=1e-4, atol=1e-4)


def test_autocast_does_not_confuse_the_average_with_the_weights(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", dtype="float32", device="cpu")
    teacher = EmaTeacher(model, decay=0.5)
    columns = [model.preprocess(["lions rest"], task="document") for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        alone = teacher.scores(columns)
        with torch.no_grad():
            for one in teacher.trained.values():
                one.mul_(1.5)
        first = model(dict(columns[0]))["sentence_embedding"]
        again = teacher.scores(columns)
        last = model(dict(columns[0]))["sentence_embedding"]
    assert torch.equal(alone, again) and torch.equal(first, last) and last.requires_grad


@pytest.mark.parametrize("objective", ["cl_kd", "kd"])
def test_a_run_needs_no_scores_and_goes_on_to_the_bit(tiny_backbone, data, tmp_path, objective):
    options = dict(self_distillation=True, ema_decay=0.5, save_total_limit=None, mini_batch_size=3, use_peft=True)
    states = []
    for name in ("whole", "parts"):
        folder = tmp_path / name
        run = tiny_run(tiny_backbone(), data, folder, "sparse", objective, **options)
        train_retriever(*run)
        if name == "parts":  # as if killed after its second step
            for later in (folder / "checkpoint-4", folder / "training.json"):
                shutil.rmtree(later) if later.is_dir() else later.unlink()
            train_retriever(*tiny_run(tiny_backbone(), data, folder, "sparse", objective, **options))
        files = [folder / "checkpoint-4" / one for one in (EMA_FILE, "0_Transformer/adapter_model.safetensors")]
        states.append([load_file(file) for file in files])
    for whole, parts in zip(*states, strict=True):
        assert whole.keys() == parts.keys() and all(torch.equal(one, parts[name]) for name, one in whole.items())
    average, adapter = states[0]
    assert len(average) == len(adapter)
    assert not (tmp_path / "whole" / EMA_FILE).exists()  # of the run, not of its result


def test_the_loss_has_the_averages_scores_and_the_log_the_students_vectors(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path, objective="kl", self_distillation=True)
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    seen = []
    inner = trainer.loss.loss
    plain = inner._distil
    inner._distil = lambda student, teacher: seen.append((student.detach(), teacher)) or plain(student, teacher)
    trainer.train()
    student, teacher = seen[0]
    torch.testing.assert_close(student, teacher, rtol=1e-4, atol=1e-3)  # the average begins as the weights
    student, teacher = seen[-1]
    assert (student - teacher).abs().max() > 1e-2
    assert trainer.guard.statistics.rows == {"query": 4, "document": 12}


def test_checkpoints_without_an_average_and_sharded_weights_are_refused(tiny_backbone, data, tmp_path, monkeypatch):
    train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "cl", objective="cl"))
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "own", self_distillation=True)
    model, tuples = build_model(arguments, "cpu"), load_training_tuples(arguments, 0)
    trainer = build_trainer(model, arguments, training, tuples)
    with pytest.raises(FileNotFoundError, match=r"has no ema\.safetensors.*without --self_distillation"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "cl" / "checkpoint-2"))
    with pytest.raises(ValueError, match="averages of other weights"):
        lone = EmaTeacher(model)
        lone.trained = lone.averages = dict(list(lone.averages.items())[1:])
        lone.save(tmp_path)
        trainer.self_teacher.load(tmp_path)
    with pytest.raises(ValueError, match=r"decay is at least 0 and below 1, got 1\.0"):
        EmaTeacher(model, decay=1.0)
    monkeypatch.setattr("lion_st.training.sharding.is_sharded", lambda _: True)
    with pytest.raises(ValueError, match="--self_distillation has no sharded form"):
        build_trainer(model, arguments, training, tuples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "cl"}, "--objective cl learns from no teacher"),
        ({"objective": "listwise"}, "--objective listwise learns from grades"),
        ({"distillation": "listwise"}, "--distillation listwise takes grades"),
        ({"teachers": ["a"]}, "--teachers is read with a teacher's scores"),
        ({"teacher_normalization": "zscore"}, "--teacher_normalization is read with a teacher's scores"),
        ({"ema_decay": 1.0}, "--ema_decay must be at least 0 and below 1"),
        ({"self_distillation": False, "ema_decay": 0.9}, "--ema_decay is read with --self_distillation alone"),
    ],
)
def test_settings_that_cannot_be_are_refused(data, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        tiny_run("backbone", data, tmp_path, **({"self_distillation": True} | options))


def test_the_averages_pass_and_memory_are_counted():
    shape = BACKBONES["micro"].shape
    plain, own = (TrainingCost(shape, True, None, averages_weights=averages) for averages in (False, True))
    assert own.flops(10, 100, 1000) - plain.flops(10, 100, 1000) == pytest.approx(
        TrainingCost(shape, True, None, cached=True).flops(10, 100, 1000) - plain.flops(10, 100, 1000)
    )
    assert own.memory(1, 1)["moving average"] == 4 * own.parameters and "moving average" not in plain.memory(1, 1)
