"""`--torch_compile` compiles the decoder layers while a run trains, and changes nothing of what it learns."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run, write_sentences, write_tuples
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters

from lion_st.training.mntp import adapt_mntp
from lion_st.training.options.arguments import MntpArguments, MntpTrainingArguments
from lion_st.training.retriever import train_retriever


@pytest.mark.parametrize("stage", ["train", "4 bits", "adapt"])
def test_compiled_layers_train_what_others_do(tiny_backbone, tmp_path, monkeypatch, stage):
    def refuse(*_):
        raise AssertionError("A whole module is compiled.")

    monkeypatch.setattr(OptimizedModule, "__init__", refuse)
    if stage == "4 bits":
        pytest.importorskip("bitsandbytes")
    backbone = tiny_backbone(num_hidden_layers=1, hidden_size=64, intermediate_size=128, head_dim=16)
    data = write_tuples(tmp_path / "tuples.jsonl")
    text = write_sentences(tmp_path / "text.txt")
    shared = dict(max_steps=2, learning_rate=1e-3, adam_epsilon=1e-3, bf16=False, save_strategy="no")
    torch._dynamo.reset()
    counters.clear()
    results = []
    for name, compiled in (("plain", {}), ("compiled", {"torch_compile_backend": "aot_eager"})):
        output = tmp_path / name
        if stage != "adapt":
            mini_batch_size = 2 if stage == "train" else None  # a forward without gradients is one more to compile
            settings = dict(mini_batch_size=mini_batch_size, use_peft=True, lora_target_modules=["q_proj"])
            settings |= dict(query_length=8, document_length=8) | shared | compiled  # of one length: less to compile
            settings["load_in_4bit"] = stage == "4 bits"
            train_retriever(*tiny_run(backbone, data, output, **settings))
        else:
            settings = dict(output_dir=str(output), per_device_train_batch_size=4, disable_tqdm=True)
            adapt_mntp(
                MntpArguments(
                    backbone=backbone, texts=[str(text)], block_size=16, eval_blocks=8, lora_target_modules=["q_proj"]
                ),
                MntpTrainingArguments(**settings, **shared, **compiled),
            )
        results.append(load_file(Path(output, "model.safetensors")))
        assert (counters["stats"]["unique_graphs"] > 0) == bool(compiled)
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
