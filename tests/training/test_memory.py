"""Memory that a dry run promises, beside what a step takes."""

import os
import subprocess
import sys

import pytest

from lion_st.training.cost import TrainingCost
from lion_st.training.recipes import BACKBONES, BackboneShape

linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peaks of memory")
ROWS, NEGATIVES, LENGTH, MINI_BATCH, TERMS = 12, 6, 8, 4, 40_000
STEP = """
import gc, sys
import torch
from lion_st.training.options.arguments import retriever_arguments
from lion_st.training.recipes import get_recipe
from lion_st.training.retriever import build_loss, build_model

torch.set_num_threads(1)
backbone, objective, mini, rows, negatives, length = *sys.argv[1:3], *map(int, sys.argv[3:])
arguments, _ = retriever_arguments(
    get_recipe("micro", "sparse", objective), model=backbone, negatives=negatives, mini_batch_size=mini or None,
    use_peft=True, attn_implementation=None,
)
model = build_model(arguments, "cpu").train()
loss = build_loss(model, arguments)
labels = torch.randn(rows, max(1, negatives) + (objective == "cl_kd"))

def step():
    ids = torch.randint(3, 50, (2 + negatives, rows, length))
    columns = [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in ids]
    terms = loss(columns, None if objective == "cl" else labels)
    sum(terms.values(), start=torch.zeros(())).backward() if isinstance(terms, dict) else terms.backward()
    del terms
    model.zero_grad()

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

step()
step()
gc.collect()
before = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # begins the peak anew
step()
print(status("VmHWM:") - before)
"""


@linux
@pytest.mark.parametrize(("objective", "cached"), [("cl_kd", False), ("cl_kd", True), ("cl", False)])
def test_a_steps_memory_is_within_a_fifth_of_the_estimate(tiny_backbone, objective, cached):
    backbone = tiny_backbone(vocab_size=TERMS)
    numbers = map(str, (MINI_BATCH * cached, ROWS, NEGATIVES, LENGTH))
    # What is freed goes back to the system at once, so that the peak is of what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", STEP, backbone, objective, *numbers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1])

    from transformers import AutoConfig

    shape = BackboneShape.from_config(AutoConfig.from_pretrained(backbone))
    cost = TrainingCost(shape, has_head=True, lora_r=16, cached=cached)
    texts = ROWS * (2 + NEGATIVES)
    parts = cost.memory((MINI_BATCH if cached else texts) * LENGTH, texts, objective, half_precision=False)
    assert measured == pytest.approx(parts["activations"] + parts["embeddings and gradients"], rel=0.2)


@pytest.mark.parametrize("lora_r", [None, 16])
def test_sharding_divides_what_is_kept_and_gathers_the_head_and_embeddings_or_two_layers(lora_r):
    shape = BACKBONES["llama-3-8b"].shape
    cost = TrainingCost(shape, has_head=True, lora_r=lora_r)
    whole, sharded = (cost.memory(1000, 10, devices=8, sharding=sharding) for sharding in ("none", "FSDP2"))
    for name, copies in (("weights", 8), ("gradients", 16), ("optimizer", 8)):  # DDP sends copies of the gradients
        assert whole[name] == pytest.approx(copies * sharded[name])
    trained = cost.parameters if lora_r is None else cost.adapter_parameters
    kept = sum(sharded[name] for name in ("weights", "gradients", "optimizer"))
    assert 8 * kept == 16 * trained + (0 if lora_r is None else 2 * cost.parameters)
    layer = (cost.linear_parameters + cost.adapter_parameters) / shape.num_hidden_layers
    head = 128_256 * 4096
    gathered = 2 * (head + max(2 * layer, head)) + (6 * head if lora_r is None else 0)
    assert sharded["gathered head and layers"] == pytest.approx(gathered, rel=1e-3)
    for name in ("activations", "embeddings and gradients"):
        assert sharded[name] == whole[name]


def test_a_dry_run_estimates_other_gpus_than_are_there():
    from lion_st.training.dry_run import describe_run
    from lion_st.training.options.command_line import parse_retriever_arguments

    given = ["--config", "lion_sp_8b", "--dry_run", "--dry_run_devices", "8", "--max_steps", "100"]
    whole, sharded = (describe_run(*parse_retriever_arguments([*given, *more])) for more in ([], ["--fsdp"]))
    for report, words in ((whole, "the whole model on each"), (sharded, "weights sharded (FSDP2)")):
        assert "Devices: 8, " in report and words in report
        assert "dry_run_devices" not in report
        assert "Main memory while the weights are read: about 15.0 GiB of " in report
    assert "GiB of each machine, whose processes map the same files" in whole
    assert "GiB of one process of each machine" in sharded
    all_weights = describe_run(*parse_retriever_arguments([*given, "--use_peft", "false"]))
    assert "Main memory while the weights are read: about 29.9 GiB of each process" in all_weights
    memory = [float(report.partition("Memory of each device, about ")[2].split()[0]) for report in (whole, sharded)]
    assert memory[0] - memory[1] == pytest.approx(7 / 8 * 16.1 / 1.0737 - 1.85, abs=1)  # of 8 B in bfloat16
