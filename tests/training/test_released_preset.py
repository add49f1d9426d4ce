"""`--preset released` against formulas of its own, and the parts that it is made of."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_tuples
from torch import nn

import lion_st
from lion_st.losses import MicroBatchRegularizerWeightSchedulerCallback
from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.arguments import (
    MntpArguments,
    MntpTrainingArguments,
    RetrieverArguments,
    retriever_arguments,
)
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.options.released_code import ramp_micro_batches, require_files
from lion_st.training.recipes import get_recipe
from lion_st.training.retriever import build_loss, resolve_batches, train_retriever

QUERIES, NEGATIVES, WIDTH = 6, 16, 40


class Texts(nn.Module):
    """A vector for each text, by number."""

    def __init__(self, texts: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vectors = nn.Parameter(torch.rand(texts, WIDTH, generator=generator, dtype=torch.float64))

    def forward(self, features):
        return {"sentence_embedding": self.vectors[features["input_ids"][:, 0]]}


def released(objective, paradigm="sparse", backbone="llama-3.2-1b", **options):
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    given = ["--backbone", backbone, "--paradigm", paradigm, "--objective", objective, *words, "--use_cpu", "true"]
    return parse_retriever_arguments([*given, "--preset", "released"])


def log_softmax(scores):
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("objective", ["cl", "cl_kd", "kd"])
def test_the_loss_is_that_of_the_released_code_on_four_gpus(objective, paradigm):
    """(NCE / 4 + KL) / 2 + FLOPS / 4, or (NCE + FLOPS) / 4, or MarginMSE + FLOPS, written down in numpy."""
    arguments, _ = released(objective, paradigm, mini_batch_size=4)
    columns = 2 + arguments.negatives
    model = Texts(QUERIES * columns)
    features = [{"input_ids": torch.arange(QUERIES)[:, None] + QUERIES * place} for place in range(columns)]
    for column in features:
        column["attention_mask"] = torch.ones_like(column["input_ids"])
    labels = torch.randn(QUERIES, columns - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = build_loss(model, arguments)(features, None if objective == "cl" else labels)
    value = sum(value.values()) if isinstance(value, dict) else value

    vectors = model.vectors.detach().numpy().reshape(columns, QUERIES, WIDTH)
    queries, documents = vectors[0], vectors[1:]  # [Q, W], [1 + n, Q, W]
    scale = 100 if paradigm == "dense" else 1
    own = scale * np.einsum("qw,dqw->qd", queries, documents)  # [Q, 1 + n]
    everything = scale * queries @ documents.reshape(-1, WIDTH).T
    nce = -log_softmax(everything)[np.arange(QUERIES), np.arange(QUERIES)].mean()
    teacher, student = log_softmax(labels.numpy()), log_softmax(own)
    kl = (np.exp(teacher) * (teacher - student)).sum(1).mean()
    margins = (own[:, :1] - own[:, 1:]) - (labels.numpy()[:, :1] - labels.numpy()[:, 1:])

    def flops(rows):
        return (rows.mean(0) ** 2).sum()

    of_queries, of_documents = 0.05 * flops(queries), 0.04 * flops(documents.reshape(-1, WIDTH))
    expected = {
        "cl": nce / 4 + (of_queries + of_documents) / 4,
        "cl_kd": (nce / 4 + kl) / 2 + (of_queries + of_documents) / 4,
        "kd": (margins**2).mean() + of_queries + 0.04 * (flops(documents[0]) + flops(documents[1])) / 2,
    }[objective]
    if paradigm == "dense":
        expected = {"cl": nce / 4, "cl_kd": (nce / 4 + kl) / 2, "kd": (margins**2).mean()}[objective]
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("backbone", "objective", "world", "expected"),
    [
        ("llama-3.2-1b", "cl_kd", 4, (28, 1)),
        ("llama-3.2-3b", "cl", 4, (16, 2)),
        ("llama-3-8b", "cl_kd", 4, (8, 4)),
        ("llama-3-8b", "cl_kd", 1, (32, 4)),  # 32 queries see each other's negatives, as on four
        ("llama-3.2-1b", "kd", 4, (256, 1)),
        ("llama-3-8b", "kd", 4, (64, 2)),
        ("llama-3-8b", "kd", 1, (64, 8)),  # FLOPS are of 64 rows, as on four
    ],
)
def test_negatives_and_flops_are_of_as_many_rows_as_there(backbone, objective, world, expected):
    arguments, training = released(objective, backbone=backbone)
    each, steps = training.per_device_train_batch_size, training.gradient_accumulation_steps
    world = SimpleNamespace(
        world_size=world, n_gpu=1, per_device_train_batch_size=each, gradient_accumulation_steps=steps
    )
    resolved = resolve_batches(arguments, world)
    assert (resolved.per_device_train_batch_size, resolved.gradient_accumulation_steps) == expected


def test_the_preset_is_under_what_is_given_and_over_the_recipe():
    arguments, training = released("cl_kd")
    assert (arguments.preset, arguments.train_adapter, arguments.model) == (
        "released", True, "runs/llama-3.2-1b-mntp-released",
    )  # fmt: skip
    assert arguments.train_data == ["data/train/msmarco_train_teacher_scores.jsonl"]
    assert arguments.train_documents == "data/msmarco-full/full_collection/raw.tsv"
    assert (arguments.teacher_normalization, arguments.teacher_temperature) == ("none", 1.0)
    assert (training.batch_sampler, training.max_steps) == ("batch_sampler", 33_250)
    _, dense = released("cl_kd", "dense")
    assert (dense.max_steps, dense.num_train_epochs) == (-1, 7)
    own, training = released("cl_kd", train_data="own.jsonl", max_steps=7)
    assert (own.train_data, own.train_documents, training.max_steps) == (["own.jsonl"], None, 7)
    made, _ = retriever_arguments(get_recipe("llama-3.2-1b", "sparse", "cl_kd"), preset="released")
    assert made.settings() == arguments.settings()


def test_other_backbones_and_presets_are_refused_and_missing_files_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for backbone in ("micro", "smollm2-135m"):
        with pytest.raises(ValueError, match=r"whose backbones are llama-3\.2-1b, llama-3\.2-3b, llama-3-8b"):
            parse_retriever_arguments(["--backbone", backbone, "--preset", "released"])
        with pytest.raises(ValueError, match="whose backbones are"):
            RetrieverArguments(backbone=backbone, model="m", train_data=["d"], preset="released")
    with pytest.raises(ValueError, match="'paper'"):
        parse_retriever_arguments(["--backbone", "llama-3-8b", "--preset", "paper"])
    arguments, _ = released("kd")
    with pytest.raises(FileNotFoundError, match=r"msmarco_qrel_added_query_teacher_scores\.jsonl, which is not there"):
        require_files(arguments.train_data)
    require_files(["own.jsonl"])  # whose reader says what is wrong with it


@pytest.mark.parametrize(("backbone", "objective", "own"), [("llama-3-8b", "cl_kd", 4), ("llama-3.2-1b", "kd", 4)])
def test_flops_weights_rise_with_each_micro_batch_of_four_gpus(backbone, objective, own):
    arguments, _ = released(objective, backbone=backbone)
    loss = build_loss(Texts(1), arguments)
    full = loss.query_regularizer_weight
    there = ramp_micro_batches(backbone, objective, arguments.batch_size)
    assert there == (4 if objective == "cl_kd" else 1)
    ramp = MicroBatchRegularizerWeightSchedulerCallback(loss, warmup_ratio=1 / 3, micro_batches=there)
    state, arguments = SimpleNamespace(max_steps=90, global_step=0), SimpleNamespace(gradient_accumulation_steps=own)
    ramp.on_train_begin(arguments, state, None)
    for step in range(40):
        state.global_step = step
        ramp.on_step_begin(arguments, state, None)
        for micro in range(own):
            counted = step * there + 1 + micro * there // own
            assert loss.query_regularizer_weight == pytest.approx(full * min(1, counted / 30) ** 2)
            ramp.on_substep_end(arguments, state, None)


def test_the_mntp_stage_of_the_preset():
    arguments, training = parse_mntp_arguments(["--backbone", "llama-3.2-1b", "--preset", "released"])
    assert (arguments.rows_per_document, arguments.merge) == (1, False)
    assert (training.max_steps, training.num_train_epochs, training.stop_after_steps) == (-1, 1.0, 10_000)
    assert training.output_dir == released("cl")[0].model


def test_an_mntp_adapter_is_trained_on(tiny_backbone, tmp_path):
    """Each line begins with a token of its own, the schedule is stopped in its middle, and its adapter goes on."""
    lines = [f"Line {n} of a text on {n * n} lions." for n in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    mntp = adapt_mntp(
        MntpArguments(
            backbone=tiny_backbone(),
            texts=[str(tmp_path / "texts.txt")],
            block_size=32,
            eval_blocks=4,
            lora_r=4,
            rows_per_document=1,
            merge=False,
        ),
        MntpTrainingArguments(
            output_dir=str(tmp_path / "mntp"),
            per_device_train_batch_size=4,
            num_train_epochs=1,
            stop_after_steps=3,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
        ),
    )
    report = json.loads((mntp / "mntp.json").read_text())
    assert (report["steps"], report["finished"]) == (3, True)
    saved = load_file(mntp / "adapter_model.safetensors")
    model = lion_st.build(mntp, "sparse", train_adapter=True, device="cpu")
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(weight.numel() for weight in trained.values()) == sum(weight.numel() for weight in saved.values())
    assert any(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)
    run = tiny_run(
        str(mntp), write_tuples(tmp_path / "a.jsonl"), tmp_path / "out", use_peft=True, train_adapter=True, max_steps=1
    )
    folder = train_retriever(*run)
    assert not (folder / "adapter_config.json").exists()  # merged into the exported checkpoint
    with pytest.raises(ValueError, match=r"has no adapter: leave one out"):
        lion_st.build(tiny_backbone(), "sparse", train_adapter=True, device="cpu")
