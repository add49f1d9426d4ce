"""`python -m lion_st.cli`, which torchrun can start."""

from lion_st.cli import app

app(prog_name="lion-st")
