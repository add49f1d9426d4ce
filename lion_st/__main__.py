"""`python -m lion_st`, which torchrun can start: `torchrun --nproc_per_node 4 -m lion_st train ...`."""

from lion_st.cli import app

app(prog_name="lion-st")
