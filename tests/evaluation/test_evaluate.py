import json
import shutil
from pathlib import Path
from typing import Any

import mteb
import pytest
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from tiny_models import TEXTS

from lion_st.encoding import encode_corpus
from lion_st.evaluation import (
    PROTOCOLS,
    MtebSearch,
    evaluate_retrieval,
    evaluate_run,
    fit_hybrid,
    get_task,
    get_task_groups,
    open_retriever,
    read_qrels,
    read_run,
    trec_task,
    write_run,
)
from lion_st.evaluation.evaluate import FIGURES, mean_row, table_columns
from lion_st.evaluation.tasks import TaskGroup, folder_task
from lion_st.retrieval import Bm25Retriever, HybridRetriever, ModelRetriever

CORPUS = {
    f"d{number}": {"title": f"Title {number}", "text": f"{text} {number}"} for number, text in enumerate(TEXTS * 4)
}
QUERIES = {f"d{number}": f"{TEXTS[number % 8][:25]} {number}" for number in range(10)}  # ids of documents: self-matches
QRELS = {query: {f"d{(int(query[1:]) + 8) % 32}": 1, query: 1} for query in QUERIES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "lions"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": key, **row}) + "\n" for key, row in CORPUS.items()))
    queries = {**QUERIES, "unjudged": "no judgement"}
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in queries.items())
    )
    lines = [f"{query}\t{doc}\t{grade}\n" for query, docs in QRELS.items() for doc, grade in docs.items()]
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    return folder


def old_format_task(
    *splits: str, corpus: Any = CORPUS, queries: Any = QUERIES, qrels: Any = QRELS, main_score: str = "ndcg_at_10"
) -> AbsTaskRetrieval:
    """A task whose data come in mteb's first format, as those of NarrativeQA and LEMB do."""
    names = splits or ("test",)

    class OldFormatTask(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="old-lions",
            dataset={"path": "lions/old", "revision": "1"},
            description="Lions.",
            type="Retrieval",
            category="t2t",
            eval_splits=list(names),
            eval_langs=["eng-Latn"],
            main_score=main_score,
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            if not self.data_loaded:
                self.corpus = {split: dict(corpus) for split in names}
                self.queries = {split: dict(queries) for split in names}
                self.relevant_docs = {split: dict(qrels) for split in names}
                self.data_loaded = True

    return OldFormatTask()


def task_scores(folder: Path) -> dict:
    (result,) = [file for file in folder.rglob("lions.json") if "rows" not in file.parts]
    return mteb.results.TaskResult.from_disk(result).scores["test"][0]


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_the_indexed_evaluation_scores_as_mteb_does_by_brute_force(
    tmp_path, folder, sparse_model, dense_model, paradigm
) -> None:
    model = sparse_model if paradigm == "sparse" else dense_model
    (row,) = evaluate_retrieval(model, folder, output_dir=tmp_path / "ours", name="tiny")
    brute_force = mteb.evaluate(model, get_task(folder), cache=None, co2_tracker=False, show_progress_bar=False)
    theirs = brute_force.task_results[0].scores["test"][0]
    ours = task_scores(tmp_path / "ours")
    for metric in ("ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_1000"):
        assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5)
    assert row["nDCG@10"] == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)
    assert row["MRR@10"] == pytest.approx(theirs["mrr_at_10"], abs=1e-5)
    assert (row["documents"], row["queries"], row["dataset"], row["paradigm"]) == (32, 10, "lions", paradigm)
    assert row["index_bytes"] > 0
    assert (row["document_terms"] is not None) == (paradigm == "sparse")
    assert read_run(row["run"]).keys() == QUERIES.keys()


def test_a_second_evaluation_reads_the_first_and_notices_changes(tmp_path, folder, sparse_model, monkeypatch) -> None:
    searches = []
    search = MtebSearch.search
    monkeypatch.setattr(MtebSearch, "search", lambda self, *args, **kw: searches.append(1) or search(self, *args, **kw))
    first = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "out")
    assert evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "out") == first
    assert len(searches) == 1
    evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "out", overwrite=True)
    assert len(searches) == 2
    evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "out", top_k=20)
    assert len(searches) == 3
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "new", "title": "", "text": "one more"}\n')
    (changed,) = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "out")
    assert changed["documents"] == 33
    assert len(searches) == 4


def test_no_metric_looks_deeper_than_the_search(tmp_path, folder, monkeypatch) -> None:
    (row,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path, top_k=20)
    assert "nDCG@10" in row
    assert "Recall@100" not in row
    (file,) = (tmp_path / "results").rglob(f"{folder.name}.json")
    (scores,) = json.loads(file.read_text())["scores"]["test"]
    depths = {int(name.rsplit("_", 1)[1]) for name in scores if name.startswith("recall_at_")}
    assert depths == {1, 3, 5, 10, 20}

    def refuse(*arguments: Any) -> None:
        raise AssertionError("The corpus was indexed.")

    monkeypatch.setattr(Bm25Retriever, "index", refuse)
    with pytest.raises(ValueError, match=r"Recall@100 looks deeper than the 20 documents.* top_k to 100 or more"):
        evaluate_retrieval("bm25", folder, output_dir=tmp_path, top_k=20, metrics=["MRR@10", "Recall@100"])
    with pytest.raises(ValueError, match="Recall@1000 looks deeper than the 5 "):
        evaluate_retrieval("bm25", folder, output_dir=tmp_path, protocol="msmarco", top_k=5)
    deep = old_format_task(main_score="ndcg_at_20")
    with pytest.raises(ValueError, match=r"scored by ndcg_at_20, .* the 10 documents .* top_k to 20 or more"):
        evaluate_retrieval("bm25", [folder, deep], output_dir=tmp_path, top_k=10)


def test_a_search_deeper_than_mtebs_is_that_deep(tmp_path) -> None:
    corpus = {f"d{number}": {"title": "", "text": "lions"} for number in range(1200)}
    task = old_format_task(corpus=corpus, queries={"q": "lions"}, qrels={"q": dict.fromkeys(corpus, 1)})
    (row,) = evaluate_retrieval("bm25", task, output_dir=tmp_path, top_k=2000, metrics=["Recall@2000", "Recall@1000"])
    assert len(read_run(row["run"])["q"]) == 1200
    assert row["Recall@2000"] == 1.0
    assert row["Recall@1000"] == pytest.approx(1000 / 1200)
    (file,) = (tmp_path / "results").rglob("old-lions.json")
    assert json.loads(file.read_text())["scores"]["test"][0]["recall_at_1000"] == pytest.approx(1000 / 1200, abs=1e-5)


def test_bm25_and_hybrids_are_evaluated_alike(tmp_path, folder, sparse_model) -> None:
    (bm25,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path / "out")
    assert bm25["nDCG@10"] > 0.5
    assert bm25["engine"] == "bm25s"
    hybrid = HybridRetriever([ModelRetriever(sparse_model, name="sp"), Bm25Retriever()], weights=(0.0, 1.0), depth=32)
    (fused,) = evaluate_retrieval(hybrid, folder, output_dir=tmp_path / "out")
    assert fused["model"] == "sp+bm25"
    assert fused["MRR@10"] == pytest.approx(bm25["MRR@10"], abs=0.05)
    (ranked,) = evaluate_retrieval(HybridRetriever(hybrid.retrievers), folder, output_dir=tmp_path / "out")
    assert ranked["run"] != fused["run"]


@pytest.mark.parametrize("self_matches, depth, kept", [("keep", 3, True), ("drop_before_cut", 3, False)])
def test_self_matches_follow_the_setting(tmp_path, self_matches, depth, kept) -> None:
    task = old_format_task(main_score="ndcg_at_3")
    (row,) = evaluate_retrieval("bm25", task, output_dir=tmp_path, self_matches=self_matches, top_k=depth)
    run = read_run(row["run"])
    assert any(query in hits for query, hits in run.items()) == kept
    assert max(len(hits) for hits in run.values()) == depth


def test_self_matches_dropped_after_the_cut_leave_shorter_rankings(tmp_path) -> None:
    task = old_format_task(main_score="ndcg_at_3")
    (row,) = evaluate_retrieval("bm25", task, output_dir=tmp_path, self_matches="drop_after_cut", top_k=3)
    run = read_run(row["run"])
    assert not any(query in hits for query, hits in run.items())
    assert min(len(hits) for hits in run.values()) == 2


def test_a_protocol_sets_lengths_depth_and_metrics(tmp_path, folder, sparse_model) -> None:
    (row,) = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path, protocol="msmarco")
    assert set(PROTOCOLS["msmarco"].metrics) <= row.keys()
    assert "MAP" not in row
    assert sparse_model[0].query_length == 32
    (short,) = evaluate_retrieval(
        ModelRetriever(sparse_model, document_length=3), folder, output_dir=tmp_path, protocol="msmarco"
    )
    assert short["document_terms"] != row["document_terms"]
    with pytest.raises(ValueError, match="'trec'"):
        evaluate_retrieval("bm25", folder, output_dir=tmp_path, protocol="trec")


def test_ids_in_common_are_self_matches_only_where_that_is_meant(tmp_path, folder) -> None:
    scores = {}
    for self_matches in ("task", "keep", "drop_after_cut"):
        task = get_task(folder)
        task.ignore_identical_ids = True  # as mteb's MS MARCO has it, whose ids are unrelated numbers
        (row,) = evaluate_retrieval(
            "bm25", task, output_dir=tmp_path, self_matches=self_matches, metrics=["Recall@100"]
        )
        scores[self_matches] = row["Recall@100"]
        run, qrels = read_run(row["run"]), read_qrels(row["qrels"])
        assert qrels == QRELS
        assert evaluate_run(qrels, run, ["Recall@100"])["Recall@100"] == row["Recall@100"]
        (again,) = evaluate_retrieval(row["run"], task, self_matches="task", metrics=["Recall@100"])
        assert again["Recall@100"] == 0.5
    assert scores["task"] == scores["drop_after_cut"] == 0.5
    assert scores["keep"] == 1.0


def test_benchmarks_and_averages_are_the_tasks_they_stand_for(folder) -> None:
    (group,) = get_task_groups("CQADupstackRetrieval")
    assert group.name == "CQADupstackRetrieval"
    assert len(group.tasks) == 12
    names = [task.metadata.name for one in get_task_groups("MTEB(eng, v2)") for task in one.tasks]
    assert "SCIDOCS" in names
    assert "STS12" not in names
    assert len(get_task_groups("NanoBEIR")) == 13
    for year, grades in ((2019, "test"), (2020, "test")):
        assert get_task(f"TRECDL{year}").metadata.eval_splits == [grades]
    for name in ("CQADupstackRetrieval", "NanoBEIR"):
        itself = mteb.get_task(name) if name.startswith("CQA") else mteb.get_benchmark(name)
        by_name, as_it_is = ([(one.name, len(one.tasks)) for one in get_task_groups(given)] for given in (name, itself))
        assert by_name == as_it_is
    assert [group.name for group in get_task_groups(folder)] == [None]
    for wrong in (None, iter([folder])):
        with pytest.raises(TypeError, match="of several, give a list"):
            evaluate_retrieval("bm25", wrong)
    with pytest.raises(FileNotFoundError, match="NoSuchBenchmark"):
        get_task_groups("NoSuchBenchmark")


def test_an_average_is_a_row_of_its_own(folder, tmp_path) -> None:
    rows = [
        evaluate_retrieval("bm25", folder, output_dir=tmp_path, top_k=depth, metrics=["Recall@10"])[0]
        for depth in (10, 20)
    ]
    mean = mean_row("both", rows)
    assert mean["Recall@10"] == pytest.approx((rows[0]["Recall@10"] + rows[1]["Recall@10"]) / 2)
    assert (mean["dataset"], mean["documents"], mean["queries"]) == ("both", 64, 20)
    assert table_columns([*rows, mean]) == [
        "model",
        "dataset",
        "documents",
        "queries",
        "Recall@10",
        *FIGURES[2:3],
        FIGURES[4],
    ]


def test_a_benchmark_ends_with_the_mean_over_its_test_sets(folder, tmp_path, monkeypatch) -> None:
    tasks = [get_task(folder), get_task(folder)]
    groups = [TaskGroup("both", tasks), TaskGroup(None, tasks[:1])]
    monkeypatch.setattr("lion_st.evaluation.evaluate.get_task_groups", lambda source, split: groups)
    rows = evaluate_retrieval("bm25", "Benchmark", output_dir=tmp_path)
    assert [row["dataset"] for row in rows][2::2] == ["both", "Benchmark"]
    assert rows[-1]["nDCG@10"] == pytest.approx((rows[2]["nDCG@10"] + rows[3]["nDCG@10"]) / 2)


def test_vectors_of_an_encoded_corpus_are_evaluated(sparse_model, folder, tmp_path) -> None:
    (expected,) = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "a")
    encoded = encode_corpus(sparse_model, folder, tmp_path / "encoded", shard_documents=10, show_progress=False)
    (row,) = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path / "b", encoded=encoded)
    assert row["nDCG@10"] == expected["nDCG@10"]
    assert row["document_terms"] == pytest.approx(expected["document_terms"])
    half = encode_corpus(sparse_model, folder, tmp_path / "half", dtype="float16", show_progress=False)
    assert ModelRetriever(sparse_model, encoded=half).fingerprint() != ModelRetriever(sparse_model).fingerprint()


def test_a_run_file_is_scored_as_it_is(tmp_path, folder) -> None:
    (bm25,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path)
    (scored,) = evaluate_retrieval(bm25["run"], folder)
    assert scored["nDCG@10"] == bm25["nDCG@10"]
    (shallow,) = evaluate_retrieval(bm25["run"], folder, top_k=1, self_matches="drop_after_cut")
    assert "nDCG@10" not in shallow
    assert shallow["MAP"] < bm25["MAP"]
    write_run(tmp_path / "part.trec", {"d0": {"d8": 1.0}})
    with pytest.warns(UserWarning, match=r"part\.trec lacks 9 of the 10 judged queries, such as 'd1'"):
        (part,) = evaluate_retrieval(tmp_path / "part.trec", folder, metrics=["MRR@10"])
    assert part["MRR@10"] == pytest.approx(0.1)
    write_run(tmp_path / "other.trec", {"of-another-set": {"d1": 1.0}})
    with pytest.raises(ValueError, match="another test set"):
        evaluate_retrieval(tmp_path / "other.trec", folder)


def test_a_misspelt_argument_is_refused_also_where_none_is_read(tmp_path, folder) -> None:
    run = tmp_path / "a.trec"
    run.touch()
    for model in (Bm25Retriever(), "bm25", run):
        with pytest.raises(TypeError, match="overwite, thread: there is no such argument"):
            evaluate_retrieval(model, folder, output_dir=tmp_path / "r", overwite=True, thread=2)  # type: ignore
    with pytest.raises(TypeError, match=r"document_length: there is no .*lengths are those of a protocol"):
        open_retriever("bm25", document_length=8)  # type: ignore


def test_fusion_weights_are_those_that_do_best_on_the_development_set(folder) -> None:
    class Reversed(Bm25Retriever):
        def __init__(self) -> None:
            super().__init__()
            self.name = "reversed"

        def search(self, queries, k=10, show_progress=False):
            return [[(doc, -score) for doc, score in reversed(hits)] for hits in super().search(queries, k)]

    hybrid = fit_hybrid([Bm25Retriever(), Reversed()], folder, split="test", metric="MRR@10", depth=20)
    assert hybrid.weights[0] > 0.5
    assert hybrid.name.endswith(f"+{hybrid.weights[1]:.2f} reversed")


def test_of_several_engines_the_first_that_can_is_taken(sparse_model, dense_model) -> None:
    engines = ["seismic", "faiss"]
    assert open_retriever(sparse_model, engines).engine == "seismic"
    assert open_retriever(dense_model, engines).engine == "faiss"
    with pytest.raises(ValueError, match="'seismic' does not search 'dense'"):
        open_retriever(dense_model, "seismic")
    with pytest.raises(ValueError, match="Unknown engine 'lucene'"):
        open_retriever(dense_model, ["exact", "lucene"])


def test_encoded_corpora_are_reused_between_engines(tmp_path, folder, sparse_model, monkeypatch) -> None:
    from lion_st.encoding import encode

    shards = []
    write = encode.write_shard
    monkeypatch.setattr(encode, "write_shard", lambda *args, **kw: shards.append(1) or write(*args, **kw))
    (exact,) = evaluate_retrieval(sparse_model, folder, output_dir=tmp_path, keep_encoded=True)
    (seismic,) = evaluate_retrieval(sparse_model, folder, "seismic", output_dir=tmp_path, keep_encoded=True)
    assert shards == [1]
    assert seismic["nDCG@10"] == pytest.approx(exact["nDCG@10"], abs=0.05)


def test_a_milvus_retriever_forgets_the_collection_it_had_before(sparse_model) -> None:
    pytest.importorskip("pymilvus")
    retriever = ModelRetriever(sparse_model, "milvus")
    for documents in ({"a": TEXTS[0], "b": TEXTS[1]}, {"c": TEXTS[0]}):
        retriever.index(documents)
        assert {document for document, _ in retriever.search([TEXTS[0]], 5)[0]} == documents.keys()


def test_blank_documents_and_queries_find_and_are_nothing(sparse_model) -> None:
    retriever = ModelRetriever(sparse_model)
    retriever.index({"a": "lions live in prides", "b": "  "})
    assert [[doc for doc, _ in hits] for hits in retriever.search([" ", "lions"], 5)] == [[], ["a"]]


def test_sources_that_are_no_test_set_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="NoSuchTask"):
        get_task("NoSuchTask")
    with pytest.raises(ValueError, match="STS12"):
        get_task("STS12")
    with pytest.raises(FileNotFoundError, match=r"corpus\.jsonl"):
        get_task(tmp_path)


def test_trec_files_are_a_test_set(tmp_path, folder) -> None:
    (tmp_path / "topics.tsv").write_text("".join(f"{query}\t{text}\n" for query, text in QUERIES.items()))
    lines = [f"{query} 0 {doc} {grade}\n" for query, docs in QRELS.items() for doc, grade in docs.items()]
    (tmp_path / "qrels.txt").write_text("".join(lines))
    task = trec_task(folder, tmp_path / "topics.tsv", tmp_path / "qrels.txt", "lions-trec")
    (trec,) = evaluate_retrieval("bm25", task, output_dir=tmp_path / "out")
    (beir,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path / "out")
    assert trec["nDCG@10"] == beir["nDCG@10"]
    (tmp_path / "qrels.txt").write_text("unknown 0 d1 1\n")
    task = trec_task(folder, tmp_path / "topics.tsv", tmp_path / "qrels.txt", "lions-trec")
    with pytest.raises(ValueError, match="'unknown'"):
        task.load_data()
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d3", "text": "another text"}\n')
    task = trec_task(folder, tmp_path / "topics.tsv", tmp_path / "qrels.txt", "lions-trec")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:33 repeats the id 'd3'"):
        task.load_data()


def test_a_test_set_lies_in_parts_below_the_two_gibibytes_that_arrow_counts(tmp_path, folder, monkeypatch) -> None:
    (whole,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path / "whole")
    monkeypatch.setattr("lion_st.evaluation.tasks.ROWS_AT_ONCE", 7)
    task = folder_task(folder)
    task.load_data()
    for part in ("corpus", "queries"):
        texts = task.dataset["default"]["test"][part].data.column("text")
        assert max(map(len, texts.chunks)) == 7 and texts.num_chunks > 1
    (row,) = evaluate_retrieval("bm25", folder_task(folder), output_dir=tmp_path / "parts")
    assert row["documents"] == len(CORPUS) and row["nDCG@10"] == whole["nDCG@10"]


def test_a_test_set_of_another_data_set_is_not_read_back(tmp_path) -> None:
    collection = tmp_path / "collection"
    collection.mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("some", "all"))
    (collection / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, count in (("some", 10), ("all", 32)):
        rows = [{"_id": key, "text": row["text"]} for key, row in list(CORPUS.items())[:count]]
        (collection / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "topics.tsv").write_text(f"d0\t{QUERIES['d0']}\n")
    (tmp_path / "qrels.txt").write_text("d0 0 d8 1\n")
    for name, count in (("some", 10), ("all", 32)):
        task = trec_task(f"{collection}:{name}", tmp_path / "topics.tsv", tmp_path / "qrels.txt", "lions")
        (row,) = evaluate_retrieval("bm25", task, output_dir=tmp_path / "out")
        assert row["documents"] == count


def test_tasks_in_mtebs_first_format_are_loaded_and_unloaded(tmp_path, folder) -> None:
    task = old_format_task()
    (row,) = evaluate_retrieval("bm25", task, output_dir=tmp_path / "old")
    (expected,) = evaluate_retrieval("bm25", folder, output_dir=tmp_path / "new")
    assert row["nDCG@10"] == expected["nDCG@10"]
    assert (row["documents"], row["queries"]) == (32, 10)
    (scored,) = evaluate_retrieval(row["run"], task)
    assert scored["nDCG@10"] == row["nDCG@10"]
    assert fit_hybrid([Bm25Retriever(), Bm25Retriever()], task, depth=20).weights == [0.5, 0.5]
    assert not task.data_loaded
    assert task.dataset is None
    task.load_data()
    evaluate_retrieval("bm25", task, output_dir=tmp_path / "old", overwrite=True)
    assert task.data_loaded
    assert task.dataset["default"]["test"]["relevant_docs"] == QRELS


def test_ids_of_a_task_are_checked_before_its_documents_are_indexed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Bm25Retriever, "index", lambda *arguments, **options: pytest.fail("The corpus was indexed."))
    task = old_format_task(corpus=CORPUS | {"a\tb": {"title": "", "text": "x"}})
    with pytest.raises(ValueError, match=r"the id 'a\\tb': ids may hold spaces, but no tabs"):
        evaluate_retrieval("bm25", task, output_dir=tmp_path)


def test_splits_of_a_task_gather_in_one_result(tmp_path, monkeypatch) -> None:
    found = {}
    for split in ("dev", "test"):
        task = old_format_task("dev", "test").filter_eval_splits([split])
        (found[split],) = evaluate_retrieval("bm25", task, output_dir=tmp_path)
        assert found[split]["split"] == split
    (file,) = (tmp_path / "results").rglob("old-lions.json")
    assert json.loads(file.read_text())["scores"].keys() == {"dev", "test"}
    assert {path.name for path in (tmp_path / "runs").glob("*.qrels")} == {
        f"old-lions.default.{split}.qrels" for split in found
    }
    monkeypatch.setattr(MtebSearch, "search", None)
    for split, row in found.items():
        task = old_format_task("dev", "test").filter_eval_splits([split])
        assert evaluate_retrieval("bm25", task, output_dir=tmp_path) == [row]
    file.write_text(file.read_text()[:-9])
    with pytest.raises(ValueError, match=r"is damaged .*: remove it"):
        evaluate_retrieval("bm25", old_format_task("dev"), output_dir=tmp_path)


def test_neither_splits_nor_namesakes_of_a_folder_replace_its_result(tmp_path, folder) -> None:
    shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels" / "dev.tsv")
    shutil.copytree(folder, tmp_path / "other" / "lions")
    rows = [
        *evaluate_retrieval("bm25", folder, output_dir=tmp_path / "out"),
        *evaluate_retrieval("bm25", folder, output_dir=tmp_path / "out", split="dev"),
        *evaluate_retrieval("bm25", tmp_path / "other" / "lions", output_dir=tmp_path / "out"),
    ]
    assert [row["split"] for row in rows] == ["test", "dev", "test"]
    assert len({row["qrels"] for row in rows}) == 3
    files = list((tmp_path / "out" / "results").rglob("lions.json"))
    assert sorted([*json.loads(file.read_text())["scores"]] for file in files) == [["dev"], ["test"], ["test"]]
