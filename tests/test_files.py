import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lion_st import files
from lion_st.files import (
    FolderInUse,
    atomic_file,
    atomic_folder,
    atomic_write,
    checksum,
    has_checksum,
    inside,
    lock_folder,
    read_json,
    remove_leftovers,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from lion_st.files import {context}
with {context}(Path(sys.argv[1])) as place:
    (place / "half" if place.is_dir() else place).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_within(context: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED.format(context=context), str(path)])
    assert done.returncode == -signal.SIGKILL


def test_a_killed_writer_within_a_folder_that_is_being_written_leaves_nothing_for_long(tmp_path: Path) -> None:
    outer_and_inner = "atomic_folder(Path(sys.argv[1])) as outer, atomic_folder(outer)"
    program = KILLED.replace("{context}(Path(sys.argv[1]))", outer_and_inner).replace("{context}", "atomic_folder")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL and len(names(tmp_path)) == 4  # a folder and a lock of each
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert names(tmp_path) == ["out"]


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def test_a_failed_write_leaves_the_earlier_contents_and_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "earlier")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("later")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "earlier"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "whole"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_replaced_folder_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "out", replace=True) as folder:
            (folder / content).write_text(content)
            assert names(tmp_path / "out") == ["one"] if content == "two" else True
    assert names(tmp_path / "out") == ["two"]
    assert names(tmp_path) == ["out"]


def test_a_folder_that_another_has_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"), atomic_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert names(tmp_path / "out") == ["theirs"]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_live_ones_is_not(tmp_path: Path) -> None:
    kill_within("atomic_folder", tmp_path / "out")
    assert len(names(tmp_path)) == 2
    with atomic_folder(tmp_path / "out") as first:
        assert sorted(names(tmp_path)) == sorted([first.name, first.with_suffix(".lock").name])
        second = threading.Thread(target=_stage, args=(tmp_path / "out",))
        second.start()
        second.join()
        assert first.is_dir()
    assert (tmp_path / "out").is_dir()


def _stage(path: Path) -> None:
    with files.staging_folder(path):
        pass


def test_a_folder_moved_away_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    kill_within("atomic_folder", tmp_path / "out")
    (staging,) = tmp_path.glob("*.tmp")
    staging.rename(staging.with_suffix(files.EARLIER))  # as between the two renames of a system without an exchange
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["half"]


def test_leftovers_of_killed_files_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    kill_within("atomic_file", tmp_path / "header.json")
    (tmp_path / ".tmpA1b2C3").touch()  # the safetensors library's
    (tmp_path / "notes.tmp").touch()
    assert len(names(tmp_path)) == 3
    with lock_folder(tmp_path):
        remove_leftovers(tmp_path)
    assert names(tmp_path) == [".lock", "notes.tmp"]


def test_a_held_lock_is_said_or_waited_for_and_ends_with_its_process(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with lock_folder(tmp_path):
            order.append("second")

    with lock_folder(tmp_path):
        with pytest.raises(FolderInUse, match="another process"):
            _refused_elsewhere(tmp_path)
        thread = threading.Thread(target=wait)
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    code = "import os, sys; from lion_st.files import lock_folder; lock_folder(sys.argv[1]).__enter__(); os.abort()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    with lock_folder(tmp_path, wait=False):
        pass


def _refused_elsewhere(folder: Path) -> None:
    found: list[BaseException] = []

    def try_it() -> None:
        try:
            with lock_folder(folder, wait=False):
                pass
        except FolderInUse as error:
            found.append(error)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    if found:
        raise found[0]


def test_checksums_of_both_kinds_are_compared_and_none_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"lion")
    assert has_checksum(file, {"xxh3": checksum(file)})
    assert not has_checksum(file, {"xxh3": "0" * 32})
    with pytest.raises(ValueError, match="no checksum"):
        has_checksum(file, {"bytes": 4})


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "link", "", None, 3, "nul\0"])
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path: Path, name: object) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").touch()
    os.symlink(tmp_path / "other", tmp_path / "folder" / "link")
    with pytest.raises(ValueError, match=r"outside|not the name"):
        inside(tmp_path / "folder", name)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a").touch()
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    os.symlink("../../blobs/0a", snapshot / "file")
    assert inside(snapshot, "file") == snapshot / "file"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize("umask, expected", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_can_be_read_by_whoever_can_read_new_files(tmp_path, umask, expected):
    weights = {"weight": torch.zeros(2)}
    earlier = os.umask(umask)
    try:
        with atomic_file(tmp_path / "alone.safetensors") as temporary:
            save_file(weights, temporary)
        with atomic_folder(tmp_path / "folder") as folder:
            save_file(weights, folder / "model.safetensors")
    finally:
        os.umask(earlier)
    for file in (tmp_path / "alone.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert file.stat().st_mode & 0o777 == expected
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"text": "\xff"}'])
def test_a_damaged_json_file_is_named(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.json' cannot be read as JSON .*Restore the file"):
        read_json(tmp_path / "settings.json")
