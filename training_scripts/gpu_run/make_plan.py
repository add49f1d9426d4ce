"""Write the plan that run.py follows on a GPU: lion-mini, SmolLM2-135M and the studies, in lanes side by side.

python training_scripts/gpu_run/make_plan.py > plan.json

The seconds are those of training; loading, tokenizing and saving come on top. Gradient caching bounds what each lane
takes: without it a batch of lion-mini took 47 GB, and three lanes more than an H200 has. The studies need
lion_st[study] and have the card to themselves for some minutes: run them with --lanes studies.
"""

from __future__ import annotations

import json
from typing import Any

SCRIPTS = "{python} training_scripts"
DATA = "--train_queries {data}/queries.parquet --train_documents {data}/documents.parquet"
TRAIN = (
    f"{{python}} -m lion_st train --backbone mini --objective cl_kd {DATA} --query_length 64 --max_steps 20000 "
    "--logging_steps 20 --save_steps 100000 --attn_implementation sdpa --dataloader_num_workers 2"
)
SPARSE = f"{TRAIN} --paradigm sparse --train_data {{data}}/train_mixed.parquet --regularizer_warmup_ratio 0.05"
DENSE = f"{TRAIN} --paradigm dense --train_data {{data}}/train.parquet"
MINI_SPARSE = f"{SPARSE} --batch_size 256 --mini_batch_size 512 --negatives 4 --document_length 256"
SMOLLM2 = (
    "--batch_size 128 --mini_batch_size 160 --negatives 2 --document_length 192 --use_peft true --lora_dropout 0 "
    "--add_bos false"
)
MNTP = (
    "{python} -m lion_st adapt --block_size 256 --mask_probability 0.3 --kept_share 0.4 --z_loss_weight 0.02 "
    "--z_loss_target 6 --lr_scheduler_type cosine --warmup_steps 0.03 --max_steps 20000 --save_steps 100000 "
    "--logging_steps 50 --dataloader_num_workers 2"
)
EVALUATE = f"{SCRIPTS}/gpu_run/evaluate.py"
TEST_SETS = " ".join(f"{{data}}/eval/{name}" for name in ("dev", "scifact", "squad_dev", "cranfield", "cisi"))
WEIGHTS = (
    "model.safetensors",
    "config.json",
    "training.json",
    "mntp.json",
    "start.json",
    "checkpoint-*/adapter_*",
)


def stage(lane: str, name: str, seconds: float, command: str, **more: Any) -> dict[str, Any]:
    keep = [f"{name}/{file}" for file in WEIGHTS] if more.pop("weights", False) else []
    return {"name": name, "lane": lane, "seconds": seconds, "command": command, "keep": keep, **more}


def trained(lane: str, name: str, seconds: float, command: str, **more: Any) -> dict[str, Any]:
    """A stage that trains for its seconds and leaves weights."""
    command = f"{command} --max_seconds {{seconds}} --output_dir {{work}}/{name}"
    return stage(lane, name, seconds, command, weights=True, **more)


def evaluation(lane: str, name: str, limits: str = "") -> dict[str, Any]:
    command = f"{EVALUATE} {{work}}/{name} {TEST_SETS} --output {{out}}/{name}.json --runs {{out}}/{name}.runs.json.gz"
    return stage(lane, f"{name} evaluated", 60, f"{command} {limits}", optional=True)


def study(name: str, workers: int) -> list[dict[str, Any]]:
    file = f"training_scripts/studies/{name}.yaml"
    command = f"{{python}} -m lion_st study {file} --workers {workers} --output {{work}}/study-{name}"
    excluded = " ".join(f"--exclude '{kind}'" for kind in ("*.safetensors", "*.parquet", "tokenizer.json"))
    packed = f"tar -C {{work}} -cJf {{out}}/study-{name}.tar.xz {excluded} study-{name}"
    return [
        stage("studies", f"study {name}", 400, command, optional=True),
        stage("studies", f"study {name} packed", 20, packed, optional=True),
    ]


def plan() -> list[dict[str, Any]]:
    cut = "--query_terms 32 --document_terms 256 --query_length 64 --document_length 384"
    whole = "--query_length 64 --document_length 256"
    texts = "--texts {data}/documents.parquet {data}/openstax.txt.xz {data}/standard_ebooks.txt.xz"
    base = "{data}/lion-mini-base"
    more_mntp = (
        f"{MNTP} --backbone {base} {texts} --use_peft false --learning_rate 1e-3 --per_device_train_batch_size 128"
    )
    unpack = f"{SCRIPTS}/gpu_run/unpack_gguf.py {{data}}/smollm2.gguf --output_dir {{work}}/smollm2"
    smollm2_mntp = (
        f"{MNTP} --backbone {{work}}/smollm2 --add_bos false {texts} --use_peft true --lora_dropout 0 "
        "--learning_rate 1e-3 --per_device_train_batch_size 64"
    )
    start = f"{SCRIPTS}/mini/start_dense.py --backbone {base} --data_dir {{data}} --output_dir {{work}}/start"
    mini_dense = (
        f"{DENSE} --temperature 0.05 --batch_size 512 --mini_batch_size 1024 "
        "--negatives 2 --document_length 192 --learning_rate 1e-3"
    )
    smollm2_sparse = f"{SPARSE} {SMOLLM2} --learning_rate 5e-4 --model {{work}}/smollm2-mntp"
    smollm2_dense = f"{DENSE} {SMOLLM2} --learning_rate 5e-4 --model {{work}}/smollm2-mntp"
    return [
        trained("mini", "lion-mini-base-2", 140, more_mntp),
        trained("mini", "lion-sp-mini-2", 110, f"{MINI_SPARSE} --learning_rate 2e-4 --model {{work}}/lion-mini-base-2"),
        evaluation("mini", "lion-sp-mini-2", cut),
        stage("dense", "start", 60, start, weights=True),
        trained("dense", "lion-ds-mini", 110, f"{mini_dense} --model {{work}}/start"),
        evaluation("dense", "lion-ds-mini", whole),
        stage("smollm2", "smollm2", 20, unpack),
        trained("smollm2", "smollm2-mntp", 50, smollm2_mntp),
        trained("smollm2", "lion-sp-135m", 100, smollm2_sparse),
        evaluation("smollm2", "lion-sp-135m", cut),
        trained("smollm2", "lion-ds-135m", 90, smollm2_dense),
        evaluation("smollm2", "lion-ds-135m", whole),
        *study("smollm2", 6),
        *study("micro", 6),
    ]  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(plan(), indent=1))
