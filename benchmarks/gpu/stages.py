"""The stages of check.py that are not a benchmark's own command, each run in a process of its own.

    python benchmarks/gpu/stages.py --device cuda head first

Every finding is printed at once as a line of JSON, {"section": ..., "row": {...}}, which check.py gathers: a stage that
is stopped leaves what it had. "--device cpu" runs the same lines at toy shapes.
"""

import argparse
import contextlib
import inspect
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "dims": (64, 128), "head": ["--texts", "2", "--length", "16", "--vocabulary", "2000", "--repeats", "1"],
        "shape": "tiny", "vocabulary": 2000, "dtype": "float32", "documents": 20, "stock documents": 10,
        "training": ["--negatives", "2", "--rows", "1", "--steps", "1", "--memory-gib", "8"],
    },
    "cuda": {
        "dims": (2048, 4096), "head": ["--repeats", "10"],
        "shape": "Llama-3.2-1B", "vocabulary": 128_256, "dtype": "bfloat16", "documents": 8192, "stock documents": 1024,
        "training": ["--rows", "16", "--steps", "4"],
    },
}  # fmt: skip
ACTIVE_TERMS = 150  # of a text of the model that trains and encodes


def emit(section: str, **row: Any) -> None:
    print(json.dumps({"section": section, "row": row}, default=str), flush=True)


# ---- the machine ----


def about(device: str) -> None:
    """Versions and the card."""
    import sentence_transformers
    import torch
    import transformers

    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    found |= {"sentence-transformers": sentence_transformers.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    emit("versions", **found)
    if device == "cpu":
        emit("card", name="none: a rehearsal at toy shapes", cores=os.cpu_count())
        return
    properties = torch.cuda.get_device_properties(0)
    emit(
        "card", name=properties.name, GiB=properties.total_memory / 2**30, SMs=properties.multi_processor_count,
        cores=os.cpu_count(), CUDA=torch.version.cuda,
    )  # fmt: skip


def machine(device: str) -> None:
    """What the card can do at best."""
    if device == "cpu":
        return
    import torch
    from triton.testing import do_bench

    bench = {"warmup": 100, "rep": 400, "return_mode": "median"}
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    milliseconds = do_bench(lambda: target.copy_(source), **bench)
    emit("ceilings", what="copy, bytes read and written", value=2 * 2**31 / milliseconds / 1e9, unit="TB/s")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    milliseconds = do_bench(lambda: a @ b, **bench)
    emit("ceilings", what="bfloat16 product of 8192 x 8192", value=2 * 8192**3 / milliseconds / 1e9, unit="TFLOP/s")


def attention(device: str) -> None:
    """Our attention over packed texts beside torch's over each text: by how many % of their norm results differ."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from lion_st.modules import unpadding

    function = getattr(unpadding, "varlen_attn", None)
    emit("signatures", varlen_attn=str(inspect.signature(function)) if function else None)
    lengths, dtype = [5, 70, 33], getattr(torch, SIZES[device]["dtype"])
    bounds = torch.tensor([0, 5, 75, 108], device=device, dtype=torch.int32)
    for groups, causal in ((8, False), (8, True), (32, False)):
        q, k, v = (
            torch.randn(1, heads, 108, 64, device=device, dtype=dtype, requires_grad=True)
            for heads in (32, groups, groups)
        )
        each = [
            scaled_dot_product_attention(*parts, enable_gqa=True, is_causal=causal)
            for parts in zip(*(states.split(lengths, dim=2) for states in (q, k, v)), strict=True)
        ]
        expected = torch.cat(each, dim=2).transpose(1, 2)
        upstream = torch.randn_like(expected)
        what = f"32 query heads, {groups} key heads" + ", causal" * causal
        try:
            packed, _ = unpadding.varlen_attention(
                None, q, k, v, None, is_causal=causal, cu_seq_lens_q=bounds, max_length_q=max(lengths)
            )
            found = (packed, *torch.autograd.grad(packed, (q, k, v), upstream))
        except Exception as error:  # what torch does not offer is a finding
            emit("attention", what=what, failed=f"{type(error).__name__}: {str(error)[:200]}")
            continue
        right = (expected, *torch.autograd.grad(expected, (q, k, v), upstream))
        errors = [100 * float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, right, strict=True)]
        emit("attention", what=what, **dict(zip(("of output", "of dQ", "of dK", "of dV"), errors, strict=True)))


# ---- the sparse head ----


class Case(NamedTuple):
    """What the sides of a comparison are given."""

    name: str
    options: argparse.Namespace
    sides: list[str]


def head_cases(device: str) -> list[Case]:
    """The comparisons, the most important first."""
    import sparse_head as bench

    small, large = SIZES[device]["dims"]
    sides = ["matmul", "lion_st", "eager", "stock"]
    cases = []
    for dim, active, trains, more in (
        (small, 0.01, False, ["stock in chunks", "matmul in tiles"]),
        (large, 0.01, False, []),
        (small, 0.5, False, []),
        (small, 0.01, True, []),
        (large, 0.5, False, []),
        (large, 0.01, True, []),
    ):
        arguments = ["--device", device, "--hidden-size", str(dim), "--active", str(active), *SIZES[device]["head"]]
        name = f"D {dim}, {100 * active:g} % active" + (", gradient of W" if trains else "")
        cases.append(Case(name, bench.parse(arguments + ["--weight-gradient"] * trains), sides + more))
    return cases


def head(device: str, part: str) -> None:
    """Time the sides, and then each of our kernels.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        part: "first" and "more" cases, or "compiled" for torch.compile, which takes its time, in all cases.
    """
    cases = head_cases(device)
    if part == "compiled":
        for case in cases:
            emit("head", case=case.name, side="compiled", **figures_of("compiled", case.options))
        return
    cases = cases[:2] if part == "first" else cases[2:]
    for case in cases:
        for side in case.sides:
            emit("head", case=case.name, side=side, **figures_of(side, case.options))
    if device == "cuda":
        for case in cases:
            profile_head(case)


def figures_of(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """A side's figures, or how it failed, which stops no other."""
    import sparse_head as bench
    import torch

    try:
        return bench.run_side(side, options)
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        if options.device == "cuda":
            torch.cuda.empty_cache()
        if side == "compiled":
            torch.compiler.reset()  # or the next case's sizes would be compiled as variables


def profile_head(case: Case) -> None:
    """Milliseconds of each kernel of one forward and backward pass of ours."""
    import sparse_head as bench
    import torch

    hidden, weight, mask = bench.make_inputs(case.options)
    hidden.requires_grad_()
    weight.requires_grad_(case.options.weight_gradient)
    trained = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    pool = bench.make_head("lion_st", training=True)
    upstream = torch.randn(len(hidden), len(weight), device="cuda")

    def step() -> None:
        torch.autograd.grad(pool(hidden, weight, mask), trained, upstream)

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(kernels, key=lambda event: -event.device_time_total)[:10]:
        emit("kernels", case=case.name, kernel=event.key[:60], ms=event.device_time_total / 3000)


# ---- compiling ahead ----


def precompile(device: str, part: str) -> None:
    """Compile what the head will run into the compilers' caches, while others keep the GPU too busy to time anything.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        part: "compiled" for torch.compile, or the hidden size for which to compile our kernels.
    """
    cases = head_cases(device)
    side = "compiled"
    if part != "compiled":
        side = "lion_st"
        cases = [case for case in cases if case.options.hidden_size == int(part)]
    for case in cases:
        case.options.repeats = 1
        if side == "lion_st" and device == "cuda":
            case.options.texts = 16  # the kernels are the same, and several processes share the memory
        figures = figures_of(side, case.options)
        if "failed" in figures:
            emit("failures", stage="precompile", what=f"{side}, {case.name}", error=figures["failed"])


# ---- a model ----


def model(device: str, folder: Path) -> None:
    """A random backbone of Llama-3.2-1B's shape, and the stock checkpoint of the same sparse encoder."""
    import common

    import lion_st

    sizes = SIZES[device]
    difference = common.make_models(folder, sizes["shape"], sizes["vocabulary"], ACTIVE_TERMS, device, sizes["dtype"])
    ours = lion_st.load(folder / "stock", as_sparse_encoder=True, device=device)
    packed = getattr(ours[0], "runs_packed", "unknown")
    emit(
        "model", shape=sizes["shape"], parameters=sum(parameter.numel() for parameter in ours.parameters()),
        runs_packed=packed, difference_of_stock=difference,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument("stage", choices=["about", "machine", "attention", "head", "precompile", "model"])
    parser.add_argument("part", nargs="?", help="of the head or of what to compile; of model: the folder")
    options = parser.parse_args()
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("There is no GPU here; --device cpu rehearses at toy shapes.")
    match options.stage:
        case "about":
            about(options.device)
        case "machine":
            machine(options.device)
        case "attention":
            attention(options.device)
        case "head":
            head(options.device, options.part)
        case "precompile":
            precompile(options.device, options.part)
        case "model":
            model(options.device, Path(options.part))


if __name__ == "__main__":
    main()
