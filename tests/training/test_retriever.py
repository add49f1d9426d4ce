import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    CachedSpladeLoss,
    SparseMarginMSELoss,
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from tiny_runs import interrupted, tiny_run, write_tuples
from transformers import Trainer, TrainerCallback

import lion_st
from lion_st.data import save_beir
from lion_st.losses import CachedContrastiveDistillationLoss, ContrastiveDistillationLoss, FlopsRegularizer
from lion_st.training.cost import TrainingCost
from lion_st.training.dry_run import describe_run
from lion_st.training.options.arguments import retriever_arguments
from lion_st.training.recipes import BackboneShape, get_recipe
from lion_st.training.retriever import (
    build_loss,
    build_model,
    build_trainer,
    export_run,
    load_training_tuples,
    resolve_batches,
    run_log,
    train_retriever,
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


LOSSES = {
    ("cl", "dense", None): MultipleNegativesRankingLoss,
    ("cl", "dense", 2): CachedMultipleNegativesRankingLoss,
    ("cl", "sparse", None): SparseMultipleNegativesRankingLoss,
    ("kd", "dense", None): MarginMSELoss,
    ("kd", "dense", 2): MarginMSELoss,
    ("kd", "sparse", None): SparseMarginMSELoss,
    ("cl_kd", "dense", None): ContrastiveDistillationLoss,
    ("cl_kd", "dense", 2): CachedContrastiveDistillationLoss,
    ("cl_kd", "sparse", None): ContrastiveDistillationLoss,
}


FURTHER = {"kl": "kl_div", "margin_mse_kl": "margin_mse_kl", "listwise": "listwise", "rank": "ranknet"}


@pytest.mark.parametrize(("objective", "distillation"), FURTHER.items())
def test_objectives_of_the_teacher_alone(tiny_backbone, data, tmp_path, objective, distillation):
    paradigm = "dense" if objective == "kl" else "sparse"
    normalization = dict(teacher_normalization="minmax") if objective == "listwise" else {}
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "run", paradigm, objective, **normalization)
    loss = build_loss(build_model(arguments, "cpu"), arguments)
    loss = loss.loss if paradigm == "sparse" else loss
    assert (loss.contrastive_weight, loss.distillation_weight, loss.distillation) == (0.0, 1.0, distillation)
    train_retriever(arguments, training)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["settings"]["objective"] == objective


def test_the_other_term_of_cl_kd_is_chosen_by_name(data, tmp_path):
    arguments, _ = tiny_run("m", data, tmp_path, "dense", "cl_kd", distillation="ranknet")
    loss = build_loss(None, arguments)
    assert (loss.contrastive_weight, loss.distillation_weight, loss.distillation) == (0.5, 0.5, "ranknet")
    assert arguments.settings()["distillation"] == "ranknet"
    for given in (dict(objective="cl", distillation="ranknet"), dict(objective="rank", teacher_temperature=2.0)):
        with pytest.raises(ValueError, match=r"is read with .* alone"):
            tiny_run("m", data, tmp_path, "dense", **given)
    with pytest.raises(ValueError, match="--preset released has the objectives cl, cl_kd, kd, not kl"):
        retriever_arguments(get_recipe("llama-3.2-1b", "sparse", "kl"), preset="released")


@pytest.mark.parametrize(("setting", "expected"), LOSSES.items())
def test_each_objective_has_its_loss(tiny_backbone, data, tmp_path, setting, expected):
    objective, paradigm, mini_batch_size = setting
    arguments, _ = tiny_run(tiny_backbone(), data, tmp_path, paradigm, objective, mini_batch_size=mini_batch_size)
    loss = build_loss(build_model(arguments, "cpu"), arguments)
    if paradigm == "sparse":
        assert type(loss) is SpladeLoss
        assert (loss.query_regularizer_weight, loss.document_regularizer_weight) == (0.05, 0.04)
        assert isinstance(loss.document_regularizer, FlopsRegularizer)
        assert loss.document_regularizer.columns == (3 if objective == "kd" else 1)
        loss = loss.loss
    assert type(loss) is expected
    if objective == "kd":
        assert loss.similarity_fct.keywords == {"scale": 1.0 if paradigm == "sparse" else pytest.approx(100.0)}
    else:
        assert loss.scale == pytest.approx(1.0 if paradigm == "sparse" else 100.0)
        assert loss.gather_across_devices


def test_a_mini_batch_size_caches_sparse_losses_with_their_regularizers(tiny_backbone, data, tmp_path):
    for objective in ("cl", "kd", "cl_kd"):
        arguments, _ = tiny_run(tiny_backbone(), data, tmp_path, "sparse", objective, mini_batch_size=2)
        loss = build_loss(build_model(arguments, "cpu"), arguments)
        assert type(loss) is CachedSpladeLoss and loss.mini_batch_size == 2
        assert not isinstance(loss.loss, CachedContrastiveDistillationLoss)


def test_queries_and_documents_are_cut_at_their_own_lengths_and_prefixed_with_their_prompts(tiny_backbone, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [
        {"query": f"{n} why" * 99, "pos": [f"{n} because" * 99], "neg": [f"{n} so" * 99, f"{n} thus" * 99]}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = dict(query_length=20, document_length=33)
    prompts = dict(query_prompt="query: ", document_prompt="passage: ")
    arguments, training = tiny_run(tiny_backbone(), path, tmp_path / "out", "dense", "cl", **lengths, **prompts)
    model = build_model(arguments, "cpu")
    trainer = build_trainer(model, arguments, training, load_training_tuples(arguments, 0))
    batch = next(iter(trainer.get_train_dataloader()))
    widths = {name.removesuffix("_input_ids"): ids.shape for name, ids in batch.items() if name.endswith("_input_ids")}
    assert widths == {"query": (4, 20), "positive": (4, 33), "negative_1": (4, 33), "negative_2": (4, 33)}
    read = {column: model.tokenizer.decode(batch[f"{column}_input_ids"][0]) for column in widths}
    assert "query: " in read.pop("query")
    assert all("passage: " in text for text in read.values())
    assert model.prompts == {"query": "query: ", "document": "passage: "}


BATCHES = [
    # batch, world, per device, accumulation, mini-batch, objective, paradigm -> per device, accumulation
    (112, 4, None, None, 32, "cl_kd", "sparse", (28, 1)),
    (128, 1, None, None, None, "cl", "dense", (128, 1)),
    (128, 2, 16, None, None, "cl", "dense", (16, 4)),
    (128, 2, None, 4, None, "cl", "dense", (16, 4)),
    (1024, 4, None, None, 32, "kd", "sparse", (256, 1)),
    (1024, 4, None, None, 32, "kd", "dense", (32, 8)),
    (4, 4, None, None, 32, "kd", "dense", (1, 1)),
]


@pytest.mark.parametrize(("total", "world", "each", "steps", "mini", "objective", "paradigm", "expected"), BATCHES)
def test_devices_and_accumulation_make_up_the_batch(
    data, tmp_path, total, world, each, steps, mini, objective, paradigm, expected
):
    arguments, training = tiny_run("m", data, tmp_path, paradigm, objective, batch_size=total, mini_batch_size=mini)
    training = FakeWorld(training, world, each, steps)
    resolved = resolve_batches(arguments, training)
    assert (resolved.per_device_train_batch_size, resolved.gradient_accumulation_steps) == expected


@pytest.mark.parametrize(("world", "each", "steps"), [(3, None, None), (2, 3, None), (2, 4, 2), (16, None, None)])
def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path, world, each, steps):
    arguments, training = tiny_run("m", data, tmp_path, batch_size=8)
    with pytest.raises(ValueError, match=rf"A batch of 8 cannot be divided into {world} device\(s\)"):
        resolve_batches(arguments, FakeWorld(training, world, each, steps))


def test_several_gpus_in_one_process_are_refused(data, tmp_path):
    arguments, training = tiny_run("m", data, tmp_path)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        resolve_batches(arguments, FakeWorld(training, 1, None, None, n_gpu=2))


class FakeWorld:
    """Training arguments on another number of devices."""

    def __init__(self, training, world, each, steps, n_gpu=1):
        self.world_size, self.n_gpu = world, n_gpu
        self.per_device_train_batch_size, self.gradient_accumulation_steps = each, steps


def test_accumulation_that_changes_the_objective_is_said(data, tmp_path, caplog):
    for paradigm, objective, said in (("dense", "cl", 1), ("dense", "kd", 0), ("sparse", "kd", 1)):
        caplog.clear()
        resolve_batches(*tiny_run("m", data, tmp_path, paradigm, objective, per_device_train_batch_size=2))
        assert len([r for r in caplog.records if "of 2 queries at a time, not of 4" in r.getMessage()]) == said


@pytest.mark.parametrize(
    ("paradigm", "objective", "settings"),
    [
        ("sparse", "cl_kd", dict(use_peft=True, lora_dropout=0.1, mini_batch_size=2)),
        ("dense", "cl_kd", dict(use_peft=False)),
        ("dense", "kd", dict(use_peft=True, lora_dropout=0.1, mini_batch_size=1)),
        ("sparse", "cl", dict(use_peft=False)),
    ],
)
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tiny_backbone, data, tmp_path, paradigm, objective, settings
):
    # Nine steps are one epoch and a half: the negatives of the second are drawn anew.
    settings = dict(max_steps=9, save_steps=3, **settings)
    run = [tiny_run(tiny_backbone(), data, tmp_path / name, paradigm, objective, **settings) for name in ("a", "b")]
    whole = train_retriever(*run[0])
    with interrupted(Trainer, 7 * resolve_batches(*run[1]).gradient_accumulation_steps + 1):
        train_retriever(*run[1])
    assert not (tmp_path / "b" / "modules.json").exists()
    report = json.loads((tmp_path / "b" / "training.json").read_text())
    assert report["steps"] == 6 and "finished" not in report
    resumed = train_retriever(*run[1])
    expected, actual = weights(whole), weights(resumed)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    start = {name.removeprefix("model."): tensor for name, tensor in weights(Path(tiny_backbone())).items()}
    moved = [name for name, tensor in expected.items() if not torch.equal(tensor, start[name.removeprefix("model.")])]
    assert len(moved) >= 14
    both = [json.loads((folder / "training.json").read_text()) for folder in (whole, resumed)]
    assert both[0]["floating_point_operations"] == both[1]["floating_point_operations"] > 0


def test_the_result_is_a_stock_checkpoint_with_the_trained_models_vectors(
    tiny_backbone, data, tmp_path, stock_vectors, texts
):
    folders = {
        paradigm: train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / paradigm, paradigm, use_peft=True))
        for paradigm in ("sparse", "dense")
    }
    actual = stock_vectors([(folder, "SentenceTransformer") for folder in folders.values()], texts)
    for paradigm, folder in folders.items():
        assert not (folder / "adapter_config.json").exists()
        expected = torch.from_numpy(lion_st.load(folder / "checkpoint-4", device="cpu").encode_query(texts))
        vectors = torch.from_numpy(actual[str(folder), "SentenceTransformer", "query"])
        torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-5)
        assert lion_st.paradigm_of(lion_st.load(folder, device="cpu")) == paradigm


def test_training_ranks_the_positives_first(tiny_backbone, data, tmp_path):
    settings = dict(max_steps=60, save_steps=60, batch_size=8, document_regularizer_weight=1e-4)
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **settings))
    rows = [json.loads(line) for line in data.read_text().splitlines()]

    def share_first(path) -> float:
        model = lion_st.load(path, device="cpu")
        queries = model.encode_query([row["query"] for row in rows], convert_to_tensor=True)
        documents = model.encode_document([row["pos"][0] for row in rows], convert_to_tensor=True)
        return ((queries @ documents.T).argmax(1) == torch.arange(len(rows))).float().mean().item()

    before = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    before.save(str(tmp_path / "before"))
    # From .75 to .96 over seeds and steps: the tiny model's texts differ in little.
    assert share_first(folder) > 0.6 > 2 * share_first(tmp_path / "before")


def test_caching_changes_neither_steps_nor_result(tiny_backbone, data, tmp_path):
    results = []
    for mini_batch_size in (None, 3):
        settings = dict(mini_batch_size=mini_batch_size, optim="sgd", max_grad_norm=0.0)
        run = tiny_run(tiny_backbone(), data, tmp_path / str(mini_batch_size), **settings)
        results.append(weights(train_retriever(*run)))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_operations_spent_are_those_of_the_tokens_read(tiny_backbone, data, tmp_path, monkeypatch):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "out", use_peft=True, mini_batch_size=2)
    masks, training_step = [], Trainer.training_step

    def spy(self, model, inputs, *args):
        masks.extend(value.clone() for name, value in inputs.items() if name.endswith("attention_mask"))
        return training_step(self, model, inputs, *args)

    monkeypatch.setattr(Trainer, "training_step", spy)
    folder = train_retriever(arguments, training)
    shape = BackboneShape.from_config(lion_st.load(folder, device="cpu")[0].config)
    lengths = [length for mask in masks for length in mask.sum(1).tolist()]
    assert len(lengths) == 4 * 4 * 4
    cost = TrainingCost(shape, has_head=True, lora_r=16, cached=True)
    expected = cost.flops(len(lengths), sum(lengths), sum(length**2 for length in lengths))
    spent = json.loads((folder / "training.json").read_text())["floating_point_operations"]
    assert spent == pytest.approx(expected, rel=1e-6)


def test_a_finished_run_is_reused_and_other_settings_are_refused(tiny_backbone, data, tmp_path, monkeypatch, capsys):
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", max_steps=1))
    monkeypatch.setattr(Trainer, "train", None)
    # Memory settings may change, what decides on the result may not.
    assert train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", max_steps=1, mini_batch_size=1)) == folder
    assert "is trained already" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"temperature was 1\.0 and is 0\.5\. Repeat its command .* another --output_dir"
    ):
        train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", max_steps=1, temperature=0.5))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            dict(batch_size=32),
            ValueError,
            r"24 tuples, fewer than a batch of 32: give more data",
        ),
        (dict(negatives=9), ValueError, r"9 are needed"),
        (dict(train_data="no.jsonl"), FileNotFoundError, r"no\.jsonl"),
        (dict(model="no/such/folder"), OSError, r"no/such/folder"),
        (dict(fp16=True), ValueError, "--fp16 needs a GPU"),
    ],
)
def test_bad_runs_are_refused_and_leave_nothing_behind(tiny_backbone, data, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_a_missing_adapted_backbone_is_said_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, _ = retriever_arguments(get_recipe("llama-3-8b", "dense", "cl"), use_cpu=True)
    with pytest.raises(
        FileNotFoundError, match=r"lion-st adapt --backbone llama-3-8b.*--model meta-llama/Meta-Llama-3-8B"
    ):
        build_model(arguments, "cpu")


def test_a_full_disk_leaves_the_last_checkpoint_to_go_on_from(tiny_backbone, data, tmp_path, monkeypatch):
    run = tiny_run(tiny_backbone(), data, tmp_path / "out", max_steps=2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("lion_st.training.runs.export", full)
        train_retriever(*run)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {".lock", "checkpoint-2", "trainer_state.json", "training.json"}
    assert (train_retriever(*run) / "modules.json").exists()
    shutil.rmtree(tmp_path / "out")


def test_a_dry_run_reads_the_shape_and_no_weights(tiny_backbone, data, tmp_path, monkeypatch):
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(Path(tiny_backbone()) / "config.json", folder)
    report = describe_run(*tiny_run(str(folder), data, tmp_path / "out", query_length=10, document_length=20))
    matrices = sum(tensor.numel() for tensor in weights(Path(tiny_backbone())).values() if tensor.ndim == 2)
    assert f"Parameters: {matrices / 1e9:.3f} B" in report
    assert "Tokens, every text at full length: 280 a step, 1,120 in all" in report  # 4 x (10 + 3 x 20), 4 steps
    assert json.loads(report[: report.index("\n}") + 2])["per_device_train_batch_size"] == 4
    assert "Devices: 1, 4 queries on each, 1 accumulation step(s)" in report
    flops = []
    for cut in ({"layers": [1]}, {"num_layers": 2}):
        report = describe_run(*tiny_run(str(folder), data, tmp_path / "out", **cut))
        flops.append(float(re.search(r"operations: (\S+) a step", report).group(1)))
    assert flops[0] < flops[1]
    assert "GPU hours at 40% of the peak in bfloat16: " in report and "of H100s" in report
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="no/such/folder"):
        describe_run(*tiny_run("no/such/folder", data, tmp_path / "out"))


def test_data_that_fill_no_batch_are_refused_before_training(tiny_backbone, tmp_path):
    """Eight rows about one document make no batch of four in which no text occurs twice."""
    row = {"pos": ["the lion sleeps"], "neg": ["the tiger"], "pos_scores": [3.0], "neg_scores": [1.0]}
    rows = [json.dumps({"query": f"question {number}"} | row) for number in range(8)]
    data = tmp_path / "same.jsonl"
    data.write_text("\n".join(rows) + "\n")
    run = tiny_run(tiny_backbone(), data, tmp_path / "out", batch_size=4, negatives=1)
    with pytest.raises(ValueError, match=r"8 rows .* fill no batch of 4 in which no text occurs twice"):
        train_retriever(*run)
    assert not any((tmp_path / "out").rglob("*"))


def test_a_stream_is_refused(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "out")
    tuples, model = load_training_tuples(arguments, 0), build_model(arguments, "cpu")
    stream = Dataset.from_list(list(tuples)).to_iterable_dataset()
    for streamed in (stream, {"first": tuples, "other": stream}):
        with pytest.raises(TypeError, match=r"all rows of .* a IterableDataset has no count: load a Dataset, without"):
            build_trainer(model, arguments, training, streamed)


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_a_folder_of_judgements_is_enough_to_train(tiny_backbone, tmp_path, paradigm):
    corpus = {f"d{n}": {"text": f"document {n}"} for n in range(16)}
    queries = {f"q{n}": f"query {n}" for n in range(8)}
    qrels = {f"q{n}": {f"d{2 * n}": 1, f"d{2 * n + 1}": 1} for n in range(8)}
    folder = save_beir(tmp_path / "beir", corpus, queries, qrels, "train")
    options = dict(negatives=0, max_steps=2, save_steps=2)
    result = train_retriever(*tiny_run(tiny_backbone(), folder, tmp_path / "out", paradigm, "cl", **options))
    assert json.loads((result / "training.json").read_text())["finished"] and (result / "modules.json").exists()
    with pytest.raises(ValueError, match="--objective cl --negatives 0, or mine some"):
        train_retriever(*tiny_run(tiny_backbone(), folder, tmp_path / "other", paradigm, "cl", negatives=1))


def test_equal_scores_are_not_equal_texts(tiny_backbone, tmp_path):
    """Labels of 1 and 0 in every row: no two rows used to share a batch, and an untrained model came out."""
    rows = [
        {"query": f"question {n}", "pos": [f"lion {n}"], "neg": [f"tiger {n}"], "pos_scores": [1.0], "neg_scores": [0]}
        for n in range(8)
    ]
    data = tmp_path / "same.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", negatives=1, max_steps=2))
    report = json.loads((folder / "training.json").read_text())
    assert (report["steps"], report["finished"]) == (2, True)


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_that_stops_early_has_not_finished(tiny_backbone, data, tmp_path):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "out", max_steps=4)
    record = run_log(arguments, resolve_batches(arguments, training))
    tuples = load_training_tuples(arguments, 0)
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, tuples, [record, StopAfterTwo()])
    trainer.train()
    with pytest.raises(ValueError, match="stopped at step 2 of 4"):
        export_run(trainer, record)
    assert not record.is_finished and not (tmp_path / "out" / "modules.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(accelerator_config={"split_batches": True}), "--accelerator_config has split_batches"),
        (dict(dataloader_num_workers=1, dataloader_persistent_workers=True), "negatives as in the first"),
    ],
)
def test_options_that_would_read_other_batches_are_refused(tiny_backbone, data, tmp_path, options, message):
    arguments, training = tiny_run(tiny_backbone(), data, tmp_path / "out", **options)
    trainer = build_trainer(build_model(arguments, "cpu"), arguments, training, load_training_tuples(arguments, 0))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_workers_that_tokenize_do_not_hang(tiny_backbone, data, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    arguments, training_arguments = tiny_run(tiny_backbone(), data, tmp_path / "out", dataloader_num_workers=1)
    model = build_model(arguments)
    model.tokenizer(["the first use starts the threads"] * 8)
    trainer = build_trainer(model, arguments, training_arguments, load_training_tuples(arguments, 0))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["query_input_ids"].ndim == 2
    assert "TOKENIZERS_PARALLELISM is set to false" in caplog.text


def test_one_process_does_not_warn_that_it_gathers_nothing(tiny_backbone, tmp_path, caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()  # which says a thing once in a process
    data = write_tuples(tmp_path / "tuples.jsonl")
    train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "run", "dense", "cl", max_steps=1, save_strategy="no"))
    assert not [line for line in caplog.messages if "gather" in line]
