"""The Dockerfile, its context and the Kubernetes example fit the package, the command and the server."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from lion_st.cli import app as commands
from lion_st.serving import ServerSettings
from lion_st.serving.launch import GRACE

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from lion_st.serving.app import add_routes  # noqa: E402
from lion_st.serving.gate import PUBLIC  # noqa: E402

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PORT = ServerSettings("model").port


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def values(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """What `lion-st serve` reads of a command line."""
    serve: Any = get_command(commands).commands["serve"]  # type: ignore[attr-defined]
    return serve.make_context("serve", arguments).params


def context() -> list[str]:
    """What `.dockerignore`, a list of exceptions to nothing at all, leaves of the repository."""
    first, *rest = (ROOT / ".dockerignore").read_text().split()
    assert first == "*"
    assert [line for line in rest if not line.startswith("!")] == ["**/__pycache__"]
    return [line.removeprefix("!") for line in rest if line.startswith("!")]


def test_the_context_is_what_is_copied_and_holds_no_weights():
    copied = [source for line in values("COPY") for source in shlex.split(line)[:-1]]
    assert sorted(copied) == sorted(context())
    assert all((ROOT / source).exists() for source in copied)
    sizes = [file.stat().st_size for file in (ROOT / "lion_st").rglob("*") if "__pycache__" not in file.parts]
    assert sum(sizes) < 5e6


def test_the_context_builds_the_whole_package(tmp_path):
    (tmp_path / "source").mkdir()
    for name in context():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        metadata = archive.read(next(name for name in packed if name.endswith("METADATA"))).decode()
    kinds = {".py", ".jinja", ".yaml", ".typed"}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "lion_st").rglob("*") if file.suffix in kinds}
    files.add("lion_st/py.typed")
    assert files <= packed
    assert "Provides-Extra: serve" in metadata


def test_commands_of_the_dockerfile_are_right():
    (entrypoint,), (check,), (port,) = values("ENTRYPOINT"), values("HEALTHCHECK"), values("EXPOSE")
    program, command, *arguments = json.loads(entrypoint)
    assert (program, command) == ("lion-st", "serve")
    assert parsed([*arguments, "/runs/model", "--index", "/runs/index"])["host"] == "0.0.0.0"
    assert int(port) == PORT
    python, flag, code = json.loads(check[check.index("[") :])
    assert (python, flag) == ("python", "-c")
    ast.parse(code)
    assert f"http://127.0.0.1:{PORT}/health" in code and "/health" in PUBLIC
    torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert torch is not None and f"pip install --no-cache-dir {torch[1]} " in values("RUN")[0]
    (user,) = values("USER")
    assert user.isdigit() and f"--uid {user} " in values("RUN")[-1]
    readme = (ROOT / "docs/deploy.md").read_text()
    shown = re.findall(r"^docker run .* lion-st-serve (.*)$", readme, re.M)
    assert shown and all(parsed([*arguments, *shlex.split(line)]) for line in shown)


def test_the_kubernetes_example_fits_the_server():
    block = re.search(r"^```yaml\n(apiVersion.*?)^```$", (ROOT / "docs/deploy.md").read_text(), re.M | re.S)
    assert block is not None
    deployment = yaml.safe_load(block[1])
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert deployment["spec"]["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    api = fastapi.FastAPI()
    add_routes(api, type("Any", (), {"paradigm": "sparse"})())
    routes = {route.path for route in api.routes}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[name]["httpGet"]
        assert asked["path"] in routes and asked["path"] in PUBLIC  # a probe has no key
        assert asked["port"] == PORT
    assert container["livenessProbe"]["timeoutSeconds"] > 1  # of a busy server
    scraped = deployment["spec"]["template"]["metadata"]["annotations"]
    assert scraped["prometheus.io/path"] in PUBLIC and scraped["prometheus.io/port"] == str(PORT)
    assert container["ports"] == [{"containerPort": PORT}]
    arguments = parsed(container["args"])
    assert spec["securityContext"]["runAsNonRoot"]  # which Kubernetes takes of a user by number alone
    assert spec["terminationGracePeriodSeconds"] > arguments["timeout"] + GRACE
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in spec["volumes"]}
    assert arguments["index"] == mounts["index"] and arguments["model"].startswith(f"{mounts['models']}/")
    (key,) = container["env"]
    option = next(one for one in get_command(commands).commands["serve"].params if one.name == "api_key")  # type: ignore[attr-defined]
    assert key["name"] == option.envvar
