"""Blocks of tokens: those of the whole text at once, made once, and never held in memory."""

import gzip
import tracemalloc

import numpy as np
import pytest
from datasets import Dataset
from tiny_models import tiny_tokenizer

from lion_st.data import text as text_module
from lion_st.data.text import iter_blocks, read_documents, token_blocks

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def sources(tmp_path):
    """A file of lines, a compressed table and a data set."""
    lines = [f"Line {n} of a text about lions that hunt {n * n} zebras." for n in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"title": "Lions", "text": "hunt at night."}\n' * 70)
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"text": [*lines[:50], "", None]}).to_parquet(tmp_path / "set" / "train.parquet")
    return [tmp_path / "a.txt", str(tmp_path / "b.jsonl.gz"), str(tmp_path / "set")]


def all_at_once(documents, tokenizer, block_size):
    tokens = np.concatenate([tokenizer(document)["input_ids"] for document in documents])
    count = len(tokens) // block_size
    return tokens[: count * block_size].reshape(count, block_size)


@pytest.mark.parametrize("block_size", [7, 32, 5000])
def test_blocks_are_those_of_all_documents_concatenated(sources, block_size):
    tokenizer = tiny_tokenizer()
    documents = list(read_documents(sources))
    expected = all_at_once(documents, tokenizer, block_size)
    cached = token_blocks(sources, tokenizer, block_size)
    assert np.array_equal(cached["input_ids"][:], expected)
    for documents_at_once in (1, 3, 1000):
        assert np.array_equal(
            np.concatenate(list(iter_blocks(documents, tokenizer, block_size, documents_at_once))), expected
        )


def test_a_second_start_reads_and_tokenizes_nothing(sources, monkeypatch):
    first = token_blocks(sources, tiny_tokenizer(), 32)[:]
    monkeypatch.setattr(text_module, "iter_blocks", lambda *args: pytest.fail("tokenized again"))
    monkeypatch.setattr(text_module, "iter_documents", lambda *args: pytest.fail("read again"))
    tokenizer = tiny_tokenizer()
    tokenizer(["one", "two three"], padding=True, truncation=True, max_length=2)  # which it remembers
    assert token_blocks(sources, tokenizer, 32)[:] == first


def test_other_texts_tokenizers_and_block_sizes_are_other_blocks(sources):
    plain, words = tiny_tokenizer(bos=False), tiny_tokenizer()
    made = [token_blocks(sources, words, 32), token_blocks(sources, plain, 32), token_blocks(sources, words, 16)]
    made.append(token_blocks(sources[:2], words, 32))
    words.add_tokens(["lions"])
    made.append(token_blocks(sources, words, 32))
    sources[0].write_text(sources[0].read_text() + "\nAnd more of it.")
    made.append(token_blocks(sources, words, 32))
    assert len({blocks.cache_files[0]["filename"] for blocks in made}) == len(made)
    assert np.array_equal(made[1]["input_ids"][:20], all_at_once(read_documents(sources[:1]), plain, 32)[:20])


def test_a_tokenizer_that_is_not_fast_is_known_by_what_it_saves(sources, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer()), "is_fast", False)
    first = token_blocks(sources, tiny_tokenizer(), 32).cache_files
    assert token_blocks(sources, tiny_tokenizer(), 32).cache_files == first
    assert token_blocks(sources, tiny_tokenizer(bos=False), 32).cache_files != first


def test_a_text_shorter_than_a_block_leaves_nothing_behind(sources, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"The text has \d+ tokens, fewer than one block of 1000000: give more"):
            token_blocks(sources, tiny_tokenizer(), 1_000_000)
    assert not list((tmp_path / "datasets-cache" / "lion_st").glob("tokens-*/*"))


def test_memory_does_not_grow_with_the_text(tmp_path):
    line = " ".join(["lions hunt zebras"] * 10)
    peaks = []
    for lines in (200, 1600):
        file = tmp_path / f"{lines}.txt"
        file.write_text(f"{line}\n" * lines)
        tokenizer = tiny_tokenizer()
        tracemalloc.start()
        blocks = iter_blocks(read_documents([file]), tokenizer, 128, documents_at_once=1)
        assert sum(map(len, blocks)) > lines
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
