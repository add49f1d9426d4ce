"""A run goes on from a whole checkpoint or says why it cannot, with one process and with several."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_runs import tiny_run

from lion_st.data.sources import files_checksum
from lion_st.training.progress.checkpoints import CHECKSUMS, checkpoint_damage, checkpoint_to_resume
from lion_st.training.retriever import train_retriever

PARTS = (
    "model.safetensors",
    "lion_st.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def finished(tiny_backbone, data, tmp_path_factory) -> Path:
    """A finished run of four steps, with checkpoints of steps 2 and 4."""
    return train_retriever(*tiny_run(tiny_backbone(), data, tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture
def killed(finished, tmp_path) -> Path:
    """The same run, killed before its result was written."""
    folder = Path(shutil.copytree(finished, tmp_path / "killed"))
    unfinish(folder)
    return folder


def unfinish(folder: Path) -> None:
    record = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"finished": False}))
    (folder / "model.safetensors").unlink()


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


def part_of(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint, wherever in it."""
    (file,) = checkpoint.rglob(name)
    return file


def same_result(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_cut_off_or_changed_is_named(finished, tmp_path, part):
    for number, damage in enumerate((Path.unlink, truncate, flip_a_bit)):
        checkpoint = Path(shutil.copytree(finished / "checkpoint-4", tmp_path / str(number)))
        assert checkpoint_damage(checkpoint) is None
        damage(part_of(checkpoint, part))
        found = checkpoint_damage(checkpoint)
        assert found is not None
        assert part in found or (part == "model.safetensors" and "neither weights nor an adapter" in found)


def test_a_checkpoint_whose_checksums_are_damaged_is_not_trusted(killed):
    for damage in (truncate, Path.unlink):
        damage(killed / "checkpoint-4" / CHECKSUMS)
        assert "cannot be read" in checkpoint_damage(killed / "checkpoint-4")
    assert checkpoint_to_resume(killed) == str(killed / "checkpoint-2")


def test_a_damaged_checkpoint_is_named_and_the_one_before_leads_to_the_same_result(
    tiny_backbone, data, killed, finished, caplog
):
    truncate(killed / "checkpoint-4" / "optimizer.pt")
    assert train_retriever(*tiny_run(tiny_backbone(), data, killed)) == killed
    (warning,) = [r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()]
    assert "checkpoint-4 is damaged: optimizer.pt has" in warning and "goes on from checkpoint-2" in warning
    assert same_result(killed, finished)
    assert part_of(killed / "damaged-checkpoint-4", "model.safetensors").exists()
    assert checkpoint_damage(killed / "checkpoint-4") is None


def test_if_no_checkpoint_is_whole_the_run_says_so_and_touches_none(tiny_backbone, data, killed):
    (killed / "checkpoint-4" / "scheduler.pt").unlink()
    flip_a_bit(part_of(killed / "checkpoint-2", "model.safetensors"))
    with pytest.raises(
        ValueError, match=r"All checkpoints .* damaged \(checkpoint-4: scheduler\.pt missing; checkpoint-2"
    ):
        train_retriever(*tiny_run(tiny_backbone(), data, killed))
    assert {"checkpoint-2", "checkpoint-4"} <= {path.name for path in killed.iterdir()}


def test_a_damaged_checkpoint_that_was_named_is_an_error(tiny_backbone, data, killed):
    truncate(killed / "checkpoint-4" / "rng_state.pth")
    named = tiny_run(tiny_backbone(), data, killed, resume_from_checkpoint=str(killed / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: rng_state\.pth has .* Name an earlier one"):
        train_retriever(*named)


def test_what_killed_processes_left_is_removed(killed):
    unfinished = Path(shutil.copytree(killed / "checkpoint-4", killed / "checkpoint-6"))
    (unfinished / CHECKSUMS).unlink()
    (unfinished / "trainer_state.json").unlink()
    for leftover in (".saving.0123abcd.tmp", "checkpoint-2/.saving.0123abcd.tmp"):
        (killed / leftover).mkdir()
    for lock in (".saving.0123abcd.lock", "checkpoint-2/.saving.0123abcd.lock"):
        (killed / lock).touch()
    assert checkpoint_to_resume(killed) == str(killed / "checkpoint-4")
    assert not unfinished.exists()
    assert not list(killed.rglob(".saving*"))


def test_data_that_changed_are_refused_whatever_their_time_of_change(tiny_backbone, data, finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "again"))
    moved = Path(shutil.copy(data, tmp_path / "tuples.jsonl"))
    run = tiny_run(tiny_backbone(), moved, folder)
    record = json.loads((folder / "training.json").read_text())
    assert record["data"]["rows"] == 24
    record["settings"]["train_data"] = [str(moved)]
    (folder / "training.json").write_text(json.dumps(record))
    assert train_retriever(*run) == folder
    moved.write_text(moved.read_text().replace("day 5", "day 6"))
    with pytest.raises(ValueError, match="holds a run on other data: their checksum was"):
        train_retriever(*run)


def test_data_of_every_kind_that_is_read_from_a_folder_count(tmp_path):
    """What `save_to_disk` writes, tables that `datasets` alone reads, and judgements as TREC's."""
    rows = {"query": ["q"], "positive": ["a"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    for name, text in {"shards/0.json": '{"query": "q"}', "set/qrels/train.trec": "q 0 a 1"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    before = [files_checksum([tmp_path / name], tmp_path / "run") for name in ("saved", "shards", "set")]
    Dataset.from_dict(rows | {"positive": ["b"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "shards" / "0.json").write_text('{"query": "r"}')
    (tmp_path / "set" / "qrels" / "train.trec").write_text("q 0 b 1")
    after = [files_checksum([tmp_path / name], tmp_path / "run") for name in ("saved", "shards", "set")]
    assert all(old and new and old != new for old, new in zip(before, after, strict=True))


def damage_and_resume_on_two_ranks(backbone: str, data: Path, output: Path) -> dict:
    """A run with an adapter on every rank, then the same again after its newest checkpoint was damaged."""
    options = dict(use_peft=True, lora_r=4, save_steps=1, save_total_limit=20)
    train_retriever(*tiny_run(backbone, data, output, **options))
    found = {path.name: checkpoint_damage(path) for path in output.glob("checkpoint-*")}
    states = sorted(path.name for path in (output / "checkpoint-4").glob("rng_state*"))
    adapters = [len(list(path.rglob("adapter_model.safetensors"))) for path in output.glob("checkpoint-*")]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(output, output.with_name("first"))
        truncate(part_of(output / "checkpoint-4", "adapter_model.safetensors"))
        unfinish(output)
    dist.barrier()
    chosen = checkpoint_to_resume(output)
    train_retriever(*tiny_run(backbone, data, output, **options))
    (output / "checkpoint-4" / "optimizer.pt").stat()
    damaged = str(output / "damaged-checkpoint-4")
    try:
        checkpoint_to_resume(output, damaged)
    except ValueError as error:
        refused = str(error)
    return {"found": found, "states": states, "adapters": adapters, "chosen": chosen, "refused": refused}


def test_ranks_write_whole_checkpoints_and_agree_on_the_one_to_go_on_from(tiny_backbone, data, tmp_path, caplog):
    output = tmp_path / "two"
    reports = run_ranks(2, damage_and_resume_on_two_ranks, tiny_backbone(), data, output)
    for report in reports:
        assert report["found"] == {f"checkpoint-{step}": None for step in (1, 2, 3, 4)}
        assert report["states"] == ["rng_state_0.pth", "rng_state_1.pth"]
        assert report["adapters"] == [1] * 4
        assert report["chosen"] == str(output / "checkpoint-3")
        assert "adapter_model.safetensors has" in report["refused"]
    assert same_result(tmp_path / "first", output)
    # One process goes on with what two began, and says that it is not the same to the bit.
    unfinish(output)
    shutil.rmtree(output / "checkpoint-4")
    options = dict(use_peft=True, lora_r=4, save_steps=1, save_total_limit=20)
    train_retriever(*tiny_run(tiny_backbone(), data, output, **options))
    assert "was begun on 2 process(es) and goes on on 1" in caplog.text
    settings = json.loads((output / "training.json").read_text())["settings"]
    assert (settings["world_size"], settings["per_device_train_batch_size"]) == (1, 4)
    one, two = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "first"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0.1, atol=0.1, msg=name)


def test_another_number_of_accumulation_steps_is_another_run(tiny_backbone, data, killed):
    run = tiny_run(tiny_backbone(), data, killed, per_device_train_batch_size=2)
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps was 1 and is 2; per_device_train_batch_size was 4"
    ):
        train_retriever(*run)
