"""Encodes the tests' texts with vLLM: prints a line of JSON for each CHECKPOINT ARCHITECTURE of the command line."""

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # vLLM's engine is another process, which imports this file
    from vllm import LLM

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_models import TEXTS

    for checkpoint, architecture in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        model = LLM(
            checkpoint,
            hf_overrides={"architectures": [architecture]},
            io_processor_plugin="lion_st",
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=16,
            gpu_memory_utilization=0.1,  # on CPUs, of the main memory
        )
        answers = {}
        for task in ("query", "document"):
            (answer,) = model.encode({"data": {"inputs": TEXTS, "prompt_name": task}}, pooling_task="plugin")
            answers[task] = answer.outputs
        print(json.dumps({"architecture": architecture, **answers}), flush=True)
        del model
