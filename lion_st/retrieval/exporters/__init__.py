"""Encoded corpora in the forms that other search engines read."""

from typing import TYPE_CHECKING

from lion_st.lazy import attach

if TYPE_CHECKING:
    from lion_st.retrieval.exporters.convert import FORMATS, Conversion, convert_index

__all__ = ["FORMATS", "Conversion", "convert_index"]

__getattr__, __dir__ = attach(__name__)
