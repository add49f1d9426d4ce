"""Limits and thresholds that are learned: their definitions, their gradients, and where they are saved."""

import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)

import lion_st
from lion_st.encoding import encode_texts, load_encoder, model_fingerprint
from lion_st.hub import render_card
from lion_st.losses import ContrastiveDistillationLoss
from lion_st.modules.query_table import QueryTable
from lion_st.modules.soft_top_k import hard_k, soft_top_k
from lion_st.training.query_encoders import save_query_encoder, static_query_encoder

QUERIES = ["what do lions eat", "rivers"]
DOCUMENTS = ["Lions prey on zebras and wildebeest.", "Rivers flow."]


def rows():
    """Distinct values, some of them 0."""
    values = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    values[1, 4:] = 0
    return values.requires_grad_()


def by_definition(values, k, temperature):
    """The gate of each value by its rank, counted one by one."""
    gated = []
    for row in values:
        ranks = [1 + sum(bool(other > value) for other in row) for value in row]
        gates = [1 / (1 + math.exp(-(1 - (rank - 0.5) / k) / temperature)) for rank in ranks]
        gated.append([value * gate for value, gate in zip(row, gates, strict=True)])
    return torch.tensor(gated, dtype=torch.float64)


@pytest.mark.parametrize(("k", "kept"), [(3.4, 3), (3.6, 4), (0.2, 1), (40.0, 12)])
def test_the_hard_rule_comes_out_with_the_gradient_of_the_gate(k, kept):
    values, log_k = rows(), torch.tensor(math.log(k), dtype=torch.float64, requires_grad=True)
    bounded = min(max(k, 1), 12)
    hard, soft = soft_top_k(values, log_k), soft_top_k(values, log_k, hard=False)
    smallest = values.detach().topk(kept, dim=1).values[:, -1:]
    assert torch.equal(hard, torch.where(values >= smallest, values, 0.0))
    torch.testing.assert_close(soft.detach(), by_definition(values.detach(), bounded, 0.1), rtol=1e-12, atol=1e-3)
    weights = torch.linspace(-1, 2, 36, dtype=torch.float64).view(3, 12)
    found = [torch.autograd.grad((weights * one).sum(), (values, log_k)) for one in (hard, soft)]
    for gradients in zip(*found, strict=True):
        torch.testing.assert_close(*gradients)
    assert (found[0][1] != 0) == (1 < k < 12)
    assert kept == 12 or hard_k(log_k) == kept


def test_gradcheck_of_the_gate():
    values, log_k = rows(), torch.tensor(math.log(4.3), dtype=torch.float64, requires_grad=True)
    chosen = values.detach()[::2].requires_grad_()  # without ties
    assert torch.autograd.gradcheck(lambda x, k: soft_top_k(x, k, temperature=0.3, hard=False), (chosen, log_k))


def with_learned(backbone, as_sparse_encoder=True):
    """A model with thresholds and limits that were learned."""
    model = lion_st.build(backbone, "sparse", as_sparse_encoder=as_sparse_encoder, dtype="float32", device="cpu")
    model[1].learn_thresholds()
    model[1].learn_top_k(9, 40)
    with torch.no_grad():
        model[1].thresholds.copy_(torch.randn(model[1].get_embedding_dimension()) * 0.2)
        model[1].log_top_k.copy_(torch.tensor([7.4, 30.7]).log())
    return model


@torch.no_grad()
def expected_rows(model, texts, task, k):
    """log1p(relu(max_i logit_i - threshold)) of the k largest, from the backbone's own logits."""
    features = model.preprocess(texts, task=task)
    logits = model[0].model(**{name: features[name] for name in ("input_ids", "attention_mask")}).logits
    logits = logits * model[1].scale - model[1].thresholds
    logits = logits.masked_fill(~features["attention_mask"].bool()[:, :, None], -math.inf)
    weights = logits.amax(1).relu().log1p()
    return torch.where(weights >= weights.topk(k, dim=1).values[:, -1:], weights, 0.0)


def test_thresholds_and_limits_are_those_of_their_definition_wherever_the_model_goes(tiny_backbone, tmp_path):
    model = with_learned(tiny_backbone())
    expected = {
        task: expected_rows(model, texts, task, k).numpy()
        for task, texts, k in (("query", QUERIES, 7), ("document", DOCUMENTS, 31))
    }

    def assert_same(found):
        for task, texts in (("query", QUERIES), ("document", DOCUMENTS)):
            vectors = encode_texts(found, texts, task).toarray()
            assert abs(vectors - expected[task]).max() < 1e-5
            tensor = getattr(found, f"encode_{task}")(texts, convert_to_tensor=True)
            assert abs(tensor.to_dense().numpy() - expected[task]).max() < 1e-5

    assert_same(model)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = lion_st.load(tmp_path / "saved", device="cpu", as_sparse_encoder=True)
    assert torch.equal(saved[1].thresholds, model[1].thresholds)
    assert torch.equal(saved[1].log_top_k, model[1].log_top_k)
    assert_same(saved)
    assert model_fingerprint(saved) == model_fingerprint(model)
    with torch.no_grad():
        saved[1].thresholds[0] += 1
    assert model_fingerprint(saved) != model_fingerprint(model)
    for kind in (SparseEncoder, SentenceTransformer):
        with pytest.raises(ValueError):
            kind(str(tmp_path / "saved"), device="cpu")
    with pytest.raises(ValueError, match=r"thresholds have no place in a stock checkpoint.*--with-limits"):
        lion_st.export(model, tmp_path / "out")
    folder = lion_st.export(model, tmp_path / "out", with_limits=True)
    exported = lion_st.load(folder, device="cpu", as_sparse_encoder=True)
    assert exported[1].log_top_k is None
    assert (exported[1].query_max_active_dims, exported[1].document_max_active_dims) == (7, 31)
    assert_same(exported)
    limited = load_encoder(tmp_path / "saved", document_max_active_dims=5, device="cpu")
    assert encode_texts(limited, DOCUMENTS, "document").nnz == 5 * len(DOCUMENTS)
    assert encode_texts(limited, QUERIES, "query").nnz == 7 * len(QUERIES)
    student = static_query_encoder(model, torch.ones(model[1].get_embedding_dimension()))
    with pytest.raises(ValueError, match="learned thresholds, for which the stock modules of a Router"):
        save_query_encoder(student, model, tmp_path / "router")
    with pytest.raises(ValueError, match="thresholds of terms"):
        render_card(exported, offline=True)


def test_limits_alone_become_settings_that_stock_holds_where_they_are_equal(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", dtype="float32", device="cpu")
    model[1].learn_top_k(12, 12)
    folder = lion_st.export(model, tmp_path / "out", "SparseEncoder")
    stock = SparseEncoder(str(folder), device="cpu")
    expected = encode_texts(model, DOCUMENTS, "document").toarray()
    assert abs(stock.encode_document(DOCUMENTS).to_dense().numpy() - expected).max() < 1e-5
    model.save_pretrained(str(tmp_path / "saved"))  # to be trained on, also in this form
    assert lion_st.load(tmp_path / "saved", device="cpu")[1].log_top_k is not None


def test_training_reads_all_terms_only_where_the_average_teaches(tiny_backbone):
    model = with_learned(tiny_backbone()).train()
    features = model.preprocess(DOCUMENTS, task="document")
    pruned = model(dict(features), task="document")["sentence_embedding"]
    assert (pruned != 0).sum(1).tolist() == [31, 31]
    pruned.sum().backward()
    assert model[1].log_top_k.grad[0] == 0 and model[1].log_top_k.grad[1] > 0
    assert (model[1].thresholds.grad < 0).sum() >= 31 and (model[1].thresholds.grad <= 0).all()
    model[1].prunes = False
    assert ((model(dict(features), task="document")["sentence_embedding"] != 0).sum(1) > 31).all()


@pytest.mark.parametrize("learned", ["limits", "table"])
def test_training_needs_to_know_which_texts_are_queries(tiny_backbone, tmp_path, learned):
    model = lion_st.build(tiny_backbone(), "sparse", dtype="float32", device="cpu")
    if learned == "limits":
        model[1].learn_top_k(9, 31)
    else:
        model[1].query_table = QueryTable(torch.ones(model.get_embedding_dimension()))
    row = {"query": "what do lions eat", "positive": "Lions prey on zebras.", "negative_1": "Lions sleep."}
    options = dict(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    for given, fails in ((None, True), ({"query": "query", "positive": "document", "negative_1": "document"}, False)):
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(router_mapping=given, **options),
            train_dataset=Dataset.from_list([row, row]),
            loss=ContrastiveDistillationLoss(model, distillation_weight=0.0),
        )
        with pytest.raises(ValueError, match=r"of the task None.* router_mapping") if fails else nullcontext():
            trainer.train()
