"""Texts are cut by characters without changing a token, and threads do not change each other's lengths."""

import copy
import pickle
import random
import threading

import pytest
from tiny_models import TEXTS, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lion_st
from lion_st.modules import tokenizing
from lion_st.modules.tokenizing import exclusive_tokenizer, leading_parts

ALPHABET = [
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "'s",
    "é",
    "e\u0301",
    "ß",
    "獅子",
    "🦁",
    "</s>",
    "lion",
    "Lions live",
    "1984",
    "\t",
]


def long_text(seed: int) -> str:
    return "".join(random.Random(seed).choices([*ALPHABET, *TEXTS], k=4000))


def ids(tokenizer, text: str, limit: int) -> list[int]:
    return tokenizer(text, truncation=True, max_length=limit)["input_ids"]


def normalized_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    return tokenizer


@pytest.mark.parametrize("make", [tiny_tokenizer, normalized_tokenizer])
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("limit", [1, 9, 128])
def test_the_kept_tokens_are_those_of_the_whole_text(make, prompt, limit):
    tokenizer = make()
    texts = [long_text(seed) for seed in range(8)]
    for text, part in zip(texts, leading_parts(tokenizer, texts, limit, prompt), strict=True):
        assert text.startswith(part) and len(part) < len(text) / 2
        assert ids(tokenizer, prompt + part, limit) == ids(tokenizer, prompt + text, limit)


def test_a_text_is_read_on_until_its_tokens_end_well_before_the_cut():
    tokenizer = tiny_tokenizer()
    one_word = "x" * 3 * tokenizing.FEWEST_CHARACTERS
    spaces = " " * 3 * tokenizing.FEWEST_CHARACTERS
    for text in (one_word, one_word + " lion" * 20_000, spaces + "lion" + spaces, "lion" + spaces + " lion" * 20_000):
        (part,) = leading_parts(tokenizer, [text], 64)
        assert ids(tokenizer, part, 64) == ids(tokenizer, text, 64)
    assert leading_parts(tokenizer, [one_word], 64) == [one_word]
    assert len(leading_parts(tokenizer, [one_word + " lion" * 20_000], 64)[0]) <= 4 * len(one_word)


def test_a_tokenizer_that_splits_nothing_reads_the_whole_text():
    """Merges run through the whole text, so that no cut is known to be safe."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, " ": 3}, [("a", "b")]))
    text = "ab " * tokenizing.FEWEST_CHARACTERS
    whole = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert leading_parts(whole, [text], 8) == [text]
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    split = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(leading_parts(split, [text], 8)[0]) == tokenizing.FEWEST_CHARACTERS
    split.truncation_side = "left"
    assert leading_parts(split, [text], 8) == [text]


def test_a_model_reads_no_more_than_it_needs(tiny_backbone, monkeypatch):
    model = lion_st.build(tiny_backbone(), "sparse", query_length=8, document_length=16, device="cpu")
    text = "lions hunt zebras. " * 200_000
    read = []
    original = type(model[0].tokenizer).__call__

    def recorded(self, texts, *args, **kwargs):
        read.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
        return original(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(model[0].tokenizer), "__call__", recorded)
    vector = model.encode_document(text)
    assert read and sum(read) < 4 * tokenizing.FEWEST_CHARACTERS
    assert (vector == model.encode_document(text[:1000])).all()


def test_threads_do_not_change_each_others_lengths(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", query_length=6, document_length=40, device="cpu")
    texts = [f"{text} {text}" for text in TEXTS]
    wrong: list[object] = []

    def tokenize(task: str, length: int) -> None:
        try:
            for _ in range(60):
                found = model.preprocess(texts, task=task, max_length=length)["input_ids"].shape[1]
                if found != length:
                    wrong.append((task, found))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=tokenize, args=("query", length)) for length in range(3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_models_are_still_copied_and_pickled(tiny_backbone):
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    with exclusive_tokenizer():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert (other.encode(TEXTS) == model.encode(TEXTS)).all()
