"""Adapt a causal language model to bidirectional attention with masked next-token prediction (MNTP).

python training_scripts/adapt_mntp.py --backbone llama-3.2-1b
python training_scripts/adapt_mntp.py --backbone path/to/model --texts a.txt.xz b.jsonl --output_dir runs/mntp

`--backbone` is a recipe (its values are the defaults), a folder or a Hub name. Options can also stand in a YAML file,
`--config my.yaml`. Run under torchrun or accelerate on several GPUs. Repeat the command to resume. `lion-st adapt`
takes the same options.
"""

from __future__ import annotations

from lion_st.errors import one_line_errors
from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.command_line import parse_mntp_arguments
from lion_st.training.runs import end_program


def main() -> None:
    result = adapt_mntp(*parse_mntp_arguments()) / "mntp.json"
    end_program(f"{result}\n{result.read_text(encoding='utf-8').rstrip()}")


if __name__ == "__main__":
    with one_line_errors("adapt_mntp.py"):
        main()
