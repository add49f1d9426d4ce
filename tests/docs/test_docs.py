"""The documentation: every fenced block runs, messages are the code's own, and the site builds."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from typer import Context
from typer.main import get_command

import lion_st
from lion_st.cli import app
from lion_st.data import save_beir
from lion_st.training.options import arguments
from lion_st.training.options.command_line import parse_mntp_arguments, parse_retriever_arguments

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "hub"), str(Path(__file__).parent)]

from hub_clients import TOKENS, connect, environment  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402
from snippets import DOCS, TRAINING, Trainings, blocks, run_page  # noqa: E402

MICRO = ROOT / "hub_uploads" / "models" / "lion-micro-base"
PAGES = sorted(DOCS.rglob("*.md"))
# All that is written for people to type: pages, cards, examples, and the first lines of scripts and configurations.
WRITTEN = {
    file: text if file.suffix == ".md" else text.rpartition('"""\n\n')[0] or text
    for pattern in ("*.md", "*/**/*.md", "examples/*.py", "training_scripts/**/*.py", "lion_st/training/configs/*.yaml")
    for file in ROOT.glob(pattern)
    if not re.match(r"\.|tests|runs|build", str(file.relative_to(ROOT)))
    for text in (file.read_text(encoding="utf-8"),)
}
TRAINING_OPTIONS = (
    arguments.MntpArguments,
    arguments.MntpTrainingArguments,
    arguments.RetrieverArguments,
    arguments.RetrieverTrainingArguments,
)
# Of pip, hf, mteb, torchrun, accelerate, docker and vLLM.
FOREIGN_OPTIONS = (
    *("--index-url", "--local-dir", "--repo-type", "--model-revision", "--nproc_per_node", "--nproc-per-node"),
    *("--num_processes", "--cpu", "--config_file", "--hf-overrides", "--io-processor-plugin", "--max-model-len"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"),
)
START_TO_FINISH = DOCS / "start-to-finish.md"
TEXTS = {
    "lions": ("what do lions eat", "Lions prey on zebras and wildebeest, mostly at night."),
    "rivers": ("where do rivers end", "Most rivers flow into the sea, some into lakes or deserts."),
    "paris": ("what is the capital of France", "Paris, on the Seine, is the capital of France."),
    "vaccines": ("do vaccines cause autism", "Large studies found no link between vaccines and autism."),
    "bridges": ("why do bridges expand", "Steel expands in heat, so bridges have joints that give way."),
    "moon": ("how far is the moon", "The moon is about 384,000 kilometres from the earth."),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Where the names that the pages use lead to: the micro model in place of large ones."""
    folder = tmp_path_factory.mktemp("models")
    made = {"meta-llama/Llama-3.2-1B": MICRO}
    named = ("runs/quickstart/lion-sp", "runs/quickstart/trained", "sentence-transformers/all-MiniLM-L6-v2")
    for number, name in enumerate(named):
        paradigm = "dense" if "MiniLM" in name else "sparse"
        model = lion_st.build(MICRO, paradigm, query_length=32, document_length=64, device="cpu")
        made[name] = lion_st.export(model, folder / str(number), create_model_card=False, verify=False)
    return made


@pytest.fixture(scope="module")
def hub(models, tmp_path_factory) -> Iterator[LoopbackHub]:
    """A Hub on loopback that has `org/lion-sp-8b`, with this process turned to it."""
    server = LoopbackHub(TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        connect(server, tmp_path_factory.mktemp("home"), patch)
        lion_st.hub.publish(models["runs/quickstart/lion-sp"], "org/lion-sp-8b", license="apache-2.0")
        yield server
    server.close()


@pytest.fixture
def checkout(models, hub, tmp_path, monkeypatch, one_thread) -> None:
    """A folder like the one a reader works in, with a few texts in place of SciFact."""
    for name, target in (models | {"hub_uploads": ROOT / "hub_uploads"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    documents = {name: {"title": "", "text": passage} for name, (_, passage) in TEXTS.items()}
    queries = {f"q-{name}": query for name, (query, _) in TEXTS.items()}
    sets = tmp_path / "runs" / "quickstart" / "test_sets"
    sets.mkdir()
    save_beir(sets / "scifact", documents, queries, {f"q-{name}": {name: 1} for name in TEXTS})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != START_TO_FINISH], ids=lambda page: str(page.relative_to(DOCS))
)
def test_every_block_of_a_page_runs(page, checkout, capsys) -> None:
    run_page(page)


def test_the_way_from_login_to_published_models_runs_to_its_end(checkout, hub, tmp_path, capsys) -> None:
    Path("meta-llama/Meta-Llama-3-8B").symlink_to(MICRO)
    corpus, tuples = Path("sentence-transformers/msmarco-corpus"), Path("lightonai/ms-marco-en-bge")
    for folder in (corpus, tuples):
        folder.mkdir(parents=True)
    (corpus / "README.md").write_text("---\nconfigs:\n- config_name: passage\n  data_files: passage.jsonl\n---\n")
    numbered = [(f"{query} {n}", f"{passage} {n}") for n in range(40) for query, passage in TEXTS.values()]
    lines = [json.dumps({"pid": str(n), "text": passage}) for n, (_, passage) in enumerate(numbered)]
    (corpus / "passage.jsonl").write_text("\n".join(lines))
    scored = {"pos_scores": [9.0], "neg_scores": [3.0, 1.0, 2.0]}
    lines = [
        json.dumps({"query": query, "pos": [passage], "neg": [f"{passage} {end}" for end in "abc"]} | scored)
        for query, passage in numbered
    ]
    (tuples / "train.jsonl").write_text("\n".join(lines))
    hub.add("mteb/scifact", Path("runs/quickstart/test_sets/scifact"), kind="dataset")
    short = ["--max_steps", "2", "--save_steps", "2", "--bf16", "false", "--use_cpu", "true", "--disable_tqdm", "true"]
    options = {
        "adapt": [*short, "--block_size", "16", "--eval_blocks", "4", "--per_device_train_batch_size", "2"],
        "train": [*short, "--batch_size", "4", "--negatives", "3", "--mini_batch_size", "2", "--document_length", "24"],
    }
    run_page(START_TO_FINISH, Trainings(options, environment(hub, tmp_path / "home", token=None), "hf_dummy"))
    for name, run in (("1b", "llama-3.2-1b-sparse-cl_kd"), ("8b", "lion-sp-8b")):
        assert json.loads(Path(f"runs/{run}/training.json").read_text())["finished"]
        card = hub.files(f"org/lion-sp-{name}")["README.md"].decode()
        assert "nDCG@10" in card and "| steps" not in card and "2 steps" in card
        assert hub.files(f"org/lion-sp-{name}", "sparse-encoder")


def messages() -> list[str]:
    """The texts of the library's errors and warnings, with a zero byte for each value in them."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "".join(map(text, node.values)) if isinstance(node, ast.JoinedStr) else "\0"

    return [
        text(node)
        for file in (ROOT / "lion_st").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr | ast.Constant) and " " in text(node)
    ]


def test_messages_of_the_troubleshooting_page_are_the_code_s_own() -> None:
    known = messages()
    shown = [line for block in blocks(DOCS / "troubleshooting.md") for line in block.text.splitlines()]
    assert len(shown) > 20
    for line in shown:
        # "..." stands for a value or for the rest of a message.
        parts = [re.escape(part.strip()) for part in line.split("...") if part.strip()]
        pattern = re.compile(".*".join(parts), re.S)
        assert any(pattern.search(message) for message in known), f"no message of lion_st reads {line!r}"


def test_every_option_and_command_that_is_written_down_exists(monkeypatch) -> None:
    """In all pages, cards and first lines of scripts of the repository, in blocks that run and in those that do not."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what a model is would be looked up
    group: Any = get_command(app)
    known = {"--help_all", "--config", *FOREIGN_OPTIONS}
    known |= {f"--{name}" for kind in TRAINING_OPTIONS for name in (each.name for each in fields(kind))}
    commands = [group, *group.commands.values(), *group.commands["data"].commands.values()]
    for command in commands:
        known.update(option for parameter in command.params for option in parameter.opts + parameter.secondary_opts)
        known.update(command.get_help_option_names(Context(command)))
    for script in (*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("training_scripts/**/*.py")):
        code = script.read_text(encoding="utf-8")
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', code))
        known |= {f"--{name}" for name in re.findall(r"^    (\w+): .*=", code, re.M)}
    for page, text in WRITTEN.items():
        options = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
        assert options <= known | {f"--no_{name[2:]}" for name in known}, (page, options - known)
        plain = text.replace("\\\n", " ")
        lines = re.findall(r"^lion-st (.*)$", "\n".join(re.findall(r"```bash\n(.*?)```", plain, re.S)), re.M)
        for line in lines + re.findall(r"`lion-st ([^`]+)`", " ".join(plain.split())):
            words = shlex.split(line, comments=True)
            assert words[0].startswith("--") or words[0] in group.commands or words[0] == "COMMAND", (page, line)
            if len(words) < 3 or words[0] == "data" or "..." in line or "<" in line:
                continue
            if words[0] in TRAINING and "--backbone" in words:  # else it is a part of one
                (parse_retriever_arguments if words[0] == "train" else parse_mntp_arguments)(words[1:])
            elif words[0] not in TRAINING and not words[1].startswith("--"):
                group.commands[words[0]].make_context(words[0], words[1:])


def test_links_of_the_pages_beside_the_documentation_lead_somewhere() -> None:
    folders = ("benchmarks", "examples", "hub_uploads", "model_cards", "training_scripts")
    pages = [page for folder in folders for page in (ROOT / folder).rglob("*.md")]
    assert pages
    for page in (*pages, *ROOT.glob("*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            place, _, anchor = link.partition("#")
            if place.startswith("http"):
                continue
            target = (page.parent / place).resolve()
            assert target.exists(), (page, link)
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in titles}, (
                link
            )


def test_what_is_uploaded_names_nothing_of_ours_that_is_not() -> None:
    uploaded = {f"lion-st/{folder.name}" for folder in (ROOT / "hub_uploads").glob("*/*")}
    for file in (ROOT / "hub_uploads").rglob("*"):
        if file.suffix in (".md", ".py", ".txt"):
            assert set(re.findall(r"\blion-st/lion-[\w-]+", file.read_text(encoding="utf-8"))) <= uploaded, file


def test_what_stands_on_two_pages_is_the_same() -> None:
    def said(*path: str) -> str:
        return ROOT.joinpath(*path).read_text(encoding="utf-8")

    shown = [block.text for block in blocks(ROOT / "README.md") if not block.language]
    assert len(shown) == 2 and shown[0] in said("docs", "index.md") and shown[1] in said("docs", "search.md")
    small = said("docs", "small-retrievers.md")
    for name in ("lion-sp-mini", "lion-ds-mini", "lion-sp-smollm2-135m"):
        rows = [line for line in said("hub_uploads", "models", name, "README.md").splitlines() if f"{name}" in line]
        rows = [row.replace("**", "") for row in rows if row.startswith("| ") and "| ." in row]
        assert len(rows) > 7 and not {*rows} - {line.replace("**", "") for line in small.splitlines()}


def test_the_readme_has_the_figures_that_were_measured() -> None:
    results = ROOT / "benchmarks" / "results"

    def rows(name: str, part: str, **wanted: Any) -> dict[str, dict]:
        found = json.loads((results / f"{name}.json").read_text())[part]
        return {row["side"]: row for row in found if wanted.items() <= row.items()}

    time, memory = "forward+backward ms", "forward+backward MiB"
    heads = [rows("gpu-h200-2", "head", case=f"D {size}, 1 % active") for size in (2048, 4096)]
    heads.append(rows("sparse_head-cpu-float32-2048", "rows"))
    shown = [
        *(f"**{head['lion_st'][time]:.1f} ms**, {head['lion_st'][memory]:,.0f} MiB | {head['stock'][time]:.1f} ms, "
          f"{head['stock'][memory]:,.0f} MiB" for head in heads[:2]),
        f"**{heads[2]['lion_st'][time] / 1e3:.1f} s**, {heads[2]['lion_st'][memory]:,.0f} MiB | "
        f"{heads[2]['stock'][time] / 1e3:.1f} s, {heads[2]['stock'][memory]:,.0f} MiB",
    ]  # fmt: skip
    rate, memory = "tokens/s", "step's memory GiB"
    ours, theirs = rows("gpu-h200-3", "training").values()
    shown.append(
        f"**{ours[rate]:,.0f} {rate}**, {ours[memory]:.0f} GiB | {theirs[rate]:,.0f} {rate}, {theirs[memory]:.0f} GiB"
    )
    ours, theirs = rows("gpu-h200-3", "encode").values()
    shown.append(f"**{ours['documents/s']:,.0f}/s** | {theirs['documents/s']:.0f}/s")
    ours, theirs, *_ = rows("encode", "rows", vocabulary=128_256).values()
    rate, peak = "documents/s", "peak RSS MB"
    shown.append(f"**{ours[rate]:.1f}/s**, {ours[peak]:,.0f} MB | {theirs[rate]:.1f}/s, {theirs[peak]:,.0f} MB")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [figures for figures in shown if figures not in readme] == []


def test_placeholders_are_called_placeholders() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert "org/lion-sp-8b" not in text or "`org/lion-sp-8b` is a placeholder" in text, page


def test_all_pages_are_in_the_navigation() -> None:
    named = re.findall(r"[\w/-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_site_builds_strictly(tmp_path, monkeypatch) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the commands' help is of this lion_st
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    commands = (tmp_path / "site" / "api" / "commands" / "index.html").read_text(encoding="utf-8")
    assert "lion-st evaluate" in commands and "--keep-encoded" in commands and "--mini_batch_size" in commands
    reference = (tmp_path / "site" / "api" / "retrieval" / "index.html").read_text(encoding="utf-8")
    assert "search_texts" in reference and "Length to cut queries to" in reference
    models = (tmp_path / "site" / "api" / "models" / "index.html").read_text(encoding="utf-8")
    assert "Examples" in models and 'class="gp"' in models  # examples are laid out as code
    benchmarks = (tmp_path / "site" / "benchmarks" / "index.html").read_text(encoding="utf-8")
    assert "NVIDIA H200" in benchmarks and "On two CPU cores" in benchmarks
