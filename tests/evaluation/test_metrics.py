import evaluate
import numpy as np
import pytest

from lion_st.evaluation import METRICS_MODULE, evaluate_queries, evaluate_run, write_qrels, write_run

QRELS = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"d": 1}}


def test_metrics_have_their_textbook_values() -> None:
    run = {"q1": {"c": 3.0, "a": 2.0, "x": 1.0, "b": 0.5}, "q2": {"y": 1.0, "d": 0.5}}
    values = evaluate_queries(QRELS, run, ["nDCG@10", "MRR@10", "Recall@2", "MAP", "P@2", "R_cap@1"])
    ideal = 2 + 1 / 1.584962500721156
    assert values["nDCG@10"]["q1"] == pytest.approx((2 / 1.584962500721156 + 1 / 2.321928094887362) / ideal)
    assert values["MRR@10"] == {"q1": 0.5, "q2": 0.5}
    assert values["Recall@2"] == {"q1": 0.5, "q2": 1.0}
    assert values["MAP"]["q1"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert values["P@2"]["q1"] == 0.5
    assert values["R_cap@1"] == {"q1": 0.0, "q2": 0.0}


def test_capped_recall_divides_by_the_cut_when_more_is_relevant() -> None:
    qrels = {"q": {str(number): 1 for number in range(50)}}
    run = {"q": {str(number): -float(number) for number in range(5)}}
    assert evaluate_run(qrels, run, ["R_cap@10", "Recall@10"]) == pytest.approx({"R_cap@10": 0.5, "Recall@10": 0.1})


def test_grades_below_the_level_count_for_ndcg_alone() -> None:
    found = evaluate_run(
        {"q": {"a": 1, "b": 2}}, {"q": {"a": 2.0, "b": 1.0}}, ["MRR@10", "P@1", "R_cap@2", "nDCG@1"], relevance_level=2
    )
    assert found == pytest.approx({"MRR@10": 0.5, "P@1": 0.0, "R_cap@2": 1.0, "nDCG@1": 0.5})


def test_equal_scores_are_ordered_by_falling_id_as_in_trec_eval() -> None:
    assert evaluate_run({"q": {"a": 1}}, {"q": {"a": 1.0, "b": 1.0}}, ["MRR@10", "nDCG@1"]) == {
        "MRR@10": 0.5,
        "nDCG@1": 0.0,
    }
    # Scores that differ only beyond 32 bits are equal.
    assert evaluate_run({"q": {"a": 1}}, {"q": {"a": 1.0 + 1e-12, "b": 1.0}}, ["MRR@1"]) == {"MRR@1": 0.0}


def test_mrr_is_cut() -> None:
    run = {"q": {**{f"x{number}": 100.0 - number for number in range(10)}, "a": 1.0}}
    values = evaluate_run({"q": {"a": 1}}, run, ["MRR@10", "MRR@11", "MRR"])
    assert values == pytest.approx({"MRR@10": 0.0, "MRR@11": 1 / 11, "MRR": 1 / 11})


def test_missing_queries_score_zero_and_unjudged_ones_do_not_count() -> None:
    run = {"q2": {"d": 1.0}, "unjudged": {"d": 1.0}}
    assert evaluate_run(QRELS, run, ["MRR@10", "nDCG@10"]) == {"MRR@10": 0.5, "nDCG@10": 0.5}


@pytest.mark.parametrize("metric", ["ndcg@10", "nDCG@0", "Recall", "MRR@", "R_cap"])
def test_unknown_metrics_are_named(metric: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown metric '{metric}'"):
        evaluate_run(QRELS, {}, [metric])


def test_the_evaluate_module_loads_from_its_folder_and_agrees() -> None:
    module = evaluate.load(str(METRICS_MODULE))
    run = {"q1": {"c": 3.0, "a": 2.0}, "q2": {"d": 0.5}}
    result = module.compute(
        predictions=[{"query": q, "documents": list(hits), "scores": list(hits.values())} for q, hits in run.items()],
        references=[{"query": q, "documents": list(d), "relevance": list(d.values())} for q, d in QRELS.items()],
    )
    assert result == pytest.approx(evaluate_run(QRELS, run))
    assert set(result) == {"nDCG@10", "MRR@10", "Recall@100", "MAP", "R_cap@100"}
    twice = {"query": "q1", "documents": ["a", "a"], "scores": [2.0, 1.0]}
    judged = [{"query": "q1", "documents": ["a"], "relevance": [1]}]
    for predictions in ([twice], [{**twice, "documents": ["a", "b"]}] * 2):
        with pytest.raises(ValueError, match="'q1', or one of its documents, occurs twice"):
            module.compute(predictions=predictions, references=judged * len(predictions))


def test_grades_are_whole_numbers_of_any_type(tmp_path) -> None:
    run = {"q": {"a": np.float32(1.0), "b": 0.5}}
    expected = evaluate_run({"q": {"b": 2}}, run)
    for grade in (np.int64(2), 2.0, np.float32(2)):
        assert evaluate_run({"q": {"b": grade}}, run) == expected
    assert write_qrels(tmp_path / "qrels", {"q": {"b": 2.0}}).read_text() == "q 0 b 2\n"
    for grade in (0.5, "2", float("nan")):
        with pytest.raises(ValueError, match=f"grade {grade!r}: give a whole number"):
            evaluate_run({"q": {"b": grade}}, run)
        with pytest.raises(ValueError, match="whole number"):
            write_qrels(tmp_path / "wrong", {"q": {"b": grade}})


def test_what_ranks_nowhere_or_matches_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'a' has the score nan for query 'q'"):
        evaluate_run({"q": {"a": 1}}, {"q": {"a": float("nan"), "b": 1.0}})
    extremes = {"q": {"a": float("-inf"), "b": float("inf")}}
    assert evaluate_run({"q": {"a": 1}}, extremes, ["MRR"]) == {"MRR": 0.5}
    for qrels, run in (({1: {"a": 1}}, {}), ({"q": {1: 1}}, {}), ({"q": {"a": 1}}, {"q": {1: 1.0}})):
        with pytest.raises(TypeError, match=r"Ids in runs and judgements are strings, got 1: pass str\(id\)"):
            evaluate_run(qrels, run)
    with pytest.raises(TypeError, match="are strings, got 1"):
        write_run(tmp_path / "run", {1: {"a": 1.0}})
    with pytest.raises(ValueError, match="not Unicode"):  # which ended the process
        evaluate_run({"q": {"a\ud800": 1}}, {"q": {"a": 1.0}})
    with pytest.raises(TypeError, match=r"dict\(hits\)"):
        evaluate_run({"q": {"a": 1}}, {"q": [("a", 1.0)]})
