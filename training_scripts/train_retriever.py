"""Fine-tune a sparse (Lion-SP) or dense (Lion-DS) retriever with one of the paper's recipes.

python training_scripts/train_retriever.py --backbone llama-3.2-1b --paradigm sparse --objective cl_kd
torchrun --nproc_per_node 4 training_scripts/train_retriever.py --config training_scripts/configs/lion_sp_8b.yaml

`lion-st recipes` lists the recipes. Options on the command line come before those of the YAML file, and those before
the recipe. `--dry_run` prints the resolved settings and their estimated cost. Repeat the command to resume.
"""

from __future__ import annotations

from lion_st.training.arguments import parse_retriever_arguments
from lion_st.training.retriever import describe_run, train_retriever


def main() -> None:
    arguments, training_arguments = parse_retriever_arguments()
    report = (describe_run if arguments.dry_run else train_retriever)(arguments, training_arguments)
    if training_arguments.process_index == 0:
        print(report)


if __name__ == "__main__":
    main()
