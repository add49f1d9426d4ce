"""Weights are identified by every value they have in memory, also in what earlier versions wrote."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig
from tiny_models import TEXTS

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.encoding.fingerprints import has_weights, model_fingerprint, weights_fingerprint
from lion_st.encoding.storage import contents_checksum
from lion_st.indexes import StorageError
from lion_st.retrieval import index_corpus, search_texts

ROWS = [{"id": f"d{number}", "text": f"{text} {number}"} for number, text in enumerate(TEXTS * 2)]


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone, tmp_path_factory):
    model = lion_st.build(tiny_backbone(dtype="bfloat16"), "sparse", device="cpu")
    return lion_st.export(model, tmp_path_factory.mktemp("exported") / "lion", verify=False)


@pytest.mark.parametrize("algorithm", ["xxh3", "sha256"])
def test_weights_are_told_apart_by_every_value(checkpoint, algorithm):
    model, same = lion_st.load(checkpoint, device="cpu"), lion_st.load(checkpoint, device="cpu")
    name = weights_fingerprint(model, algorithm)
    assert weights_fingerprint(same, algorithm) == name
    with torch.no_grad():
        for tensor in model.parameters():
            before = tensor.flatten()[-1].item()
            tensor.view(-1)[-1] = before + 1
            assert weights_fingerprint(model, algorithm) != name
            tensor.view(-1)[-1] = before
    assert weights_fingerprint(model, algorithm) == name
    assert weights_fingerprint(lion_st.load(checkpoint, dtype="float32", device="cpu"), algorithm) != name


def test_training_and_merged_adapters_change_the_name_of_the_weights(tiny_backbone, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = lion_st.build(tiny_backbone(), "dense", lora=lora, device="cpu")
    merged = lion_st.load(lion_st.export(adapted, tmp_path / "merged", verify=False), device="cpu")
    plain = lion_st.build(tiny_backbone(), "dense", device="cpu")
    names = {weights_fingerprint(model) for model in (adapted, merged, plain)}
    assert len(names) == 3
    before = weights_fingerprint(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(plain.preprocess(TEXTS[:2]))["sentence_embedding"].sum().backward()
    optimizer.step()
    assert weights_fingerprint(plain) != before


def test_what_earlier_versions_wrote_is_read_and_gone_on_with(checkpoint, tmp_path):
    model = lion_st.load(checkpoint, device="cpu")
    encoded = encode_corpus(model, ROWS, tmp_path / "encoded", shard_documents=6, show_progress=False)
    new = {file.name: file.read_bytes() for file in encoded.glob("shard-*")}
    settings = json.loads((encoded / "settings.json").read_text())
    assert "weights_xxh3" in settings and "weights_sha256" not in settings
    old = {name: value for name, value in settings.items() if not name.endswith("_xxh3")}
    old |= {"model_sha256": model_fingerprint(model, "sha256"), "weights_sha256": weights_fingerprint(model, "sha256")}
    manifest = json.loads((encoded / "manifest.json").read_text()) | {"settings": old}
    manifest["xxh3"] = contents_checksum(manifest)
    (encoded / "settings.json").write_text(json.dumps(old))
    (encoded / "manifest.json").write_text(json.dumps(manifest))
    assert has_weights(model, EncodedCorpus(encoded).manifest["settings"])
    index = index_corpus(encoded, tmp_path / "index", sample=0).index
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(search_texts(model, index, TEXTS[:2], k=1)) == 2

    (encoded / "shard-000001.safetensors").unlink()
    (encoded / "manifest.json").unlink()
    encode_corpus(model, ROWS, encoded, shard_documents=6, show_progress=False)
    assert {file.name: file.read_bytes() for file in encoded.glob("shard-*")} == new
    assert EncodedCorpus(encoded).manifest["settings"] == old

    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    with pytest.raises(StorageError, match="weights_sha256 was"):
        encode_corpus(model, ROWS, encoded, shard_documents=6, show_progress=False)
    with pytest.warns(UserWarning, match="whose weights or their type differ"):
        search_texts(model, index, TEXTS[:1], k=1)
