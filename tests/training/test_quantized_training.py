"""`--load_in_4bit` trains an adapter on weights of 4 bits, resumes to the bit, and writes ordinary checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import interrupted, tiny_options, tiny_run, write_sentences, write_tuples
from transformers import AutoModelForCausalLM, Trainer

import lion_st
from lion_st.errors import UsageError
from lion_st.training.dry_run import describe_run
from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.arguments import MntpArguments, MntpTrainingArguments
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.retriever import train_retriever

SHAPE = dict(hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1)
FOUR_BITS = dict(use_peft=True, load_in_4bit=True)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_tuples(tmp_path / "tuples.jsonl")


def test_a_run_resumes_to_the_bit_and_its_result_is_a_stock_checkpoint(tiny_backbone, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = dict(mini_batch_size=2, max_steps=4, save_steps=2, **FOUR_BITS)
    runs = [tiny_run(tiny_backbone(**SHAPE), data, tmp_path / name, **settings) for name in ("a", "b")]
    whole = train_retriever(*runs[0])
    with interrupted(Trainer, 4):
        train_retriever(*runs[1])
    resumed = train_retriever(*runs[1])
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert (
        all(torch.equal(tensor, found[name]) for name, tensor in expected.items()) and expected.keys() == found.keys()
    )
    start = load_file(Path(tiny_backbone(**SHAPE)) / "model.safetensors")
    assert torch.equal(expected["model.embed_tokens.weight"], start["model.embed_tokens.weight"])  # the LM head, too
    assert json.loads((whole / "training.json").read_text())["settings"]["load_in_4bit"] is True
    # The last checkpoint's adapter, on the base of 4 bits that it was trained on, is the result.
    texts = ["what do lions do", "Zebras rest."]
    last = lion_st.load(whole / "checkpoint-4", load_in_4bit=True, device="cpu")
    torch.testing.assert_close(
        lion_st.load(whole, device="cpu").encode_document(texts, convert_to_tensor=True),
        last.encode_document(texts, convert_to_tensor=True),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("paradigm", "options"), [("sparse", {"query_encoder": "static"}), ("multi_vector", {})])
def test_what_learns_beside_the_adapter_resumes_too(tiny_backbone, data, tmp_path, paradigm, options):
    pytest.importorskip("bitsandbytes")

    def run():
        return tiny_run(
            tiny_backbone(**SHAPE), data, tmp_path / "run", paradigm, **FOUR_BITS, **options, save_total_limit=None
        )

    def learned():
        return lion_st.load(tmp_path / "run" / "checkpoint-4", device="cpu")[1].state_dict()

    folder = train_retriever(*run())
    (expected,) = learned().values()
    shutil.rmtree(folder / "checkpoint-4")  # as if killed before its third step
    (folder / "training.json").unlink()
    train_retriever(*run())
    (found,) = learned().values()
    assert torch.equal(found, expected)


def test_a_retriever_with_an_adapter_is_merged_unrounded_below_a_new_one(tiny_backbone, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = dict(max_steps=1, save_steps=1, use_peft=True)
    first = train_retriever(*tiny_run(tiny_backbone(**SHAPE), data, tmp_path / "first", **settings))
    for name, four_bits in (("plain", False), ("four", True)):
        train_retriever(
            *tiny_run(str(first / "checkpoint-1"), data, tmp_path / name, load_in_4bit=four_bits, **settings)
        )
    plain, four = (load_file(tmp_path / name / "start" / "model.safetensors") for name in ("plain", "four"))
    assert all(torch.equal(tensor, four[name]) for name, tensor in plain.items())


def test_a_backbone_is_adapted_and_merged(tiny_backbone, tmp_path):
    pytest.importorskip("bitsandbytes")
    text = write_sentences(tmp_path / "text.txt")
    output = adapt_mntp(
        MntpArguments(backbone=tiny_backbone(**SHAPE), texts=[str(text)], block_size=16, eval_blocks=8, **FOUR_BITS),
        MntpTrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, save_steps=2,
            learning_rate=1e-2, bf16=False, disable_tqdm=True,
        ),
    )  # fmt: skip
    report = json.loads((output / "mntp.json").read_text())
    assert report["eval_loss_after"] < report["eval_loss_before"]
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not hasattr(model.config, "quantization_config")
    start = AutoModelForCausalLM.from_pretrained(tiny_backbone(**SHAPE))
    change = [
        ((after - before).norm() / before.norm()).item()
        for (name, after), (_, before) in zip(model.named_parameters(), start.named_parameters(), strict=True)
        if "_proj" in name
    ]
    assert 0.01 < max(change) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--use_peft", "false"], "--load_in_4bit holds weights that do not train: leave out --use_peft false"),
        (["--fsdp"], "--load_in_4bit is not built for sharded weights: leave out --fsdp"),
    ],
)
def test_what_does_not_go_with_four_bits_is_refused_before_any_work(tiny_backbone, data, tmp_path, options, message):
    given = tiny_options(tiny_backbone(), data, tmp_path / "out", use_peft=True, mini_batch_size=2)
    line = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
    with pytest.raises(UsageError, match=message):
        train_retriever(*parse_retriever_arguments(["--backbone", "micro", *line, "--load_in_4bit", *options]))
    with pytest.raises(UsageError, match=message):
        adapt_mntp(
            *parse_mntp_arguments(
                ["--backbone", "none", "--texts", "none", "--use_cpu", "true", "--load_in_4bit", *options]
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_four_bits_take():
    def gibibytes(*options: str) -> str:
        lines = describe_run(*parse_retriever_arguments(["--backbone", "llama-3-8b", *options])).splitlines()
        return next(line for line in lines if line.startswith("Memory of each device"))

    assert "weights 15.1" in gibibytes() and "weights 4.6" not in gibibytes()
    assert "weights 5." in gibibytes("--load_in_4bit") and "layer of 4 bits at work 0.11" in gibibytes("--load_in_4bit")
