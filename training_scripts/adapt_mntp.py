"""Adapt a causal language model to bidirectional attention with masked next-token prediction (MNTP).

python training_scripts/adapt_mntp.py --backbone meta-llama/Llama-3.2-1B \
    --texts Salesforce/wikitext:wikitext-103-raw-v1 --output_dir runs/llama-3.2-1b-mntp

Run under torchrun or accelerate on several GPUs; repeat the command to resume.
"""

from __future__ import annotations

from trl import TrlParser

from lion_st.training.arguments import MntpArguments, MntpTrainingArguments
from lion_st.training.mntp import adapt_mntp


def main() -> None:
    parser = TrlParser((MntpArguments, MntpTrainingArguments), allow_abbrev=False)
    arguments, training_arguments = parser.parse_args_and_config()
    folder = adapt_mntp(arguments, training_arguments)
    print(folder / "mntp.json", (folder / "mntp.json").read_text(), sep="\n")


if __name__ == "__main__":
    main()
