"""The Hub on loopback as fixtures, and clients in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

WITHOUT_LION = """
class NoLion:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lion_st":
            raise ImportError("lion_st is not installed here")

sys.meta_path.insert(0, NoLion())
"""
PREAMBLE = """
import json, os, sys, time
{guard}
arguments = json.loads(sys.argv[1])

def answer(value):
    print("ANSWER" + json.dumps(value), flush=True)
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """An empty Hub; the token `hf_dummy` may write to `org`, `hf_other` to `other`."""
    server = LoopbackHub({"hf_dummy": ("tester", "org"), "hf_other": ("stranger", "other")})
    yield server
    server.close()


@pytest.fixture
def start_client(hub, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """`start_client(code, arguments)` starts Python code on the Hub; see `run_client`."""
    started: list[subprocess.Popen] = []

    def start(code: str, arguments: Any = None, token: str | None = "hf_dummy", stock: bool = False):
        script = PREAMBLE.format(guard=WITHOUT_LION if stock else "") + code
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(arguments)],
            env=inherited | hub.environment(tmp_path / "home", token),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_client(start_client) -> Callable[..., Any]:
    """`run_client(code, arguments, token=..., stock=...)` runs Python code on the Hub and returns what it answers.

    The code finds `arguments`, and `answer(value)` sends JSON back. With `stock=True` it cannot import lion_st.
    """

    def run(code: str, arguments: Any = None, **settings: Any) -> Any:
        process = start_client(code, arguments, **settings)
        out, errors = process.communicate(timeout=240)
        answers = [line.removeprefix("ANSWER") for line in out.splitlines() if line.startswith("ANSWER")]
        assert process.returncode == 0 and answers, f"{out}\n{errors}"
        return json.loads(answers[-1])

    return run


@pytest.fixture(scope="session")
def uploads() -> Path:
    """The folders that are uploaded to the Hub."""
    return Path(__file__).parents[2] / "hub_uploads"
