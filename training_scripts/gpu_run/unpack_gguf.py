"""Save a GGUF file as an ordinary backbone in bfloat16, which loads in seconds where several stages need it.

python training_scripts/gpu_run/unpack_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --output_dir runs/smollm2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from lion_st.modules.backbones import gguf_options
from lion_st.modules.loading import load_backbone, read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    folder, gguf = gguf_options(options.file)
    config = read_config(options.file, {})
    load_backbone("text-generation", options.file, config, {}).save_pretrained(options.output_dir)
    AutoTokenizer.from_pretrained(folder, **gguf).save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
