"""The choice of a configuration: measured once, kept for other processes, never in the way."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from lion_st.kernels import pretune

pytest.importorskip("triton")
from lion_st.kernels import triton_backend, triton_backward, triton_forward, tuning

KEY = ("maxima", 2048, 128_256, "torch.bfloat16", True)
TIMES = {"slow": 3.0, "fast": 1.0, "middling": 2.0}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose clock says `TIMES`, with an empty cache; `machine.ran` are the configurations it ran."""
    machine = SimpleNamespace(ran=[], compiled=[], cache=tmp_path / "cache")

    def probe(configuration, compile_only):
        (machine.compiled if compile_only else machine.ran).append(configuration)

    def do_bench(run, warmup, rep):
        run()
        return TIMES[machine.ran[-1]]

    machine.probe = lambda: probe
    machine.do_bench = do_bench
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.cache))
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    return machine


def test_the_fastest_is_measured_once(machine):
    tuner = tuning.Tuner(list(TIMES))
    assert [tuner.fastest(KEY, machine.probe) for _ in range(3)] == ["fast"] * 3
    assert machine.ran == list(TIMES) and sorted(machine.compiled) == sorted(TIMES)
    assert tuner.times == {KEY: TIMES}


def test_another_process_measures_nothing(machine):
    assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"
    machine.ran.clear()
    assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"
    assert not machine.ran
    assert tuning.Tuner(list(TIMES)).fastest(("maxima", 4096), machine.probe) == "fast"
    assert machine.ran == list(TIMES)


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b'{"configuration": "gone"}', b"\xff", b'{"configuration": 3}'])
def test_a_broken_choice_is_measured_again_and_replaced(machine, contents):
    file = tuning.cache_file(KEY)
    file.parent.mkdir(parents=True)
    file.write_bytes(contents)
    assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"
    assert machine.ran == list(TIMES)
    assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"
    assert machine.ran == list(TIMES)
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_done_without(machine, caplog):
    machine.cache.write_text("a file where the folder would be")
    with caplog.at_level("DEBUG", logger="lion_st.kernels.tuning"):
        assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"
    assert "Cannot keep the choice" in caplog.text
    assert not any(record.levelname in ("WARNING", "ERROR") for record in caplog.records)


def test_no_home_is_done_without(machine, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuning.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    assert tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe) == "fast"


def test_a_choice_holds_for_the_versions_it_was_measured_with(machine, monkeypatch):
    tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe)
    monkeypatch.setattr("triton.__version__", "99.0")
    tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe)
    monkeypatch.setattr(tuning, "_source_hash", lambda: "changed")
    tuning.Tuner(list(TIMES)).fastest(KEY, machine.probe)
    assert machine.ran == list(TIMES) * 3


def test_what_does_not_run_is_passed_over(machine):
    def probe(configuration, compile_only):
        if configuration == "fast" or (configuration == "middling" and not compile_only):
            raise ValueError("out of resources")
        machine.ran.append(configuration)

    assert tuning.Tuner(list(TIMES)).fastest(KEY, lambda: probe) == "slow"
    with pytest.raises(RuntimeError, match=r"No configuration of the kernel runs .* out of resources"):
        tuning.Tuner(["fast", "middling"]).fastest(("other",), lambda: probe)


def test_many_threads_measure_once(machine):
    tuner = tuning.Tuner(list(TIMES))
    threads = [threading.Thread(target=tuner.fastest, args=(KEY, machine.probe)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.ran == list(TIMES)


# ---- beforehand ----


def test_there_is_nothing_to_tune_without_triton(monkeypatch):
    monkeypatch.setenv("LION_ST_KERNEL", "blockwise")
    assert pretune([(16, 40)], device="cpu") == {}


@pytest.mark.parametrize("shapes", [[(16,)], [(0, 40)], [(1, 2, 3)]])
def test_a_shape_is_two_numbers(shapes):
    with pytest.raises(ValueError, match=r"A shape is a hidden size and a vocabulary size, got \("):
        pretune(shapes, device="cpu")


def test_a_model_needs_an_lm_head():
    with pytest.raises(ValueError, match="Linear has no module with an lm_head"):
        pretune(torch.nn.Linear(2, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU the real thing is tested.")
def test_all_kernels_run_once(monkeypatch):
    monkeypatch.setenv("LION_ST_KERNEL", "triton")
    monkeypatch.setattr(triton_backend, "PROBE", (1, 128, 20))
    ran = []
    for name in ("maxima_kernel", "finish_kernel"):
        kernel = getattr(triton_forward, name)
        monkeypatch.setattr(triton_backend, name, Recorder(kernel, ran, name))
    sum_rows = Recorder(triton_backward.sum_rows_kernel, ran, "sum_rows_kernel")
    monkeypatch.setattr(triton_backward, "sum_rows_kernel", sum_rows)
    assert pretune(torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 40)})) == {}
    assert set(ran) == {"maxima_kernel", "finish_kernel", "sum_rows_kernel"}


def test_a_model_is_tuned_for_its_own_lm_head(tiny_backbone):
    import lion_st
    from lion_st.kernels.pretuning import _lm_head_weight

    model = lion_st.build(tiny_backbone(), "sparse", device="cpu")
    assert _lm_head_weight(model).data_ptr() == model[0].lm_head.weight.data_ptr()


class Recorder:
    """A kernel that notes that it was launched."""

    def __init__(self, kernel, ran, name):
        self.kernel, self.ran, self.name = kernel, ran, name

    def __getitem__(self, grid):
        self.ran.append(self.name)
        return self.kernel[grid]
