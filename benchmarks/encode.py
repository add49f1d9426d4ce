"""Encoding a corpus: documents/s and peak memory of encode_corpus beside stock SparseEncoder.encode and mteb's path.

    python benchmarks/encode.py
    python benchmarks/encode.py --documents 1000 --vocabulary 8000 --flat 1000 2000
    python benchmarks/encode.py --device cuda --sides encode_corpus SparseEncoder.encode

On a CPU the model is a small random Llama (hidden 64, 2 layers) with a Llama-3-sized vocabulary, so that the time and
memory of the vocabulary-wide rows show; on a GPU it has Llama-3.2-1B's shape, in bfloat16. About 150 terms a text are
active, as in trained retrievers; the texts are random words, as many as MS MARCO's passages have tokens. Every side
runs in a process of its own and reads the same texts; its peak resident memory is what the operating system reports.
Stock keeps all vectors in memory, as its interface asks. mteb calls stock's encode, and reads a fifth of the documents
to save time. The last rows show that the memory of encode_corpus does not grow with the corpus, over a smaller
vocabulary (--flat-vocabulary), on which that does not depend.

"query ms" is the median time of queries of about 9 tokens, encoded one by one. On a GPU a pass that compiles and
tunes goes first, and "GPU busy %" is the share of an encoding's time in which some kernel or copy ran.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, SHAPES, in_process, make_models, peak_mib, random_texts, report

ACTIVE_TERMS = 150
SIDES = ("encode_corpus", "SparseEncoder.encode", "mteb SparseEncoderWrapper")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shape": "tiny", "dtype": "float32", "flat": [10_000, 100_000]},
    "cuda": {"shape": "Llama-3.2-1B", "dtype": "bfloat16", "flat": []},
}
QUERIES = 50  # encoded one by one
Encode = Callable[[list[str], Path], Any]  # texts and an empty folder -> the folder of shards, or vectors


def make_side(side: str, folder: Path, device: str) -> tuple[Any, Encode]:
    """The model and what encodes a list of documents with it."""
    if side == "encode_corpus":
        import lion_st
        from lion_st.encoding import encode_corpus

        model: Any = lion_st.load(folder / "stock", as_sparse_encoder=True, device=device)

        def to_shards(documents: list[str], output: Path) -> Path:
            records = ({"id": str(number), "text": text} for number, text in enumerate(documents))
            return encode_corpus(model, records, output / "encoded", shard_documents=2048, show_progress=False)

        return model, to_shards

    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(folder / "stock"), device=device)
    if side == "SparseEncoder.encode":
        return model, lambda documents, _: model.encode_document(documents, batch_size=32, show_progress_bar=False)

    from datasets import Dataset
    from mteb import get_task
    from mteb._create_dataloaders import create_dataloader
    from mteb.models.sentence_transformer_wrapper import SparseEncoderWrapper
    from mteb.types import PromptType

    wrapper = SparseEncoderWrapper(model)
    metadata = get_task("SciFact").metadata

    def through_mteb(documents: list[str], _: Path) -> torch.Tensor:
        ids = [str(number) for number in range(len(documents))]
        corpus = Dataset.from_dict({"id": ids, "text": documents})
        loader = create_dataloader(corpus, task_metadata=metadata, prompt_type=PromptType.document, batch_size=32)
        return wrapper.encode(
            loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.document,
            batch_size=32, show_progress_bar=False,
        )  # fmt: skip

    return model, through_mteb


def timed(encode: Encode, documents: list[str]) -> tuple[float, float]:
    """Seconds to encode documents, and their active terms."""
    from lion_st.encoding import EncodedCorpus

    with tempfile.TemporaryDirectory() as output:
        began = time.perf_counter()
        encoded = encode(documents, Path(output))
        seconds = time.perf_counter() - began
        if isinstance(encoded, Path):
            return seconds, sum(vectors.nnz for _, vectors in EncodedCorpus(encoded))
        return seconds, encoded.coalesce().values().numel()


def run_side(side: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Figures of one side as they come; called in a process of its own."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    on_gpu = options.device == "cuda"
    model, encode = make_side(side, folder, options.device)
    documents = list(random_texts(options.documents, options.vocabulary))
    figures: dict[str, Any] = {}
    if on_gpu:
        timed(encode, documents[:2048])  # compiles and tunes
        torch.cuda.reset_peak_memory_stats()
    seconds, terms = timed(encode, documents)
    figures |= {"documents/s": len(documents) / seconds, "terms/document": terms / len(documents)}
    if on_gpu:
        figures["peak GPU GiB"] = torch.cuda.max_memory_allocated() / 2**30
    figures["peak RSS MiB"] = peak_mib()
    yield figures
    figures["query ms"] = query_milliseconds(model, options.vocabulary)
    yield figures
    if on_gpu:
        yield figures | {"GPU busy %": 100 * busy_share(lambda: timed(encode, documents[:2048]))}


def query_milliseconds(model: Any, vocabulary: int) -> float:
    """Median time of queries that are encoded one by one."""
    times = []
    for query in random_texts(QUERIES + 5, vocabulary, median=9):
        began = time.perf_counter()
        model.encode_query(query, show_progress_bar=False).cpu()
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[5:]))


def busy_share(work: Callable[[], tuple[float, float]]) -> float:
    """Share of the seconds that `work` returns in which a kernel or a copy ran on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds, _ = work()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    busy = reached = 0.0
    for start, end in spans:  # streams overlap
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--shape", choices=list(SHAPES), help="tiny on a CPU, else Llama-3.2-1B")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--flat", type=int, nargs="*", help="corpora to compare memory on; 10,000 and 100,000 on a CPU")
    parser.add_argument("--flat-vocabulary", type=int, default=16_000)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=3600, help="limit of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    if options.side:
        for figures in run_side(options.side, options.folder, options):
            print(json.dumps(figures), flush=True)
        return

    runs = [
        (side, options.documents // (5 if side.startswith("mteb") else 1), options.vocabulary) for side in options.sides
    ]
    runs += [("encode_corpus", count, options.flat_vocabulary) for count in options.flat]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for side, count, vocabulary in runs:
            folder = Path(name) / str(vocabulary)
            if not folder.exists():
                make_models(folder, options.shape, vocabulary, ACTIVE_TERMS, options.device, options.dtype)
            arguments = ["--side", side, "--folder", str(folder), "--documents", str(count)]
            arguments += ["--device", options.device, "--vocabulary", str(vocabulary)]
            figures = in_process(__file__, arguments, options.seconds)
            row = {"side": side, "vocabulary": vocabulary, "documents": count}
            rows.append({**row, **({"failed": "out of memory"} if figures is None else figures)})
            print(f"{side}, {count:,} documents: done", flush=True)
    name = "encode" if options.device == "cpu" else f"encode-{options.device}"
    settings = {"active terms": ACTIVE_TERMS, "dtype": options.dtype, **SHAPES[options.shape]}
    report(options.output, name, f"a Llama of the shape {options.shape}", rows, settings, options.device)


if __name__ == "__main__":
    main()
