"""A study of tiny random backbones whose cells take seconds."""

import json
from pathlib import Path
from typing import Any

from lion_st.data import save_beir

TOPICS = ("lions", "zebras", "rivers", "storms", "bridges", "engines", "poems", "planets")


def write_tuples(path: Path, rows: int = 32) -> Path:
    """Questions with a scored passage and two negatives, which are passages of other questions."""

    def passage(row: int) -> str:
        return f"{TOPICS[row % 8].capitalize()} of group {row} were seen on day {row}."

    lines = [
        {
            "query": f"when were {TOPICS[row % 8]} of group {row} seen",
            "pos": [passage(row)],
            "neg": [passage((row + 1) % rows), passage((row + 2) % rows)],
            "pos_scores": [5.0],
            "neg_scores": [1.0 + row % 3, 0.5],
        }
        for row in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_test(folder: Path, count: int = 12) -> Path:
    texts = {f"d{row}": f"Notes about {TOPICS[row % 8]}, page {row}." for row in range(count)}
    return save_beir(
        folder,
        {one: {"title": "", "text": text} for one, text in texts.items()},
        {f"q{row}": f"what is on page {row} about {TOPICS[row % 8]}" for row in range(6)},
        {f"q{row}": {f"d{row}": 1} for row in range(6)},
    )


def tiny_study(folder: Path, backbone: str, **changes: Any) -> dict[str, Any]:
    """Values of a study's file: one backbone of one layer, two cells."""
    values: dict[str, Any] = {
        "name": "tiny",
        "backbones": [{"name": "small", "recipe": "micro", "model": backbone, "num_layers": 1}],
        "paradigms": ["sparse", "dense"],
        "objectives": ["cl_kd"],
        "seeds": [1],
        "budget": {"flops": "2e8"},
        "training": {"batch_size": 4, "bf16": False, "attn_implementation": "sdpa", "document_length": 32,
                     "save_steps": 2, "logging_steps": 1,
                     "where": [{"paradigm": "sparse", "learning_rate": "1e-2"}]},
        "data": {"train": str(write_tuples(folder / "train.jsonl")), "hold_out": 6},
        "evaluation": {"in_domain": ["held_out"], "zero_shot": [str(write_test(folder / "notes"))], "top_k": 10,
                       "metrics": ["nDCG@10", "MRR@10"], "entropy_negatives": 8},
        "machine": 1e10,
    }  # fmt: skip
    return values | changes
