"""Query encoders made of a full model: cheap queries over an index that stays as it is."""

import numpy as np
import pytest
import torch
from commands import lion
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SparseEncoder
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import encode_texts, load_encoder, model_fingerprint
from lion_st.indexes import create_index
from lion_st.retrieval import ModelRetriever
from lion_st.training.progress.collapse import TrainingCollapsed
from lion_st.training.query_distillation import (
    DenseDistillationArguments,
    QueryDistillationLoss,
    SparseDistillationArguments,
    distill_query_encoder,
    make_distillation_targets,
)
from lion_st.training.query_encoders import (
    idf_weights,
    save_query_encoder,
    static_query_encoder,
    truncated_query_encoder,
)

TUPLES = [
    {"query": text[:12], "positive": text, "negative_1": TEXTS[(number + 3) % 8]} for number, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def sparse_model(tiny_backbone):
    return lion_st.build(tiny_backbone(), "sparse", query_length=16, document_length=32)


@pytest.fixture(scope="module")
def targets(sparse_model):
    return make_distillation_targets(sparse_model, Dataset.from_list(TUPLES * 2))


def losses(student, targets) -> dict[str, float]:
    features = student.preprocess(targets.queries[:8], task="query") | {"task": "query"}
    with torch.no_grad():
        terms = QueryDistillationLoss(student, targets, vector_weight=1.0)([features], torch.arange(8))
    return {name: term.item() for name, term in terms.items()}


def test_lessons_hold_each_document_once_and_its_row(sparse_model, targets) -> None:
    assert targets.query_vectors.shape[0] == 16
    assert targets.document_vectors.shape[0] == 8
    expected = encode_texts(sparse_model, [TUPLES[3]["positive"], TUPLES[3]["negative_1"]], "document")
    found = targets.document_vectors[targets.candidates[3]]
    np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-5)


def test_document_frequencies_of_all_shards_give_the_weights() -> None:
    shards = [(["a", "b"], np.array([[1.0, 0, 0], [2.0, 1.0, 0]])), (["c"], np.array([[1.0, 0, 0]]))]
    assert idf_weights(shards).tolist() == pytest.approx([np.log(1 + 0.5 / 3.5), np.log(1 + 2.5 / 1.5), np.log(8)])
    with pytest.raises(ValueError, match="no documents"):
        idf_weights([])


def test_a_static_query_is_the_weights_of_its_own_tokens(sparse_model) -> None:
    weights = np.linspace(0, 1, sparse_model.get_embedding_dimension(), dtype=np.float32)
    student = static_query_encoder(sparse_model, weights)
    (row,) = encode_texts(student, [TEXTS[0]], "query").toarray()
    tokens = set(sparse_model.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"][:16])
    assert {int(term): row[term] for term in np.flatnonzero(row)} == {term: weights[term] for term in tokens}


@pytest.mark.parametrize("kind", ["static", "truncated"])
def test_distillation_brings_the_scores_nearer_to_the_full_model(sparse_model, targets, tmp_path, kind) -> None:
    student = static_query_encoder(sparse_model) if kind == "static" else truncated_query_encoder(sparse_model, 1)
    before = losses(student, targets)
    rate = 0.1 if kind == "static" else 2e-3
    distill_query_encoder(student, targets, tmp_path, epochs=4, batch_size=8, learning_rate=rate, disable_tqdm=True)
    after = losses(student, targets)
    assert after["score_loss"] < 0.9 * before["score_loss"]
    if kind == "truncated":
        assert after["vector_loss"] < before["vector_loss"]
    else:
        assert min(student[0].weight.tolist()) >= 0


def test_truncation_leaves_the_full_model_as_it_is(sparse_model) -> None:
    before = encode_texts(sparse_model, TEXTS, "query").toarray()
    student = truncated_query_encoder(sparse_model, 1)
    assert len(student[0].decoder.layers) == 1
    assert len(sparse_model[0].decoder.layers) == sparse_model[0].config.num_hidden_layers == 2
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(encode_texts(sparse_model, TEXTS, "query").toarray(), before)
    for layers in (0, 2):
        with pytest.raises(ValueError, match=f"got {layers}"):
            truncated_query_encoder(sparse_model, layers)


def test_the_router_checkpoint_is_stock_and_searches_the_full_models_index(
    sparse_model, targets, tmp_path, stock_vectors
) -> None:
    static = static_query_encoder(sparse_model, idf_weights([([], targets.document_vectors)]))
    students = {"static": static, "truncated": truncated_query_encoder(sparse_model, 1)}
    saved = {name: save_query_encoder(student, sparse_model, tmp_path / name) for name, student in students.items()}
    vectors = stock_vectors([(path, "SparseEncoder") for path in saved.values()], TEXTS)
    for name, student in students.items():
        for task, live in (("query", student), ("document", sparse_model)):
            expected = encode_texts(live, TEXTS, task).toarray()
            np.testing.assert_allclose(vectors[str(saved[name]), "SparseEncoder", task], expected, atol=1e-4)
    with pytest.raises(FileExistsError):
        save_query_encoder(static, sparse_model, saved["static"])
    with pytest.raises(ValueError, match=r"for sentence_transformers\.SparseEncoder alone"):
        SentenceTransformer(str(saved["static"]), device="cpu")

    documents = {f"d{number}": text for number, text in enumerate(TEXTS)}
    by_router = ModelRetriever(load_encoder(saved["static"]))
    by_both = ModelRetriever(sparse_model, query_model=load_encoder(saved["static"]))
    index = create_index("exact", "sparse")
    index.add(list(documents), encode_texts(sparse_model, TEXTS, "document"))
    expected = index.search(encode_texts(static, TEXTS[:2], "query"), 3)
    for retriever in (by_router, by_both):
        retriever.index(documents)
        for found, true in zip(retriever.search(TEXTS[:2], 3), expected, strict=True):
            assert dict(found) == pytest.approx(dict(true), rel=1e-3)
    assert by_router.fingerprint() != by_both.fingerprint()


def test_a_truncated_encoder_keeps_the_layers_that_it_is_told_to(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(num_hidden_layers=5), "sparse", query_length=16, device="cpu")
    student = truncated_query_encoder(model, [0, 2, -1])
    assert len(student[0].decoder.layers) == student[0].config.num_hidden_layers == 3
    for mine, full in zip(student[0].decoder.layers, (0, 2, 4), strict=True):
        whole = model[0].decoder.layers[full]
        assert torch.equal(mine.mlp.up_proj.weight, whole.mlp.up_proj.weight) and mine is not whole
    assert len(model[0].decoder.layers) == 5
    path = save_query_encoder(student, model, tmp_path / "router")
    found = encode_texts(load_encoder(path, device="cpu"), TEXTS, "query")
    assert abs(found - encode_texts(student, TEXTS, "query")).max() < 1e-4
    for layers in (0, 5, [], [2, 0], [0, 0], [0, 5], [0, 4, -1]):
        with pytest.raises(ValueError, match=r"layers is a number of at least 1 and below the model's 5.* got"):
            truncated_query_encoder(model, layers)


def test_a_router_keeps_the_limit_of_documents_where_it_has_no_effect_on_queries(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(), "sparse", query_length=16, document_max_active_dims=16, device="cpu")
    path = save_query_encoder(static_query_encoder(model), model, tmp_path / "router")
    stock = SparseEncoder(str(path), device="cpu")
    assert stock.encode_document(TEXTS)._nnz() == 16 * len(TEXTS) == encode_texts(model, TEXTS, "document").nnz
    assert stock.encode_query(TEXTS)._nnz() == encode_texts(static_query_encoder(model), TEXTS, "query").nnz
    limited = model_fingerprint(stock)
    stock.max_active_dims = None
    assert model_fingerprint(stock) != limited
    with pytest.raises(ValueError, match="one limit of active terms, and documents are to keep 16"):
        save_query_encoder(truncated_query_encoder(model, 1), model, tmp_path / "other")
    model.save_pretrained(str(tmp_path / "limited"))
    (tmp_path / "empty").mkdir()  # what is in the data is not looked at
    command = ("query-encoder", tmp_path / "limited", tmp_path / "empty", tmp_path / "new")
    refusal = lion(*command, "--kind", "truncated", "--layers", "1", exit_code=1)
    assert "one limit of active terms, and documents are to keep 16" in refusal
    with pytest.raises(ValueError, match=r"is a Router, with an encoder for queries .*publish --folder"):
        lion_st.load(path)
    model[1].document_max_active_dims = 15
    with pytest.raises(ValueError, match="documents are to keep 15"):
        save_query_encoder(static_query_encoder(model), model, tmp_path / "other")


def test_dense_models_have_truncated_query_encoders_alone(tiny_backbone, tmp_path) -> None:
    model = lion_st.build(tiny_backbone(), "dense", query_length=16)
    path = save_query_encoder(truncated_query_encoder(model, 1), model, tmp_path / "router")
    assert (path / "query_0_Transformer").is_dir()
    assert load_encoder(path, device="cpu").encode_query(["a lion"]).shape == (1, 32)
    with pytest.raises(ValueError, match="Cannot determine the embedding dimension"):
        SparseEncoder(str(path), device="cpu")
    with pytest.raises(ValueError, match="this one is dense"):
        static_query_encoder(model)


def test_what_does_not_fit_is_named(sparse_model) -> None:
    with pytest.raises(ValueError, match=r"numbers of at least 0, got the shape \(3,\)"):
        static_query_encoder(sparse_model, np.ones(3))
    with pytest.raises(ValueError, match="begins with SparseStaticEmbedding"):
        truncated_query_encoder(static_query_encoder(sparse_model), 1)
    with pytest.raises(ValueError, match="columns query and positive"):
        make_distillation_targets(sparse_model, Dataset.from_list([{"query": "a"}]))


@pytest.mark.parametrize("kind", ["static", "truncated"])
def test_a_distillation_that_is_lost_ends_with_what_to_change(sparse_model, targets, tmp_path, kind) -> None:
    student = static_query_encoder(sparse_model) if kind == "static" else truncated_query_encoder(sparse_model, 1)
    options = dict(epochs=12, batch_size=8, learning_rate=1e38, max_grad_norm=0.0, disable_tqdm=True)
    with pytest.raises(
        TrainingCollapsed, match=r"at step 20: the (loss|norm of the weights) is .* Lower --learning_rate"
    ):
        distill_query_encoder(student, targets, tmp_path, logging_steps=1000, **options)


@pytest.mark.parametrize("kind", [SparseDistillationArguments, DenseDistillationArguments])
def test_a_distillation_leaves_all_gpus_but_the_first_alone(kind, tmp_path):
    arguments = kind(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # as transformers counts them
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 4
