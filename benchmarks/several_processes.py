"""Train the same on two processes as on one, and print how far losses and exports are apart.

    python benchmarks/several_processes.py
    python benchmarks/several_processes.py --steps 100 --only fsdp
    DS_ACCELERATOR=cpu python benchmarks/several_processes.py --divisions zero2 zero3 rounding

Each cell is a training of a small Llama: sparse or dense, by contrast alone (cl) or with a teacher (cl_kd), of an
adapter or of all weights, with cached gradients or without. Two gloo processes, each with the whole model (DDP) or with
shards of it (FSDP2, DeepSpeed's ZeRO), have the batch of one process. AdamW has an epsilon of 1e-3, since with the
usual one a gradient that is nothing but rounding would be a step like any other; dropout is 0, since each process draws
its own. "rounding" is one process again, from weights that are each changed by about 1e-7 of themselves: as far as that
parts, several processes may.

Printed are the largest difference of a step's loss, as a share of that loss, and of an exported tensor, as a share of
its norm and as a share of what the training changed of it. The exit code is 1 where a loss is apart by more than 1e-4.
"""

import argparse
import json
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, make_models, random_texts, report
from safetensors.torch import load_file, save_file
from soak import Runner

LIMIT = 1e-4
ROWS, NEGATIVES, BATCH = 64, 2, 4
WORDS = 300
ROUNDING = 1e-7  # of a weight; float32 holds 6e-8
DIVISIONS = {"ddp": "DDP", "fsdp": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "rounding": "one, other rounding"}


def write_tuples(path: Path) -> None:
    """Random texts with scores; each row's first negative is the positive of another.

    No text has a word twice: the two tokens would have nearly the same logits, and rounding would decide which of them
    is the largest and gets the gradient.
    """
    texts = [" ".join(dict.fromkeys(text.split())) for text in random_texts(ROWS * (2 + NEGATIVES), WORDS, median=12)]
    queries, positives, others = texts[:ROWS], texts[ROWS : 2 * ROWS], iter(texts[2 * ROWS :])
    lines = [
        {
            "query": query,
            "pos": [positives[row]],
            "neg": [positives[(row + 2) % ROWS], *(next(others) for _ in range(NEGATIVES - 1))],
            "pos_scores": [5.0 + row % 3],
            "neg_scores": [float(row % 4 - n) for n in range(NEGATIVES)],
        }
        for row, query in enumerate(queries)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def divided(division: str) -> dict[str, Any]:
    """Options that divide a model over processes; of ZeRO with buffers that these small models fill several times."""
    if division.startswith("zero"):
        zero = {"stage": int(division[-1]), "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}
        return {"deepspeed": json.dumps({"zero_optimization": zero})}
    return {"fsdp": True} if division == "fsdp" else {}


def change_rounding(source: Path, target: Path) -> Path:
    """A copy of a model whose weights are each changed by about `ROUNDING` of themselves."""
    shutil.copytree(source, target)
    torch.manual_seed(0)
    weights = load_file(source / "model.safetensors")
    changed = {name: tensor * (1 + ROUNDING * torch.randn_like(tensor)) for name, tensor in weights.items()}
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def losses(folder: Path) -> torch.Tensor:
    """The loss of every step, [steps]."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in log if "loss" in entry], dtype=torch.float64)


def exported_difference(one: Path, other: Path, before: Path) -> tuple[float, float]:
    """The largest difference of a tensor, as a share of its norm and of what changed of it."""
    found, wanted, start = (load_file(folder / "model.safetensors") for folder in (other, one, before))
    shares, changes = [], []
    for name, tensor in wanted.items():
        difference = torch.linalg.vector_norm(found[name] - tensor)
        shares.append(float(difference / torch.linalg.vector_norm(tensor)))
        changed = float(torch.linalg.vector_norm(tensor - start[name])) if name in start else 0.0
        if changed > 1e-3 * float(torch.linalg.vector_norm(tensor)):  # else rounding is most of the change
            changes.append(float(difference) / changed)
    return max(shares), max(changes, default=float("nan"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="Cells that have all of these words.")
    parser.add_argument("--divisions", nargs="+", default=["ddp", "fsdp"], choices=DIVISIONS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    one, two = Runner(1), Runner(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, "tiny", WORDS)
        write_tuples(folder / "tuples.jsonl")
        nudged = change_rounding(folder / "backbone", folder / "nudged")

        def train(runner: Runner, output: str, paradigm: str, objective: str, **more: Any) -> Path:
            options: dict[str, Any] = {
                "model": str(folder / "backbone"),
                "train_data": str(folder / "tuples.jsonl"),
                "output_dir": str(folder / output),
                "batch_size": BATCH,
                "negatives": NEGATIVES,
                "attn_implementation": "eager",
                "max_steps": chosen.steps,
                "save_strategy": "no",
                "logging_steps": 1,
                "learning_rate": 1e-3,
                "adam_epsilon": 1e-3,
                "bf16": False,
                "disable_tqdm": True,
                "paradigm": paradigm,
                "objective": objective,
            } | more
            runner.finish(runner.start(options), options)
            return folder / output

        for cell in product(
            ("sparse", "dense"), ("cl", "cl_kd"), ("adapter", "all weights"), ("cached", "uncached"), chosen.divisions
        ):
            paradigm, objective, trained, caching, division = cell
            if not set(chosen.only) <= set(cell):
                continue
            peft = {"use_peft": True, "lora_dropout": 0.0} if trained == "adapter" else {"use_peft": False}
            label = f"{paradigm}-{objective}-{trained.replace(' ', '-')}-{caching}"
            # Texts of a mini-batch on each process: that of both together is the same.
            mini = 2 if caching == "cached" else None
            alone = folder / f"one-{label}"
            if not alone.exists():
                train(one, alone.name, paradigm, objective, **peft, mini_batch_size=mini)
            before = folder / f"before-{paradigm}"
            if not before.exists():
                train(one, before.name, paradigm, objective, use_peft=False, max_steps=1, learning_rate=1e-12)
            if division == "rounding":
                more, runner = {"mini_batch_size": mini, "model": str(nudged)}, one
            else:
                more, runner = {"mini_batch_size": mini and mini // 2} | divided(division), two
            both = train(runner, f"{division}-{label}", paradigm, objective, **peft, **more)
            wanted, found = losses(alone), losses(both)
            assert len(wanted) == len(found) == chosen.steps
            share, changed = exported_difference(alone, both, before)
            rows.append(
                {
                    "two processes": DIVISIONS[division],
                    "vectors": paradigm,
                    "objective": objective,
                    "trained": trained,
                    "gradients": caching,
                    "loss, first and last": f"{wanted[0]:.3f}, {wanted[-1]:.3f}",
                    "largest difference of a loss": f"{float(((found - wanted) / wanted).abs().max()):.1e}",
                    "of an exported tensor": f"{share:.1e}",
                    "of its change": f"{changed:.1e}",
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    report(chosen.output, "several-processes", f"Two processes beside one, {chosen.steps} steps", rows, {})
    if any(float(row["largest difference of a loss"]) > LIMIT for row in rows):
        sys.exit(f"A loss of two processes is more than {LIMIT} from that of one.")


if __name__ == "__main__":
    main()
