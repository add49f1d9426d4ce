"""Write the plan that run.py follows on a GPU: lion-mini from its backbone on, and SmolLM2-135M beside it.

python training_scripts/gpu_run/make_plan.py > plan.json

The seconds are those of training; loading, tokenizing and saving come on top. A first stage trains for a few seconds,
so that what cannot run is known before the others have spent theirs.
"""

from __future__ import annotations

import json
from typing import Any

SCRIPTS = "{python} training_scripts"
TRAIN = (
    "{python} -m lion_st train --backbone mini --objective cl_kd --train_data {data}/train.parquet "
    "--train_queries {data}/queries.parquet --train_documents {data}/documents.parquet --query_length 64 "
    "--document_length 256 --negatives 4 --max_steps 20000 --logging_steps 20 --save_steps 100000 "
    "--attn_implementation sdpa --dataloader_num_workers 4"
)
MINI = "--batch_size 256"
SMOLLM2 = "--batch_size 128 --mini_batch_size 160 --use_peft true --lora_dropout 0 --add_bos false --learning_rate 5e-4"
SPARSE_START = (
    "--block_size 256 --mask_probability 0.3 --kept_share 0.4 --z_loss_weight 0.02 --z_loss_target 6 "
    "--lr_scheduler_type cosine --warmup_steps 0.03 --max_steps 20000 --save_steps 100000 --logging_steps 25 "
    "--dataloader_num_workers 3"
)
EVALUATE = f"{SCRIPTS}/gpu_run/evaluate.py"


def stage(
    lane: str, name: str, seconds: float, command: str, keep: tuple[str, ...] = (), **more: Any
) -> dict[str, Any]:
    return {"name": name, "lane": lane, "seconds": seconds, "command": command, "keep": keep, **more}


def budget(command: str) -> str:
    return f"{command} --max_seconds {{seconds}}"


def evaluation(lane: str, name: str, limits: str = "") -> dict[str, Any]:
    folders = "{data}/eval/scifact {data}/eval/squad_dev"
    command = f"{EVALUATE} {{work}}/{name} {folders} --output {{out}}/{name}.json {limits}"
    return stage(lane, f"{name} evaluated", 40, command, optional=True)


def plan() -> list[dict[str, Any]]:
    limits = "--query_terms 64 --document_terms 256"
    smoke = f"{TRAIN} {MINI} --paradigm sparse --model {{work}}/lion-mini-base --learning_rate 5e-4"
    weights = ("*/model.safetensors", "*/*.json")
    mini = [
        stage("mini", "smoke", 8, budget(f"{smoke} --output_dir {{work}}/smoke")),
        stage("mini", "lion-sp-mini", 95, budget(f"{smoke} --output_dir {{work}}/lion-sp-mini"), weights),
        evaluation("mini", "lion-sp-mini", limits),
        stage(
            "mini", "distilled", 50,
            budget(
                f"{SCRIPTS}/mini/distil_embeddings.py --backbone {{work}}/lion-mini-base --data_dir {{data}} --teacher "
                "{data}/teacher --output_dir {work}/distilled --num_train_epochs 20 --dataloader_num_workers 4"
            ),
        ),
        stage(
            "mini", "lion-ds-mini", 60,
            budget(
                f"{TRAIN} {MINI} --paradigm dense --model {{work}}/distilled --learning_rate 3e-4 --output_dir "
                "{work}/lion-ds-mini"
            ),
            weights,
        ),
        evaluation("mini", "lion-ds-mini"),
    ]  # fmt: skip
    smollm2 = [
        stage(
            "smollm2", "smollm2-mntp", 60,
            budget(
                "{python} -m lion_st adapt --backbone {data}/smollm2.gguf --add_bos false --texts "
                "{data}/documents.parquet --lora_dropout 0 --learning_rate 1e-3 --per_device_train_batch_size 64 "
                f"{SPARSE_START} --output_dir "
                "{work}/smollm2-mntp"
            ),
        ),
        *(
            item
            for paradigm, name in (("sparse", "lion-sp-135m"), ("dense", "lion-ds-135m"))
            for item in (
                stage(
                    "smollm2", name, 70,
                    budget(
                        f"{TRAIN} {SMOLLM2} --paradigm {paradigm} --model {{work}}/smollm2-mntp --output_dir "
                        f"{{work}}/{name}"
                    ),
                    (f"{name}/checkpoint-*/adapter_*",),
                ),
                evaluation("smollm2", name, limits if paradigm == "sparse" else ""),
            )
        ),
    ]  # fmt: skip
    return [*mini, *smollm2]


if __name__ == "__main__":
    print(json.dumps(plan(), indent=1))
