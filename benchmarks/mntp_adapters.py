"""Train retrievers from an MNTP adapter that is merged into its backbone, and from the same one trained on.

    python benchmarks/mntp_adapters.py

For each seed `lion-st adapt --no_merge` leaves an adapter on a backbone. `lion-st train` then merges it and trains a
new adapter on the result, which is the default, or trains the adapter itself on (`--train_adapter true`): of the same
rank, on the same data in the same order, with the same steps and seed. Both are scored on test sets in BEIR layout,
beside a new adapter on the backbone without the MNTP stage. What has left its result in `--work-dir` is not run again.
"""

import argparse
import json
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, report

import lion_st
from lion_st.data import load_beir, quickstart_data, quickstart_test_sets
from lion_st.encoding import encode_texts
from lion_st.evaluation import evaluate_run, hits_to_run
from lion_st.evaluation.mteb_search import document_text
from lion_st.indexes import create_index
from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments
from lion_st.training.recipes import adapted_backbone
from lion_st.training.retriever import train_retriever

WAYS = {"without MNTP": {}, "merged": {}, "continued": {"train_adapter": True}}


def words(options: dict[str, Any]) -> list[str]:
    """Options as a command line."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def score(folder: Path, paradigm: str, test_sets: dict[str, Path], asked: int) -> dict[str, float]:
    """nDCG@10 on each test set and, of a sparse model, mean active terms of a document."""
    model = lion_st.load(str(folder), device="cpu", dtype="float32")  # bfloat16 is slow here
    scores: dict[str, float] = {}
    terms = []
    for name, data in test_sets.items():
        corpus, queries, qrels = load_beir(data)
        qrels = dict(islice(qrels.items(), asked))
        index = create_index("exact", paradigm)
        texts = [document_text(row["title"], row["text"]) for row in corpus.values()]
        documents = encode_texts(model, texts, "document")
        index.add(list(corpus), documents)
        found = index.search(encode_texts(model, [queries[query] for query in qrels], "query"), 100)
        scores[f"nDCG@10 {name}"] = evaluate_run(qrels, hits_to_run(qrels, found), ["nDCG@10"])["nDCG@10"]
        if paradigm == "sparse":
            terms.append(documents.nnz / len(corpus))
    return scores | ({"terms/document": float(np.mean(terms))} if terms else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=adapted_backbone("micro"), help="What MNTP adapts.")
    parser.add_argument("--texts", nargs="+", help="Of MNTP; the bundled training documents by default.")
    parser.add_argument("--paradigms", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--test-sets", nargs="+", default=["squad_dev"], choices=["squad_dev", "scifact"])
    parser.add_argument("--queries", type=int, default=500, help="Of each test set.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--mntp-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="Of both stages.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/mntp-adapters"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    written = quickstart_test_sets(options.work_dir / "test_sets")
    test_sets = {name: written[name] for name in options.test_sets}
    texts = options.texts or [str(quickstart_data() / "documents.parquet")]
    common = {"learning_rate": options.learning_rate, "lora_r": 16, "lora_alpha": 32, "disable_tqdm": True}
    losses, rows = [], []
    for seed in options.seeds:
        adapter = options.work_dir / f"mntp-{seed}"
        stage = dict(backbone=options.backbone, output_dir=adapter, max_steps=options.mntp_steps, seed=seed, bf16=False)
        stage |= dict(block_size=128, per_device_train_batch_size=16, mask_probability=0.3, kept_share=0.4)
        stage |= dict(z_loss_weight=0.02, z_loss_target=6, eval_blocks=64, attn_implementation="eager", merge=False)
        adapt_mntp(*parse_mntp_arguments(["--texts", *texts, *words(common | stage)]))
        record = json.loads((adapter / "mntp.json").read_text())
        losses.append([record["eval_loss_before"], record["eval_loss_after"]])
    for paradigm in options.paradigms:
        for way, more in WAYS.items():
            found = []
            for seed in options.seeds:
                model = options.backbone if way == "without MNTP" else options.work_dir / f"mntp-{seed}"
                folder = options.work_dir / f"{paradigm}-{way.replace(' ', '-')}-{seed}"
                run = dict(model=model, output_dir=folder, max_steps=options.steps, seed=seed, use_peft=True)
                run |= dict(batch_size=16, document_length=64)
                recipe = ["--backbone", "micro", "--paradigm", paradigm, "--objective", "cl_kd"]
                train_retriever(*parse_retriever_arguments([*recipe, *words(common | run | more)]))
                file = folder / "scores.json"
                if not file.exists():
                    file.write_text(json.dumps(score(folder, paradigm, test_sets, options.queries)))
                found.append(json.loads(file.read_text()))
            row: dict[str, Any] = {"": paradigm, "the adapter is": way}
            for name in found[0]:
                values = [one[name] for one in found]
                row |= {name: statistics.mean(values), f"± {name}": (max(values) - min(values)) / 2}
            rows.append(row)
    settings = {"mntp steps": options.mntp_steps, "steps": options.steps, "seeds": len(options.seeds)}
    report(options.output, "mntp-adapters", f"MNTP adapters, {settings}", rows, settings | {"mntp": losses})


if __name__ == "__main__":
    main()
