"""`python -m lion_st.cli`, as `python -m lion_st`."""

from lion_st.cli import app

app(prog_name="lion-st")
