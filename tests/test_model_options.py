"""What makes a model another retriever than the paper's, in its checkpoints and in what stock loads of an export."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from tiny_models import as_sparse_encoder
from torch.nn.functional import normalize
from transformers import CodeLlamaTokenizer

import lion_st
from lion_st.encoding.fingerprints import model_fingerprint
from lion_st.hub import render_card
from lion_st.modules import LionTransformer, LlamaPooling

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
REPLLAMA = dict(causal=True, add_eos=True, pooling="last_token", normalize=True)
OPTIONS = {
    "repllama": ("dense", REPLLAMA),
    "normalized mean": ("dense", dict(normalize=True)),
    "double log1p, no BOS": ("sparse", dict(activation="double_log1p", add_bos=False)),
    "causal sparse": ("sparse", dict(causal=True, add_eos=True)),
    "some layers": ("dense", dict(layers=[1])),
}


def test_options_are_those_of_the_checkpoint_and_of_its_export(tiny_backbone, texts, tmp_path, stock_vectors):
    exported = {}
    for name, (paradigm, options) in OPTIONS.items():
        for adapter, lora in (("lora", LORA), ("full", None))[: 2 if name == "repllama" else 1]:
            model = lion_st.build(tiny_backbone(), paradigm, lora=lora, device="cpu", **options)
            folder = tmp_path / name / adapter
            model.save_pretrained(str(folder), create_model_card=False)
            loaded = lion_st.load(folder, device="cpu")
            assert (loaded.encode(texts) == model.encode(texts)).all()
            assert loaded[0].causal == options.get("causal", False)
            assert loaded[1].get_config_dict() == model[1].get_config_dict()
            assert loaded.tokenizer("a")["input_ids"] == model.tokenizer("a")["input_ids"]
            assert model_fingerprint(loaded) == model_fingerprint(model)
            path = lion_st.export(model, folder / "stock", create_model_card=False)
            exported[str(path)] = model
            assert abs(lion_st.load(path, device="cpu").encode(texts) - model.encode(texts)).max() < 1e-5
    vectors = stock_vectors([(path, "SentenceTransformer") for path in exported], texts)
    for path, model in exported.items():
        difference = abs(vectors[path, "SentenceTransformer", "document"] - model.encode_document(texts)).max()
        assert difference < 1e-5, path


def test_the_repllama_vector_is_the_normalized_causal_state_of_the_appended_token(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "dense", document_length=12, device="cpu", **REPLLAMA)
    stock = Transformer(tiny_backbone()).eval()  # a causal model, as its authors load it
    for text in texts:
        ids = [*stock.tokenizer(text)["input_ids"][:11], stock.tokenizer.eos_token_id]
        with torch.no_grad():
            state = stock.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        actual = model.encode_document(text, convert_to_tensor=True)
        torch.testing.assert_close(actual, normalize(state, dim=0), rtol=0, atol=1e-5)


def test_the_double_log1p_is_stock_s_over_every_token(tiny_backbone, texts):
    model = lion_st.build(tiny_backbone(), "sparse", scale=1.0, activation="double_log1p", device="cpu")
    features = model.preprocess(texts)
    with torch.no_grad():
        transformer = model[0].model
        logits = transformer(**{name: features[name] for name in ("input_ids", "attention_mask")}).logits
    pooled = SpladePooling("max", "log1p_relu")({"token_embeddings": logits} | features)["sentence_embedding"]
    once = SpladePooling("max", "relu")({"token_embeddings": logits.clone()} | features)["sentence_embedding"]
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), pooled, rtol=0, atol=1e-5)
    assert (once - pooled).max() > 0.1
    model[1].max_active_dims = 5
    sparse = as_sparse_encoder(model).encode(texts).to_dense()
    torch.testing.assert_close(sparse, model.encode(texts, convert_to_tensor=True))


def test_the_same_weights_read_causally_are_another_model(tiny_backbone):
    models = [lion_st.build(tiny_backbone(), "dense", causal=causal, device="cpu") for causal in (False, True)]
    assert model_fingerprint(models[0]) != model_fingerprint(models[1])
    assert abs(models[0].encode("a lion") - models[1].encode("a lion")).max() > 1e-3


def test_a_plain_causal_checkpoint_of_others_is_still_refused(tiny_backbone, tmp_path):
    transformer = Transformer(tiny_backbone())
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is a causal model"):
        lion_st.load(tmp_path, device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}])
def test_texts_begin_and_end_as_told_also_when_cut_and_loaded_again(tiny_backbone, tmp_path, family, flags):
    def ids(add_bos, add_eos, folder):
        options = {"processor_kwargs": flags} if flags else {}
        module = LionTransformer(tiny_backbone(family), add_bos=add_bos, add_eos=add_eos, query_length=6, **options)
        folder.mkdir()
        module.save(str(folder))
        found = LionTransformer.load(str(folder)).preprocess(["Who wrote the novel '1984'?"], task="query")
        assert (
            found["input_ids"].tolist()
            == module.preprocess(["Who wrote the novel '1984'?"], task="query")["input_ids"].tolist()
        )
        return found["input_ids"][0].tolist(), module.tokenizer

    plain, tokenizer = ids(None, False, tmp_path / "plain")
    ended, _ = ids(None, True, tmp_path / "ended")
    assert len(plain) == len(ended) == 6
    assert ended == [*plain[:-1], tokenizer.eos_token_id]
    if family == "llama" and not flags:
        bare, _ = ids(False, False, tmp_path / "bare")
        assert plain[0] == tokenizer.bos_token_id and bare[:5] == plain[1:]


def test_the_card_says_how_the_model_reads(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu", **REPLLAMA)
    card = render_card(model, "org/repllama", license="mit")
    assert "from left to right alone, and the vector is the last token's state, brought to length 1" in card
    assert "LlamaModel, causal" in card
    sparse = lion_st.build(tiny_backbone(), "sparse", activation="double_log1p", device="cpu")
    assert "log1p(log1p(relu(" in render_card(sparse, "org/sparse", license="mit")


@pytest.mark.parametrize(
    ("paradigm", "option", "reason"),
    [
        ("dense", {"query_max_active_dims": 32}, "query_max_active_dims=32 changes nothing of a dense model"),
        ("dense", {"scale": 1.0}, "it is for sparse and hybrid ones: leave it out"),
        ("sparse", {"pooling": "last_token"}, "pooling='last_token' changes nothing of a sparse model"),
        ("multi_vector", {"normalize": True}, "normalize=True changes nothing of a multi_vector model"),
        ("hybrid", {"token_dimension": 64}, "token_dimension=64 changes nothing of a hybrid model"),
    ],
)
def test_an_option_of_another_paradigm_is_refused(tiny_backbone, paradigm, option, reason):
    with pytest.raises(ValueError, match=reason):
        lion_st.build(tiny_backbone(), paradigm, device="cpu", **option)


def test_vectors_without_the_prompt_are_not_promised(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", query_prompt="query: ", device="cpu")
    model.set_pooling_include_prompt(True)
    with pytest.raises(ValueError, match="pool over the prompt's tokens too"):
        model.set_pooling_include_prompt(False)


@pytest.mark.parametrize("options", [{"query_length": 0}, {"document_length": -1}, {"query_length": 6.5}])
def test_lengths_are_whole_numbers(tiny_backbone, options):
    with pytest.raises(ValueError, match="whole numbers above 0 or None"):
        lion_st.build(tiny_backbone(), "dense", device="cpu", **options)


def test_a_tokenizer_that_forgets_how_texts_begin_and_end_is_refused(tiny_backbone, tmp_path):
    shutil.copytree(tiny_backbone(), tmp_path / "backbone")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "▁": 4, "a": 5, "▁a": 6, "b": 7}
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    # Its post-processor is made anew by __init__, whatever its tokenizer.json says.
    CodeLlamaTokenizer(vocab=words, merges=[("▁", "a")], **special).save_pretrained(tmp_path / "backbone")
    lion_st.build(tmp_path / "backbone", "dense", device="cpu")
    with pytest.raises(ValueError, match="CodeLlamaTokenizer makes its special tokens anew whenever it is loaded"):
        lion_st.build(tmp_path / "backbone", "dense", add_eos=True, device="cpu")


@pytest.mark.parametrize("place", ["./gone", "runs/gone", "a/b/gone", "~/gone", Path("gone")])
def test_a_folder_that_is_not_there_is_called_missing(place):
    with pytest.raises(
        FileNotFoundError, match=r"There is no folder .*gone': backbone is a folder or a Hub repository"
    ):
        lion_st.build(place, "dense")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*gone': path_or_repo is a folder"):
        lion_st.load(place)


def test_wrong_options_are_refused(tiny_backbone):
    with pytest.raises(ValueError, match=r"activation must be one of .*'double_log1p'.* got 'relu'"):
        lion_st.build(tiny_backbone(), "sparse", activation="relu", device="cpu")
    assert LlamaPooling(4, normalize=True).get_config_dict()["normalize"] is True
