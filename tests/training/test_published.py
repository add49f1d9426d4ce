"""Other people's recipes: complete, with their source, and what they train is what they say."""

import dataclasses
import json

import pytest
from commands import lion
from sentence_transformers import SentenceTransformer
from tiny_runs import tiny_options, write_tuples

from lion_st.errors import UsageError
from lion_st.training.dry_run import describe_run
from lion_st.training.options.arguments import RetrieverArguments, RetrieverTrainingArguments, retriever_arguments
from lion_st.training.options.command_line import parse_retriever_arguments
from lion_st.training.published import PUBLISHED, describe_recipe, output_folder, published_recipe
from lion_st.training.recipes import BACKBONES
from lion_st.training.retriever import train_retriever
from lion_st.training.starting import build_model

EVERY = [(name, backbone) for name, one in PUBLISHED.items() for backbone in one.backbones]


@pytest.mark.parametrize(("name", "backbone"), EVERY)
def test_every_recipe_is_one_command_whose_cost_is_known(name, backbone):
    arguments, training = parse_retriever_arguments(["--recipe", name, "--backbone", backbone, "--use_cpu", "true"])
    recipe = published_recipe(name, backbone)
    assert (arguments.recipe, arguments.backbone, arguments.paradigm) == (name, backbone, recipe.paradigm)
    assert training.output_dir == output_folder(name, backbone)
    assert arguments.settings()["recipe"] == name
    assert "GPU hours" in describe_run(arguments, training)
    options = {
        field.name for kind in (RetrieverArguments, RetrieverTrainingArguments) for field in dataclasses.fields(kind)
    }
    assert recipe.defaults().keys() <= options
    text = describe_recipe(name, backbone)
    assert "arxiv.org/abs/" in text and "published: " in text and "not found in the source" in text
    assert f"lion-st train --recipe {name} --backbone {backbone}" in text


def test_the_settings_are_those_of_their_authors():
    first, second = (published_recipe(name, "llama-3.2-1b") for name in ("laconic-pretrain", "laconic"))
    assert (first.batch_size, first.negatives, first.add_bos, first.scale) == (2048, 0, False, 1.0)
    assert first.query_regularizer_weight == first.document_regularizer_weight == 5e-4
    assert (second.batch_size, second.negatives, second.train_data) == (128, 15, "rlhn/rlhn-680K")
    assert second.query_regularizer_weight == second.document_regularizer_weight == 1e-3
    assert second.model == first.defaults()["output_dir"]
    assert (first.lora_r, published_recipe("laconic", "llama-3.1-8b").lora_r) == (32, 16)
    splade = published_recipe("splade-llama")
    assert (splade.backbone, splade.objective, splade.temperature) == ("llama-3.1-8b", "kl", 10.0)
    assert (splade.negatives, splade.batch_size, splade.lora_r, splade.query_regularizer_weight) == (8, 128, 64, 1e-4)
    dense = published_recipe("repllama")
    assert (dense.causal, dense.add_eos, dense.pooling, dense.normalize) == (True, True, "last_token", True)
    assert (dense.temperature, dense.objective, dense.query_prompt) == (0.01, "cl", "query: ")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-4b", "qwen3-8b"])
def test_the_shapes_of_qwen_have_the_published_numbers_of_parameters(name):
    from lion_st.training.cost import TrainingCost

    billions = {"qwen3-0.6b": 0.596, "qwen3-4b": 4.022, "qwen3-8b": 8.191}[name]
    assert TrainingCost(BACKBONES[name].shape, True, None).parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_what_cannot_be_is_refused_by_name():
    for options, message in (
        (["--recipe", "repllama", "--paradigm", "sparse"], "repllama is dense, not sparse: leave out --paradigm"),
        (["--recipe", "repllama", "--objective", "kd"], "repllama is cl, not kd"),
        (["--recipe", "colbert"], "no published recipe 'colbert': choose from laconic-pretrain"),
        (["--recipe", "repllama", "--backbone", "micro"], "repllama is for llama-3.1-8b.*not 'micro'"),
        (["--backbone", "qwen3-4b"], "qwen3-4b is for --recipe laconic-pretrain.*--model Qwen/Qwen3-4B-Base"),
        ([], r"--backbone: [^q]* Or a published recipe with --recipe: laconic-pretrain"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_retriever_arguments(options)
    arguments, _ = parse_retriever_arguments(["--recipe", "laconic", "--backbone", "qwen3-4b"])
    with pytest.raises(FileNotFoundError, match="--recipe laconic-pretrain --backbone qwen3-4b` first"):
        build_model(arguments, "cpu")


def test_recipes_are_shown_in_full():
    listed = lion("recipes")
    assert all(name in listed for name in PUBLISHED) and "llama-3-8b" in listed
    assert "pooling                      last_token" in lion("recipes", "repllama", "--backbone", "qwen3-0.6b")
    assert "max_steps                    33250" in lion("recipes", "llama-3.2-1b-sparse-cl_kd")
    hybrid = lion("recipes", "llama-3-8b-hybrid-cl")
    assert "arxiv.org/abs/2502.15526, for a paradigm that the paper does not have" in hybrid
    lion("recipes", "none", exit_code=None)


def test_both_phases_of_laconic_train_one_model(tiny_backbone, tmp_path):
    """On a tiny backbone in place of the large one."""
    data = write_tuples(tmp_path / "tuples.jsonl")
    tiny = {**tiny_options(tiny_backbone(), data, tmp_path / "first", max_steps=1), "use_peft": True}
    del tiny["negatives"]
    first = retriever_arguments(
        published_recipe("laconic-pretrain", "llama-3.2-1b"), **tiny | dict(lora_r=2, lora_alpha=4)
    )
    folder = train_retriever(*first)
    again = tiny | dict(model=str(folder), output_dir=str(tmp_path / "second"), negatives=2)
    second = retriever_arguments(published_recipe("laconic", "llama-3.2-1b"), **again)
    stock = SentenceTransformer(str(train_retriever(*second)), device="cpu")
    assert stock.prompts == {"query": "query: ", "document": "passage: "} and stock[0].query_length == 256
    assert stock.tokenizer.bos_token_id not in stock.tokenizer("a lion")["input_ids"]
    assert json.loads((tmp_path / "second" / "training.json").read_text())["settings"]["recipe"] == "laconic"
