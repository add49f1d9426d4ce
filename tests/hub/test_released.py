"""Released checkpoints become stock ones with their authors' vectors."""

import json
import os
import shutil
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import ModelCard, constants, hf_api
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lion_st
from lion_st.cli import app
from lion_st.hub import Contract, import_released, merge_backbone, render_card

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_case() -> Path:
    """One golden case where its shape does not matter."""
    return GOLDEN / "h64_tied_rope_default"


@pytest.fixture(scope="module")
def one_backbone(one_case, tiny_backbone, tmp_path_factory) -> Path:
    """Its model beside a tokenizer."""
    path = tmp_path_factory.mktemp("backbone") / "model"
    shutil.copytree(one_case / "model", path)
    for file in Path(tiny_backbone()).glob("*token*"):
        shutil.copy(file, path)
    return path


def golden_vectors(folder, case, batch):
    """Vectors of a stock model for a golden batch of token ids."""
    inputs = load_file(case / "inputs.safetensors")
    features = {name: inputs[f"{batch}.{name}"] for name in ("input_ids", "attention_mask")}
    model = SentenceTransformer(str(folder), device="cpu").eval()
    with torch.no_grad():
        return model(features | {"logits_to_keep": 0})["sentence_embedding"]


@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_the_papers_adapters_give_golden_vectors_as_stock_checkpoints(golden_case, golden_backbone, paradigm, tmp_path):
    folder = import_released(golden_case / f"lora_{paradigm}", golden_backbone, tmp_path / "out")
    golden = load_file(golden_case / "lora_reps.safetensors")
    for batch in ("mixed_left", "nopad"):
        expected = golden[f"{paradigm}.{batch}.merged"]
        torch.testing.assert_close(golden_vectors(folder, golden_case, batch), expected, rtol=0, atol=TOLERANCE)
    stock = SentenceTransformer(str(folder), device="cpu")
    assert stock.tokenizer.padding_side == "left" and stock.tokenizer("a")["input_ids"][0] == 0
    assert (stock[0].query_length, stock[0].document_length) == (64, 192)
    assert not list(folder.rglob("*.bin"))


def test_weights_in_a_bin_are_read_without_unpickling_anything_else(one_case, one_backbone, tmp_path):
    adapter = shutil.copytree(one_case / "lora_sparse", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    folder = import_released(adapter, one_backbone, tmp_path / "out")
    expected = load_file(one_case / "lora_reps.safetensors")["sparse.nopad.merged"]
    torch.testing.assert_close(golden_vectors(folder, one_case, "nopad"), expected, rtol=0, atol=TOLERANCE)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"weight": Code()}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="hold more than tensors"):
        import_released(adapter, one_backbone, tmp_path / "other")
    assert not (tmp_path / "it ran").exists() and not (tmp_path / "other").exists()


def edited(folder: Path, target: Path, file: str, **changes) -> Path:
    shutil.copytree(folder, target)
    settings = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps(settings | changes))
    return target


def test_a_base_on_its_authors_machine_must_be_named(one_case, tmp_path):
    path = "/gone/checkpoints/llama3-8b-mntp"
    adapter = edited(one_case / "lora_sparse", tmp_path / "a", "adapter_config.json", base_model_name_or_path=path)
    with pytest.raises(FileNotFoundError, match=rf"{path}', which cannot be read.*base="):
        import_released(adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_say_what_they_are_for_are_refused(one_case, one_backbone, tmp_path):
    silent = edited(one_case / "lora_dense", tmp_path / "silent", "adapter_config.json", auto_mapping=None)
    with pytest.raises(ValueError, match=r"does not say what it was trained for .*paradigm"):
        import_released(silent, one_backbone, tmp_path / "out")
    with pytest.raises(ValueError, match=r"is not in its files, and no contract was given"):
        import_released(silent, one_backbone, tmp_path / "out", paradigm="dense")
    folder = import_released(silent, one_backbone, tmp_path / "out", paradigm="dense", contract="lion")
    expected = load_file(one_case / "lora_reps.safetensors")["dense.nopad.merged"]
    torch.testing.assert_close(golden_vectors(folder, one_case, "nopad"), expected, rtol=0, atol=TOLERANCE)


def test_an_mntp_adapter_is_a_backbone_to_start_from(one_case, one_backbone, tmp_path):
    """LLM2Vec's adapters have the paper's dense layout: the keys lack the inner `model.`."""
    classes = {"base_model_class": "LlamaEncoderModel", "parent_library": "llm2vec.models.bidirectional_llama"}
    adapter = edited(one_case / "lora_dense", tmp_path / "mntp", "adapter_config.json", auto_mapping=classes)
    with pytest.raises(ValueError, match=r"MNTP adapter of LLM2Vec.*merge_backbone"):
        import_released(adapter, one_backbone, tmp_path / "out")
    backbone = merge_backbone(adapter, tmp_path / "backbone", base=one_backbone)
    model = lion_st.build(backbone, "dense", device="cpu")
    expected = load_file(one_case / "lora_reps.safetensors")["dense.nopad.merged"]
    inputs = load_file(one_case / "inputs.safetensors")
    features = {name: inputs[f"nopad.{name}"] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        actual = model.eval()(features)["sentence_embedding"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert lion_st.build(backbone, "sparse", device="cpu").encode("lion").shape == (512,)


def licensed(folder: Path, target: Path, license: str) -> Path:
    shutil.copytree(folder, target)
    (target / "README.md").write_text(f"---\nlicense: {license}\n---\n# Card\n")
    return target


def test_the_licence_is_that_of_the_weights_merged_in(one_case, one_backbone, tmp_path):
    base = licensed(one_backbone, tmp_path / "base", "llama3.2")
    folder = import_released(one_case / "lora_dense", base, tmp_path / "out")
    assert ModelCard.load(folder / "README.md").data.license == "llama3.2"
    adapter = licensed(one_case / "lora_dense", tmp_path / "adapter", "mit")
    folder = import_released(adapter, base, tmp_path / "other")
    assert ModelCard.load(folder / "README.md").data.license == "llama3.2"
    assert "# other" in (folder / "README.md").read_text() and "mteb run" not in (folder / "README.md").read_text()


def test_an_import_from_the_hub_names_the_adapter_and_its_base(
    connected, one_case, one_backbone, tmp_path, monkeypatch
):
    monkeypatch.setattr(hf_api.api, "endpoint", connected.url)  # peft asks this client, which is older than the Hub
    connected.add("org/base", licensed(one_backbone, tmp_path / "base", "llama3.2"))
    settings = {"base_model_name_or_path": "org/base"}
    adapter = edited(one_case / "lora_dense", tmp_path / "adapter", "adapter_config.json", **settings)
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    connected.add("org/adapter", adapter)
    folder = import_released("org/adapter", output=tmp_path / "out")
    metadata = ModelCard.load(folder / "README.md").data
    assert (metadata.license, metadata.base_model) == ("llama3.2", ["org/adapter", "org/base"])
    again = ModelCard(render_card(folder, "org/mine", offline=False)).data
    assert (again.license, again.base_model) == ("llama3.2", ["org/adapter", "org/base"])


# ---- merged checkpoints ----


def laconic_vectors(path: str, texts: list[str]) -> torch.Tensor:
    """What LACONIC computes: no beginning-of-sequence token, attention in both directions, no scale on the logits."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.config.is_causal = False
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            rows.append(model(ids).logits.max(dim=1).values.relu().log1p()[0])
    return torch.stack(rows)


def test_a_merged_checkpoint_needs_its_contract(tiny_backbone, texts, tmp_path):
    backbone = Path(tiny_backbone())
    released = edited(backbone, tmp_path / "laconic-1b", "config.json", architectures=["LlamaBiForMNTP"])
    for file in released.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no contract was given.*'laconic'"):
        import_released(released, backbone, tmp_path / "out")
    folder = import_released(released, backbone, tmp_path / "out", contract="laconic")
    stock = SentenceTransformer(str(folder), device="cpu")
    for task, prompt in (("query", "query: "), ("document", "passage: ")):
        actual = getattr(stock, f"encode_{task}")(texts, convert_to_tensor=True)
        expected = laconic_vectors(str(backbone), [prompt + text for text in texts])
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert lion_st.load(folder, device="cpu").tokenizer("a")["input_ids"] == stock.tokenizer("a")["input_ids"]


def test_a_contract_of_ones_own(tiny_backbone, texts, tmp_path):
    contract = Contract(scale=2.0, query_prompt="q: ", query_length=20)
    folder = import_released(tiny_backbone(), output=tmp_path / "out", contract=contract, model_type="SparseEncoder")
    model = lion_st.build(tiny_backbone(), "sparse", scale=2.0, query_prompt="q: ", query_length=20, device="cpu")
    loaded = lion_st.load(folder, device="cpu")
    assert abs(loaded.encode_query(texts) - model.encode_query(texts)).max() < TOLERANCE
    assert "SparseEncoder" in (folder / "config_sentence_transformers.json").read_text()


def test_the_command_knows_repllamas_contract_and_that_it_is_dense(tiny_backbone, texts, tmp_path):
    from lion_st.training.published import published_recipe

    command = ["import", tiny_backbone(), str(tmp_path / "out"), "--contract", "repllama"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    names = ("causal", "add_eos", "pooling", "normalize", "query_prompt", "query_length", "document_length")
    recipe = vars(published_recipe("repllama"))
    model = lion_st.build(tiny_backbone(), "dense", device="cpu", **{name: recipe[name] for name in names})
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode_query(texts)
    assert abs(found - model.encode_query(texts)).max() < TOLERANCE
    with pytest.raises(ValueError, match=r"paradigm must be one of .*, got 'hybrid'"):
        import_released(tiny_backbone(), contract="lion", paradigm="hybrid")


def test_a_saved_retriever_keeps_its_own_contract_and_a_missing_one_is_named(tiny_backbone, texts, tmp_path):
    model = lion_st.build(tiny_backbone(), "dense", query_prompt="q: ", device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    folder = import_released(tmp_path / "saved", output=tmp_path / "out")
    assert abs(lion_st.load(folder, device="cpu").encode_query(texts) - model.encode_query(texts)).max() < TOLERANCE
    assert "# out" in (folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="neither an adapter_config"):
        import_released(tmp_path, output=tmp_path / "other")


# ---- the gated weights ----

QUERIES = ["What is the capital of France?", "Who wrote '1984'?"]
PASSAGES = ["Paris is the capital of France.", "George Orwell wrote '1984'."]
SCORES = {
    "SP": [[14.835160, 0.026406], [0.005473, 13.909823]],
    "DS": [[0.287761, 0.132120], [0.104066, 0.292190]],
}


@pytest.mark.parametrize("name", ["SP", "DS"])
def test_the_released_1b_models_give_their_authors_scores(name, tmp_path):
    repository = f"hzeng/Lion-{name}-1B-llama3-marco-mntp"
    try:
        socket.create_connection((urlsplit(constants.ENDPOINT).hostname, 443), timeout=1).close()
        folder = import_released(repository, output=tmp_path / "out", dtype="float32")
    except OSError as error:
        pytest.skip(f"{repository} or its base cannot be reached: {str(error).splitlines()[0]}")
    assert repository in ModelCard.load(folder / "README.md").data.base_model
    model = SentenceTransformer(str(folder))
    scores = model.encode_query(QUERIES) @ model.encode_document(PASSAGES).T
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(SCORES[name]), rtol=1e-3, atol=1e-3)
