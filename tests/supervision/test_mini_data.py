"""The training data of lion-mini: mined, scored and chosen as their README says, from small texts."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from commands import lion

import lion_st
from lion_st.data import load_tuples

MINI = Path(__file__).parents[2] / "training_scripts" / "mini"
THINGS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems", "planets", "mountains", "islands")


def commands() -> list[list[str]]:
    """Those of the README from `lion-st mine` up to the choice of negatives."""
    text = re.search(r"```bash\n(.*?)```", (MINI / "README.md").read_text(encoding="utf-8"), re.S)[1]
    words = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]
    ends = [number for number, line in enumerate(words) if "mine" in line or "choose_negatives.py" in " ".join(line)]
    return words[ends[0] : ends[-1] + 1]


def test_its_commands_make_tuples_that_train(tiny_backbone, tmp_path, monkeypatch, one_thread):
    teacher = lion_st.build(tiny_backbone(), "dense", query_length=32, document_length=64, device="cpu")
    lion_st.export(teacher, tmp_path / "teacher", verify=False, create_model_card=False)
    data = tmp_path / "runs" / "mini-data"
    data.mkdir(parents=True)
    texts = [f"The {one} stand beside some {other} in year {n}." for n, one in enumerate(THINGS) for other in THINGS]
    asked = [f"which {one} stand beside {other}" for one in THINGS for other in THINGS]
    documents, queries = ([f"{letter}{n}" for n in range(len(texts))] for letter in "dq")
    pq.write_table(pa.table({"document_id": documents, "text": texts}), data / "documents.parquet")
    columns = {"query_id": queries, "text": asked, "positive": documents, "source": ["things"] * len(asked)}
    pq.write_table(pa.table(columns), data / "queries.parquet")
    judged = [f"{query}\t{document}\t1" for query, document in zip(queries, documents, strict=True)]
    (data / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    monkeypatch.chdir(tmp_path)
    for program, *words in commands():
        words = [word.replace("sentence-transformers/all-MiniLM-L6-v2", "teacher") for word in words]
        if program == "lion-st":
            lion(*words, "--quiet")
        else:
            monkeypatch.setattr(sys, "argv", [*words, "--negatives", "3", "--positive_rank", "25"])
            runpy.run_path(str(MINI.parents[1] / words[0]), run_name="__main__")
    rows = pq.read_table(data / "train.parquet").to_pylist()
    assert len(rows) > 20
    scored = {row["query_id"]: row for row in pq.read_table(data / "scored.parquet").to_pylist()}
    for row in rows:
        positive, *negatives = row["scores"]
        assert row["document_ids"][0] == f"d{row['query_id'][1:]}" and len(negatives) == 3
        assert negatives == sorted(negatives, reverse=True)
        assert max(negatives) <= 0.95 * positive + 0.01  # rounded to hundredths
        both = [scored[row["query_id"]]["scores"][name][0] for name in ("dense", "bm25")]
        assert abs(positive - 25 * sum(both) / 2) < 0.01
    tuples = load_tuples(
        data / "train.parquet",
        negatives=3,
        teacher_scores=True,
        queries=data / "queries.parquet",
        documents=data / "documents.parquet",
    )
    assert tuples[0]["query"].startswith("which ") and len(tuples[0]["label"]) == 4
