"""An HTTP server for sparse, dense and hybrid models and their indexes: the interfaces of text-embeddings-inference.

The names below are imported on first use.
"""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.serving.app import create_app
    from lion_st.serving.launch import serve
    from lion_st.serving.service import Service
    from lion_st.serving.settings import ServerSettings

__all__ = ["ServerSettings", "Service", "create_app", "serve"]

__getattr__, __dir__ = attach(__name__)
