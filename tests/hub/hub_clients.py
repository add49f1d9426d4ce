"""Clients of the Hub on loopback: processes of their own, and this one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http as http
import pytest
import transformers.utils.hub
from huggingface_hub import constants
from loopback_hub import LoopbackHub

TOKENS = {"hf_dummy": ("tester", "org"), "hf_other": ("stranger", "other")}
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


def environment(hub: LoopbackHub, home: Path, token: str | None = "hf_dummy") -> dict[str, str]:
    """This process's environment, with the Hub in place of any other."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | hub.environment(home, token)


def start_python(
    hub: LoopbackHub,
    folder: Path,
    code: str,
    arguments: Any = None,
    token: str | None = "hf_dummy",
    stock: bool = False,
) -> subprocess.Popen[str]:
    """Start Python code on the Hub; it finds `arguments`, and `answer(value)` sends JSON back.

    With `stock=True` it cannot import lion_st.
    """
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE.format(guard=WITHOUT_LION if stock else "") + code, json.dumps(arguments)],
        env=environment(hub, folder / "home", token),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(hub: LoopbackHub, folder: Path, code: str, arguments: Any = None, **settings: Any) -> Any:
    """Run Python code on the Hub and return what it answers; see `start_python`."""
    process = start_python(hub, folder, code, arguments, **settings)
    out, errors = process.communicate()
    answers = [line.removeprefix("ANSWER") for line in out.splitlines() if line.startswith("ANSWER")]
    assert process.returncode == 0 and answers, f"{out}\n{errors}"
    return json.loads(answers[-1])


def connect(hub: LoopbackHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn this process's huggingface_hub to a Hub, as if it had been imported for that."""
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    # A dropped connection is tried again six times; the pauses in between would take half a minute.
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
