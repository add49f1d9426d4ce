"""What importing the package costs and needs, and which way its packages import each other."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

import lion_st
from lion_st.extras import EXTRA_OF, EXTRAS

HEAVY = ("torch", "transformers", "sentence_transformers", "mteb", "faiss", "trl", "datasets", "peft", "numba")


def test_importing_the_package_imports_nothing_heavy():
    program = f"import sys, lion_st; print(sorted(set({HEAVY!r}) & set(sys.modules)), lion_st.__version__)"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.split()[0] == "[]"


@pytest.mark.parametrize("package", ["", ".encoding", ".evaluation", ".hub", ".retrieval", ".supervision", ".training"])
def test_every_public_name_can_be_imported(package):
    module = import_module(f"lion_st{package}")
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(module.__all__) <= set(dir(module))


def test_folders_are_there_after_importing_the_package_alone():
    program = f"""
import sys, lion_st
names = ("data", "evaluation", "hub", "retrieval", "training", "kernels", "losses", "modules")
assert set(names) <= set(dir(lion_st))
print([getattr(lion_st, name).__name__ for name in names[:5]][2], sorted(set({HEAVY!r}) & set(sys.modules)))
print([getattr(lion_st, name).__name__ for name in names[5:]][0], lion_st.hub.merge_backbone.__name__)
try:
    lion_st.no_such_name
except AttributeError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == [
        "lion_st.hub []",
        "lion_st.kernels merge_backbone",
        "module 'lion_st' has no attribute 'no_such_name'",
    ]


# As where they are not installed: nothing finds them.
WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder

absent, find, find_distributions = {sorted(EXTRA_OF)!r}, PathFinder.find_spec, PathFinder.find_distributions
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.partition(".")[0] in absent else find(name, *rest)
)
PathFinder.find_distributions = classmethod(
    lambda cls, context=DistributionFinder.Context(): () if context.name in absent else find_distributions(context)
)
"""
USES = """
import lion_st
from lion_st.encoding import encode_texts
from lion_st.retrieval import ModelRetriever

model = lion_st.build(sys.argv[1], "sparse", device="cpu")
lion_st.export(model, sys.argv[2], create_model_card=False)
loaded = lion_st.load(sys.argv[2], device="cpu")
rows = encode_texts(loaded, ["a lion", "a lake"], "document")
retriever = ModelRetriever(loaded)
retriever.index({"a": "a lion hunts", "b": "a lake is calm"})
print(rows.shape[0], len(retriever.search(["a lion"], k=2)[0]), sorted(set(absent) & set(sys.modules)))
"""


def test_building_loading_encoding_and_searching_need_no_extra(tiny_backbone, tmp_path):
    command = [sys.executable, "-c", WITHOUT_EXTRAS + USES, str(tiny_backbone()), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "[]"]


MISSING = """
import numpy
import typer
from typer.testing import CliRunner

from lion_st.cli.group import OneLineErrors
from lion_st.evaluation import get_task
from lion_st.extras import require
from lion_st.indexes import create_index
from lion_st.retrieval import Bm25Retriever

calls = {
    "retrieval": [
        lambda: Bm25Retriever().index({"a": "x"}),
        lambda: create_index("faiss", "dense").add(["a"], numpy.ones((1, 4), dtype=numpy.float32)),
    ],
    "eval": [lambda: get_task("SciFact")],
    "serve": [lambda: require("uvicorn")],
    "milvus": [lambda: create_index("milvus", "sparse")],
    "ray": [lambda: require("ray.data")],
    "train": [lambda: require("trl")],
    "demo": [lambda: require("gradio")],
    "gguf": [lambda: require("gguf")],
}
for extra, called in calls.items():
    for call in called:
        try:
            call()
        except ImportError as error:
            assert f"pip install 'lion-st[{extra}]'" in str(error), (extra, str(error))
        else:
            raise AssertionError(extra)

app = typer.Typer(cls=OneLineErrors)

@app.callback()
def main(): ...

@app.command()
def train():
    import datasets

shown = CliRunner().invoke(app, ["train"])
assert "pip install 'lion-st[train]'" in shown.output, shown.output
print("named")
"""


def test_a_missing_extra_is_named_with_the_line_that_installs_it():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS + MISSING], capture_output=True, text=True)
    assert done.stdout.strip() == "named", done.stderr


@pytest.fixture
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")
    file = Path(__file__).parents[1] / "pyproject.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]


def test_extras_bring_what_they_are_named_for(project):
    distributions = {"seismic": "pyseismic-lsr", "faiss": "faiss-cpu", "milvus_lite": "milvus-lite"}
    distributions |= {"pytrec_eval": "pytrec_eval-terrier", "Stemmer": "PyStemmer"}
    for extra, packages in EXTRAS.items():
        brought = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]}
        needed = {distributions.get(package, package) for package in packages}
        assert set(map(canonicalize_name, needed)) <= set(map(canonicalize_name, brought)), extra
        in_all = re.search(rf"[\[,]{extra}[\],]", project["optional-dependencies"]["all"][0]) is not None
        assert in_all == (extra != "deepspeed"), extra  # which is built from source, and imported with accelerate


def test_no_release_of_transformers_is_ruled_out(project):
    (line,) = [line for line in project["dependencies"] if line.startswith("transformers")]
    assert "<" not in line


# A Python that makes an environment whose pip writes down what it is asked for, and reaches no index of CPU builds.
PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
cat > "$3/bin/pip" <<'END'
#!/bin/sh
echo "$@" >> asked
case "$*" in *whl/cpu*) exit $UNREACHABLE;; esac
END
chmod +x "$3/bin/pip"
"""


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("unreachable", ["0", "1"])
def test_torch_is_installed_for_cpus_unless_there_is_a_gpu(tmp_path, gpu, unreachable):
    root = Path(__file__).parents[1]
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(root / name, tmp_path)
    programs = {"python": PYTHON, "nvidia-smi": f"#!/bin/sh\nexit {0 if gpu else 1}\n"}
    (tmp_path / "bin").mkdir()
    for name, program in programs.items():
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "UNREACHABLE": unreachable}
    command = ["make", "--silent", ".venv/.quickstart", f"PYTHON={tmp_path / 'bin' / 'python'}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    *torch, project = (tmp_path / "asked").read_text().splitlines()
    assert ["whl/cpu" in line for line in torch] == (
        [False] if gpu else [True, False] if unreachable == "1" else [True]
    )
    assert all("torch==" in line for line in torch)
    assert project.endswith("--editable .[train,eval]")


def test_a_release_has_one_version(project):
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert lion_st.__version__ == project["version"] == re.search(r"^version: (.+)$", citation, re.MULTILINE)[1]
