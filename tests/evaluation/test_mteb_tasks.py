"""Tasks of mteb beyond searching: re-ranking, prompts of their own, benchmarks."""

import json
from pathlib import Path
from typing import Any

import mteb
import pytest
from commands import lion
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from tiny_models import TEXTS

import lion_st
from lion_st.evaluation import evaluate_retrieval
from lion_st.evaluation.mteb_search import _among, task_prompts
from lion_st.retrieval import Bm25Retriever, HybridRetriever, ModelRetriever

DOCUMENTS = {f"d{number}": f"{text} {number}" for number, text in enumerate(TEXTS * 4)}
QUERIES = {f"q{number}": TEXTS[number][:25] for number in range(8)}
QRELS = {query: {f"d{int(query[1:]) + 8}": 1, f"d{int(query[1:]) + 3}": 1} for query in QUERIES}
CANDIDATES = {query: [f"d{(3 * int(query[1:]) + 5 * step) % 32}" for step in range(20)] for query in QUERIES}


def task_of(kind: str, candidates: dict[str, list[str]] | None) -> AbsTaskRetrieval:
    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="SciFact",
            dataset={"path": "lions/reranking", "revision": "1"},
            description="Lions.",
            type=kind,
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="map_at_1000",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            part = {
                "corpus": Dataset.from_list(
                    [{"id": key, "title": "", "text": text} for key, text in DOCUMENTS.items()]
                ),
                "queries": Dataset.from_list([{"id": key, "text": text} for key, text in QUERIES.items()]),
                "relevant_docs": {query: dict(grades) for query, grades in QRELS.items()},
                "top_ranked": candidates,
            }
            self.dataset = {"default": {"test": part}}
            self.data_loaded = True

    return Task()


@pytest.fixture(scope="module")
def models(tiny_backbone) -> dict[str, Any]:
    return {paradigm: lion_st.build(tiny_backbone(), paradigm, device="cpu") for paradigm in ("sparse", "dense")}


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_candidates_are_ranked_as_mteb_ranks_them(tmp_path, models, paradigm) -> None:
    task = task_of("Reranking", CANDIDATES)
    (row,) = evaluate_retrieval(models[paradigm], task, output_dir=tmp_path, metrics=["nDCG@10", "MAP"])
    (theirs,) = mteb.evaluate(
        models[paradigm], task_of("Reranking", CANDIDATES), cache=None, co2_tracker=False, show_progress_bar=False
    ).task_results
    scores = theirs.scores["test"][0]
    assert row["nDCG@10"] == pytest.approx(scores["ndcg_at_10"], abs=1e-5)
    assert row["MAP"] == pytest.approx(scores["map_at_1000"], abs=1e-5)
    (free,) = evaluate_retrieval(models[paradigm], task_of("Retrieval", None), output_dir=tmp_path / "free")
    assert free["nDCG@10"] != row["nDCG@10"]  # all documents are not the candidates
    run = [line.split() for line in Path(row["run"]).read_text().splitlines()]
    assert {query: sorted(one[2] for one in run if one[0] == query) for query in QUERIES} == {
        query: sorted(set(own)) for query, own in CANDIDATES.items()
    }


def test_other_retrievers_rank_candidates_too_and_approximate_ones_say_that_they_cannot(tmp_path, models) -> None:
    task = task_of("Reranking", CANDIDATES)
    hybrid = HybridRetriever([ModelRetriever(models["sparse"]), Bm25Retriever()])
    for retriever in (Bm25Retriever(), hybrid):
        (row,) = evaluate_retrieval(retriever, task, output_dir=tmp_path)
        assert 0 < row["nDCG@10"] < 1
    assert _among([("a", -0.25), ("b", -0.5)], ["b", "blank", "a"]) == [("a", -0.25), ("b", -0.5), ("blank", -0.5)]
    with pytest.raises(ValueError, match=r"'faiss' cannot score the given candidates .* exact and torch can"):
        evaluate_retrieval(models["dense"], task, "faiss", output_dir=tmp_path)


def test_a_prompt_for_a_task_or_its_kind_takes_the_place_of_the_usual_one(tmp_path, tiny_backbone) -> None:
    model = lion_st.build(tiny_backbone(), "dense", query_prompt="usual: ", device="cpu")
    model.prompts |= {"Retrieval-query": "find: ", "SciFact-document": "lions: ", "Reranking": "rank: "}
    usual = dict(model.prompts)
    retriever = ModelRetriever(model)
    for kind, query, document in (("Retrieval", "find: ", "lions: "), ("Reranking", "rank: ", "lions: ")):
        with task_prompts(retriever, task_of(kind, None).metadata):
            assert (model.prompts["query"], model.prompts["document"]) == (query, document)
        assert model.prompts == usual
    task = task_of("Retrieval", None)
    (row,) = evaluate_retrieval(model, task, output_dir=tmp_path)
    stock = mteb.evaluate(model, task_of("Retrieval", None), cache=None, co2_tracker=False, show_progress_bar=False)
    assert row["nDCG@10"] == pytest.approx(stock.task_results[0].scores["test"][0]["ndcg_at_10"], abs=1e-5)


def test_nanobeir_is_one_command(tmp_path, monkeypatch, tiny_backbone) -> None:
    """Over a copy of the size of a toy in the place of each data set on the Hub."""

    def load(self, num_proc: int | None = None, **kwargs: Any) -> None:
        (split,) = self.eval_splits
        task = task_of("Retrieval", None)
        task.load_data()
        self.dataset = {subset: {split: dict(task.dataset["default"]["test"])} for subset in self.hf_subsets}
        self.data_loaded = True

    benchmark = mteb.get_benchmark("NanoBEIR")
    monkeypatch.setattr(benchmark, "tasks", list(benchmark.tasks)[:3])  # the other ten are as these
    for task in benchmark.tasks:
        monkeypatch.setattr(type(task), "load_data", load)
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    lion_st.export(model, tmp_path / "model", verify=False, create_model_card=False)
    shown = lion("evaluate", tmp_path / "model", "--data", "nanobeir", "--output", tmp_path / "out", "--quiet")
    rows = [line for line in shown.splitlines() if line.startswith("| model ") and "dataset" not in line]
    assert len(rows) == 4 and "nanobeir |" in rows[-1] and "NanoArguAna" in rows[0]
    results = list((tmp_path / "out" / "results").rglob("Nano*.json"))
    assert len(results) == 3
    meta = json.loads((results[0].parent / "model_meta.json").read_text())
    assert (meta["embed_dim"], meta["similarity_fn_name"], meta["loader"]) == (
        model.get_embedding_dimension(),
        "dot",
        "SentenceTransformerEncoderWrapper",
    )
