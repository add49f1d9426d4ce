"""The training scripts, as a user starts them."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from commands import lion
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_runs import tiny_options, write_tuples

CONFIGS = files("lion_st.training") / "configs"
SCRIPTS = Path(__file__).parents[2] / "training_scripts"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}


def command_line(options: dict) -> list[str]:
    given = {name: value for name, value in options.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def run_script(name: str, options: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / name), *options]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, text=True, capture_output=True)


def run_here(monkeypatch, name: str, options: list[str]) -> None:
    """The script in this process, which has imported everything already."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(SCRIPTS / name), run_name="__main__")


def kill_after_checkpoint(name: str, options: list[str], checkpoint: Path) -> None:
    """Start a command and end it the hard way once it has written a checkpoint."""
    command = [sys.executable, "-m", "lion_st", name, *options]
    with subprocess.Popen(
        command, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (checkpoint / "trainer_state.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)


def same_weights(first: Path, second: Path) -> bool:
    tensors = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items())


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_resumes_with_the_same_command(tiny_backbone, data, tmp_path):
    recipe = ["--backbone", "micro", "--paradigm", "sparse", "--objective", "cl_kd"]

    def options(folder: str) -> list[str]:
        steps = dict(max_steps=30, save_steps=2, save_total_limit=2)
        return recipe + command_line(tiny_options(tiny_backbone(), data, tmp_path / folder, **steps))

    kill_after_checkpoint("train", options("killed"), tmp_path / "killed" / "checkpoint-4")
    assert not (tmp_path / "killed" / "modules.json").exists()
    printed = lion("train", *options("killed"))
    assert printed.splitlines()[-1] == str(tmp_path / "killed")
    # It went on after a checkpoint instead of starting over.
    logged = [float(epoch) for epoch in re.findall(r"'epoch': '([\d.]+)'", printed)]
    assert min(logged) > 2 / 6
    lion("train", *options("whole"))
    assert same_weights(tmp_path / "killed", tmp_path / "whole")


def test_mntp_runs_from_a_yaml_file(tiny_backbone, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(f"Line {n} of a text on {n * n} lions." for n in range(200)))
    (tmp_path / "mntp.yaml").write_text(
        f"backbone: {tiny_backbone()}\ntexts: [{tmp_path}/texts.txt]\nblock_size: 32\neval_blocks: 4\nmax_steps: 2\n"
        "per_device_train_batch_size: 2\nlora_r: 4\ndisable_tqdm: true\n"
    )
    options = ["--config", str(tmp_path / "mntp.yaml"), "--output_dir", str(tmp_path / "out"), "--max_steps", "3"]
    run_here(monkeypatch, "adapt_mntp.py", options)
    report = json.loads((tmp_path / "out" / "mntp.json").read_text())
    assert (report["steps"], report["tokens"], report["settings"]["lora_r"]) == (3, 3 * 2 * 32, 4)
    assert '"eval_loss_after"' in capsys.readouterr().out


def test_a_wrong_option_or_recipe_ends_the_script_with_the_reason(tmp_path, monkeypatch, capsys):
    """One real process: the status and the last line are what a user or a scheduler sees."""
    monkeypatch.chdir(tmp_path)
    failed = run_script("train_retriever.py", ["--backbone", "llama-5"])
    assert failed.returncode == 2
    *_, line = failed.stderr.splitlines()  # behind what other packages say when they are imported
    assert line.startswith("train_retriever.py: There is no recipe for backbone 'llama-5'")
    for name, options, code, message in (
        ("train_retriever.py", ["--backbone", "micro", "--epoch", "3"], 2, "--epoch is not an option"),
        ("train_retriever.py", ["--config", "no.yaml"], 1, "The file 'no.yaml' of --config is not there"),
        ("adapt_mntp.py", ["--backbone", "llama-3-8b", "--text", "a.txt"], 2, "did you mean --texts?"),
        ("train_retriever.py", ["--backbone", "micro", "--train_data", "a", "b"], 2, "on a and b with lion-st train"),
    ):
        with pytest.raises(SystemExit) as end:
            run_here(monkeypatch, name, options)
        (line,) = capsys.readouterr().err.splitlines()
        assert (end.value.code, message in line) == (code, True)
        with monkeypatch.context() as patch, pytest.raises((ValueError, FileNotFoundError)):
            patch.setenv("LION_ST_TRACEBACK", "1")
            run_here(monkeypatch, name, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["train_retriever.py", "adapt_mntp.py"])
def test_scripts_have_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, name, ["--help"])
    assert end.value.code == 0
    assert f"usage: {name} [--config FILE]" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_the_page_to_copy_trains_what_the_command_trains(tiny_backbone, data, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    unscored = tmp_path / "unscored.jsonl"
    kept = [{name: row[name] for name in ("query", "pos", "neg")} for row in rows]
    unscored.write_text("".join(json.dumps(row) + "\n" for row in kept))
    for paradigm in ("sparse", "dense"):

        def options(folder: str, paradigm: str = paradigm) -> list[str]:
            values = tiny_options(tiny_backbone(), data, tmp_path / f"{paradigm}-{folder}", query_prompt="q: ")
            if paradigm == "dense":
                values |= {"self_distillation": True, "train_data": str(unscored)}
            return ["--backbone", "micro", "--paradigm", paradigm, "--objective", "cl_kd", *command_line(values)]

        run_here(monkeypatch, "train_retriever.py", options("page"))
        assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / f"{paradigm}-page")
        lion("train", *options("command"))
        assert same_weights(tmp_path / f"{paradigm}-page", tmp_path / f"{paradigm}-command")


@pytest.mark.parametrize("backbone", ["llama-3.2-1b", "llama-3.2-3b", "llama-3-8b"])
def test_a_dry_run_of_a_paper_recipe_needs_neither_network_nor_weights(tmp_path, monkeypatch, capsys, backbone):
    monkeypatch.chdir(tmp_path)
    options = ["--backbone", backbone, "--paradigm", "sparse", "--objective", "cl_kd", "--dry_run", "--max_steps", "7"]
    run_here(monkeypatch, "train_retriever.py", options)
    report = capsys.readouterr().out
    settings = json.loads(report[: report.index("\n}") + 2])
    assert (settings["negatives"], settings["max_steps"], settings["lora_r"]) == (16, 7, 16)
    assert re.search(r"Tokens, every text at full length: [\d,]+ a step, [\d,]+ in all", report)
    assert re.search(r"Memory of each device, about [\d.]+ GiB: weights [\d.]+, gradients", report)
    assert re.search(r"Tokens a second at 40% of the peak in bfloat16: [\d,]+ on 1 H100\(s\)", report)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_configurations_resolve(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a backbone of the Hub is asked for
    run_here(monkeypatch, "train_retriever.py", ["--config", str(config), "--dry_run"])
    assert "Floating point operations" in capsys.readouterr().out


def test_two_processes_train_what_one_does_on_the_same_batches(tiny_backbone, tmp_path):
    """torchrun on two gloo ranks: negatives, teacher scores and FLOPS over both, with gradient caching.

    Of each row, a negative is another row's positive, which keeps the two apart also where they are on two ranks.
    """
    data = write_tuples(tmp_path / "tuples.jsonl", shared=True, negatives=2)

    def options(folder: str, mini_batch_size: int) -> list[str]:
        plain = dict(optim="sgd", max_grad_norm=0, lr_scheduler_type="constant", learning_rate=1e-3, max_steps=3)
        plain["mini_batch_size"] = mini_batch_size
        values = tiny_options(tiny_backbone(), data, tmp_path / folder, **plain)
        return ["--backbone", "micro", "--objective", "cl_kd", *command_line(values)]

    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d")
    launcher += ("--rdzv_endpoint", "localhost:0", "-m", "lion_st", "train")
    command = [sys.executable, *launcher, *options("two", 1)]
    both = subprocess.run(command, env=os.environ | ENVIRONMENT, text=True, capture_output=True)
    assert both.returncode == 0, both.stderr
    report = json.loads((tmp_path / "two" / "training.json").read_text())
    assert (report["settings"]["world_size"], report["settings"]["per_device_train_batch_size"]) == (2, 2)
    lion("train", *options("one", 4))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = load_file(Path(tiny_backbone()) / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-6, msg=name)
    assert sum(not torch.allclose(one[name], start[name], rtol=1e-3) for name in one if name in start) >= 10
    flops = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert flops[0]["floating_point_operations"] == flops[1]["floating_point_operations"]
