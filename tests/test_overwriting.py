"""Nothing is written over what is there unless `overwrite=True` says so, in the same words everywhere."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import lion_st
from lion_st.data.beir import save_beir
from lion_st.evaluation import trade_off_figure, write_prune_report, write_qrels, write_run
from lion_st.files import LOCK, atomic_folder
from lion_st.hub import merge_backbone
from lion_st.indexes import Pruning, create_index
from lion_st.indexes import base as index_base

VECTORS = sparse.csr_array(np.eye(3, 5, dtype=np.float32))
IDS = ["a", "b", "c"]


def exported(path: Path, backbone: str, **options):
    lion_st.export(
        lion_st.build(backbone, "dense", device="cpu"), path, verify=False, create_model_card=False, **options
    )


def merged(path: Path, backbone: str, **options):
    from peft import LoraConfig

    from lion_st.modules.adapters import save_adapter

    adapter = path.with_name("adapter")
    adapter.mkdir(exist_ok=True)
    model = lion_st.build(backbone, "dense", lora=LoraConfig(r=2, target_modules="all-linear"), device="cpu")
    save_adapter(model[0].model, adapter)
    model[0].processor.save_pretrained(adapter)
    merge_backbone(adapter, path, **options)


def indexed(path: Path, _: str, **options):
    index = create_index("exact", "sparse")
    index.add(IDS, VECTORS)
    index.save(path, **options)


def encoder_of_queries(path: Path, backbone: str, **options):
    from lion_st.training.query_encoders import save_query_encoder, static_query_encoder

    model = lion_st.build(backbone, "sparse", device="cpu")
    save_query_encoder(static_query_encoder(model), model, path, **options)


def reported(path: Path, _: str, **options):
    judged = {"a": {"a": 1}}
    write_prune_report(path, (IDS, VECTORS), (["a"], VECTORS[[0]]), judged, settings=[Pruning()], **options)


WRITERS = {
    "export": exported,
    "merge_backbone": merged,
    "index": indexed,
    "query encoder": encoder_of_queries,
    "run": lambda path, _, **options: write_run(path, {"q": {"d": 1.0}}, **options),
    "qrels": lambda path, _, **options: write_qrels(path, {"q": {"d": 1}}, **options),
    "report": reported,
    "figure": lambda path, _, **options: trade_off_figure(
        [{"documents": "none", "index_bytes": 1, "nDCG@10": 0.5}], path, **options
    ),
    "test collection": lambda path, _, **options: save_beir(path, {"d": {"text": "t"}}, {"q": "t"}, {}, **options),
}


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file() and file.name != LOCK]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("what", WRITERS)
def test_what_is_there_is_replaced_only_if_asked(what, tiny_backbone, tmp_path):
    write, path = WRITERS[what], tmp_path / "out"
    write(path, tiny_backbone())
    before = contents(path)
    with pytest.raises(FileExistsError, match=r"exists\. Name another, or pass overwrite=True to replace it\."):
        write(path, tiny_backbone())
    assert contents(path) == before
    write(path, tiny_backbone(), overwrite=True)
    assert contents(path).keys() == before.keys() or what == "index"  # whose data folder has a new name
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_an_index_that_another_process_saved_meanwhile_stays(tmp_path, monkeypatch):
    def other_saves_first(path, *rest):
        monkeypatch.undo()
        indexed(tmp_path / "out", "")
        return index_base.write_folder(path, *rest)

    monkeypatch.setattr(index_base, "write_folder", other_saves_first)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        indexed(tmp_path / "out", "")
    assert len(list((tmp_path / "out").glob("data-*"))) == 1


def test_a_lock_alone_is_nothing_and_a_file_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).touch()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert (tmp_path / "out" / "new").exists()
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileExistsError, match="is a file, whose place no folder takes"),
        atomic_folder(tmp_path / "file", replace=True),
    ):
        pass
