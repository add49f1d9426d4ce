"""From a folder of text to a scored run on the command line."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from commands import lion
from tiny_models import TEXTS
from transformers.utils import logging
from typer.testing import CliRunner

import lion_st
from lion_st.cli import app
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.evaluation import evaluate_run, prune_report, read_qrels, read_run
from lion_st.indexes import Pruning, load_index
from lion_st.retrieval import search_texts

DOCUMENTS = {f"d{number}": f"{text} {number}" for number, text in enumerate(TEXTS * 4)}
QUERIES = {f"q{number}": DOCUMENTS[f"d{number}"] for number in range(8)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "lions"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    qrels = "".join(f"{query}\td{query[1:]}\t1\n" for query in QUERIES)
    for split in ("test", "dev"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.fixture(scope="module")
def models(tiny_backbone, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        paradigm: lion_st.export(lion_st.build(tiny_backbone(), paradigm), folder / f"lion-{paradigm}", verify=False)
        for paradigm in ("sparse", "dense")
    }


def test_quiet_commands_hold_back_the_advice_of_libraries(tiny_backbone, data, tmp_path, caplog):
    model = lion_st.export(lion_st.build(tiny_backbone(dtype="bfloat16"), "dense"), tmp_path / "half", verify=False)
    caplog.set_level("WARNING", "sentence_transformers")  # which scripts that other tests import raise
    for options, advice in ((["--quiet"], 0), ([], 1)):
        logging.warning_once.cache_clear()
        lion("encode", model, data / "queries.jsonl", tmp_path / f"{advice}", *options)
        assert caplog.text.count("loaded in torch.bfloat16 on CPU") == advice


@pytest.fixture(scope="module")
def encoded(models, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    with (data / "corpus.jsonl").open() as lines:
        shown = lion("encode", models["sparse"], "-", folder / "corpus", "--quiet", input=lines.read() + "{broken\n")
    assert "32 texts in 1 shards" in shown
    assert "skipped: 1 malformed" in shown
    assert "standard input:33" in shown
    lion("encode", models["sparse"], data / "queries.jsonl", folder / "queries", "--task", "query", "--quiet")
    return folder


def test_the_engine_that_took_the_place_of_another_is_said_and_written(monkeypatch, encoded, tmp_path) -> None:
    monkeypatch.setattr("lion_st.indexes.factory.find_spec", lambda package: None)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.17"))
    with pytest.warns(UserWarning, match="'exact' takes its place"):
        shown = lion("index", encoded / "corpus", tmp_path / "index", "--engine", "seismic", "--set", "query_cut=5")
    assert "index: exact, 32 documents" in shown
    assert load_index(tmp_path / "index").stats()["engine"] == "exact"


def test_a_folder_of_text_becomes_a_scored_run(models, data, encoded, tmp_path) -> None:
    assert "exact, 32 documents" in lion("index", encoded / "corpus", tmp_path / "index")
    run = tmp_path / "sp.trec"
    search = ("search", models["sparse"], tmp_path / "index", "--queries", data / "queries.jsonl")
    assert "queries" in lion(*search, "--run", run, "-k", "20")
    assert read_run(run).keys() == QUERIES.keys()
    table = lion("evaluate", run, models["sparse"], "--data", data, "--output", tmp_path / "results", "--quiet")
    _, _, scored, evaluated = table.splitlines()
    assert scored.split("|")[1].strip() == "sp.trec"
    ndcg = table.splitlines()[0].split("|").index(" nDCG@10 ")
    assert scored.split("|")[ndcg] == evaluated.split("|")[ndcg]
    assert float(scored.split("|")[ndcg]) > 0


def test_a_search_keeps_to_the_allowed_documents(models, data, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfd3\r\nd9\n\nelsewhere\n")  # as Windows writes it
    allowed = ("--allowed", tmp_path / "ids.txt")
    search = ("search", models["sparse"], tmp_path / "index")
    shown = lion(*search, QUERIES["q1"], "-k", 9, *allowed, "--quiet")
    assert {line.split("\t")[2] for line in shown.splitlines()} <= {"d3", "d9"} and shown
    lion(*search, "--queries", data / "queries.jsonl", "--run", tmp_path / "sp.trec", *allowed, "--quiet")
    assert set().union(*read_run(tmp_path / "sp.trec").values()) == {"d3", "d9"}
    (tmp_path / "ids.txt").write_text("elsewhere\n")
    assert "None of the 1 allowed documents" in lion(*search, QUERIES["q1"], *allowed, "--quiet", exit_code=1)
    (tmp_path / "ids.txt").write_bytes(b"d3\n\xe9\n")
    assert "ids.txt:2 is not UTF-8 text" in lion(*search, QUERIES["q1"], *allowed, "--quiet", exit_code=1)


def test_a_query_is_answered_with_reasons(models, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    queries = list(QUERIES.values())[:3]
    best = search_texts(lion_st.load(models["sparse"]), load_index(tmp_path / "index"), queries, k=1, explain=True)
    search = ("search", models["sparse"], tmp_path / "index", "-k", "1")
    found, reasons = lion(*search, queries[0], "--explain").splitlines()
    assert found == f"1\t{best[0].score:.4f}\t{best[0].document}"
    assert reasons.startswith(f"\t{best[0].terms[0].term} {best[0].terms[0].share:.0%}, ")
    asked = lion(*search, input=f"{queries[0]}\n\n{queries[1]}\n")  # piped in, as if typed
    assert [line.split("\t")[2] for line in asked.splitlines()] == [result.document for result in best[:2]]
    many = tmp_path / "queries.tsv"
    many.write_text(f"a\t{queries[1]}\nb\t{queries[2]}\n")
    shown = lion(*search, "--queries", many).splitlines()
    assert shown[::2] == queries[1:]
    assert [line.split("\t")[2] for line in shown[1::2]] == [result.document for result in best[1:]]
    many.write_text(f"a\t{queries[1]}\nb\t{queries[1]}\n")  # the same twice
    assert lion(*search, "--queries", many).splitlines() == shown[:2] * 2
    lion("index", encoded / "corpus", tmp_path / "nothing", "--threshold", "1000", "--sample", "0")
    result = CliRunner().invoke(app, ["search", str(models["sparse"]), str(tmp_path / "nothing"), queries[0]])
    assert (result.exit_code, result.stdout) == (0, "")
    assert "Nothing was found for 1 of 1 queries: What is" in result.stderr


def test_terms_are_weighed_by_their_rarity_in_an_index_that_has_them(models, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    query = QUERIES["q1"]
    index = load_index(tmp_path / "index")
    best = search_texts(lion_st.load(models["sparse"]), index, [query], k=1, idf=True)[0]
    search = ("search", models["sparse"], tmp_path / "index", query, "-k", "1")
    assert lion(*search, "--idf") == f"1\t{best.score:.4f}\t{best.document}\n" != lion(*search)
    lion("index", encoded / "corpus", tmp_path / "seismic", "--engine", "seismic", "--sample", "0")
    search = ("search", models["sparse"], tmp_path / "seismic", query, "--idf", "--quiet")
    assert "--idf needs the term weights that the engines 'exact' and 'torch' keep" in lion(*search, exit_code=1)


def test_texts_stand_beside_the_ids_of_what_was_found(models, data, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    corpus = tmp_path / "corpus.jsonl"  # in which ids repeat: the first of each was encoded
    rows = [{"_id": key, "text": text} for key, first in DOCUMENTS.items() for text in (first, "not encoded")]
    corpus.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    search = ("search", models["sparse"], tmp_path / "index", "-k", "2", "--corpus", corpus)
    for shown in (lion(*search, QUERIES["q1"]), lion(*search, input=QUERIES["q1"] + "\n")):
        for line in shown.splitlines():
            _, _, document, text = line.split("\t")
            assert text == DOCUMENTS[document]


def test_what_is_there_is_replaced_on_request_alone(models, data, encoded, tmp_path) -> None:
    index = ("index", encoded / "corpus", tmp_path / "index")
    lion(*index)
    assert "--overwrite" in lion(*index, "--top-terms", "3", exit_code=1)
    assert "32 documents" in lion(*index, "--top-terms", "3", "--overwrite")
    corpus = ("encode", models["sparse"], data / "corpus.jsonl", tmp_path / "vectors", "--quiet")
    lion(*corpus)
    lion(*corpus)  # goes on where it stopped
    lion(*corpus, "--vector-dtype", "float16", exit_code=1)
    assert "32 texts" in lion(*corpus, "--vector-dtype", "float16", "--overwrite")
    run = ("search", models["sparse"], tmp_path / "index", "--queries", data / "queries.jsonl", "--run", tmp_path / "r")
    lion(*run)
    assert "--overwrite" in lion(*run, exit_code=1)
    lion(*run, "--overwrite")
    made = ("query-encoder", models["sparse"], data, tmp_path / "idf", "--kind", "idf", "--split", "test")
    lion(*made, "--negatives", "0", "--quiet")
    assert "320 weights" in lion(*made, "--negatives", "0", "--quiet", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["idf", "index", "r", "vectors"]


def test_a_query_encoder_is_refused_before_anything_is_encoded(models, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lion_st.encoding.encode.encode_texts", None)
    monkeypatch.setattr("lion_st.training.query_distillation.make_distillation_targets", None)
    dense = ("query-encoder", models["dense"], data, tmp_path / "q", "--split", "test", "--negatives", "0")
    assert "--kind truncated" in lion(*dense, "--kind", "static", exit_code=2)
    assert "layers" in lion(*dense, "--kind", "truncated", "--layers", "99", exit_code=1)


def test_queries_are_cut_and_checksums_compared_on_request(models, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    search = ("search", models["sparse"], tmp_path / "index", QUERIES["q1"], "-k", "2")
    model, index = lion_st.load(models["sparse"]), load_index(tmp_path / "index")
    cut, whole = (search_texts(model, index, [QUERIES["q1"]], k=2, max_tokens=tokens) for tokens in (3, None))
    scores = [[f"{result.score:.4f}" for result in results] for results in (cut, whole)]
    assert scores[0] != scores[1]
    for shown, expected in zip((lion(*search, "--max-tokens", "3"), lion(*search, "--verify")), scores, strict=True):
        assert [line.split("\t")[1] for line in shown.splitlines()] == expected
    (tmp_path / "q.tsv").write_text(f"q\t{QUERIES['q1']}\n")
    run = ("--queries", tmp_path / "q.tsv", "--run", tmp_path / "run", "--max-tokens", "3")
    lion(*search[:3], *run)
    assert max(read_run(tmp_path / "run")["q"].values()) == pytest.approx(cut[0].score, rel=1e-4)
    values = next((tmp_path / "index").glob("data-*/values.npy"))
    content = bytearray(values.read_bytes())
    content[-3] ^= 4
    values.write_bytes(bytes(content))
    assert "checksum" in lion(*search, exit_code=1)
    assert "checksum" in lion(*search, "--no-verify", exit_code=1)  # a small file is always compared


def test_an_approximate_or_pruned_index_says_what_it_lost(encoded, tmp_path) -> None:
    shown = lion("index", encoded / "corpus", tmp_path / "lv", "--engine", "seismic", "--set", "query_cut=5")
    assert "Recall@10 " in shown
    queries = ("--queries", encoded / "queries")
    assert "Recall@10 1.0000" in lion(
        "index", encoded / "corpus", tmp_path / "u8", "--set", "quantization=uint16", *queries
    )
    whole = lion("index", encoded / "corpus", tmp_path / "whole").split(", ")[2]
    assert whole != lion("index", encoded / "corpus", tmp_path / "pruned", "--top-terms", "5").split(", ")[2]
    assert "NAME=VALUE" in lion("index", encoded / "corpus", tmp_path / "bad", "--set", "query_cut", exit_code=2)


def test_the_pruning_report_is_a_table_and_figures(data, encoded, tmp_path) -> None:
    shown = lion(
        "prune", encoded / "corpus", "--queries", encoded / "queries", "--qrels", data / "qrels" / "test.tsv",
        "--report", tmp_path / "report", "--top-terms", "40", "--top-terms", "3", "--threshold", "0.5",
    )  # fmt: skip
    assert [shown.count(name) for name in ("none", "top_terms=40", "top_terms=3", "threshold=0.5")] == [1, 1, 1, 1]
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "report.md", "report.json", "quality-size.svg", "quality-latency.svg"
    }  # fmt: skip
    rows = json.loads((tmp_path / "report" / "report.json").read_text())
    settings = [Pruning(), Pruning(top_terms=40), Pruning(top_terms=3), Pruning(threshold=0.5)]
    at_once = prune_report(
        EncodedCorpus(encoded / "corpus").whole(), EncodedCorpus(encoded / "queries").whole(),
        read_qrels(data / "qrels" / "test.tsv"), settings,
    )  # fmt: skip
    assert [row | {"ms_per_query": 0} for row in rows] == [row | {"ms_per_query": 0} for row in at_once]


def test_queries_that_were_encoded_otherwise_measure_nothing_unsaid(encoded, data, tiny_backbone, tmp_path) -> None:
    measured = (
        ("index", encoded / "corpus", tmp_path / "pruned", "--top-terms", "5"),
        ("prune", encoded / "corpus", "--qrels", data / "qrels" / "test.tsv", "--report", tmp_path / "report"),
        ("convert-index", encoded / "corpus", tmp_path / "converted", "--to", "bmp"),
    )
    for command in measured:
        assert "queries with --task query" in lion(*command, "--queries", encoded / "corpus", exit_code=1)
    other = lion_st.build(tiny_backbone(tied=False), "sparse")
    encode_corpus(other, data / "queries.jsonl", tmp_path / "others", task="query", show_progress=False)
    for command in measured:
        with pytest.warns(UserWarning, match="whose weights, their type, attention or head differ"):
            lion(*command, "--queries", tmp_path / "others")


def test_sparse_dense_and_their_fusion_stand_in_one_table(models, data, tmp_path) -> None:
    shown = lion(
        "evaluate", models["sparse"], models["dense"], "--data", data, "--bm25", "--hybrid", "convex", "--dev", data,
        "--engine", "seismic", "--engine", "faiss", "--output", tmp_path, "--quiet", "--metric", "MRR@10",
        "--bm25-stemmer", "porter",
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in shown.splitlines()[2:]]
    assert rows[:3] == [["bm25-porter", "bm25s"], ["lion-sparse", "seismic"], ["lion-dense", "faiss"]]
    assert rows[3][1] == "seismic+faiss"
    others = [shutil.copytree(models["sparse"], tmp_path / name / "lion-sparse") for name in ("short", "long")]
    shown = lion("evaluate", *others, models["dense"], "--data", data, "--output", tmp_path, "--quiet")
    named = [line.split("|")[1].strip() for line in shown.splitlines()[2:]]
    assert named == ["short-lion-sparse", "long-lion-sparse", "lion-dense"]
    assert "development set" in lion(
        "evaluate", models["sparse"], models["dense"], "--data", data, "--hybrid", "convex", "--quiet", exit_code=2
    )


def test_a_query_encoder_takes_the_place_of_the_full_models_queries(models, data, encoded, tmp_path) -> None:
    made = ("query-encoder", models["sparse"], data, tmp_path / "idf", "--kind", "idf", "--split", "test")
    assert "320 weights" in lion(*made, "--negatives", "0", "--quiet")
    assert "exists" in lion(*made, exit_code=1)
    lion("index", encoded / "corpus", tmp_path / "index")
    assert len(lion("search", tmp_path / "idf", tmp_path / "index", QUERIES["q2"], "-k", "3").splitlines()) == 3
    options = ("--query-model", tmp_path / "idf", "--output", tmp_path / "out", "--quiet")
    assert "| lion-sparse+idf | lions |" in lion("evaluate", models["sparse"], "--data", data, *options)


def test_terms_are_limited_by_task(models, data, encoded, tmp_path) -> None:
    lion(
        "encode",
        models["sparse"],
        data / "corpus.jsonl",
        tmp_path / "five",
        "--document-max-active-dims",
        "5",
        "--quiet",
    )
    vectors = EncodedCorpus(tmp_path / "five").whole()[1]
    assert vectors.nnz == 5 * vectors.shape[0]
    refused = lion("encode", models["sparse"], data, tmp_path / "other", "--query-max-active-dims", "5", exit_code=2)
    assert "limits nothing" in refused and not (tmp_path / "other").exists()
    lion("index", encoded / "corpus", tmp_path / "index")
    question = ("search", models["sparse"], tmp_path / "index", QUERIES["q2"], "-k", "1", "--explain")
    few = lion(*question, "--query-max-active-dims", "2")
    assert "more" in lion(*question) and len(few.splitlines()[1].split(",")) == 2


def test_runs_are_compared(data, tmp_path) -> None:
    for name, kept in (("good", 8), ("poor", 2)):
        lines = [f"{query} Q0 d{query[1:] if number < kept else 99} 1 1.0 t\n" for number, query in enumerate(QUERIES)]
        (tmp_path / name).write_text("".join(lines))
    shown = lion("compare", tmp_path / "poor", tmp_path / "good", "--qrels", data / "qrels" / "test.tsv")
    assert "| nDCG@10 | poor | good | 0.250 | 1.000 | 0.750 |" in shown
    assert "worse: no query" in shown
    assert "two runs" in lion("compare", tmp_path / "poor", "--qrels", data / "qrels" / "test.tsv", exit_code=2)
    (tmp_path / "foreign").write_text("x1 Q0 d1 1 1.0 t\n")
    runs = (tmp_path / "good", tmp_path / "foreign")
    assert "'foreign' has no query" in lion("compare", *runs, "--qrels", data / "qrels" / "test.tsv", exit_code=1)


def test_runs_of_one_name_are_told_apart_in_a_table(data, tmp_path) -> None:
    runs = [tmp_path / name / "run.trec" for name in ("one", "other")]
    for number, run in enumerate(runs):
        run.parent.mkdir()
        run.write_text("".join(f"{query} Q0 d{int(query[1:]) + number} 1 1.0 t\n" for query in QUERIES))
    shown = lion("evaluate", *runs, "--data", data, "--metric", "MRR@10", "--quiet")
    assert "| one-run.trec | lions | 1.000 |" in shown and "| other-run.trec | lions | 0.000 |" in shown


def test_evaluated_runs_are_compared_by_the_judgements_beside_them(models, data, tmp_path) -> None:
    lion("evaluate", models["sparse"], "--bm25", "--data", data, "--output", tmp_path, "--quiet")
    runs = sorted((tmp_path / "runs").glob("lions.*.test.trec"))
    (qrels,) = (tmp_path / "runs").glob("lions.*.test.qrels")
    shown = lion("compare", *runs, "--qrels", qrels)
    assert f"| nDCG@10 | {runs[0].name} | {runs[1].name} |" in shown


def test_trec_files_are_a_test_set(data, tmp_path) -> None:
    (tmp_path / "topics.tsv").write_text("".join(f"{query}\t{text}\n" for query, text in QUERIES.items()))
    (tmp_path / "qrels.txt").write_text("".join(f"{query} 0 d{query[1:]} 1\n" for query in QUERIES))
    files = (data / "corpus.jsonl", tmp_path / "topics.tsv", tmp_path / "qrels.txt")
    shown = lion("evaluate", "bm25", "--trec", *files, "--protocol", "trec-dl", "--output", tmp_path / "out", "--quiet")
    assert "| bm25 | topics | 0.908 | 0.000 | 0.000 | 0.000 |" in shown  # grades of 1 count for nDCG alone


def test_queries_need_ids_and_texts_of_their_own(models, encoded, tmp_path) -> None:
    lion("index", encoded / "corpus", tmp_path / "index")
    search = ("search", models["sparse"], tmp_path / "index")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n')
    assert "bad.jsonl:2 repeats the id 'a'" in lion(*search, "--queries", bad, exit_code=1)
    bad.write_text('{"text": "x"}\n')
    assert "bad.jsonl:1 has no id among its fields" in lion(*search, "--queries", bad, exit_code=1)
    assert "--run" in lion(*search, "lions", "--run", tmp_path / "run", exit_code=2)


def test_ids_with_spaces_and_judgements_of_absent_documents_are_scored_to_the_end(models, tmp_path) -> None:
    """LIMIT's documents are called by people's names, and ArguAna judges documents that it lacks."""
    folder = tmp_path / "limit"
    (folder / "qrels").mkdir(parents=True)
    names = {"Ada Moor": "Ada Moor likes quokkas.", "Ben Tall": "Ben Tall likes chess."}
    rows = [json.dumps({"_id": name, "title": "", "text": text}) for name, text in names.items()]
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode("utf-8-sig")))
    (folder / "queries.jsonl").write_text('{"_id": 1, "text": "Who likes quokkas?"}\n\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\tAda Moor\t1\n1\tgone\t1\n")
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="judges 1 document.* lacks, such as 'gone'"):
        shown = lion("evaluate", models["sparse"], "bm25", "--data", folder, "--output", out, "--quiet")
    assert "| bm25 | bm25s | limit |" in shown
    runs, (qrels,) = sorted((out / "runs").glob("*.trec")), (out / "runs").glob("*.qrels")
    for run in runs:
        assert read_run(run)["1"].keys() <= names.keys()
        assert "\tQ0\tAda Moor\t" in run.read_text()
    scores = evaluate_run(read_qrels(qrels), read_run(runs[0]), ["Recall@100", "nDCG@10"])
    assert scores["Recall@100"] == 0.5  # the absent document is never found
    fused = tmp_path / "fused.trec"
    lion("fuse", *runs, "--output", fused)
    for judged in (qrels, folder / "qrels" / "test.tsv"):
        assert "| nDCG@10 |" in lion("compare", *runs, fused, "--qrels", judged)
    assert "fused.trec" in lion("evaluate", fused, "--data", folder, "--output", out, "--quiet")


def test_ids_that_no_file_can_express_are_refused_before_anything_is_encoded(models, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "tabs"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "a\\tb", "text": "lions"}\n')
    (folder / "queries.jsonl").write_text('{"_id": 1, "text": "lions"}\n')
    (folder / "qrels" / "test.tsv").write_text("1\tc\t1\n")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("The corpus was indexed.")

    monkeypatch.setattr("lion_st.retrieval.retriever.ModelRetriever.index", refuse)
    for model in (models["sparse"], "bm25"):
        shown = lion("evaluate", model, "--data", folder, "--output", tmp_path / "out", "--quiet", exit_code=1)
        assert "corpus.jsonl:1 has the id 'a\\tb': ids may hold spaces, but no tabs" in shown


@pytest.mark.parametrize("name", ["queries.tsv", "topics.xml", "queries.csv.gz"])
def test_every_form_of_queries_is_searched_and_encoded(models, encoded, tmp_path, name) -> None:
    forms = {
        "queries.tsv": "\ufeff1\tlions & lambs\n",
        "topics.xml": '<topics><topic number="1"><query>lions &amp; lambs</query></topic></topics>',
        "queries.csv.gz": "qid,query\n1,lions & lambs\n",
    }
    content = forms[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    lion("index", encoded / "corpus", tmp_path / "index")
    lion("search", models["sparse"], tmp_path / "index", "--queries", tmp_path / name, "--run", tmp_path / "run")
    assert read_run(tmp_path / "run").keys() == {"1"}
    assert "1 texts in 1 shards" in lion(
        "encode", models["sparse"], tmp_path / name, tmp_path / "encoded", "--task", "query", "--quiet"
    )
