import numpy as np
import pytest

from lion_st.encoding import to_csr
from lion_st.indexes import Pruning, create_index
from lion_st.retrieval import convex_fusion, explain_score, fit_convex_weights, reciprocal_rank_fusion, top_terms

VECTORS = to_csr(np.array([[0.0, 4.0, 1.0, 2.0], [3.0, 0.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]]))


def kept(pruning: Pruning) -> list[list[float]]:
    return pruning.apply(VECTORS).toarray().tolist()


def test_each_limit_keeps_what_it_says() -> None:
    assert kept(Pruning(top_terms=1)) == [[0, 4, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]]
    assert kept(Pruning(threshold=2)) == [[0, 4, 0, 2], [3, 0, 0, 3], [0, 0, 0, 0]]
    assert kept(Pruning(threshold=0.6, top_terms=2)) == [[0, 4, 0, 2], [3, 0, 0, 3], [0, 0, 0, 0]]
    assert kept(Pruning()) == VECTORS.toarray().tolist()


def test_pruned_rows_hold_their_heaviest_terms_on_random_vectors() -> None:
    rng = np.random.default_rng(0)
    vectors = to_csr(rng.random((50, 300)) * (rng.random((50, 300)) < 0.2))
    pruned = Pruning(top_terms=7).apply(vectors).toarray()
    for full, row in zip(vectors.toarray(), pruned, strict=True):
        assert sorted(row[row > 0]) == sorted(full)[-7:]


@pytest.mark.parametrize("limit", [{"top_terms": 0}, {"threshold": -1.0}])
def test_impossible_limits_are_named(limit: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(limit))):
        Pruning(**limit)


def test_the_explanation_adds_up_to_the_score(tiny_backbone) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone())
    lion, pride = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("lion", "pride"))
    query, document = np.zeros((1, 320)), np.zeros((1, 320))
    query[0, [lion, pride, 7]] = 2.0, 1.0, 5.0
    document[0, [lion, pride, 9]] = 3.0, 2.0, 5.0
    shared = explain_score(query, document, tokenizer)
    assert [round(term.share, 6) for term in shared] == [0.75, 0.25]
    assert sum(term.query_weight * term.document_weight for term in shared) == pytest.approx(8.0)
    assert shared[0].term == tokenizer.decode([lion]).strip()
    assert top_terms(query, tokenizer, 2)[1] == (tokenizer.decode([lion]).strip(), 2.0)
    assert explain_score(query, np.eye(1, 320), tokenizer) == []


@pytest.mark.parametrize("quantization", [None, "uint16"])
def test_the_exact_index_gives_back_a_document(quantization: str | None) -> None:
    rng = np.random.default_rng(1)
    vectors = to_csr(rng.random((40, 90)) * (rng.random((40, 90)) < 0.3))
    index = create_index("exact", "sparse", quantization=quantization)
    index.add([str(row) for row in range(40)], vectors)
    np.testing.assert_allclose(index.vectors(["3", "39"]).toarray(), vectors[[3, 39]].toarray(), atol=1e-4)
    with pytest.raises(KeyError, match="'x'"):
        index.vectors(["x"])


SPARSE = [[("a", 9.0), ("b", 8.0), ("c", 1.0)], []]
DENSE = [[("c", 0.9), ("b", 0.8), ("d", 0.1)], [("a", 0.3)]]


def test_reciprocal_rank_fusion_sums_inverse_ranks() -> None:
    fused = reciprocal_rank_fusion([SPARSE, DENSE], k=3)
    assert [doc for doc, _ in fused[0]] == ["c", "b", "a"]
    assert fused[0][1][1] == pytest.approx(2 / 62)
    assert fused[1] == [("a", pytest.approx(1 / 61))]
    assert [doc for doc, _ in reciprocal_rank_fusion([[[("b", 1.0)]], [[("a", 1.0)]]])[0]] == ["a", "b"]  # tied


def test_convex_fusion_weighs_normalised_scores() -> None:
    assert [doc for doc, _ in convex_fusion([SPARSE, DENSE], (1, 0))[0][:2]] == ["a", "b"]
    half = dict(convex_fusion([SPARSE, DENSE], (2, 2))[0])
    assert {type(score) for score in half.values()} == {float}
    assert half == pytest.approx({"a": 0.5, "b": 0.5 * 7 / 8 + 0.5 * 7 / 8, "c": 0.5, "d": 0.0})
    assert convex_fusion([SPARSE, DENSE], (1, 3))[1] == [("a", 0.75)]  # the only hit is the best there is
    with pytest.raises(ValueError, match="one finite weight"):
        convex_fusion([SPARSE, DENSE], (1,))
    with pytest.raises(ValueError, match="same queries"):
        reciprocal_rank_fusion([SPARSE, DENSE[:1]])


def test_fitted_weights_are_the_best_of_the_grid() -> None:
    def relevant_on_top(run) -> float:
        return float(next(iter(run["q"])) == "c") + 0.1 * run["q"]["c"]

    weights, value = fit_convex_weights([SPARSE[:1], DENSE[:1]], ["q"], relevant_on_top, steps=10)
    assert weights == (0.0, 1.0)
    assert value == pytest.approx(1.1)
    # Where it makes no difference, the even mixture is taken.
    assert fit_convex_weights([SPARSE[:1], DENSE[:1]], ["q"], lambda run: 1.0)[0] == (0.5, 0.5)
