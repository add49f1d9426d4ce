"""The builder of the bundled data set, from small sources to the files that training reads."""

import json
import lzma
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lion_st
from lion_st.data import load_tuples, save_beir

SCRIPT = Path(__file__).parents[2] / "training_scripts" / "build_quickstart_data.py"
NAMES = ("squadshifts", "medquad", "openstax_heading", "openstax_glossary", "arxiv_title_abstract")
THINGS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems", "planets", "mountains", "islands")

pytestmark = pytest.mark.usefixtures("datasets_cache")


def sources(folder: Path) -> Path:
    folder.mkdir()
    for name in NAMES:
        rows = [
            {
                "query": f"{name} of {one} beside {other}",
                "pos": f"In {name} the {one} stand beside some {other}, {other} are seen by {one} in year {number}.",
            }
            for number, one in enumerate(THINGS)
            for other in THINGS[number + 1 : number + 3]
        ]
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_it_mines_scores_and_writes_what_training_reads(tiny_backbone, tmp_path, monkeypatch, capsys, one_thread):
    teacher = lion_st.build(tiny_backbone(), "dense", query_length=32, document_length=64, device="cpu")
    lion_st.export(teacher, tmp_path / "teacher", verify=False, create_model_card=False)
    tests = {f"t{n}": {"title": "", "text": f"A text of a test about {thing} alone."} for n, thing in enumerate(THINGS)}
    for name in ("squad_dev", "scifact"):
        asked = {f"a{n}": f"who asks about {thing}" for n, thing in enumerate(THINGS)}
        save_beir(tmp_path / "eval" / name, tests, asked, {f"a{n}": {f"t{n}": 1} for n in range(len(THINGS))})
    output = tmp_path / "built"
    options = {
        "sources": sources(tmp_path / "sources"),
        "test_sets": tmp_path / "eval",
        "teacher": tmp_path / "teacher",
        "output_dir": output,
        "work_dir": tmp_path / "work",
        "negatives": 2,
    }
    words = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    figures = json.loads(printed[printed.index("{\n") :])
    assert set(figures["teacher_ndcg_at_10"]["scifact"]) == {"dense", "bm25", "both"}
    rows = pq.read_table(output / "train.parquet").to_pylist()
    assert len(rows) == sum(figures["tuples"].values()) > 10
    for row in rows:
        assert len(set(row["document_ids"])) == 3 and row["scores"] == sorted(row["scores"], reverse=True)
        assert max(row["scores"][1:]) <= 0.95 * row["scores"][0] + 0.01
    texts = {name: output / f"{name}.parquet" for name in ("queries", "documents")}
    tuples = load_tuples(output / "train.parquet", negatives=2, teacher_scores=True, **texts)
    assert len(tuples) == len(rows) and set(tuples[0]) == {"query", "positive", "negative_1", "negative_2", "label"}


def test_only_the_first_of_near_duplicates_is_kept():
    first_of_near_duplicates = runpy.run_path(str(SCRIPT))["first_of_near_duplicates"]
    vectors = np.random.default_rng(1).normal(size=(9, 32))
    vectors[5], vectors[7] = vectors[2], vectors[2] + 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for block_size in (2, 4, 100):
        kept = first_of_near_duplicates(vectors, block_size=block_size)
        assert np.flatnonzero(~kept).tolist() == [5, 7]
