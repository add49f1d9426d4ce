"""A training that is killed, also while it writes, ends as one that is not; and two do not share a folder."""

import sys
import time
from pathlib import Path

import pytest
from tiny_runs import tiny_options, tiny_run, write_tuples

from lion_st.files import FolderInUse
from lion_st.training.retriever import train_retriever

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import soak


@pytest.fixture(scope="module")
def runner() -> soak.Runner:
    return soak.Runner()


@pytest.fixture
def options(tiny_backbone, tmp_path) -> dict:
    """A run over an epoch and a half, with dropout, that writes every other step."""
    data = write_tuples(tmp_path / "tuples.jsonl")
    settings = dict(max_steps=9, save_steps=1, use_peft=True, lora_r=4, lora_dropout=0.1, mini_batch_size=2)
    return tiny_options(tiny_backbone(), data, tmp_path / "out", paradigm="sparse", objective="cl_kd", **settings)


def test_a_training_that_is_killed_again_and_again_ends_with_the_same_weights(runner, options, tmp_path):
    result = soak.soak(runner, options, tmp_path, kills=3)
    assert result["differences"] == []
    assert result["kills"] == {"while_it_writes": 2, "at_any_moment": 1}


def test_a_second_run_in_the_folder_of_one_that_goes_on_is_refused(runner, options, tiny_backbone, tmp_path):
    output = tmp_path / "out"
    going = runner.start(options | {"max_steps": 100_000})
    try:
        while not any(output.glob("checkpoint-*/checksums.json")):
            assert going[0].is_alive(), Path(f"{output}.log").read_text()
            time.sleep(0.05)
        rest = {name: value for name, value in options.items() if name not in ("paradigm", "objective", "output_dir")}
        settings = rest | {"max_steps": 100_000}
        data, backbone = Path(settings.pop("train_data")), settings.pop("model")
        with pytest.raises(FolderInUse, match=rf"{output} is being written by another process: wait for it, or stop"):
            train_retriever(*tiny_run(backbone, data, output, **settings))
        assert going[0].is_alive()
    finally:
        runner.kill(going)
