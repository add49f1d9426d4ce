"""sentence-transformers modules: the bidirectional decoder, and a head for each kind of vectors."""

from lion_st.modules.hybrid_head import HybridHead
from lion_st.modules.lion_transformer import LionTransformer
from lion_st.modules.llama_pooling import LlamaPooling
from lion_st.modules.multi_vector_head import MultiVectorHead
from lion_st.modules.splade_head import SpladeHead

__all__ = ["HybridHead", "LionTransformer", "LlamaPooling", "MultiVectorHead", "SpladeHead"]
