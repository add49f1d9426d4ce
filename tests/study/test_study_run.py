"""A study runs, goes on, and survives a cell that fails."""

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import Result
from commands import lion
from tiny_study import tiny_study, write_test
from typer.testing import CliRunner

import lion_st
from lion_st.cli import app
from lion_st.data import load_beir, load_tuples
from lion_st.data.layouts import DOCUMENT_LISTS
from lion_st.data.overlap import normalize
from lion_st.data.tuples import set_epoch
from lion_st.encoding import encode_corpus
from lion_st.errors import INTERRUPTED, UsageError
from lion_st.evaluation import fit_fusion
from lion_st.evaluation.tasks import get_task
from lion_st.exporting import single_models
from lion_st.files import lock_folder
from lion_st.study import contrastive_entropies, parse_study, plan_study, run_study
from lion_st.study.data import OverlapError, StudyData, load_test, prepare_data, shuffle_labels
from lion_st.study.jobs import LOCK, run_job
from lion_st.study.run import Job, Workers, last_error, stage_options, visible_gpus, worker_environment
from lion_st.training.progress.checkpoints import CHECKSUMS, checkpoint_to_resume


@dataclass
class Finished:
    """A study of two cells: the dense one failed at first, was then killed behind its first checkpoint, and went on."""

    values: dict[str, Any]
    output: Path
    failed: Result
    again: Result
    sparse_rows: int  # when they were written, in nanoseconds
    killed_at: int  # step of the last checkpoint

    def rows(self, paradigm: str) -> Path:
        return self.output / "cells" / f"small-{paradigm}-cl_kd-seed1" / "rows.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_backbone) -> Finished:
    folder = tmp_path_factory.mktemp("study")
    values = tiny_study(folder, tiny_backbone())
    file, output = folder / "tiny.yaml", folder / "out"
    file.write_text(yaml.safe_dump(values))
    cell = output / "cells" / "small-dense-cl_kd-seed1"
    # A record that cannot be read stands where the dense cell writes its own.
    obstacle = cell / "trained" / "training.json"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("not JSON")
    failed = CliRunner().invoke(app, ["study", str(file), "--output", str(output), "--workers", "2"])
    sparse_rows = (output / "cells" / "small-sparse-cl_kd-seed1" / "rows.json").stat().st_mtime_ns
    obstacle.unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "lion_st.study.jobs", str(cell)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 500
    while process.poll() is None and not list(cell.glob(f"trained/checkpoint-*/{CHECKSUMS}")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    (cell / "log.txt").unlink()
    killed_at = int(str(checkpoint_to_resume(cell / "trained")).rpartition("-")[2])
    again = CliRunner().invoke(app, ["study", str(file), "--output", str(output)])
    return Finished(values, output, failed, again, sparse_rows, killed_at)


def test_a_failing_cell_is_named_and_does_not_stop_the_others(finished: Finished) -> None:
    failed = finished.failed
    assert failed.exit_code == 1
    assert "small-dense-cl_kd-seed1: FAILED, '" in failed.stdout and "training.json' cannot be read" in failed.stdout
    line = "lion-st study: 1 of 2 jobs failed, the others are finished. small-dense-cl_kd-seed1: "
    assert failed.stderr.startswith(line)
    assert failed.stderr.count("\n") == 1
    assert finished.rows("sparse").exists()


def test_the_same_command_skips_what_is_finished(finished: Finished) -> None:
    assert finished.again.exit_code == 0, finished.again.output
    assert "small-sparse-cl_kd-seed1: finished already." in finished.again.stdout
    assert finished.rows("sparse").stat().st_mtime_ns == finished.sparse_rows


def test_a_killed_cell_goes_on_from_its_checkpoint(finished: Finished) -> None:
    (row, *_) = json.loads(finished.rows("dense").read_text())
    log = (finished.rows("dense").parent / "log.txt").read_text()
    assert 0 < finished.killed_at < row["steps"]
    assert log.count("'loss': ") == row["steps"] - finished.killed_at


def test_rows_say_what_a_cell_was_and_what_it_spent(finished: Finished) -> None:
    cell = plan_study(parse_study(finished.values)).cells[0]
    place = finished.rows("sparse")
    found = json.loads(place.read_text())
    assert {(row["test_set"], row["metric"]) for row in found} == {
        (test, metric) for test in ("held_out", "notes") for metric in ("nDCG@10", "MRR@10", "contrastive entropy")
    }
    for row in found:
        assert row["configuration"] == cell.configuration and row["steps"] == cell.steps
        assert row["flops"] == pytest.approx(cell.flops, rel=0.1)  # texts of the batches, not of the sample
        assert row["domain"] == ("in_domain" if row["test_set"] == "held_out" else "zero_shot")
        assert row["index_bytes"] > 0 and row["query_terms"] > 0
        assert (place.parent / row["run"]).is_file() and (place.parent / row["qrels"]).is_file()
    assert not (place.parent / "trained").exists()


def test_a_job_that_another_process_has_finished_is_not_done_again(finished: Finished) -> None:
    rows = finished.rows("dense")
    before = rows.stat().st_mtime_ns
    run_job(rows.parent)  # whose weights are gone
    assert rows.stat().st_mtime_ns == before and not (rows.parent / "trained").exists()


def test_an_interrupt_ends_the_processes_of_all_workers(tmp_path: Path) -> None:
    jobs = [Job(tmp_path / name, {"name": name}, "", tmp_path / name / "done") for name in ("first", "second")]
    begun: list[str] = []

    def say(line: str) -> None:
        begun.append(line)
        if len(begun) == 2:
            raise KeyboardInterrupt

    with ExitStack() as locks:
        for job in jobs:
            job.place.mkdir()
            locks.enter_context(lock_folder(job.place, name=LOCK))  # for which its process would wait for ever
        with pytest.raises(KeyboardInterrupt):
            Workers(2, say).run(jobs)


def test_two_processes_share_the_batches_of_a_cell(tmp_path: Path, finished: Finished) -> None:
    values = finished.values | {"paradigms": ["sparse"]}
    run_study(plan_study(parse_study(values), 2), tmp_path, [].append)
    rows = json.loads((tmp_path / "cells" / "small-sparse-cl_kd-seed1" / "rows.json").read_text())
    alone = json.loads(finished.rows("sparse").read_text())
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in alone], rel=1e-3)
    log = (tmp_path / "cells" / "small-sparse-cl_kd-seed1" / "log.txt").read_text()
    assert log.count("'loss': ") == rows[0]["steps"]  # which one of them logs


def test_processes_divide_the_batches_of_mntp(tmp_path: Path, tiny_backbone) -> None:
    mntp = {"texts": ["train"], "max_steps": 2, "block_size": 16, "per_device_train_batch_size": 4, "bf16": False}
    values = tiny_study(tmp_path, tiny_backbone(), paradigms=["sparse"], mntp=mntp)
    plan = plan_study(parse_study(values), 2)
    (alone,), (stage,) = plan_study(parse_study(values)).stages, plan.stages
    assert stage == alone and stage.tokens == 2 * 4 * 16
    data = StudyData({}, tmp_path / "texts", {}, {})
    assert stage_options(plan, stage, data, tmp_path)["per_device_train_batch_size"] == 2
    with pytest.raises(UsageError, match="3 processes cannot share the MNTP batches of small, 4 blocks"):
        plan_study(parse_study(values), 3)


def test_what_a_process_of_a_training_says_is_what_failed() -> None:
    lines = [
        "job: an earlier attempt",
        "{'loss': 1}",
        "job: no memory",
        "E1127 elastic: failed",
        "===",
    ]
    assert last_error(lines) == "no memory"
    assert last_error(lines[1:2]) == "{'loss': 1}" and last_error([]) is None


def test_an_interrupt_ends_all_processes_of_a_training(tmp_path: Path, tiny_backbone) -> None:
    file, output = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(tiny_study(tmp_path, tiny_backbone(), paradigms=["sparse"], budget={"flops": 1e12})))
    log = output / "cells" / "small-sparse-cl_kd-seed1" / "log.txt"
    command = [sys.executable, "-m", "lion_st", "study", str(file), "--output", str(output), "--processes", "2"]
    study = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 500
    while not (log.exists() and "'loss': " in log.read_text()):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    begun = study.children(recursive=True)
    assert len(begun) >= 4  # the job, torchrun and two trainings
    study.send_signal(signal.SIGINT)
    assert study.wait(60) == INTERRUPTED
    assert not psutil.wait_procs(begun, timeout=60)[1]


def test_the_reason_of_a_failure_is_that_of_this_attempt(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nprint('killed', flush=True)\nos._exit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "log.txt").write_text("job: a reason that was mended since\n")
    job = Job(tmp_path, {"name": "cell"}, "", tmp_path / "done")
    assert Workers(1, print).run([job]) == {"cell": "killed"}


def test_workers_divide_the_cores_unless_told_otherwise(monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert "OMP_NUM_THREADS" not in worker_environment(0, 1)
    assert worker_environment(0, 3)["OMP_NUM_THREADS"] == "2"
    assert worker_environment(11, 12)["OMP_NUM_THREADS"] == "1"
    assert worker_environment(0, 1, processes=4)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_environment(0, 3)["OMP_NUM_THREADS"] == "5"


def test_workers_have_gpus_of_their_own_for_all_their_processes(monkeypatch, finished: Finished) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    seen = [worker_environment(slot, 3, processes=2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert seen == ["2,3", "5,7", "8,2"]
    assert worker_environment(1, 2)["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a, MIG-2b,-1,3")
    assert visible_gpus() == ["GPU-1a", "MIG-2b"]
    for hidden in ("-1", "", "NoDevFiles"):  # which a study on CPUs is not refused for
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7,8")
    with pytest.raises(ValueError, match="6 processes of a cell need a GPU each, and there are 5"):
        run_study(replace(plan_study(parse_study(finished.values)), processes=6), finished.output)


def test_a_folder_of_other_settings_is_refused(finished: Finished) -> None:
    changed = finished.values | {"budget": {"flops": 3e8}}
    with pytest.raises(ValueError, match="holds small-sparse-cl_kd-seed1 with other settings"):
        run_study(plan_study(parse_study(changed)), finished.output)


def test_rows_of_all_numbers_of_candidates_are_trained_on_and_compared_with_tests(
    tmp_path: Path, tiny_backbone
) -> None:
    from pyarrow import parquet

    values = tiny_study(tmp_path, tiny_backbone())
    file = Path(values["data"]["train"])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[::2]:
        row["neg"], row["neg_scores"] = row["neg"][:1], row["neg_scores"][:1]
    several = rows[5]
    several |= {"pos": [*several["pos"], "Notes about lions, page 0."], "pos_scores": [5.0, 4.0]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"]["overlap"] = "report"
    data = prepare_data(parse_study(values), tmp_path / "data")
    trained = parquet.read_table(data.options[0.0]["train_data"]).to_pylist()
    candidates = [row["positive_document_ids"] + row["negative_document_ids"] for row in trained]
    assert len(trained) == 32 - 6 and {len(row["negative_document_ids"]) for row in trained} >= {1, 2}
    assert list(map(len, candidates)) == [len(row["scores"]) for row in trained]
    assert {len(row["positive_document_ids"]) for row in trained} == {1, 2}
    tuples = load_tuples(data.options[0.0]["train_data"], documents=data.texts, negatives=1, teacher_scores=True,
                         drop_short=True)  # fmt: skip
    drawn = set()
    for epoch in range(9):
        set_epoch(tuples, epoch)
        drawn |= {(row["positive"], row["label"][0]) for row in tuples if row["query"] == several["query"]}
    assert drawn == set(zip(several["pos"], several["pos_scores"], strict=True))
    values["data"].pop("hold_out")
    values["evaluation"].pop("in_domain")
    (found,) = prepare_data(parse_study(values), tmp_path / "as they are").overlap
    assert found["documents trained on, exact"] == 1  # the second positive, which training draws too


def test_a_test_set_of_several_parts_is_refused_before_training(tmp_path: Path, monkeypatch) -> None:
    task = get_task(write_test(tmp_path / "parts"))
    monkeypatch.setattr("lion_st.evaluation.tasks.get_task", lambda *_: task)
    assert len(load_test("InTwoLanguages", "test")[0]) == 12
    task.load_data()
    task.dataset["default"]["test"]["relevant_docs"]["gone"] = {"d1": 1}
    with pytest.raises(ValueError, match="InTwoLanguages has no text for the judged query 'gone'"):
        load_test("InTwoLanguages", "test")
    task.dataset["other"] = task.dataset["default"]
    with pytest.raises(ValueError, match=r"InTwoLanguages has 2 parts .*\(default/test, other/test\).*save_beir"):
        load_test("InTwoLanguages", "test")


def test_an_objective_that_reads_scores_may_be_added_to_a_study(tmp_path: Path, tiny_backbone) -> None:
    from pyarrow import parquet

    values = tiny_study(tmp_path, tiny_backbone())
    for objectives in (["cl"], ["cl", "kd"]):
        data = prepare_data(parse_study(values | {"objectives": objectives}), tmp_path / "data", begun=True)
        columns = parquet.read_schema(data.options[0.0]["train_data"]).names
        assert ("scores" in columns) == ("kd" in objectives)


@pytest.mark.parametrize("bf16", [False, True])
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_warned_of(finished, bf16, monkeypatch, caplog) -> None:
    monkeypatch.setattr("lion_st.kernels.bfloat16.multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("lion_st.study.run.visible_gpus", list)
    changed = finished.values | {"training": finished.values["training"] | {"bf16": bf16}, "budget": {"flops": 3e8}}
    with pytest.raises(ValueError, match="with other settings"):
        run_study(plan_study(parse_study(changed)), finished.output)
    assert ("bf16: false below training: and mntp:" in caplog.text) == bf16


def test_held_out_documents_and_copies_of_them_are_not_trained_on(tmp_path: Path, tiny_backbone) -> None:
    values = tiny_study(tmp_path, tiny_backbone(), label_noise=[0, 0.5])
    data = prepare_data(parse_study(values), tmp_path / "data")
    from pyarrow import parquet

    corpus, queries, qrels = load_beir(data.tests["held_out"])
    assert len(corpus) == 6 and len(qrels) == 6
    trained = parquet.read_table(data.options[0.0]["train_data"]).to_pylist()
    documents = {row["id"]: row["text"] for row in parquet.read_table(data.texts).to_pylist()}
    assert len(trained) == 32 - 6
    hidden = {normalize(row["text"]) for row in corpus.values()}
    assert hidden.isdisjoint(map(normalize, documents.values()))
    assert {one for row in trained for name in DOCUMENT_LISTS for one in row[name]} <= documents.keys()
    assert set(queries.values()).isdisjoint(row["query_text"] for row in trained)
    assert all(row[key] == 0 for row in data.overlap for key in row if "trained on" in key)
    noisy = parquet.read_table(data.options[0.5]["train_data"]).to_pylist()
    positives, shuffled = ([row["positive_document_ids"] for row in rows] for rows in (trained, noisy))
    assert sum(one != other for one, other in zip(positives, shuffled, strict=True)) == 13
    assert sorted(positives) == sorted(shuffled)


def test_changed_files_of_the_data_are_read_again_until_a_cell_has_begun(tmp_path: Path, tiny_backbone) -> None:
    """Of documents that stand beside the tuples too."""
    from pyarrow import parquet

    values = tiny_study(tmp_path, tiny_backbone())
    rows = [json.loads(line) for line in Path(values["data"]["train"]).read_text().splitlines()]
    ids = {text: str(n) for n, text in enumerate(dict.fromkeys(one for row in rows for one in row["pos"] + row["neg"]))}
    texts, tuples = tmp_path / "texts.jsonl", tmp_path / "ids.jsonl"
    texts.write_text("".join(json.dumps({"id": one, "text": text}) + "\n" for text, one in ids.items()))
    named = [{"question": row["query"], "pos_pid": ids[row["pos"][0]], "pos_score": 2.0, "neg_scores": [1.0, 0.5],
              "neg_pids": [ids[one] for one in row["neg"]]} for row in rows]  # fmt: skip
    tuples.write_text("".join(json.dumps(row) + "\n" for row in named))
    values["data"] = {"train": str(tuples), "documents": str(texts), "hold_out": 6}
    study = parse_study(values)
    assert prepare_data(study, tmp_path / "data").texts is not None
    texts.write_text(texts.read_text().replace('"text": "', '"text": "New: '))
    with pytest.raises(ValueError, match=r"data have changed since .* cells were trained on what they held"):
        prepare_data(study, tmp_path / "data", begun=True)
    changed = prepare_data(study, tmp_path / "data")
    assert all(row["text"].startswith("New: ") for row in parquet.read_table(changed.texts).to_pylist())


def test_a_folder_of_another_studys_data_is_refused(tmp_path: Path, tiny_backbone) -> None:
    plan = plan_study(parse_study(tiny_study(tmp_path, tiny_backbone())))
    job, data = tmp_path / "out" / "cells" / "of another study" / "job.json", tmp_path / "out" / "data" / "data.json"
    for file in (job, data):
        file.parent.mkdir(parents=True)
        file.write_text('{"settings": "others", "configuration": "another"}')
    with pytest.raises(ValueError, match=r"data have changed since .* choose another --output"):
        run_study(plan, tmp_path / "out")
    assert data.exists()


def test_a_test_set_that_is_trained_on_is_refused_or_reported(tmp_path: Path, tiny_backbone) -> None:
    values = tiny_study(tmp_path, tiny_backbone())
    copied = write_test(tmp_path / "copied")
    with (copied / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "x", "title": "", "text": "LIONS of group 8 -- were seen on day 8"}\n')
    values["evaluation"] = values["evaluation"] | {"zero_shot": [str(copied)], "in_domain": []}
    values["data"] = {"train": values["data"]["train"]}
    with pytest.raises(OverlapError, match="1 documents of the test set 'copied' are trained on"):
        prepare_data(parse_study(values), tmp_path / "data")
    values["data"]["overlap"] = "report"
    (row,) = prepare_data(parse_study(values), tmp_path / "data").overlap
    assert row["documents trained on, normalised"] == 1 and row["documents trained on, exact"] == 0


def test_a_larger_share_of_noise_shuffles_what_a_smaller_one_does() -> None:
    rows = [{"query_text": str(n), "scores": n} for n in range(100)]
    moved = [
        {n for n, row in enumerate(shuffle_labels(rows, share)) if row["scores"] != n} for share in (0.1, 0.25, 1.0)
    ]
    assert [len(one) for one in moved] == [10, 25, 100]
    assert moved[0] < moved[1] < moved[2]


def test_multi_vector_and_hybrid_models_are_cells_like_the_others(tmp_path: Path, tiny_backbone) -> None:
    file, output = tmp_path / "tiny.yaml", tmp_path / "out"
    values = tiny_study(tmp_path, tiny_backbone(), paradigms=["multi_vector", "hybrid"])
    values["evaluation"]["dev"] = {"source": str(write_test(tmp_path / "dev", 10)), "split": "test"}
    values["evaluation"]["keep_weights"] = True
    file.write_text(yaml.safe_dump(values))
    lion("study", file, "--output", output)
    multi_vector, hybrid = plan_study(parse_study(values)).cells
    for cell in (multi_vector, hybrid):
        rows = json.loads((output / "cells" / cell.name / "rows.json").read_text())
        assert {row["paradigm"] for row in rows} == {cell.paradigm}
        assert {row["metric"] for row in rows} == {"nDCG@10", "MRR@10", "contrastive entropy"}
        assert all(0 <= row["value"] <= 1 for row in rows if row["metric"] == "nDCG@10")
    place = output / "cells" / hybrid.name
    sparse = plan_study(parse_study(values | {"paradigms": ["sparse"]} | {"evaluation": {
        name: value for name, value in values["evaluation"].items() if name != "dev"}})).cells[0]  # fmt: skip
    assert hybrid.flops / hybrid.steps == sparse.flops / sparse.steps  # the head; pooling both costs nothing beside it
    assert rows[0]["document_terms"] > 0 and rows[0]["flops"] == pytest.approx(hybrid.flops, rel=0.1)

    model = lion_st.load(place / "trained", paradigm="hybrid", device="cpu")
    weights = json.loads((place / "evaluation" / "fusion_weights.json").read_text())
    assert weights == list(fit_fusion(model, values["evaluation"]["dev"]["source"], "test"))
    # The entropy is the mean of those of its two models, each at its temperature.
    corpus, queries, qrels = load_test(values["evaluation"]["zero_shot"][0], "test")
    parts = []
    for number, (part, divisor) in enumerate(zip(single_models(model), (1.0, 0.01), strict=True)):
        records = [{"id": key, "text": row["text"]} for key, row in corpus.items()]
        encode_corpus(part, records, tmp_path / f"encoded{number}", show_progress=False)
        parts.append(contrastive_entropies(part, tmp_path / f"encoded{number}", corpus, queries, qrels, 8, divisor))
    found = json.loads((place / "evaluation" / "notes" / "entropies.json").read_text())
    assert found == {key: pytest.approx((parts[0][key] + parts[1][key]) / 2, rel=1e-3) for key in qrels}
    assert "hybrid" in (output / "report" / "table.md").read_text()
    assert all((output / "report" / "figures" / f"{name}.svg").is_file() for name in ("quality-size", "sparse-dense"))


def test_a_relevant_document_without_a_text_is_left_out_of_the_entropy(tiny_backbone, tmp_path):
    texts = ["", "lions rest", "zebras run", "rivers flow", "storms pass"]
    corpus = {f"d{number}": {"title": "", "text": text} for number, text in enumerate(texts)}
    model = lion_st.build(tiny_backbone(), "dense", device="cpu")
    records = [{"id": key, "text": row["text"]} for key, row in corpus.items()]
    encode_corpus(model, records, tmp_path / "encoded", show_progress=False)
    qrels = {"q0": {"d0": 2, "d2": 1}, "q1": {"d3": 1}, "q2": {"d0": 1}}
    queries = {"q0": "what do zebras do", "q1": "what do rivers do", "q2": "what is empty"}
    found = contrastive_entropies(model, tmp_path / "encoded", corpus, queries, qrels)
    del corpus["d0"]
    assert found == contrastive_entropies(model, tmp_path / "encoded", corpus, queries, qrels)
    assert found.keys() == {"q0", "q1"}
