"""Compiles the Triton kernels for GPUs, present or not, and prints what each needs as JSON.

python compile_kernels.py            # the configurations that matter most
python compile_kernels.py --all      # every configuration on every architecture, some minutes
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lion_st.kernels import triton_backend, triton_backward, triton_forward, triton_pair_scores, triton_postings
from lion_st.kernels.triton_backend import CONFIGURATIONS, Configuration

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # of a program, at most


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, **options: int):
    """The compiled kernel; pointers and strides are multiples of 16, as they are of torch's tensors."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (place,): aligned
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride")
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def describe(name: str, compiled: Any, architecture: int, expected_shared_bytes: int, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": architecture,
        "shared_bytes": compiled.metadata.shared,
        "expected_shared_bytes": expected_shared_bytes,
        "spilled_loads": compiled.asm["sass"].count("LDL"),
        **more,
    }


def compile_maxima(configuration: Configuration, dtype: torch.dtype, architecture: int) -> dict:
    name, block = NAMES[dtype], configuration.block_dim(dtype)
    constants = {
        "DIM": 2048, "TERMS": configuration.terms, "TILE": configuration.slots, "BLOCK_DIM": block,
        "SUPERTILE": triton_backend.SUPERTILE,
        "WITH_POSITIONS": True, "PRECISION": "tf32x3", "DESCRIPTORS": configuration.descriptors,
    }  # fmt: skip
    if configuration.descriptors:
        types = {
            "hidden": f"tensordesc<{name}[{configuration.slots},{block}]>",
            "weight": f"tensordesc<{name}[{configuration.terms},{block}]>",
        }
    else:
        types = dict.fromkeys(["hidden", "weight"], f"*{name}")
    types |= dict.fromkeys(["values", "partial_values"], "*fp32")
    types |= dict.fromkeys(["positions", "partial_positions", "group_text", "group_first", "group_last"], "*i32")
    types |= {"group_start": "*i64", "ends": "*i32"}
    types |= dict.fromkeys(["texts", "first_term", "last_term", "weight_stride"], "i32")
    compiled = compile_kernel(
        triton_forward.maxima_kernel, types, constants, architecture,
        num_warps=configuration.warps, num_stages=configuration.stages,
    )  # fmt: skip
    shared = configuration.shared_bytes
    return describe("maxima_kernel", compiled, architecture, shared, dtype=name, configuration=configuration)


def compile_others(architecture: int) -> list[dict]:
    pointers = dict.fromkeys(["bounds", "ends", "order", "group_text", "group_first", "group_last"], "*i32")
    pointers |= dict.fromkeys(["positions", "partial_positions", "row", "starts", "piece_segment"], "*i32")
    pointers |= dict.fromkeys(["piece_first", "split_first", "pieces"], "*i32")
    pointers |= {"group_start": "*i64", "table": "*bf16", "sums": "*bf16"}
    pointers |= dict.fromkeys(["values", "partial_values", "bias", "coefficient", "partial_sums"], "*fp32")
    numbers = dict.fromkeys(["texts", "tokens", "terms", "partial_terms", "first_term", "last_term"], "i32")
    numbers |= {"piece_length": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32"}
    types = pointers | numbers
    found = []
    finish = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "WITH_POSITIONS": True, "GROUPS": 16, "BLOCK": 1024}
    sums = [{"DIM": 2048, "BLOCK": 256, "SPLIT": split} for split in (True, False)]
    for kernel, constants, warps in (
        (triton_forward.schedule_kernel, {"TILE": 128}, 1),
        (triton_forward.finish_kernel, finish, 4),
        (triton_backward.sum_rows_kernel, sums[0], 1),
        (triton_backward.sum_rows_kernel, sums[1], 1),
        (triton_backward.merge_sums_kernel, {"DIM": 2048, "BLOCK": 256}, 1),
    ):
        compiled = compile_kernel(kernel, types, constants, architecture, num_warps=warps)
        found.append(describe(kernel.__name__, compiled, architecture, 4096))
    types = {"scores": "*fp32", "stride": "i32", "documents": "*i32", "values": "*fp32", "weights": "*fp32"}
    types |= dict.fromkeys(["starts", "rows", "terms"], "*i64")
    types |= {"queries": "*fp32"} | dict.fromkeys(["query", "document"], "*i64")
    dense, sparse = types | {"documents": "*fp32"}, types | {"terms": "*i32"}
    constants = {"BLOCK": 512}
    for kernel, own, shared in (
        (triton_postings.add_postings_kernel, types, 0),
        (triton_pair_scores.dense_pair_scores_kernel, dense, 64),
        (triton_pair_scores.sparse_pair_scores_kernel, sparse, 64),
    ):
        compiled = compile_kernel(kernel, own, constants, architecture, num_warps=4)
        found.append(describe(kernel.__name__, compiled, architecture, shared))
    return found


def main() -> None:
    wanted = [
        (CONFIGURATIONS[0], torch.bfloat16, 90),
        (CONFIGURATIONS[-1], torch.bfloat16, 80),
        (CONFIGURATIONS[-1], torch.float32, 89),
    ]
    if "--all" in sys.argv:
        wanted = [
            (configuration, dtype, architecture)
            for architecture in SHARED_BYTES
            for dtype in (torch.bfloat16, torch.float32)
            for configuration in CONFIGURATIONS
            if not (configuration.descriptors and architecture < 90)
            and not (configuration.logits_per_thread > 64 and (architecture not in (90, 100) or dtype == torch.float32))
            and configuration.shared_bytes <= SHARED_BYTES[architecture]
        ]
    found = [compile_maxima(*arguments) for arguments in wanted]
    for architecture in SHARED_BYTES if "--all" in sys.argv else (90,):
        found += compile_others(architecture)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
