"""Training tuples, test collections and plain text, read from where they are published."""

from lion_st.data.beir import load_beir, save_beir

__all__ = ["load_beir", "save_beir"]
