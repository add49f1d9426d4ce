"""Liger's Triton kernels in a backbone's decoder layers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lion_st.extras import require

KERNELS = ("rope", "rms_norm", "swiglu", "geglu")


@contextmanager
def liger_kernels(model: PreTrainedModel, **kernels: bool) -> Iterator[None]:
    """Run RMSNorm, the gated MLP and rotary embeddings with Liger's kernels, on a GPU, until the block ends.

    The LM head and the loss stay as they are: Liger's are those of a causal language model. So does what else the
    process makes of the same architecture, but for rotary embeddings, which are one function for all of its models.

    References:
        Hsu et al., Liger Kernel, 2024: https://arxiv.org/abs/2410.10989.
    """
    patches = require("liger_kernel.transformers.monkey_patch")
    kind = model.config.model_type
    if kind not in patches.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"Liger has no kernels for {kind!r}: leave out use_liger_kernel; torch_compile takes any architecture."
        )
    namespace: Any = vars(sys.modules[type(model).__module__])
    names, methods = dict(namespace), {module: set(vars(module)) for module in model.modules()}
    apply = patches.MODEL_TYPE_TO_APPLY_LIGER_FN[kind]
    takes = inspect.signature(apply).parameters
    settings = {"cross_entropy": False, "fused_linear_cross_entropy": False, **kernels}
    try:
        apply(model=model, **{name: value for name, value in settings.items() if name in takes})
        _restore(namespace, names, classes_alone=True)
        yield
    finally:
        _restore(namespace, names)
        for module, before in methods.items():
            for name in vars(module).keys() - before:
                del vars(module)[name]


def _restore(namespace: dict[str, Any], names: dict[str, Any], classes_alone: bool = False) -> None:
    """Give names of a module their values back."""
    for name, value in names.items():
        if namespace[name] is not value and (isinstance(value, type) or not classes_alone):
            namespace[name] = value
