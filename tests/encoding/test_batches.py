"""Each text is tokenized once, ahead of the model, and gets the vector that the model's own `encode` gives it."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

import lion_st
from lion_st.encoding import batches, encode_texts
from lion_st.encoding.batches import BatchEncoder
from lion_st.modules.tokenizing import FEWEST_CHARACTERS, first_tokens
from lion_st.modules.unpadding import packed

PROMPTS = {"query": "query: ", "document": "A passage. "}
LONG = "lions hunt zebras, 1984. " * 400
ONE_WORD = "x" * (FEWEST_CHARACTERS + 9)
MANY = [*TEXTS, LONG, ONE_WORD, *(f"{text} {text}" for text in TEXTS), f"More {LONG}"]


def between(*around: str):
    """A tokenizer that puts special tokens before and behind a text."""
    tokenizer = tiny_tokenizer()
    ids = {"<s>": 0, "</s>": 1}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(around), pair="$A $B", special_tokens=[(token, ids[token]) for token in around if token in ids]
    )
    return tokenizer


def cut_on_the_left():
    tokenizer = between("<s>", "$A", "</s>")
    tokenizer.truncation_side = "left"
    return tokenizer


TOKENIZERS = {
    "bos": tiny_tokenizer,
    "nothing": lambda: tiny_tokenizer(bos=False),
    "eos": lambda: between("$A", "</s>"),
    "both": lambda: between("<s>", "$A", "</s>"),
    "cut on the left": cut_on_the_left,
    "in Python": ByT5Tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("limit", [3, 12, 64])
def test_the_tokens_are_those_of_truncation(name, prompt, limit):
    tokenizer = TOKENIZERS[name]()
    texts = MANY if limit == 12 else MANY[:-1]
    tokens = first_tokens(tokenizer, texts, limit, prompt)
    whole = [tokenizer(prompt + text, verbose=False)["input_ids"] for text in texts]
    for text, row, is_cut, all_of_it in zip(texts, tokens.rows, tokens.is_cut, whole, strict=True):
        assert row.tolist() == tokenizer(prompt + text, truncation=True, max_length=limit)["input_ids"]
        assert is_cut == (len(all_of_it) > limit)
    assert 0 < tokens.is_cut.sum() <= len(texts)
    with pytest.raises(ValueError, match="allow more"):
        first_tokens(between("<s>", "$A", "</s>"), texts, 2)


@pytest.fixture(scope="module", params=["sparse", "dense"])
def model(request, tiny_backbone):
    prompts = {f"{task}_prompt": prompt for task, prompt in PROMPTS.items()}
    return lion_st.build(tiny_backbone(), request.param, query_length=12, document_length=40, device="cpu", **prompts)


@pytest.mark.parametrize("task", ["query", "document"])
def test_each_text_is_tokenized_once_and_gets_the_models_own_vector(model, task, monkeypatch):
    expected = getattr(model, f"encode_{task}")(MANY, convert_to_numpy=True)
    encode_texts(model, MANY[:2], task)
    read: Counter[str] = Counter()
    tokenize = type(model.tokenizer).__call__

    def counted(self, texts, *arguments, **options):
        read.update([texts] if isinstance(texts, str) else texts)
        return tokenize(self, texts, *arguments, **options)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counted)
    found = encode_texts(model, MANY, task, tokens_per_batch=100)
    read -= Counter(["a", PROMPTS[task]])  # what finds special tokens, and the room that the prompt leaves
    expected_reads = Counter(PROMPTS[task] + text[:FEWEST_CHARACTERS] for text in MANY)
    expected_reads[PROMPTS[task] + ONE_WORD] += 1  # a cut is not safe in it
    assert read == expected_reads
    np.testing.assert_allclose(found if isinstance(found, np.ndarray) else found.toarray(), expected, atol=1e-5)


@pytest.mark.parametrize("task", ["query", "document"])
def test_the_models_features_are_those_of_its_own_preprocessing(model, task):
    limit = model[0].token_limit(task)
    own = packed(model.preprocess(MANY, prompt=PROMPTS[task], task=task))
    encoder = BatchEncoder(model, task, limit, tokens_per_batch=10**6)
    tokenized = encoder.tokenize(MANY)
    rows = own["input_ids"][0].split(own["cu_seq_lens_q"].diff().tolist())
    expected = torch.cat([rows[place] for place in tokenized.order])
    (features,) = tokenized.batches
    assert torch.equal(features["input_ids"][0], expected)
    assert features.keys() == own.keys() - {"modality", "prompt_length", "logits_to_keep"}
    for name in features.keys() - {"input_ids", "position_ids", "seq_idx"}:
        value = own[name]
        if name.startswith("cu_seq"):
            value = torch.nn.functional.pad(value.diff()[tokenized.order.tolist()].cumsum(0), (1, 0)).int()
        assert (features[name] == value) is True or torch.equal(features[name], value)
    model[0].runs_packed = False
    try:
        padded = model.preprocess([MANY[place] for place in tokenized.order], prompt=PROMPTS[task], task=task)
        (features,) = encoder.tokenize(MANY).batches
        assert all(torch.equal(features[name], padded[name]) for name in ("input_ids", "attention_mask"))
    finally:
        model[0].runs_packed = True


def test_settings_of_a_models_own_are_kept(model):
    settings = model[0].processing_kwargs
    try:
        model[0].processing_kwargs = settings | {"text": {**settings.get("text", {}), "add_special_tokens": False}}
        expected = model.encode_document(TEXTS, convert_to_numpy=True)
        found = encode_texts(model, TEXTS, "document")
        np.testing.assert_allclose(found if isinstance(found, np.ndarray) else found.toarray(), expected, atol=1e-5)
    finally:
        model[0].processing_kwargs = settings
    assert not np.allclose(model.encode_document(TEXTS, convert_to_numpy=True), expected)


def test_many_texts_are_encoded_section_by_section(model, monkeypatch):
    whole = encode_texts(model, MANY, "document")
    monkeypatch.setattr(batches, "TEXTS_AT_ONCE", 4)
    parts = encode_texts(model, MANY, "document")
    difference = whole - parts
    assert abs(difference).max() < 1e-5 and parts.shape == whole.shape
