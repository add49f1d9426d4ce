"""The command line's commands of publication."""

from commands import lion
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer, SparseEncoder

import lion_st


def test_a_checkpoint_goes_from_import_over_export_to_its_card(tiny_backbone, texts, tmp_path):
    lion("import", tiny_backbone(), tmp_path / "in", "--contract", "laconic", "--dtype", "float32")
    exported = lion("export", tmp_path / "in", tmp_path / "lion-sp", "--sparse-encoder")
    assert exported.strip() == str(tmp_path / "lion-sp")
    stock = SparseEncoder(str(tmp_path / "lion-sp"), device="cpu")
    live = lion_st.load(tmp_path / "in", device="cpu")
    assert abs(stock.encode_query(texts).to_dense() - live.encode_query(texts, convert_to_tensor=True)).max() < 1e-5
    lion("card", tmp_path / "lion-sp", "--license", "mit", "--output", tmp_path / "card.md")
    assert ModelCard.load(tmp_path / "card.md").data.license == "mit"
    again = lion("export", tmp_path / "in", tmp_path / "lion-sp", exit_code=1)
    assert "lion-st export: " in again and "overwrite" in again


def test_limits_of_terms_are_set_and_left_out_in_an_export(tiny_backbone, texts, tmp_path):
    limits = ("--query-max-active-dims", 3, "--document-max-active-dims", 6)
    lion_st.build(tiny_backbone(), "sparse", device="cpu").save_pretrained(str(tmp_path / "model"))
    export = ("export", tmp_path / "model", tmp_path / "out", *limits)
    refused = lion(*export, exit_code=1)
    assert "--with-limits" in refused and "--all-terms" in refused
    lion(*export, "--all-terms", exit_code=2)
    lion(*export, "--with-limits")
    assert (lion_st.load(tmp_path / "out", device="cpu").encode_query(texts) > 0).sum() == 3 * len(texts)
    lion("publish", tmp_path / "out", "org/out", "--license", "mit", "--dry-run", exit_code=1)
    lion("export", tmp_path / "out", tmp_path / "whole", "--all-terms")
    whole = SentenceTransformer(str(tmp_path / "whole"), device="cpu").encode_document(texts)
    assert (whole > 0).sum() > 6 * len(texts)


def test_publish_lists_what_it_would_publish(tmp_path):
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Toy\n")
    (folder / "model.safetensors").write_bytes(bytes(2_500))
    lines = lion("publish", "--folder", folder, "org/toy", "--dry-run").splitlines()
    assert lines[:3] == [
        "org/toy, revision main: 2 files, 2.5 kB",
        "        6 B  README.md",
        "     2.5 kB  model.safetensors",
    ]
    assert lines[-1] == "# Toy"
    assert "Write owner/name" in lion("publish", "--folder", folder, "toy", "--dry-run", exit_code=1)
