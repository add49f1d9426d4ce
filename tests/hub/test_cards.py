"""Cards state what was measured or lies in a file, and nothing else."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from commands import lion
from huggingface_hub import ModelCard
from recipe_cards import render_recipe_card

import lion_st
from lion_st.data.beir import save_beir
from lion_st.evaluation import evaluate_retrieval
from lion_st.files import is_hub_name
from lion_st.hub import render_card
from lion_st.hub.card_data import (
    EXPANDED_QUERY,
    SAMPLE_DOCUMENTS,
    SAMPLE_QUERIES,
    card_data,
)
from lion_st.hub.results import task_scores
from lion_st.training.progress.record import RunLog
from lion_st.training.recipes import get_recipe

ROOT = Path(__file__).parents[2]
EMISSIONS = "timestamp,duration,emissions,gpu_model,cpu_model\n2026-01-01,1800,0.25,,Some CPU\n"


TABLE = ("ndcg_at_10", "mrr_at_10", "recall_at_100")


def rows_of(text: str) -> list[list[str]]:
    """Cells of a Markdown table's rows."""
    return [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]


def section(card: str, title: str) -> str:
    _, _, rest = card.partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone, tmp_path_factory) -> Path:
    """A sparse checkpoint with all that training and evaluation leave beside it."""
    base = tmp_path_factory.mktemp("base") / "lion-tiny-base"
    shutil.copytree(tiny_backbone(), base)
    (base / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en, de]\n---\n# Base\n")
    folder = tmp_path_factory.mktemp("card") / "lion-sp-tiny"
    lion_st.export(lion_st.build(base, "sparse", device="cpu"), folder)
    settings = {
        "backbone": "micro",
        "model": str(base),
        "learning_rate": 5e-4,
        "regularizer_warmup_ratio": 1 / 3,
        "files": [str(base / "tuples.jsonl"), "C:\\data\\more.jsonl", "~/mine.jsonl"],
        "train_data": "org/tuples",
        "seed": None,
    }
    record = RunLog(folder / "training.json", settings)
    record.update(steps=560, seconds=1800.0, floating_point_operations=1.5e15, finished=True)
    (folder / "emissions.csv").write_text(EMISSIONS)
    documents = {f"d{n}": {"title": "", "text": text} for n, text in enumerate(SAMPLE_DOCUMENTS)}
    queries = {f"q{n}": text for n, text in enumerate(SAMPLE_QUERIES)}
    save_beir(folder.parent / "toy", documents, queries, {f"q{n}": {f"d{n}": 1} for n in range(8)})
    for model in (folder, "bm25"):
        evaluate_retrieval(model, folder.parent / "toy", output_dir=folder / "results")
    return folder


@pytest.fixture(scope="module")
def card(checkpoint) -> str:
    return render_card(checkpoint, "org/lion-sp-tiny", base_model="org/tiny-base")


def test_the_metadata_say_what_the_checkpoint_is(card, connected):
    ModelCard(card).validate()
    metadata = ModelCard(card).data.to_dict()
    assert metadata["library_name"] == "sentence-transformers"
    assert metadata["pipeline_tag"] == "feature-extraction"
    assert {"sparse-encoder", "splade", "lion-st"} <= set(metadata["tags"])
    assert metadata["base_model"] == "org/tiny-base" and metadata["base_model_relation"] == "finetune"
    assert metadata["datasets"] == ["org/tuples"]
    assert metadata["co2_eq_emissions"] == {
        "emissions": 250.0,
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "hours_used": 0.5,
        "hardware_used": "Some CPU",
    }


def test_results_are_those_of_the_files_with_bm25_beside(card, checkpoint):
    measured = {}
    for file in checkpoint.rglob("toy.json"):
        content = json.loads(file.read_text())
        measured["bm25" if "bm25" in str(file) else "model"] = content["scores"]["test"][0]
    results = {result.metric_type: result for result in ModelCard(card).data.eval_results}
    assert set(results) == {"ndcg_at_10", "mrr_at_10", "recall_at_100", "recall_at_1000", "map_at_1000"}
    for metric, result in results.items():
        assert result.metric_value == measured["model"][metric]
        assert (result.dataset_name, result.dataset_split) == ("toy", "test")
    rows_file = next(file for file in (checkpoint / "results/rows").iterdir() if "bm25" not in file.name)
    rows = json.loads(rows_file.read_text())
    cells = [cell.strip() for cell in rows_of(section(card, "Results"))[0]]
    scores = [f"{measured[who][metric]:.3f}" for metric in TABLE for who in ("model", "bm25")]
    assert cells == ["toy", *scores, *(f"{rows[0][name]:,.0f}" for name in ("query_terms", "document_terms"))]


def test_sparsity_and_expansion_are_the_models_own(card, checkpoint):
    stock = lion_st.load(checkpoint, device="cpu")
    active = [float((stock.encode(list(texts)) > 0).sum(1).mean()) for texts in (SAMPLE_QUERIES, SAMPLE_DOCUMENTS)]
    assert f"{active[0]:.1f} terms of a query and {active[1]:.1f} of a document are active" in card
    vector = stock.encode_query(EXPANDED_QUERY, convert_to_tensor=True)
    shown = {name.strip(): float(weight) for name, weight in rows_of(section(card, "What a query is expanded to"))}
    assert list(shown.values()) == sorted(shown.values(), reverse=True) and len(shown) == 12
    own = {name.strip("*") for name in shown if name.startswith("**")}
    assert own <= set(EXPANDED_QUERY.split())
    for word in own:  # with those of its pieces that no earlier word has, and its other spellings
        pieces = {token for text in (f" {word}", word, word.title(), f" {word.title()}")
                  for token in stock.tokenizer(text, add_special_tokens=False)["input_ids"]}  # fmt: skip
        assert shown[f"**{word}**"] <= float(vector[list(pieces)].sum()) + 0.005
    assert "\ufffd" not in own


def test_training_is_told_without_anybodys_folders(card, checkpoint):
    training = section(card, "Training")
    assert "560 steps, 0.50 hours, 1.5e+15 floating point operations, 250.0 g of CO2" in training
    assert "| learning_rate | 0.0005 |" in training and "seed" not in training
    settings = json.loads((checkpoint / "training.json").read_text())["settings"]
    assert "| regularizer_warmup_ratio | 0.333333 |" in training
    assert "| files | tuples.jsonl, more.jsonl, mine.jsonl |" in training
    assert settings["model"] not in card and f"| model | {Path(settings['model']).name} |" in training


def test_what_nothing_backs_is_left_out(tiny_backbone, tmp_path):
    model = lion_st.build(tiny_backbone("qwen3"), "dense", query_prompt="query: ", device="cpu")
    lion_st.export(model, tmp_path / "lion-ds-tiny")
    (tmp_path / "lion-ds-tiny" / "training.json").write_text(json.dumps({"settings": {"model": "x"}, "steps": 3}))
    card = render_card(tmp_path / "lion-ds-tiny")
    metadata = ModelCard(card).data.to_dict()
    assert not {"license", "model-index", "co2_eq_emissions", "datasets", "language", "base_model"} & metadata.keys()
    assert metadata["pipeline_tag"] == "sentence-similarity"
    for absent in ("## Results", "## Training", "expanded to", "SparseEncoder(", "steps", "Licence", "seismic"):
        assert absent not in card
    assert "| Prompts | query: `query: ` |" in card and "32 dimensions" in card


def test_the_licence_and_languages_are_the_bases(checkpoint, tmp_path):
    card = render_card(checkpoint, "org/lion-sp-tiny")
    metadata = ModelCard(card).data.to_dict()
    # The training record names the base's folder, whose card has them, and its recipe, whose backbone has a Hub name.
    assert metadata["base_model"] == "lion-st/lion-micro-base"
    assert metadata["license"] == "llama3.2" and metadata["language"] == ["en", "de"]


def test_results_of_two_models_are_refused(checkpoint, tmp_path):
    folder = tmp_path / "mine"
    evaluate_retrieval(checkpoint, checkpoint.parent / "toy", output_dir=folder / "results", name="another")
    with pytest.raises(ValueError, match=r"of several models: lion_st/another, lion_st/lion-sp-tiny"):
        render_card(checkpoint, results=[folder])


def measured_again(checkpoint: Path, target: Path, engine: str = "exact", task: str = "toy", **changes) -> Path:
    """A copy of the checkpoint's result on toy, of another engine, with other settings or on another test set."""
    (file,) = (file for file in checkpoint.rglob("toy.json") if "bm25" not in str(file))
    target.mkdir()
    content = json.loads(file.read_text())
    content["task_name"] = task
    content["scores"]["test"][0]["ndcg_at_10"] = 0.123
    (target / f"{task}.json").write_text(json.dumps(content))
    meta = json.loads((file.parent / "model_meta.json").read_text())
    settings = meta["experiment_kwargs"] | {"engine": engine, **changes.pop("settings", {})}
    (target / "model_meta.json").write_text(json.dumps(meta | {"experiment_kwargs": settings, **changes}))
    return target


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "0" * 40},  # other weights, another type of them, or a quantized index
        {"settings": {"top_k": 10}},
        {"settings": {"self_matches": "keep"}},
        {},  # the same settings, and yet another score
    ],
)
def test_two_measurements_on_one_test_set_are_refused(checkpoint, tmp_path, changes):
    other = measured_again(checkpoint, tmp_path / "other", **changes)
    message = rf"several results of lion_st/lion-sp-tiny on toy: .*toy\.json, {other}/toy\.json\. .*--results"
    with pytest.raises(ValueError, match=message):
        render_card(checkpoint, results=[other])
    (alone,) = task_scores([other / "toy.json"])
    assert alone.scores["ndcg_at_10"] == 0.123


def test_of_several_engines_over_the_same_vectors_the_exact_one_counts(checkpoint, card, tmp_path):
    other = measured_again(checkpoint, tmp_path / "other", engine="seismic")
    again = render_card(checkpoint, "org/lion-sp-tiny", base_model="org/tiny-base", results=[other, checkpoint])
    assert again == card


def test_figures_of_another_model_are_not_shown_and_missing_results_are_refused(checkpoint, tmp_path):
    (file,) = (file for file in (checkpoint / "results/rows").iterdir() if "bm25" not in file.name)
    rows = json.loads(file.read_text())
    (tmp_path / "older.json").write_text(json.dumps([row | {"model": "another", "query_terms": 1.0} for row in rows]))
    assert task_scores([checkpoint, tmp_path / "older.json"]) == task_scores([checkpoint])
    with pytest.raises(FileNotFoundError, match=r"no results at .*nowhere"):
        render_card(checkpoint, results=[tmp_path / "nowhere"])


def test_files_and_folders_are_not_linked_as_repositories(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tuples").touch()
    for local in ("data/train.jsonl", "mine/train.parquet", "runs/gone", "mine/tuples", "a/b/c", "./a", "/a", "~/a"):
        assert not is_hub_name(local), local
    for name in ("org/tuples", "meta-llama/Llama-3.2-1B"):
        assert is_hub_name(name), name
    folder = shutil.copytree(checkpoint, tmp_path / "lion-sp-tiny")
    record = json.loads((folder / "training.json").read_text())
    record["settings"] |= {"train_data": "mine/train.jsonl.gz", "model": "runs/my-mntp", "backbone": None}
    (folder / "training.json").write_text(json.dumps(record))
    metadata = ModelCard(render_card(folder, "org/lion-sp-tiny")).data
    assert metadata.datasets is None and metadata.base_model is None


def test_a_folders_card_says_how_to_use_a_folder(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "lion-sp-tiny")
    monkeypatch.chdir(tmp_path)
    usage = section(render_card("lion-sp-tiny"), "Use")
    assert "mteb run" not in usage and "revision" not in usage
    assert "\nlion-st evaluate lion-sp-tiny --data SciFact\n" in usage
    (command,) = re.findall(r"^lion-st (export .*)$", usage, re.MULTILINE)
    lion(*shlex.split(command))
    blocks = [block for block in re.findall(r"```python\n(.*?)```", usage, re.DOTALL) if "import lion_st" not in block]
    assert len(blocks) == 2
    other = section(render_card("lion-sp-tiny-sparse-encoder"), "Use")
    blocks += [block for block in re.findall(r"```python\n(.*?)```", other, re.DOTALL) if "import lion_st" not in block]
    assert len(blocks) == 3 and 'SparseEncoder("lion-sp-tiny-sparse-encoder")' in blocks[2]
    for block in blocks:
        exec(block, {})


def test_the_quickstart_leaves_its_results_where_the_card_finds_them(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # the script sets it where it is not set
    specification = importlib.util.spec_from_file_location("quickstart", ROOT / "training_scripts" / "quickstart.py")
    quickstart = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)
    specification.loader.exec_module(quickstart)
    folder = shutil.copytree(checkpoint, tmp_path / "lion-sp-tiny", ignore=shutil.ignore_patterns("results"))
    arguments = quickstart.QuickstartArguments(output_dir=str(tmp_path))
    data = [checkpoint.parent / "toy"]
    _, lexical = quickstart.evaluate(arguments, "bm25", data)
    for _ in range(2):  # the second model of this name takes the first one's place
        rows, own = quickstart.evaluate(arguments, lion_st.load(folder, dtype=quickstart.DTYPE), data)
        quickstart.keep_results(folder, [own, lexical], rows)
        results = section(render_card(folder, "org/lion-sp-tiny"), "Results")
        cells = dict(zip(re.findall(r"[^|]+", results.splitlines()[1]), rows_of(results)[0], strict=True))
        assert float(cells[" nDCG@10 "]) == round(rows[0]["nDCG@10"], 3) and " BM25 nDCG@10 " in cells
        assert cells[" terms a document "].strip() == f"{rows[0]['document_terms']:,.0f}"
        assert f"this model in {str(quickstart.DTYPE).removeprefix('torch.')}" in results
        config = json.loads((folder / "config_sentence_transformers.json").read_text())
        config["prompts"]["query"] = "another "
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))


def test_the_micro_backbone_is_not_a_model_to_generate_text_with():
    metadata = ModelCard.load(ROOT / "hub_uploads" / "models" / "lion-micro-base" / "README.md").data
    assert metadata.pipeline_tag == "feature-extraction"


@pytest.mark.parametrize("backbone", ["llama-3.2-1b", "llama-3.2-3b", "llama-3-8b"])
@pytest.mark.parametrize("paradigm", ["sparse", "dense"])
def test_the_cards_of_the_papers_models_are_marked_and_up_to_date(backbone, paradigm, connected):
    card = render_recipe_card(backbone, paradigm)
    ModelCard(card).validate()
    name = f"lion-{'sp' if paradigm == 'sparse' else 'ds'}-{backbone.split('-')[-1]}"
    kept = ROOT / "model_cards" / f"{name}.md"
    assert kept.read_text() == card, "run `python model_cards/recipe_cards.py`"
    assert "A recipe, not trained here." in card
    metadata = ModelCard(card).data.to_dict()
    assert "model-index" not in metadata and metadata["license"].startswith("llama3")
    assert f"| fine-tuning: max_steps | {get_recipe(backbone, paradigm, 'cl_kd').max_steps} |" in card
    assert ("--sparse-encoder" in section(card, "Train")) == (paradigm == "sparse")


def test_published_figures_are_marked_as_the_authors_and_kept_out_of_the_metadata():
    card = render_recipe_card("llama-3-8b", "sparse")
    published = section(card, "Published by the paper's authors")
    assert "Not measured here" in published and "https://arxiv.org/abs/2502.15526" in published
    assert "survey" not in card and not rows_of(published)
    example = section(render_recipe_card("llama-3.2-1b", "dense"), "Published by the paper's authors")
    assert rows_of(example)[0] == [" What is the capital of France? ", " 0.287761 ", " 0.132120 "]
    assert not rows_of(section(render_recipe_card("llama-3.2-3b", "dense"), "Published by the paper's authors"))
    assert "eval_results" not in ModelCard(card).data.to_dict()


def test_a_card_says_what_a_checkpoint_cannot_refuse(card, tiny_backbone):
    limits = section(card, "Limits")
    assert "`truncate_dim` does not shorten" in limits and "loads in its own class alone" in limits
    dense = section(render_card(lion_st.build(tiny_backbone(), "dense", device="cpu"), "org/lion-ds"), "Limits")
    assert "`SparseEncoder` refuses it" in dense and "truncate_dim" not in dense


def test_tied_weights_are_counted_once(tiny_backbone):
    tied, untied = (
        card_data(lion_st.build(tiny_backbone(tied=tied), "sparse", device="cpu")) for tied in (True, False)
    )
    assert untied.parameters - tied.parameters == tied.dimensions * 32


def test_scores_of_fewer_terms_than_the_model_keeps_are_refused(checkpoint, tmp_path):
    documents = {f"d{row}": {"title": "", "text": text} for row, text in enumerate(SAMPLE_DOCUMENTS)}
    data = save_beir(tmp_path / "data", documents, {"q0": EXPANDED_QUERY}, {"q0": {"d0": 1}})
    options = {"device": "cpu", "query_max_active_dims": 2}
    evaluate_retrieval(checkpoint, data, output_dir=tmp_path / "few", load_options=options)
    with pytest.raises(
        ValueError, match=r"was measured with query_max_active_dims=2, limits of terms that the model does not"
    ):
        render_card(lion_st.load(checkpoint, device="cpu"), results=[tmp_path / "few" / "results"], offline=True)
