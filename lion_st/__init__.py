"""lion_st: sparse (Lion-SP), dense (Lion-DS) and multi-vector retrievers from decoder-only language models.

The names below are imported on first use, so that `import lion_st` costs next to nothing.
"""

import logging
from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.exporting import export
    from lion_st.kernels import splade_pool
    from lion_st.losses import CachedContrastiveDistillationLoss, ContrastiveDistillationLoss, FlopsRegularizer
    from lion_st.models import build, load, paradigm_of
    from lion_st.modules import HybridHead, LionTransformer, LlamaPooling, MultiVectorHead, SpladeHead

__version__ = "0.1.0"

__all__ = [
    "CachedContrastiveDistillationLoss",
    "ContrastiveDistillationLoss",
    "FlopsRegularizer",
    "HybridHead",
    "LionTransformer",
    "LlamaPooling",
    "MultiVectorHead",
    "SpladeHead",
    "__version__",
    "build",
    "export",
    "load",
    "paradigm_of",
    "splade_pool",
]

__getattr__, __dir__ = attach(__name__)

# bitsandbytes, which peft imports where it is installed, warns in every process of a CPU kernel that it does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
