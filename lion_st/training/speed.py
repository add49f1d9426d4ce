"""What makes the decoder layers faster while a run trains: compilation, Liger's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import TrainingArguments

from lion_st.modules.compilation import compile_layers, release_layers
from lion_st.modules.liger import liger_kernels
from lion_st.training.sharding import backbone_of


@contextmanager
def faster_layers(model: Any, arguments: TrainingArguments) -> Iterator[None]:
    """Run a model's decoder layers as `torch_compile` and `use_liger_kernel` say, until the block ends.

    transformers' own way of both is left out: it compiles the whole model, and has Liger replace the forward pass of a
    language model, or nothing of a sentence-transformers model.
    """
    backbone = backbone_of(model)
    liger, arguments.use_liger_kernel = arguments.use_liger_kernel, False
    with ExitStack() as stack:
        stack.callback(setattr, arguments, "use_liger_kernel", liger)
        if liger:
            stack.enter_context(liger_kernels(backbone, **(arguments.liger_kernel_config or {})))
        if arguments.torch_compile:
            stack.callback(release_layers, backbone)
            compile_layers(backbone, str(arguments.torch_compile_backend), arguments.torch_compile_mode)
        yield
