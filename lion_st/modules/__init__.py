"""sentence-transformers modules: the bidirectional decoder, the sparse head and the dense pooling."""

from __future__ import annotations

from lion_st.modules.lion_transformer import LionTransformer
from lion_st.modules.llama_pooling import LlamaPooling
from lion_st.modules.splade_head import SpladeHead

__all__ = ["LionTransformer", "LlamaPooling", "SpladeHead"]
