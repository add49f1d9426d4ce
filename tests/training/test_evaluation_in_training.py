"""What is seen of a run while it trains, and the best of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from test_checkpoints import same_result, unfinish
from tiny_runs import TOPICS, positive, tiny_run

import lion_st
from lion_st.data import save_beir
from lion_st.errors import UsageError
from lion_st.training.evaluation import build_evaluator, nano_beir_evaluator
from lion_st.training.retriever import build_model, build_trainer, load_training_tuples, train_retriever

# Dropout, so that a random number more or less would show; and what counts as best is the worst, which comes early.
OPTIONS = dict(max_steps=10, save_steps=2, use_peft=True, lora_r=4, lora_dropout=0.2, batch_size=8)
WORST = dict(metric_for_best_model="eval_own_dot_ndcg@10", greater_is_better=False)


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """Which of 24 texts answers a query."""
    rows = range(24)
    corpus = {f"d{row}": {"title": "", "text": positive(row)} for row in rows}
    queries = {f"q{row}": f"what do {TOPICS[row % len(TOPICS)]} number {row} do" for row in rows}
    return save_beir(tmp_path_factory.mktemp("beir") / "own", corpus, queries, {f"q{n}": {f"d{n}": 1} for n in rows})


def evaluations(folder: Path) -> dict[int, dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in history if "eval_ndcg@10" in entry}


@pytest.fixture(scope="module")
def evaluated(tiny_backbone, data, collection, tmp_path_factory) -> Path:
    """A finished run that exported the checkpoint with the lowest nDCG@10, and keeps the last two beside it."""
    options = OPTIONS | WORST | dict(eval_data=[str(collection)], load_best_model_at_end=True, save_total_limit=2)
    output = tmp_path_factory.mktemp("run") / "out"
    return train_retriever(*tiny_run(tiny_backbone(), data, output, **options))


def test_the_log_says_what_a_search_with_the_checkpoint_finds(evaluated):
    logged = evaluations(evaluated)
    assert list(logged) == [2, 4, 6, 8, 10]
    model = lion_st.load(evaluated / "checkpoint-10", device="cpu")
    rows = range(24)
    queries = model.encode_query([f"what do {TOPICS[row % len(TOPICS)]} number {row} do" for row in rows])
    scores = queries @ model.encode_document([positive(row) for row in rows]).T
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    expected = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0.0).mean()
    assert logged[10]["eval_own_dot_ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert logged[10]["eval_ndcg@10"] == logged[10]["eval_own_dot_ndcg@10"]
    assert logged[10]["eval_own_corpus_active_dims"] > 0


def test_the_best_checkpoint_is_kept_and_exported(evaluated):
    scores = {step: entry["eval_ndcg@10"] for step, entry in evaluations(evaluated).items()}
    best = min(scores, key=scores.__getitem__)
    assert best < 8, "the test needs a run whose last checkpoint is not the one to export"
    assert {path.name for path in evaluated.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (best, 8, 10)}
    record = json.loads((evaluated / "training.json").read_text())
    assert record["exported"] == {"checkpoint": f"checkpoint-{best}", "eval_own_dot_ndcg@10": scores[best]}
    texts = [positive(3), positive(4)]
    vectors, chosen, last = (
        lion_st.load(folder, device="cpu").encode_document(texts)
        for folder in (evaluated, evaluated / f"checkpoint-{best}", evaluated / "checkpoint-10")
    )
    assert np.allclose(vectors, chosen, atol=1e-4) and not np.allclose(vectors, last, atol=1e-2)


def test_the_best_is_exported_also_from_between_two_checkpoints(tiny_backbone, data, collection, tmp_path):
    options = OPTIONS | WORST | dict(eval_data=[str(collection)], load_best_model_at_end=True, eval_steps=2)
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **options | dict(save_steps=6)))
    scores = {step: entry["eval_ndcg@10"] for step, entry in evaluations(folder).items()}
    best = min(scores, key=scores.__getitem__)
    assert best not in (6, 10), "the test needs a run whose best evaluation is not of a step that is saved anyway"
    record = json.loads((folder / "training.json").read_text())
    assert record["exported"] == {"checkpoint": f"checkpoint-{best}", "eval_own_dot_ndcg@10": scores[best]}
    result, chosen = (lion_st.load(path, device="cpu") for path in (folder, folder / f"checkpoint-{best}"))
    assert np.allclose(result.encode_document([positive(3)]), chosen.encode_document([positive(3)]), atol=1e-4)


def test_blank_and_absent_documents_are_never_found(tiny_backbone, tmp_path):
    corpus = {"d0": {"text": positive(0)}, "d1": {"text": positive(1)}, "blank": {"title": "", "text": " "}}
    qrels = {"q0": {"d0": 1, "blank": 1, "gone": 1}}
    folder = save_beir(tmp_path / "own", corpus, {"q0": "what do lions do"}, qrels)
    _, training = tiny_run("m", "d", tmp_path, "dense", eval_data=[str(folder)])
    with pytest.warns(UserWarning, match="count as never found"):
        evaluator = build_evaluator(training, "dense")
    found = evaluator(lion_st.build(tiny_backbone(), "dense", device="cpu"))
    assert found["own_dot_recall@10"] == pytest.approx(1 / 3)
    save_beir(folder, corpus, {"q0": "what do lions do"}, {"q0": {"blank": 1}}, overwrite=True)
    with pytest.raises(ValueError, match="own has no query with a relevant document"):
        build_evaluator(training, "dense")


def test_evaluating_changes_no_weight(tiny_backbone, data, evaluated, tmp_path):
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **OPTIONS))
    one, other = (
        load_file(next(run.glob("checkpoint-10/**/adapter_model.safetensors"))) for run in (folder, evaluated)
    )
    assert all((tensor == other[name]).all() for name, tensor in one.items())


def test_a_moved_run_finds_its_best_checkpoint_and_refuses_a_damaged_one(tiny_backbone, data, collection, evaluated):
    moved = Path(shutil.copytree(evaluated, evaluated.with_name("moved")))
    unfinish(moved)
    best = json.loads((moved / "training.json").read_text())["exported"]["checkpoint"]
    options = OPTIONS | WORST | dict(eval_data=[str(collection)], load_best_model_at_end=True, save_total_limit=2)
    run = tiny_run(tiny_backbone(), data, moved, **options)
    train_retriever(*run)
    assert same_result(evaluated, moved)
    unfinish(moved)
    weights = next((moved / best).glob("**/adapter_model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{best}, is damaged: .* --load_best_model_at_end false"):
        train_retriever(*run)


def test_early_stopping_ends_the_run_and_a_killed_one_stays_ended(tiny_backbone, data, tmp_path, capsys):
    options = OPTIONS | dict(
        max_steps=20, eval_share=0.2, early_stopping_patience=1, greater_is_better=False, lora_dropout=0.0
    )
    run = tiny_run(tiny_backbone(), data, tmp_path / "out", **options)
    folder = train_retriever(*run)
    assert "Held out 5 queries" in capsys.readouterr().out
    record = json.loads((folder / "training.json").read_text())
    assert record["finished"] and record["steps"] == max(evaluations(folder)) < 20
    killed = Path(shutil.copytree(folder, tmp_path / "killed"))
    unfinish(killed)
    again = tiny_run(tiny_backbone(), data, killed, **options)
    train_retriever(*again)
    assert same_result(folder, killed)
    assert json.loads((killed / "training.json").read_text())["steps"] == record["steps"]


def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_step_more(tiny_backbone, data, tmp_path):
    options = dict(lr_scheduler_type="constant", max_steps=4)
    folder = train_retriever(*tiny_run(tiny_backbone(), data, tmp_path / "out", **options))
    killed = Path(shutil.copytree(folder, tmp_path / "killed"))
    unfinish(killed)
    record = json.loads((killed / "training.json").read_text())
    (killed / "training.json").write_text(json.dumps(record | {"steps": 2, "floating_point_operations": 1.0}))
    train_retriever(*tiny_run(tiny_backbone(), data, killed, **options))
    assert same_result(folder, killed)
    assert {path.name for path in killed.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    both = [json.loads((run / "training.json").read_text()) for run in (folder, killed)]
    assert both[0]["steps"] == both[1]["steps"] == 4
    assert both[0]["floating_point_operations"] == both[1]["floating_point_operations"]


def evaluate_on_ranks(backbone: str, data: Path, collection: Path, output: Path) -> dict[str, float]:
    arguments, training = tiny_run(
        backbone, data, output, eval_data=[str(collection)], eval_share=0.2, eval_steps=2, max_steps=2
    )
    trainer = build_trainer(
        build_model(arguments, training.device), arguments, training, load_training_tuples(arguments, 0)
    )
    before = trainer.evaluate()
    trainer.train()
    return {"before": before["eval_ndcg@10"], "after": trainer.state.best_metric}


def test_ranks_share_an_evaluation_and_see_the_same(tiny_backbone, data, collection, tmp_path):
    reports = run_ranks(2, evaluate_on_ranks, tiny_backbone(), data, collection, tmp_path / "two")
    alone = evaluate_on_ranks(tiny_backbone(), data, collection, tmp_path / "one")
    assert reports[0] == reports[1]
    assert reports[0]["before"] == pytest.approx(alone["before"], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(eval_data=["no/such/folder"]), FileNotFoundError, "no/such/folder"),
        (dict(metric_for_best_model="ndcg@7"), UsageError, r"ndcg@7 is not measured: choose from ndcg@10, own_dot_acc"),
        (dict(eval_split="dev"), FileNotFoundError, r"dev\.tsv does not exist; splits with judgements: \['test'\]"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(
    tiny_backbone, data, collection, tmp_path, settings, error, message
):
    run = tiny_run(tiny_backbone(), data, tmp_path / "out", **dict(eval_data=[str(collection)]) | settings)
    with pytest.raises(error, match=message):
        train_retriever(*run)
    assert not (tmp_path / "out").exists()


def test_nano_beir_is_read_as_it_is_published(tiny_backbone, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = {
        "corpus": {"_id": ["d1", "d2"], "text": [positive(1), positive(2)]},
        "queries": {"_id": ["q1"], "text": ["what do zebras number 1 do"]},
        "qrels": {"query-id": ["q1"], "corpus-id": ["d1"]},
    }
    configs = []
    for name, columns in parts.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "NanoSciFact.parquet")
        files = f"  - split: NanoSciFact\n    path: {name}/NanoSciFact.parquet\n"
        configs.append(f"- config_name: {name}\n  data_files:\n{files}")
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")
    evaluator = nano_beir_evaluator(["scifact"], "sparse", 8, dataset_id=str(tmp_path))
    model = lion_st.build(tiny_backbone(), "sparse", as_sparse_encoder=True, device="cpu")
    assert 0 < evaluator(model)["NanoBEIR_mean_dot_ndcg@10"] <= 1
    evaluator = nano_beir_evaluator(["scifact"], "hybrid", 8, dataset_id=str(tmp_path))
    found = evaluator(lion_st.build(tiny_backbone(), "hybrid", device="cpu"))
    assert all(0 < found[f"NanoBEIR_mean_{name}_ndcg@10"] <= 1 for name in ("dot", "sparse_dot", "dense_dot"))
    with pytest.raises(FileNotFoundError, match=r"NanoBEIR cannot be loaded from .*nothing .* give BEIR folders"):
        nano_beir_evaluator(["scifact"], "sparse", 8, dataset_id=str(tmp_path / "nothing"))
