"""What a budget buys, and what a study's file may say."""

import json
from pathlib import Path

import pytest
from tiny_study import tiny_study

from lion_st.errors import UsageError
from lion_st.study import parse_study, plan_study, read_study
from lion_st.training.recipes import BACKBONES

STUDIES = Path(__file__).parents[2] / "training_scripts" / "studies"
PAPER = {
    "backbones": ["llama-3.2-1b"],
    "budget": {"flops": 1e20, "lengths": {"query": 10, "document": 100}},
    "data": {"train": "lightonai/ms-marco-en-bge"},
    "evaluation": {"zero_shot": ["SciFact"]},
}


def planned(**changes):
    return plan_study(parse_study(PAPER | changes))


def counted_flops(layers: int, dense: bool) -> float:
    """Operations of a step of 112 queries with 17 documents of Llama-3.2-1B with a LoRA of rank 16, counted by hand.

    Its blocks have hidden size 2048, 32 heads and 8 key-value heads of 64, an MLP of 8192; its vocabulary has 128,256
    terms. The recipe caches gradients, so that every text goes forward twice.
    """
    products = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 8192), (2048, 8192), (8192, 2048)]
    texts, tokens, squares = 112 * 18, 112 * (10 + 17 * 100), 112 * (100 + 17 * 10_000)
    linear = layers * sum(2 * a * b for a, b in products) * tokens
    adapter = layers * sum(2 * 16 * (a + b) for a, b in products) * tokens
    attention = layers * 2 * (2 * 32 * 64) * squares  # of queries with keys, and of weights with values
    head = 0 if dense else 2 * 2048 * 128_256 * tokens
    head_backward = 0 if dense else 2 * 2048 * 128_256 * texts  # one position a term and text has a gradient
    forward = linear + adapter + attention + head
    backward = linear + 2 * adapter + 2 * attention + head_backward
    return 2 * forward + backward


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("layers", [4, 16])
def test_the_budget_buys_the_steps_that_an_independent_count_gives(paradigm: str, layers: int) -> None:
    backbones = [{"recipe": "llama-3.2-1b", "num_layers": layers}]
    (cell,) = planned(backbones=backbones, paradigms=[paradigm], objectives=["cl_kd"]).cells
    each = counted_flops(layers, paradigm == "dense")
    assert cell.steps == int(1e20 / each)
    assert cell.flops == pytest.approx(cell.steps * each, rel=1e-9)
    assert cell.tokens == cell.steps * 112 * 1710
    assert cell.options["max_steps"] == cell.steps


def test_a_grid_is_whole_for_one_seed_before_the_next() -> None:
    cells = planned(seeds=[7, 3], objectives=["cl", "kd"]).cells
    assert [cell.seed for cell in cells] == [7] * 4 + [3] * 4
    assert [(cell.paradigm, cell.objective) for cell in cells[:4]] == [
        (cell.paradigm, cell.objective) for cell in cells[4:]
    ]


def test_mntp_comes_out_of_the_budget_only_where_it_is_included() -> None:
    mntp = {"texts": ["a.txt"], "max_steps": 100}
    budget = {"flops": 1e19, "lengths": "full"}
    apart = planned(mntp=mntp, budget=budget, objectives=["cl"])
    inside = planned(mntp=mntp, budget=budget | {"includes_mntp": True}, objectives=["cl"])
    for cell, less in zip(apart.cells, inside.cells, strict=True):
        step = cell.flops / cell.steps
        assert less.steps == int((1e19 - cell.mntp_flops) / step) < cell.steps
    # 32 blocks of 512 tokens; forward, recomputed, backward of frozen weights: at least three products of each weight.
    tokens = 100 * 32 * 512
    linear = 2 * BACKBONES["llama-3.2-1b"].shape.num_hidden_layers * 60_817_408 * tokens
    assert apart.stages[0].tokens == tokens
    assert 3 * linear < apart.stages[0].flops < 4 * linear


def test_lengths_are_measured_with_the_backbones_tokenizer(tmp_path, tiny_backbone) -> None:
    from transformers import AutoTokenizer

    values = tiny_study(tmp_path, tiny_backbone())
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone())
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]

    def mean(texts: list[str], prompt: str, end: int) -> float:
        return sum(min(32, len(tokenizer(prompt + text)["input_ids"]) + end) for text in texts) / len(texts)

    for query_prompt, document_prompt, end in (("", "", 0), ("q: ", "p: ", 1)):
        prompts = {"query_prompt": query_prompt, "document_prompt": document_prompt, "add_eos": bool(end)}
        plan = plan_study(parse_study(values | {"training": values["training"] | prompts}))
        query = mean([row["query"] for row in rows], query_prompt, end)
        positive = mean([row["pos"][0] for row in rows], document_prompt, end)
        negative = mean([text for row in rows for text in row["neg"]], document_prompt, end)
        for cell in plan.cells:  # of four queries, each with a relevant document and a negative
            assert cell.tokens == round(cell.steps * 4 * (query + 2 * (positive + 2 * negative) / 3))
    longest = planned(budget={"flops": 1e20, "lengths": "full"}, objectives=["cl"]).cells[0]
    assert longest.tokens / longest.steps == 112 * (64 + 17 * 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paradigm": ["sparse"]}, "'paradigm', which is not a setting of it: did you mean 'paradigms'?"),
        ({"paradigms": ["spars"]}, "paradigms names 'spars': choose from sparse, dense, multi_vector, hybrid"),
        ({"objectives": []}, "objectives is []: give a list of at least one"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"label_noise": [2]}, "label_noise is 2: give a number of at least 0 and at most 1"),
        ({"budget": {"flops": "many"}}, "budget: flops is 'many'"),
        ({"budget": {"flop": 1}}, "did you mean 'flops'?"),
        ({"budget": {"flops": 1, "lengths": "full"}}, "does not buy a step of llama-3.2-1b-sparse-cl-seed42"),
        ({"backbones": ["llama-5"]}, "recipe is 'llama-5': choose from llama-3.2-1b"),
        ({"backbones": [{"recipe": "micro", "num_layers": 9}]}, "asks for layer 8 of lion-st/lion-micro-base"),
        ({"training": {"lerning_rate": 1}}, "did you mean --learning_rate?"),
        ({"training": {"max_steps": 1}}, "on which the study decides"),
        ({"training": {"query_regularizer_weight": 1}}, "read with --paradigm sparse or hybrid alone"),
        ({"training": {"where": [{"paradigm": "x"}]}}, "paradigm is 'x'"),
        ({"evaluation": {}}, "evaluation names no test set"),
        ({"evaluation": {"zero_shot": ["a"], "metrics": ["nDCG@1000"]}}, "nDCG@1000 looks deeper"),
        ({"evaluation": {"in_domain": ["held_out"]}}, "data.hold_out is 0"),
        ({"evaluation": {"zero_shot": ["a"], "engine": "seismic"}}, "does not search 'dense' vectors"),
        ({"evaluation": {"zero_shot": ["a"], "dev": "b"}}, "for the weights of hybrid models"),
        ({"evaluation": {"zero_shot": ["a"], "dev": {"source": "a", "split": "test"}}}, "is a test set of the study"),
        ({"machine": "abacus"}, "give H100 or A100, or the training FLOPs a second"),
        ({"mntp": {"texts": ["a"]}, "backbones": ["micro"]}, "mntp needs max_steps"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(changes, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(**changes)
    assert message in str(caught.value)


def test_a_recipes_way_with_the_teachers_scores_is_for_its_own_data() -> None:
    own, *_ = planned(objectives=["cl_kd"]).cells
    assert (own.options["teacher_normalization"], own.options["teacher_temperature"]) == ("minmax", 0.05)
    other, *_ = planned(objectives=["cl_kd"], data={"train": "lion-st/lion-quickstart"}).cells
    assert "teacher_normalization" not in other.options


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_that_come_with_it_are_planned(file: Path) -> None:
    plan = plan_study(read_study(file))
    assert all(cell.flops <= cell.budget_flops for cell in plan.cells)
    sizes = {cell.non_embedding_parameters for cell in plan.cells}
    if file.stem == "micro":
        assert len(sizes) >= 3 and all(0.5e6 < size < 12e6 for size in sizes)
        assert len(plan.cells) == len(sizes) * 2 * 3 * 2
        assert plan.flops / plan.study.flops_per_second < 4 * 3600
    if file.stem == "smollm2":
        assert [cell.options["max_steps"] for cell in plan.cells if cell.backbone == "layers30"]
        assert len(sizes) == 4
