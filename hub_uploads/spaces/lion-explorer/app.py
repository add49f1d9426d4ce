"""The Space: what a sparse retriever makes of a query, what it finds in 2,067 Wikipedia paragraphs, and why."""

import os

from lion_st.demo import build_page, launch, load_explorer

MODEL = os.environ.get("LION_MODEL", "lion-st/lion-sp-mini")
DENSE_MODEL = os.environ.get("LION_DENSE_MODEL")  # without one, BM25 is beside the sparse model
DATA = os.environ.get("LION_DATA")

page = build_page(load_explorer(MODEL, DATA or None, DENSE_MODEL or None))

if __name__ == "__main__":
    launch(page)
