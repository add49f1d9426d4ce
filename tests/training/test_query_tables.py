"""Queries that are looked up in a table, learned together with the encoder of the documents."""

import json
import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Router
from tiny_runs import tiny_run

import lion_st
from lion_st.encoding import encode_texts, load_encoder, model_fingerprint
from lion_st.errors import UsageError
from lion_st.hub import render_card
from lion_st.study.grid import plan_study
from lion_st.study.settings import parse_study
from lion_st.training.dry_run import describe_run
from lion_st.training.options.command_line import parse_retriever_arguments
from lion_st.training.progress.throughput import lengths_of_read_texts
from lion_st.training.query_encoders import save_query_encoder, table_query_encoder
from lion_st.training.query_tables import attach_query_table
from lion_st.training.retriever import load_training_tuples, train_retriever
from lion_st.training.starting import build_model

QUERIES = ["what do lions number 3 do", "what do rivers number 2 do do do"]
DOCUMENTS = ["Lions number 3 do this and that on day 3.", "Rivers 4 rest in place 1."]


def with_table(backbone, data, folder, paradigm="sparse", **options):
    """A model as it is when its training begins."""
    arguments, _ = tiny_run(backbone, data, folder, paradigm, query_encoder="static", **options)
    model = build_model(arguments, "cpu")
    attach_query_table(model, arguments, {"tuples": load_training_tuples(arguments, 0)})
    return model


@pytest.mark.parametrize(
    ("paradigm", "kind", "options"),
    [
        ("sparse", "static", {"use_peft": True, "query_prompt": "query: ", "mini_batch_size": 2}),
        ("sparse", "idf", {"document_max_active_dims": 40}),
        ("dense", "static", {"objective": "cl"}),
        ("sparse", "static", {"bf16": True}),
    ],
)
def test_a_table_and_the_documents_encoder_learn_together_and_become_a_stock_router(
    tiny_backbone, data, tmp_path, paradigm, kind, options
):
    arguments, training = tiny_run(
        tiny_backbone(), data, tmp_path / "run", paradigm, **options, query_encoder=kind, query_length=9
    )
    folder = train_retriever(arguments, training)
    trained = lion_st.load(folder / "checkpoint-4", device="cpu", merge_adapter=True)
    stock_class = SparseEncoder if paradigm == "sparse" else SentenceTransformer
    stock = stock_class(str(folder), device="cpu")
    assert isinstance(stock[0], Router)
    with pytest.raises(ValueError, match=r"is a Router.*train on a checkpoint of its run"):
        with_table(str(folder), data, tmp_path / "again", paradigm)
    router = load_encoder(folder, device="cpu")
    for task, texts in (("query", QUERIES), ("document", DOCUMENTS)):
        expected = encode_texts(trained, texts, task)
        for vectors in (encode_texts(router, texts, task), getattr(stock, f"encode_{task}")(texts)):
            assert abs(to_rows(vectors) - to_rows(expected)).max() < 1e-4
    assert len(model_fingerprint(router)) == 64
    before = with_table(tiny_backbone(), data, tmp_path / "before", paradigm, query_length=9)
    assert torch.equal(before.query_table.weight, trained.query_table.weight) == (kind == "idf")
    documents = to_rows(encode_texts(before, DOCUMENTS, "document"))
    assert abs(documents - to_rows(encode_texts(trained, DOCUMENTS, "document"))).max() > 1e-3
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert paradigm == "dense" or 0 < state["log_history"][-1]["query_active_dims"] <= 9


def to_rows(vectors):
    if isinstance(vectors, torch.Tensor):
        return vectors.to_dense().numpy()
    return vectors if isinstance(vectors, np.ndarray) else vectors.toarray()


def test_an_interrupted_run_goes_on_with_its_table(tiny_backbone, data, tmp_path):
    tables = []
    for name in ("whole", "parts"):
        folder = tmp_path / name
        arguments, training = tiny_run(tiny_backbone(), data, folder, query_encoder="static", save_total_limit=None)
        train_retriever(arguments, training)
        if name == "parts":  # as if killed after its second step
            for later in (folder / "checkpoint-4", folder / "training.json"):
                shutil.rmtree(later) if later.is_dir() else later.unlink()
            train_retriever(*tiny_run(tiny_backbone(), data, folder, query_encoder="static", save_total_limit=None))
        tables.append(lion_st.load(folder / "checkpoint-4", device="cpu").query_table.weight)
    assert torch.equal(*tables)


def test_a_table_is_trained_on_and_never_replaced(tiny_backbone, data, tmp_path):
    model = with_table(tiny_backbone(), data, tmp_path, query_length=7)
    with torch.no_grad():
        model.query_table.weight.fill_(0.5)
    model.save_pretrained(str(tmp_path / "saved"))
    again = with_table(str(tmp_path / "saved"), data, tmp_path)
    assert torch.equal(again.query_table.weight, model.query_table.weight)
    with pytest.raises(ValueError, match="train it on with --query_encoder static"):
        train_retriever(*tiny_run(str(tmp_path / "saved"), data, tmp_path / "run"))


def test_a_table_gives_a_query_the_weights_of_its_own_tokens(tiny_backbone, data, tmp_path):
    model = with_table(tiny_backbone(), data, tmp_path, query_length=7)
    table, tokenizer = model.query_table, model.tokenizer
    assert table.weight.mean().item() == pytest.approx(1)
    with torch.no_grad():
        table.weight[:40] = -1.0
    (row,) = encode_texts(model, QUERIES[1:], "query").toarray()
    tokens = set(tokenizer(QUERIES[1], add_special_tokens=False)["input_ids"][:7])
    expected = {token: table.weight[token].item() for token in tokens if token >= 40}
    assert {int(term): row[term] for term in np.flatnonzero(row)} == pytest.approx(expected)
    tensor = model.encode_query(QUERIES[1])
    assert tensor.is_sparse and abs(tensor.to_dense().numpy() - row).max() < 1e-6
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SparseEncoder(str(tmp_path / "saved"), device="cpu")
    with pytest.raises(ValueError, match="A table encodes this model's queries"):
        lion_st.export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"A table encodes the queries of .* leave out the query's"):
        load_encoder(tmp_path / "saved", query_max_active_dims=2, device="cpu")
    loaded = load_encoder(tmp_path / "saved", document_max_active_dims=9, device="cpu")
    assert encode_texts(loaded, QUERIES, "document").nnz == 9 * len(QUERIES)
    loaded = lion_st.load(tmp_path / "saved", device="cpu")
    with pytest.raises(ValueError, match=r"A card says how to load .* queries are looked up in a table"):
        render_card(loaded, offline=True)
    assert abs(loaded.encode_query(QUERIES[1]) - row).max() < 1e-6
    path = save_query_encoder(table_query_encoder(loaded), loaded, tmp_path / "router")
    assert abs(encode_texts(load_encoder(path), QUERIES, "query") - encode_texts(model, QUERIES, "query")).max() < 1e-6


def test_a_dense_table_begins_with_the_models_vector_of_each_token(tiny_backbone, data, tmp_path):
    model = with_table(tiny_backbone(), data, tmp_path, "dense", objective="cl")
    (token, *others) = model.tokenizer("lions", add_special_tokens=False)["input_ids"]
    features = model.preprocess(["lions"], task="document") if not others else None
    expected = model.encode_document("lions") if features is not None else None
    ids = torch.tensor([[*model.tokenizer("")["input_ids"], token]])
    with torch.no_grad():
        alone = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"][0]
    torch.testing.assert_close(model.query_table.weight[token], alone, rtol=0, atol=1e-5)
    assert expected is None or abs(alone.numpy() - expected).max() < 1e-5
    numbers = [token, *others, token]
    text = model.tokenizer.decode(numbers)
    read = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    mean = model.query_table.weight[read].mean(dim=0).detach().numpy()
    assert abs(model.encode_query(text) - mean).max() < 1e-6


@pytest.mark.parametrize(
    ("paradigm", "options", "message"),
    [
        ("multi_vector", {"query_encoder": "static"}, "is of sparse and dense models"),
        ("dense", {"query_encoder": "idf"}, "weighs the terms of a sparse model"),
        (
            "sparse",
            {"query_encoder": "static", "query_max_active_dims": 4},
            "--query_max_active_dims limits what a network adds",
        ),
        (
            "sparse",
            {"query_encoder": "static", "document_max_active_dims": 9, "query_length": 10},
            "--document_max_active_dims 9 would",
        ),
        ("sparse", {"query_encoder_learning_rate": 0.1}, "is read with --query_encoder static alone"),
        ("sparse", {"query_encoder": "static", "query_encoder_learning_rate": 0.0}, "query_encoder_learning_rate"),
    ],
)
def test_tables_that_cannot_be_are_refused(data, tmp_path, paradigm, options, message):
    with pytest.raises(UsageError, match=message):
        tiny_run("backbone", data, tmp_path, paradigm, **options)


def test_a_dry_run_counts_no_queries_that_no_network_reads_but_the_table():
    def cost(*options):
        lines = describe_run(*parse_retriever_arguments(["--backbone", "llama-3-8b", "--paradigm", "dense", *options]))
        found = {line.partition(":")[0].partition(",")[0]: line for line in lines.splitlines()}
        optimizer = found["Memory of each device"].partition("optimizer ")[2].partition(",")[0]
        return int(found["Tokens"].split(": ")[1].partition(" ")[0].replace(",", "")), float(optimizer)

    full, static = cost(), cost("--query_encoder", "static")
    assert full[0] - static[0] == 128 * 64
    assert static[1] - full[1] == pytest.approx(8 * 128_256 * 4096 / 2**30, abs=0.02)


def test_a_study_spends_its_budget_on_what_a_network_reads():
    def planned(**training):
        values = {
            "backbones": [{"recipe": "micro"}], "paradigms": ["sparse"], "objectives": ["cl"], "training": training,
            "budget": {"flops": 1e13, "lengths": {"query": 100, "document": 100}},
            "data": {"train": "lion-st/lion-quickstart"},
            "evaluation": {"zero_shot": ["lion-st/lion-quickstart:scifact"]},
        }  # fmt: skip
        (cell,) = plan_study(parse_study(values)).cells
        return cell

    full, static = planned(), planned(query_encoder="static")
    assert full.tokens / full.steps == 1.5 * static.tokens / static.steps
    assert static.steps > 1.4 * full.steps and static.flops == pytest.approx(1e13, rel=0.03)


def test_queries_that_no_network_reads_do_not_cost():
    masks = {"query_attention_mask": torch.ones(2, 3), "positive_attention_mask": torch.ones(2, 5)}
    inputs = masks | {"query_task": "query", "positive_task": "document", "label": torch.ones(2)}
    assert lengths_of_read_texts(inputs).tolist() == [3, 3, 5, 5]
    assert lengths_of_read_texts(inputs, with_queries=False).tolist() == [5, 5]
