"""Training tuples, test collections and plain text, read from where they are published."""

from lion_st.data.beir import load_beir, quickstart_test_sets, save_beir
from lion_st.data.quickstart import quickstart_data
from lion_st.data.tuples import load_tuples, set_epoch

__all__ = [
    "load_beir",
    "load_tuples",
    "quickstart_data",
    "quickstart_test_sets",
    "save_beir",
    "set_epoch",
]
