"""Encoding a corpus: documents/s and peak memory of encode_corpus beside stock SparseEncoder.encode and mteb's path.

    python benchmarks/encode.py
    python benchmarks/encode.py --documents 1000 --vocabulary 8000 --flat 1000 2000

The model is a small random Llama (hidden 64, 2 layers) with a Llama-3-sized vocabulary, so that the time and memory of
the vocabulary-wide rows show, and with about 150 active terms a text, as trained retrievers have; the texts are random
words, as many as MS MARCO's passages have tokens. Every side runs in a process of its own and reads the same texts; its
peak resident memory is what the operating system reports. Stock keeps all vectors in memory, as its interface asks.
mteb calls stock's encode, and reads a fifth of the documents to save time. The last rows show that the memory of
encode_corpus does not grow with the corpus, over a smaller vocabulary (--flat-vocabulary), on which that does not
depend.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, in_process, msmarco_lengths, report, word_tokenizer

ACTIVE_TERMS = 150


def make_model(folder: Path, vocabulary: int) -> None:
    """Save a random backbone, and beside it the stock sparse-encoder checkpoint that the other sides load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lion_st

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config)
    tokenizer = word_tokenizer(vocabulary)
    tokenizer.save_pretrained(folder / "backbone")
    make_sparse(backbone, tokenizer, vocabulary)
    backbone.save_pretrained(folder / "backbone")
    model = lion_st.build(folder / "backbone", "sparse", scale=1.0, document_length=128)
    lion_st.export(model, folder / "stock", model_type="SparseEncoder")


def make_sparse(backbone: Any, tokenizer: Any, vocabulary: int) -> None:
    """Give random weights a trained retriever's sparsity: about `ACTIVE_TERMS` terms of a text are above zero.

    One hidden dimension is made the same for all tokens, and the LM head subtracts it from every logit.
    """
    import torch

    with torch.no_grad():
        backbone.model.embed_tokens.weight[:, 0] = 1.0
        backbone.lm_head.weight[:, 0] = 0.0
        largest, constant = [], []
        for text in texts(8, vocabulary):
            hidden = backbone.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            largest.append((hidden @ backbone.lm_head.weight.T).max(dim=0).values)
            constant.append(hidden[:, 0].mean())
        rank = vocabulary - ACTIVE_TERMS
        floor = torch.stack(largest).kthvalue(rank, dim=1).values.mean()
        backbone.lm_head.weight[:, 0] = -floor / torch.stack(constant).mean()


def texts(count: int, vocabulary: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for length in msmarco_lengths(rng, count):
        yield " ".join(f"w{number}" for number in rng.integers(3, vocabulary, length - 1))


def run_side(side: str, folder: Path, count: int, vocabulary: int) -> dict[str, Any]:
    """Encode `count` documents and report seconds and peak memory; called in a process of its own."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if side == "encode_corpus":
        import lion_st
        from lion_st.retrieval import EncodedCorpus, encode_corpus

        model = lion_st.load(folder / "stock", as_sparse_encoder=True)
        rows = ({"id": str(number), "text": text} for number, text in enumerate(texts(count, vocabulary)))
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as output:
            encoded = encode_corpus(model, rows, Path(output) / "encoded", shard_documents=2048, show_progress=False)
            seconds = time.perf_counter() - began
            terms = sum(vectors.nnz for _, vectors in EncodedCorpus(encoded)) / count
    elif side == "SparseEncoder.encode":
        from sentence_transformers import SparseEncoder

        stock = SparseEncoder(str(folder / "stock"))
        documents = list(texts(count, vocabulary))
        began = time.perf_counter()
        rows = stock.encode_document(documents, batch_size=32, show_progress_bar=False)
        seconds = time.perf_counter() - began
        terms = rows.coalesce().values().numel() / count
    else:
        from datasets import Dataset
        from mteb import get_task
        from mteb._create_dataloaders import create_dataloader
        from mteb.models.sentence_transformer_wrapper import SparseEncoderWrapper
        from mteb.types import PromptType
        from sentence_transformers import SparseEncoder

        wrapper = SparseEncoderWrapper(SparseEncoder(str(folder / "stock")))
        documents = list(texts(count, vocabulary))
        metadata = get_task("SciFact").metadata
        corpus = Dataset.from_dict({"id": [str(number) for number in range(count)], "text": documents})
        began = time.perf_counter()
        loader = create_dataloader(corpus, task_metadata=metadata, prompt_type=PromptType.document, batch_size=32)
        rows = wrapper.encode(
            loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.document,
            batch_size=32, show_progress_bar=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        terms = rows.coalesce().values().numel() / count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rate = count / seconds
    return {"documents/s": rate, "terms/document": terms, "peak RSS MB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--flat", type=int, nargs="*", default=[10_000, 100_000], help="corpora to compare memory on")
    parser.add_argument("--flat-vocabulary", type=int, default=16_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.folder, options.documents, options.vocabulary)))
        return

    count, vocabulary = options.documents, options.vocabulary
    sides = [("encode_corpus", count, vocabulary), ("SparseEncoder.encode", count, vocabulary)]
    sides += [("mteb SparseEncoderWrapper", count // 5, vocabulary)]
    sides += [("encode_corpus", count, options.flat_vocabulary) for count in options.flat]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for side, count, vocabulary in sides:
            folder = Path(name) / str(vocabulary)
            if not folder.exists():
                make_model(folder, vocabulary)
            arguments = ["--side", side, "--folder", str(folder), "--documents", str(count)]
            figures = in_process(__file__, [*arguments, "--vocabulary", str(vocabulary)])
            row = {"side": side, "vocabulary": vocabulary, "documents": count}
            rows.append({**row, **(figures or {"failed": "out of memory"})})
            print(f"{side}, {count:,} documents: done", flush=True)
    report(options.output, "encode", "a small Llama", rows, {"active terms": ACTIVE_TERMS})


if __name__ == "__main__":
    main()
