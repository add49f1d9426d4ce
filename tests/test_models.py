import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
from tiny_models import as_sparse_encoder, stirred

import lion_st
from lion_st.modules.adapters import save_adapter

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)


@pytest.fixture
def lora():
    return LORA


def assert_same_weights(one, other):
    expected, actual = one.state_dict(), other.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == actual[name].dtype and torch.equal(tensor, actual[name]), name


# ---- build ----


@pytest.mark.parametrize(("paradigm", "width"), [("sparse", 320), ("dense", 32)])
def test_a_built_model_is_an_ordinary_sentence_transformer(tiny_backbone, family, texts, paradigm, width):
    model = lion_st.build(tiny_backbone(family), paradigm, query_prompt="q: ", device="cpu")
    assert isinstance(model, SentenceTransformer)
    assert model.similarity_fn_name == "dot" and model.get_embedding_dimension() == width
    assert lion_st.paradigm_of(model) == paradigm
    assert model.encode_document(texts).shape == (len(texts), width)
    assert (model.encode_query("lion") == model.encode_document("q: lion")).all()


def test_a_sparse_encoder_is_one(tiny_backbone):
    encoder = lion_st.build(tiny_backbone(), "sparse", as_sparse_encoder=True, device="cpu")
    assert isinstance(encoder, SparseEncoder) and lion_st.paradigm_of(encoder) == "sparse"


def test_arguments_that_do_not_fit_are_refused(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match=r"one of \('sparse', 'dense', 'multi_vector', 'hybrid'\), got 'lexical'"):
        lion_st.build(tiny_backbone(), "lexical")
    with pytest.raises(ValueError, match="as_sparse_encoder=True needs a sparse model"):
        lion_st.build(tiny_backbone(), "dense", as_sparse_encoder=True)
    lion_st.build(tiny_backbone(), "dense", device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"is a saved retriever.*lion_st\.load"):
        lion_st.build(tmp_path, "dense")


def test_lora_trains_float32_adapters_and_nothing_else(tiny_backbone, lora):
    model = lion_st.build(tiny_backbone(dtype="bfloat16"), "sparse", lora=lora, device="cpu")
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert lora.base_model_name_or_path is None


# ---- save and load ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_loading_restores_weights_and_contract_to_the_bit(
    tiny_backbone, family, texts, tmp_path, lora, paradigm, dtype, with_lora
):
    model = lion_st.build(
        tiny_backbone(family, dtype=dtype),
        paradigm,
        lora=lora if with_lora else None,
        query_length=9,
        document_length=17,
        query_prompt="query: ",
        document_prompt="passage: ",
        device="cpu",
    )
    stirred(model).save_pretrained(str(tmp_path))
    loaded = lion_st.load(tmp_path, device="cpu")
    assert_same_weights(model, loaded)
    assert loaded.prompts == {"query": "query: ", "document": "passage: "}
    assert (loaded[0].query_length, loaded[0].document_length) == (9, 17)
    assert loaded[1].get_config_dict() == model[1].get_config_dict()
    assert (model.encode_query(texts) == loaded.encode_query(texts)).all()
    assert (model.encode_document(texts) == loaded.encode_document(texts)).all()


@pytest.mark.parametrize("pooling", ["mean", "last_token"])
def test_other_poolings_come_back(tiny_backbone, texts, tmp_path, pooling):
    model = lion_st.build(tiny_backbone(), "dense", pooling=pooling, device="cpu")
    model.save_pretrained(str(tmp_path))
    loaded = lion_st.load(tmp_path, device="cpu")
    assert loaded[1].mode == pooling
    assert (loaded.encode(texts) == model.encode(texts)).all()


def test_a_checkpoint_that_compares_otherwise_is_warned_of(tiny_backbone, tmp_path, recwarn):
    for normalize in (False, True):
        model = lion_st.build(tiny_backbone(), "dense", normalize=normalize)
        folder = lion_st.export(model, tmp_path / f"{normalize}", verify=False, create_model_card=False)
        stock = SentenceTransformer(str(folder), similarity_fn_name="cosine")
        stock.save(str(tmp_path / f"{normalize}-cosine"), create_model_card=False)
    for name in ("False", "True", "True-cosine"):  # of which inner products are as good
        assert lion_st.load(tmp_path / name).similarity_fn_name == "dot"
    assert not [warning for warning in recwarn if "compared by" in str(warning.message)]
    with pytest.warns(UserWarning, match="compared by 'cosine', and lion_st compares them by inner products"):
        lion_st.load(tmp_path / "False-cosine")


def test_limits_of_active_terms_come_back(tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "sparse", query_max_active_dims=3, document_max_active_dims=6, device="cpu")
    model.save_pretrained(str(tmp_path / "rows"))
    loaded = lion_st.load(tmp_path / "rows", as_sparse_encoder=True, device="cpu")
    assert (model.encode_query(texts) == loaded.encode_query(texts).to_dense().numpy()).all()
    assert loaded.encode_query(texts)._nnz() == 3 * len(texts)
    assert loaded.encode_document(texts)._nnz() == 6 * len(texts)
    as_sparse_encoder(model).save_pretrained(str(tmp_path / "tensors"))
    for form, stock_class in (("rows", SentenceTransformer), ("tensors", SparseEncoder)):
        assert "lion_st.load(" in (tmp_path / form / "README.md").read_text()
        with pytest.raises(ValueError, match=r"(?s)lion_st.*trust_remote_code"):
            stock_class(str(tmp_path / form), device="cpu")


def test_the_limit_of_queries_goes_before_that_of_all_texts_also_when_loaded(tiny_backbone, texts, tmp_path):
    limits = {"max_active_dims": 6, "query_max_active_dims": 3}
    model = lion_st.build(tiny_backbone(), "sparse", as_sparse_encoder=True, device="cpu", **limits)
    model.save_pretrained(str(tmp_path))
    for loaded in (model, lion_st.load(tmp_path, as_sparse_encoder=True, device="cpu")):
        assert loaded.encode_query(texts)._nnz() == 3 * len(texts)
        assert loaded.encode_document(texts)._nnz() == loaded.encode(texts)._nnz() == 6 * len(texts)


def test_full_weights_are_stock_on_disk_and_an_adapter_makes_stock_refuse(
    tiny_backbone, texts, tmp_path, lora, stock_vectors
):
    saved = {}
    for paradigm in ("sparse", "dense"):
        model = stirred(lion_st.build(tiny_backbone(), paradigm, query_prompt="query: ", device="cpu"))
        model.save_pretrained(str(tmp_path / paradigm))
        saved[str(tmp_path / paradigm)] = model
    vectors = stock_vectors([(path, "SentenceTransformer") for path in saved], texts)
    for path, model in saved.items():
        for task in ("query", "document"):
            ours = getattr(model, f"encode_{task}")(texts)
            assert abs(ours - vectors[path, "SentenceTransformer", task]).max() < 1e-5
    adapter = lion_st.build(tiny_backbone(), "dense", lora=lora, device="cpu")
    adapter.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "adapter"), device="cpu")


def test_a_merged_adapter_encodes_the_same_and_saves_stock(tiny_backbone, texts, tmp_path, lora):
    model = stirred(lion_st.build(tiny_backbone(), "sparse", lora=lora, device="cpu"))
    model.save_pretrained(str(tmp_path / "adapter"))
    merged = lion_st.load(tmp_path / "adapter", merge_adapter=True, device="cpu")
    assert not any("lora" in name for name in merged.state_dict())
    assert abs(merged.encode(texts) - model.encode(texts)).max() < 1e-5
    merged.save_pretrained(str(tmp_path / "merged"))
    stock = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert abs(stock.encode(texts) - model.encode(texts)).max() < 1e-5


def test_an_adapter_trains_on_only_if_asked(tiny_backbone, tmp_path, lora):
    lion_st.build(tiny_backbone(), "dense", lora=lora, device="cpu").save_pretrained(str(tmp_path))
    frozen = lion_st.load(tmp_path, device="cpu")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    trainable = lion_st.load(tmp_path, is_trainable=True, device="cpu")
    assert all(p.requires_grad == ("lora_" in name) for name, p in trainable.named_parameters())


def test_saving_over_a_checkpoint_leaves_nothing_of_it_but_keeps_other_files(tiny_backbone, tmp_path, lora):
    lion_st.build(tiny_backbone(), "sparse", lora=lora, device="cpu").save_pretrained(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text("{}")
    lion_st.build(tiny_backbone(), "dense", device="cpu").save_pretrained(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert "trainer_state.json" in names and "model.safetensors" in names
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "lion_st.safetensors"}
    assert lion_st.paradigm_of(lion_st.load(tmp_path, device="cpu")) == "dense"


def test_a_save_that_fails_leaves_the_old_checkpoint(tiny_backbone, texts, tmp_path, monkeypatch):
    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    model.save_pretrained(str(tmp_path))
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model[0].processor), "save_pretrained", disk_full)
    with pytest.raises(OSError, match="No space left"):
        stirred(model).save_pretrained(str(tmp_path))
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def test_pickled_weights_are_never_written(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert not list(tmp_path.iterdir())


# ---- what cannot be loaded ----


def test_a_missing_base_is_named_with_the_remedy(tiny_backbone, texts, tmp_path, lora):
    base = shutil.copytree(tiny_backbone(), tmp_path / "base")
    model = stirred(lion_st.build(base, "sparse", lora=lora, device="cpu"))
    model.save_pretrained(str(tmp_path / "adapter"))
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base model '.*/base'.*base=\"path/to/base\""):
        lion_st.load(tmp_path / "adapter", device="cpu")
    loaded = lion_st.load(tmp_path / "adapter", base=moved, device="cpu")
    assert (loaded.encode(texts) == model.encode(texts)).all()


def test_a_relative_base_is_found_from_elsewhere(tiny_backbone, tmp_path, lora, monkeypatch):
    shutil.copytree(tiny_backbone(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    lion_st.build("base", "dense", lora=lora, device="cpu").save_pretrained("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lion_st.load("../adapter", device="cpu").encode("lion").shape == (32,)


def test_a_bare_adapter_needs_its_paradigm(tiny_backbone, texts, tmp_path, lora):
    model = stirred(lion_st.build(tiny_backbone(), "dense", lora=lora, device="cpu"))
    save_adapter(model[0].model, tmp_path)
    with pytest.raises(ValueError, match=r'bare adapter.*paradigm="sparse" or paradigm="dense"'):
        lion_st.load(tmp_path, device="cpu")
    loaded = lion_st.load(tmp_path, paradigm="dense", device="cpu")
    assert (loaded.encode(texts) == model.encode(texts)).all()


def test_adapters_work_whatever_peft_transformers_asks_for(tiny_backbone, texts, tmp_path, lora, monkeypatch):
    def refuse(**_):
        raise ValueError("please use a version >= 99")

    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", refuse)
    model = stirred(lion_st.build(tiny_backbone(), "sparse", lora=lora, device="cpu"))
    model.save_pretrained(str(tmp_path))
    assert (lion_st.load(tmp_path, device="cpu").encode(texts) == model.encode(texts)).all()


def test_adapter_weights_that_do_not_fit_are_refused(tiny_backbone, tmp_path, lora):
    lion_st.build(tiny_backbone(), "sparse", lora=lora, device="cpu").save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(ValueError, match="of another shape"):
        lion_st.load(tmp_path, device="cpu")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="unexpected"):
        lion_st.load(tmp_path, device="cpu")


def test_a_checkpoint_with_other_weights_is_refused(tiny_backbone, tmp_path):
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"missing \(first: model\.layers\.2"):
        lion_st.load(tmp_path, device="cpu")


def test_what_is_not_a_lion_checkpoint_is_refused(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match=r"no modules\.json.*lion_st\.build"):
        lion_st.load(tiny_backbone(), device="cpu")
    with pytest.raises(FileNotFoundError):
        lion_st.load(tmp_path / "no" / "such" / "folder", device="cpu")
    lion_st.build(tiny_backbone(), "dense", device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is a dense model, not sparse"):
        lion_st.load(tmp_path, paradigm="sparse", device="cpu")
    with pytest.raises(ValueError, match="needs a sparse model"):
        lion_st.load(tmp_path, as_sparse_encoder=True, device="cpu")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["is_causal"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is a causal model"):
        lion_st.load(tmp_path, device="cpu")


def test_more_layers_than_were_saved_are_refused_before_one_is_built(tiny_backbone, tmp_path):
    folder = shutil.copytree(tiny_backbone(), tmp_path / "backbone")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 10_000_000}))
    with pytest.raises(ValueError, match=r"missing \(first: model\.layers\.2 of 10,000,000 layers, where 2 were saved"):
        lion_st.build(folder, "sparse", device="cpu")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("modules.json", "[{", "Expecting"),
        ("modules.json", "{}", "holds a dict"),
        ("config.json", '{"model_type": ', "Expecting"),
        ("config_sentence_transformers.json", "null", "holds a NoneType"),
        ("config_sentence_transformers.json", "", "Expecting value"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tiny_backbone, tmp_path, name, content, problem):
    lion_st.build(tiny_backbone(), "dense", device="cpu").save_pretrained(str(tmp_path))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"has a damaged {name} \(.*{problem}") as raised:
        lion_st.load(tmp_path, device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("reference", ["lion_st.modules.adapters.load_adapter_weights", "lion_st.exporting.export"])
def test_a_checkpoint_may_ask_for_modules_alone(tiny_backbone, tmp_path, reference):
    lion_st.build(tiny_backbone(), "dense", device="cpu").save_pretrained(str(tmp_path))
    entries = json.loads((tmp_path / "modules.json").read_text())
    entries[1]["type"] = reference
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=f"asks for the module '{reference}'; lion_st has .*SpladeHead"):
        lion_st.load(tmp_path, device="cpu")


def test_a_prompt_leaves_room_for_the_text(tiny_backbone, texts, tmp_path):
    prompt = "Represent this question for searching relevant passages: "
    with pytest.raises(ValueError, match=r"Queries are cut to 16 tokens, of which the prompt 'Represent .* one vector"):
        lion_st.build(tiny_backbone(), "dense", query_length=16, query_prompt=prompt, device="cpu")
    with pytest.raises(ValueError, match=r"Documents are cut to 1 tokens, of which special tokens take 1"):
        lion_st.build(tiny_backbone(), "dense", document_length=1, device="cpu")
    model = lion_st.build(tiny_backbone(), "dense", query_length=16, document_length=200, device="cpu")
    assert len(model.encode_document(texts, prompt=prompt)) == len(texts)
    with pytest.raises(ValueError, match="Queries are cut to 16 tokens"):
        model.encode_query(texts, prompt=prompt)
    model.prompts["query"] = prompt
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="shorten the prompt"):
        lion_st.load(tmp_path, device="cpu")


def test_what_is_not_a_model_or_a_path_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"path_or_repo is a folder or a Hub repository, got None, a NoneType"):
        lion_st.load(None)
    with pytest.raises(TypeError, match=r"backbone is a folder"):
        lion_st.build(torch.nn.Linear(2, 2), "dense")
    with pytest.raises(ValueError, match="path_or_repo is empty"):
        lion_st.load("")
    with pytest.raises(TypeError, match=r"Pass a model, not 'runs/lion': lion_st\.load"):
        lion_st.paradigm_of("runs/lion")
    with pytest.raises(TypeError, match=r"Pass a model, not 'runs/lion'"):
        lion_st.encoding.encode_texts("runs/lion", ["a lion"], "query")


def test_weights_that_are_slow_on_this_cpu_are_warned_of(tiny_backbone, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lion_st.kernels.bfloat16.multiplies_bfloat16", lambda: False)
    warning = 'dtype="float32" (--dtype float32).'
    model = lion_st.build(tiny_backbone(dtype="bfloat16"), "dense", device="cpu")
    assert caplog.text.count(warning) == 1
    lion_st.load(lion_st.export(model, tmp_path / "lion", verify=False), device="cpu")
    assert caplog.text.count(warning) == 2
    lion_st.load(tmp_path / "lion", device="cpu", dtype="float32")
    monkeypatch.setattr("lion_st.kernels.bfloat16.multiplies_bfloat16", lambda: True)
    lion_st.load(tmp_path / "lion", device="cpu")
    assert caplog.text.count(warning) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a GPU.")
def test_a_gpu_that_is_not_there_is_a_sentence(tiny_backbone, tmp_path):
    with pytest.raises(ValueError, match=r"device='cuda:1', but torch .* finds no CUDA GPU here\. Leave device out"):
        lion_st.build(tiny_backbone(), "dense", device="cuda:1")
    with pytest.raises(ValueError, match="device='cuda'"):
        lion_st.load(tmp_path, device="cuda")


# ---- training ----


def train(model, folder: Path, steps: int, resume: bool = False, **settings):
    from datasets import Dataset

    pairs = Dataset.from_dict(
        {
            "query": [f"what is number {i} of the lions" for i in range(16)],
            "positive": [f"lion number {i} lives in pride {i % 5} by the river" for i in range(16)],
        }
    )
    sparse = isinstance(model, SparseEncoder)
    arguments_class, trainer_class, loss_class = {
        "SparseEncoder": (SparseEncoderTrainingArguments, SparseEncoderTrainer, SparseMultipleNegativesRankingLoss),
        "SentenceTransformer": (
            SentenceTransformerTrainingArguments, SentenceTransformerTrainer, MultipleNegativesRankingLoss,
        ),
        "MultiVectorEncoder": (
            MultiVectorEncoderTrainingArguments, MultiVectorEncoderTrainer, MultiVectorMultipleNegativesRankingLoss,
        ),
    }[model.model_type]  # fmt: skip
    arguments = arguments_class(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        router_mapping={"query": "query", "positive": "document"},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
        **settings,
    )
    loss = loss_class(model)
    if sparse:
        loss = SpladeLoss(model, loss, document_regularizer_weight=1e-3, query_regularizer_weight=1e-3)
    trainer = trainer_class(model, arguments, train_dataset=pairs, loss=loss)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("paradigm", "as_sparse_encoder"),
    [("sparse", False), ("sparse", True), ("dense", False), ("multi_vector", False), ("hybrid", False)],
)
def test_training_resumes_to_the_bit(tiny_backbone, tmp_path, lora, paradigm, as_sparse_encoder, with_lora):
    def fresh():
        torch.manual_seed(11)
        return lion_st.build(
            tiny_backbone(),
            paradigm,
            lora=lora if with_lora else None,
            as_sparse_encoder=as_sparse_encoder,
            device="cpu",
        )

    uninterrupted = train(fresh(), tmp_path / "whole", steps=4).model
    train(fresh(), tmp_path / "halves", steps=2)
    resumed = train(fresh(), tmp_path / "halves", steps=4, resume=True).model
    assert_same_weights(uninterrupted, resumed)
    moved = [
        name for name, tensor in fresh().state_dict().items() if not torch.equal(tensor, resumed.state_dict()[name])
    ]
    assert moved
    loaded = lion_st.load(tmp_path / "halves" / "checkpoint-4", device="cpu", is_trainable=True)
    assert_same_weights(uninterrupted, loaded)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_the_best_checkpoint_is_brought_back(tiny_backbone, tmp_path, lora, with_lora):
    model = lion_st.build(tiny_backbone(), "sparse", lora=lora if with_lora else None, device="cpu")
    trainer = train(model, tmp_path, steps=4)
    best = lion_st.load(tmp_path / "checkpoint-2", device="cpu")
    assert any(not torch.equal(tensor, best.state_dict()[name]) for name, tensor in model.state_dict().items())
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    assert_same_weights(model, best)
