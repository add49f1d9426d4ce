"""A page to explore a sparse retriever: what a query becomes, what it finds, and why.

`Explorer` holds the models and the collection and answers queries with plain data, `lion_st.demo.terms` says why a
passage matched, `lion_st.demo.markup` turns both into HTML, and `lion_st.demo.page` lays it out with Gradio (the extra
`lion-st[demo]`), which is imported when a page is built.
"""

from lion_st.demo.collection import Collection, quickstart_collection, read_collection
from lion_st.demo.explorer import Explorer, QueryError, load_explorer
from lion_st.demo.page import build_page, launch

__all__ = [
    "Collection",
    "Explorer",
    "QueryError",
    "build_page",
    "launch",
    "load_explorer",
    "quickstart_collection",
    "read_collection",
]
