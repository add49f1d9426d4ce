import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny_runs import interrupted, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import lion_st
from lion_st.data.text import read_documents
from lion_st.errors import UsageError
from lion_st.hub import merge_backbone
from lion_st.modules import LionTransformer
from lion_st.training.contract import backbone_config
from lion_st.training.mntp import MntpCollator, MntpTrainer, adapt_mntp, masked_next_token_forward
from lion_st.training.options.arguments import MntpArguments, MntpTrainingArguments
from lion_st.training.starting import build_model


def blocks(count: int, length: int, vocab_size: int = 300) -> list[dict]:
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(3, vocab_size, length)} for _ in range(count)]


def collator(**settings) -> MntpCollator:
    return MntpCollator(**(dict(vocab_size=300, mask_token_id=7, special_token_ids=[0, 1, 2]) | settings))


def test_a_fifth_of_the_tokens_is_chosen_and_becomes_mask_random_or_stays_8_to_1_to_1():
    rows = blocks(200, 500)
    batch = collator()(rows)
    assert batch["positions"].shape == batch["labels"].shape == (200, 100)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows]))
    assert torch.equal(original.gather(1, batch["positions"]), batch["labels"])
    now = batch["input_ids"].gather(1, batch["positions"])
    masked, kept = now == 7, now == batch["labels"]
    random = ~masked & ~kept
    for share, expected in ((masked, 0.8), (kept, 0.1), (random, 0.1)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.01)
    assert now[random].float().mean().item() == pytest.approx(150, abs=8)  # uniform over the vocabulary
    untouched = torch.ones_like(original, dtype=torch.bool).scatter(1, batch["positions"], False)
    assert torch.equal(batch["input_ids"][untouched], original[untouched])


def test_the_shares_of_what_the_chosen_tokens_become_can_be_set():
    rows = blocks(200, 500)
    batch = collator(random_share=0.2, kept_share=0.5)(rows)
    now = batch["input_ids"].gather(1, batch["positions"])
    assert (now == 7).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (now == batch["labels"]).float().mean().item() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"random_share \(0.6\) and kept_share \(0.5\) must be .* at most 1 together"):
        collator(random_share=0.6, kept_share=0.5)


def test_the_first_and_special_tokens_are_never_chosen():
    rows = blocks(100, 20)
    for row in rows:
        row["input_ids"][5:15] = 1
    positions = collator(mask_probability=0.4)(rows)["positions"]
    assert set(positions.unique().tolist()) == {1, 2, 3, 4, 15, 16, 17, 18, 19}


def test_a_block_is_masked_the_same_in_any_batch_and_otherwise_in_another_epoch_or_with_another_seed():
    rows = blocks(8, 50)
    mask = collator()
    whole = mask(rows)
    for name, values in mask(rows[5:6]).items():
        assert torch.equal(values[0], whole[name][5])
    mask.epoch = 1
    assert not torch.equal(mask(rows)["positions"], whole["positions"])
    assert not torch.equal(collator(seed=1)(rows)["positions"], whole["positions"])


def test_a_block_without_enough_ordinary_tokens_is_refused():
    with pytest.raises(ValueError, match=r"10 tokens has 0 that are not special tokens, fewer than the 2 to mask"):
        collator()([{"input_ids": np.ones(10, dtype=np.int64)}])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_loss_is_the_shifted_cross_entropy_of_full_logits_at_the_masked_tokens(tiny_backbone, family):
    path = tiny_backbone(family)
    batch = collator()(blocks(3, 40))
    reference = AutoModelForCausalLM.from_pretrained(path)
    reference.config.is_causal = False
    logits = reference(input_ids=batch["input_ids"], use_cache=False).logits
    labels = torch.full((3, 40), -100).scatter(1, batch["positions"], batch["labels"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()

    model = masked_next_token_forward(LionTransformer(path, transformer_task="text-generation"))
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert [tuple(shape) for shape in seen] == [(3, 8, logits.shape[-1])]
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_z_loss_draws_log_z_to_its_target_in_training_alone(tiny_backbone):
    batch = collator()(blocks(3, 40))
    path = tiny_backbone()
    plain = masked_next_token_forward(LionTransformer(path, transformer_task="text-generation")).train()(**batch).loss
    transformer = LionTransformer(path, transformer_task="text-generation")
    model = masked_next_token_forward(transformer, z_loss_weight=0.5, z_loss_target=3.0)
    logits = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: logits.append(output))
    assert model.eval()(**batch).loss.item() == pytest.approx(plain.item(), rel=1e-6)
    trained = model.train()(**batch).loss
    expected = plain + 0.5 * (logits[-1].logsumexp(-1) - 3.0).square().mean()
    assert trained.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"Line {n} of a text about lions that hunt {n * n} zebras." for n in range(300)))
    return path


def arguments(tiny_backbone, text_file: Path, output: Path, **settings) -> tuple:
    mntp = dict(backbone=tiny_backbone(), texts=[str(text_file)], block_size=32, eval_blocks=8, use_peft=False)
    training = dict(
        output_dir=str(output),
        per_device_train_batch_size=4,
        max_steps=6,
        save_steps=2,
        learning_rate=1e-3,
        bf16=False,
        disable_tqdm=True,
    )
    mntp |= {name: value for name, value in settings.items() if name in MntpArguments.__dataclass_fields__}
    training |= {name: value for name, value in settings.items() if name not in mntp}
    return MntpArguments(**mntp), MntpTrainingArguments(**training)


@pytest.mark.parametrize("use_peft", [False, True])
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(
    tiny_backbone, text_file, tmp_path, use_peft
):
    settings = dict(use_peft=use_peft, learning_rate=1e-2)
    adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "whole", **settings))
    parts = arguments(tiny_backbone, text_file, tmp_path / "parts", **settings)
    with interrupted(MntpTrainer, 6):
        adapt_mntp(*parts)
    # A checkpoint that was cut off while it was written is passed over.
    (tmp_path / "parts" / "checkpoint-5").mkdir()
    assert not (tmp_path / "parts" / "config.json").exists()
    adapt_mntp(*parts)
    whole, resumed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    start = AutoModelForCausalLM.from_pretrained(tiny_backbone())
    changed = 0
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
        changed += not torch.equal(tensor, start.state_dict()[name])
    assert changed >= 14


def test_the_result_is_a_bidirectional_backbone_for_stock_transformers_and_lion(tiny_backbone, text_file, tmp_path):
    output = adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "out", max_steps=40))
    report = json.loads((output / "mntp.json").read_text())
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.5
    assert (report["steps"], report["tokens"], report["finished"]) == (40, 40 * 4 * 32, True)
    assert report["seconds"] > 0

    stock = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = ["Lions hunt zebras.", "Lions hunt gnus."]
    first = [stock.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in texts]
    assert (first[0] - first[1]).abs().max() > 1e-3
    assert tokenizer.model_max_length == 512
    assert lion_st.build(output, "sparse", device="cpu").encode_query("lions").shape == (stock.config.vocab_size,)


def test_a_finished_run_is_reused_and_other_settings_are_refused(tiny_backbone, text_file, tmp_path, monkeypatch):
    run = arguments(tiny_backbone, text_file, tmp_path / "out", max_steps=2)
    adapt_mntp(*run)
    monkeypatch.setattr(MntpTrainer, "train", None)
    assert adapt_mntp(*run) == tmp_path / "out"
    with pytest.raises(ValueError, match=r"max_steps was 2 and is 3\. Repeat its command .* another --output_dir"):
        adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "out", max_steps=3))


def test_an_adapter_can_be_kept_apart_and_merged_later(tiny_backbone, text_file, tmp_path):
    settings = dict(use_peft=True, learning_rate=1e-2)
    adapter = adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "a", merge=False, **settings))
    assert not (adapter / "model.safetensors").exists()
    merged = adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "b", **settings))
    later = merge_backbone(adapter, tmp_path / "c")
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (merged, later))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], msg=name)


@pytest.mark.parametrize("kept", [{"num_layers": 1}, {"layers": [1]}])
def test_an_adapter_of_some_layers_is_put_on_them_alone(tiny_backbone, text_file, data, tmp_path, kept):
    settings = dict(use_peft=True, learning_rate=1e-2, max_steps=2, **kept)
    adapter = adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "a", merge=False, **settings))
    merged = adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "b", **settings))
    expected = lion_st.build(merged, "dense", device="cpu").encode_query("lions")
    run, _ = tiny_run(str(adapter), data, tmp_path / "run", "dense", "cl")
    again, _ = tiny_run(str(adapter), data, tmp_path / "again", "dense", "cl", train_adapter=True, **kept)
    for model in (
        lion_st.load(adapter, paradigm="dense", device="cpu"),
        build_model(run, "cpu", tmp_path / "run"),
        build_model(again, "cpu"),
    ):
        assert model[0].config.num_hidden_layers == 1
        np.testing.assert_allclose(model.encode_query("lions"), expected, atol=1e-5)
    assert backbone_config(str(adapter)).num_hidden_layers == 1  # which a dry run counts


def test_weights_are_trained_in_float32_and_saved_in_the_backbones_dtype(tiny_backbone, text_file, tmp_path):
    backbone = tiny_backbone(dtype="bfloat16")
    run, training = arguments(tiny_backbone, text_file, tmp_path / "out", backbone=backbone, learning_rate=1e-5)
    adapt_mntp(run, training)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-6", dtype="auto")
    assert trained.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    rounded = trained.to(torch.bfloat16).state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(rounded[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mask_token="<none>"), r"has no token '<none>'; pass a token it has with --mask_token"),
        (dict(eval_blocks=100_000), r"of which 100000 are held out: give more text or fewer --eval_blocks"),
        (dict(texts=["missing.txt"], backbone="org/of-no-one"), r"missing\.txt is not a file or folder here"),
        (dict(mask_probability=1.5), r"mask_probability must be between 0 and 1, got 1\.5"),
        (dict(fp16=True), "--fp16 needs a GPU"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing_behind(tiny_backbone, text_file, tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adapt_mntp(*arguments(tiny_backbone, text_file, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_checkpoint_to_go_on_from(tiny_backbone, text_file, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run = arguments(tiny_backbone, text_file, tmp_path / "out", max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("lion_st.training.mntp.save_merged", full)
        adapt_mntp(*run)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".lock", "checkpoint-2", "mntp.json", "trainer_state.json"]
    adapt_mntp(*run)
    assert (tmp_path / "out" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "out")


def test_texts_come_from_files_and_from_data_sets_with_a_text_column(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"title": "Three", "text": "Four."}) + "\n")
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"text": ["Five.", "", "  Six. ", None, "Seven."]}).to_parquet(tmp_path / "set" / "train.parquet")
    sources = [tmp_path / "a.txt", str(tmp_path / "b.jsonl.gz"), str(tmp_path / "set")]
    assert list(read_documents(sources, rows_per_document=2)) == [
        "One.\nTwo.",
        "Four.\nThree",
        "Five.\nSix.",
        "Seven.",
    ]
    (tmp_path / "other").mkdir()
    Dataset.from_dict({"body": ["Five."]}).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(ValueError, match=r"columns \['body'\]: it needs a column 'text'"):
        list(read_documents([tmp_path / "other"]))


def test_several_gpus_in_one_process_are_refused_before_anything_is_read(tmp_path):
    training = MntpTrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    assert training.n_gpu < 2
    training._n_gpu = 2
    with pytest.raises(UsageError, match="torchrun --nproc_per_node 2"):
        adapt_mntp(MntpArguments(backbone=str(tmp_path / "nothing"), texts=[str(tmp_path / "nothing")]), training)
