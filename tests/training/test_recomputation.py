"""`--gradient_checkpointing` has the backward pass recompute activations, and changes nothing of what is learned."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_sentences, write_tuples
from torch.nn.modules.module import register_module_forward_pre_hook

from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.arguments import MntpArguments, MntpTrainingArguments
from lion_st.training.retriever import train_retriever


@pytest.mark.parametrize("stage", ["train", "adapt"])
def test_layers_compute_once_more_and_train_the_same_without_a_warning(tiny_backbone, tmp_path, stage):
    data = write_tuples(tmp_path / "tuples.jsonl")
    text = write_sentences(tmp_path / "text.txt")
    backbone, results, calls = tiny_backbone(num_hidden_layers=1), [], []
    for recomputed in (False, True):
        output = str(tmp_path / f"{recomputed}")
        shared = dict(max_steps=2, bf16=False, save_strategy="no", gradient_checkpointing=recomputed)
        counted = []
        hook = register_module_forward_pre_hook(
            lambda module, _, counted=counted: counted.append(module.training and "MLP" in str(type(module)))
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*checkpointing")
            if stage == "train":
                train_retriever(*tiny_run(backbone, data, Path(output), use_peft=True, **shared))
            else:
                adapt_mntp(
                    MntpArguments(backbone=backbone, texts=[str(text)], block_size=16, eval_blocks=8),
                    MntpTrainingArguments(
                        output_dir=output,
                        per_device_train_batch_size=4,
                        disable_tqdm=True,
                        learning_rate=1e-3,
                        **shared,
                    ),
                )
        hook.remove()
        calls.append(sum(counted))
        results.append(load_file(Path(output, "model.safetensors")))
    assert calls[1] == 2 * calls[0] > 0
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
