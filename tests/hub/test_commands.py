"""The command line's commands of publication."""

import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SparseEncoder
from typer.testing import CliRunner

import lion_st
from lion_st.cli import app


@pytest.fixture
def lion():
    """`lion(*arguments)` runs the command line and returns its result."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_checkpoint_goes_from_import_over_export_to_its_card(lion, tiny_backbone, texts, tmp_path):
    imported = lion("import", tiny_backbone(), tmp_path / "in", "--contract", "laconic", "--dtype", "float32")
    assert imported.exit_code == 0, imported.output
    exported = lion("export", tmp_path / "in", tmp_path / "lion-sp", "--sparse-encoder")
    assert exported.stdout.strip() == str(tmp_path / "lion-sp"), exported.output
    stock = SparseEncoder(str(tmp_path / "lion-sp"), device="cpu")
    live = lion_st.load(tmp_path / "in", device="cpu")
    assert abs(stock.encode_query(texts).to_dense() - live.encode_query(texts, convert_to_tensor=True)).max() < 1e-5
    written = lion("card", tmp_path / "lion-sp", "--license", "mit", "--output", tmp_path / "card.md")
    assert written.exit_code == 0, written.output
    assert ModelCard.load(tmp_path / "card.md").data.license == "mit"
    again = lion("export", tmp_path / "in", tmp_path / "lion-sp")
    assert again.exit_code == 1 and "lion-st export: " in again.stderr and "overwrite" in again.stderr


def test_limits_of_terms_are_set_and_left_out_in_an_export(lion, tiny_backbone, texts, tmp_path):
    limits = ("--query-top-k", 3, "--document-top-k", 6)
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save_pretrained(str(tmp_path / "model"))
    refused = lion("export", tmp_path / "model", tmp_path / "out", *limits)
    assert refused.exit_code == 1 and "--with-limits" in refused.stderr and "--all-terms" in refused.stderr
    assert lion("export", tmp_path / "model", tmp_path / "out", *limits, "--all-terms").exit_code == 2
    assert lion("export", tmp_path / "model", tmp_path / "out", *limits, "--with-limits").exit_code == 0
    assert (lion_st.load(tmp_path / "out", device="cpu").encode_query(texts) > 0).sum() == 3 * len(texts)
    assert lion("publish", tmp_path / "out", "org/out", "--license", "mit", "--dry-run").exit_code == 1
    assert lion("export", tmp_path / "out", tmp_path / "whole", "--all-terms").exit_code == 0
    whole = SentenceTransformer(str(tmp_path / "whole"), device="cpu").encode_document(texts)
    assert (whole > 0).sum() > 6 * len(texts)


def test_publish_lists_what_it_would_publish(lion, tmp_path):
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Toy\n")
    (folder / "model.safetensors").write_bytes(bytes(2_500))
    shown = lion("publish", "--folder", folder, "org/toy", "--dry-run")
    lines = shown.stdout.splitlines()
    assert lines[:3] == [
        "org/toy, revision main: 2 files, 2.5 kB",
        "        6 B  README.md",
        "     2.5 kB  model.safetensors",
    ]
    assert lines[-1] == "# Toy"
    refused = lion("publish", "--folder", folder, "toy", "--dry-run")
    assert refused.exit_code == 1 and "Write owner/name" in refused.stderr
