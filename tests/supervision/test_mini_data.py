"""What lion-mini learns from, mined, scored and chosen as its README says, and its dense start, from small texts."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
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


def test_a_dense_start_retrieves_by_the_mean_of_its_terms(tiny_backbone, tmp_path, monkeypatch, one_thread):
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f"{one}{one}{two} the {two}{one}{two} and the {one}" for one in letters for two in letters[:8]]
    asked = [f"which {text.split()[0]} {text.split()[2]}" for text in texts]
    ids = [f"d{number}" for number in range(len(texts))]
    pq.write_table(pa.table({"document_id": ids, "text": texts}), tmp_path / "documents.parquet")
    pq.write_table(pa.table({"text": asked, "positive": ids}), tmp_path / "queries.parquet")
    shape = ["--backbone", tiny_backbone(), "--num_layers", "1", "--batch_size", "64", "--max_steps", "60"]
    folders = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "start")]
    monkeypatch.setattr(sys, "argv", ["start_dense.py", *shape, *folders])
    script = runpy.run_path(str(MINI / "start_dense.py"), run_name="__main__")
    report = json.loads((tmp_path / "start" / "start.json").read_text())
    assert report["steps"] == 60 and report["loss_last"] < 0.7 * report["loss_first"]

    model = lion_st.load(tmp_path / "start", device="cpu")
    queries, documents = (
        encode(found) for encode, found in ((model.encode_query, asked), (model.encode_document, texts))
    )
    ranks = ((queries @ documents.T) > (queries * documents).sum(1)[:, None]).sum(1)
    assert np.mean(ranks < 3) > 0.8
    for layer in model[0].model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    terms = model[0].model.embed_tokens.weight.detach()
    assert torch.allclose(terms.norm(dim=1), terms.norm(dim=1).mean().expand(len(terms)), rtol=1e-5)
    ids = torch.tensor(model.tokenizer(texts[5])["input_ids"])
    mean = torch.nn.functional.normalize(terms[ids, 1:].mean(0), dim=0)
    assert np.allclose(model.encode_document(texts[5]), np.concatenate([[0], mean]), atol=1e-5)

    vectors = torch.randn(50, 16)  # on a sphere their products stay, but for the least direction of them
    vectors /= 20 * vectors.norm(dim=1).max()
    vectors[:, 3] = 0
    placed = script["on_a_sphere"](vectors)[:, 1:]
    ratios = (placed @ placed.T) / (vectors @ vectors.T)
    assert ratios.min() > 0 and (ratios.max() / ratios.min() < 1.05)
