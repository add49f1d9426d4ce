"""To the Hub: a stock checkpoint with its card and its sparse twin, or a folder as it is, in whole commits."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lion_st.guard import GUARD
from lion_st.hub.cards import render_card
from lion_st.hub.facts import RESULTS_FOLDER
from lion_st.stock import export

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from sentence_transformers.base.model import BaseModel

MAIN = "main"
SPARSE_ENCODER = "sparse-encoder"
NEXT = "next of v1, v2, ..."  # no tag can have this name
CONFIG = "config_sentence_transformers.json"
MODULES = "modules.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
IGNORED = re.compile(r"(^|/)(\.git|\.cache|\.DS_Store|__pycache__)(/|$)")

RepositoryType: TypeAlias = Literal["model", "dataset", "space"]
Token: TypeAlias = "bool | str | None"


@dataclass(frozen=True)
class Publication:
    """What was published, or with `dry_run=True` what would be.

    Attributes:
        repo_id: Name on the Hub.
        files: Size in bytes by path, for each revision.
        card: The README.md of a model.
        commits: Commit of each revision; empty in a dry run.
        tags: Tags set, and their commits.
        url: Where it is; the pull request if one was opened. None in a dry run.
    """

    repo_id: str
    files: dict[str, dict[str, int]]
    card: str | None = None
    commits: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    url: str | None = None


def publish(
    model: BaseModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: Token = None,
    tag: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    results: Iterable[str | Path] = (),
    message: str | None = None,
) -> Publication:
    """Publish a model on the Hub as a stock checkpoint with its card.

    `SentenceTransformer(repo_id)` loads the main revision. Of a sparse model the revision `sparse-encoder` holds the
    same weights for `SparseEncoder(repo_id, revision="sparse-encoder")`. Both are tagged: `v1` and
    `v1-sparse-encoder`, then `v2`, ...

    A revision changes in one commit, the main one last, after all weights have arrived: a failure leaves it as it was.
    The same call made again goes on from there and sends only what is missing.

    Args:
        model: A model of `lion_st.build` or `lion_st.load`, or a checkpoint to load first, with the files of
            `render_card` beside it.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        private: Make a new repository private; by default the owner's setting.
        revision: Branch to publish to in place of main, made if it is not there, with no twin and no tag but `tag`.
        create_pr: Open a pull request in place of committing, with no twin and no tag.
        dry_run: Export, and say what would be published, without a network.
        token: Hub token that may write; by default the one that `hf auth login` saved.
        tag: Name of the tag; by default the next of v1, v2, ...
        base_model: See `render_card`.
        license: See `render_card`.
        results: See `render_card`.
        message: Commit message.

    Returns:
        Files, card, commits and tags.

    Raises:
        ValueError: If the name, the model or the card is wrong, no licence is known, or the tag is taken.
        PermissionError: If the Hub refuses the token.
        OSError: If the upload fails.

    Example:
        ::

            lion_st.hub.publish("runs/lion-sp-1b", "org/lion-sp-1b", dry_run=True).files["main"]
            lion_st.hub.publish("runs/lion-sp-1b", "org/lion-sp-1b").url
    """
    _require_place(repo_id, create_pr, revision, tag)
    with tempfile.TemporaryDirectory(prefix="lion-st-publish-") as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        card = _stage(model, folder, repo_id, offline=dry_run, token=token, base_model=base_model, license=license,
                      results=list(results))  # fmt: skip
        contents = _revisions(_contents(folder), revision, create_pr)
        files = _sizes(contents)
        if dry_run:
            return Publication(repo_id, files, card)
        _require_license(card, repo_id)
        upload = _Upload(repo_id, "model", token, private)
        return upload.send(contents, files, card, message, create_pr, tag or (NEXT if revision is None else None))


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: RepositoryType | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: Token = None,
    tag: str | None = None,
    message: str | None = None,
) -> Publication:
    """Publish a folder as it is, such as one of hub_uploads/, in one commit.

    The revision then holds the folder's files and no others. Pickled files are refused. Of a sparse model the revision
    `sparse-encoder` is made as by `publish`.

    Args:
        folder: What to publish; hidden files and caches are left out.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        repo_type: `"model"`, `"dataset"` or `"space"`; by default as the folder's parent says (models/, datasets/,
            spaces/).
        private: Make a new repository private.
        revision: Branch in place of main.
        create_pr: Open a pull request in place of committing.
        dry_run: Say what would be published, without a network.
        token: Hub token that may write.
        tag: Name of a tag to set.
        message: Commit message.

    Returns:
        Files, commits and tags.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it.
        ValueError: If the name is wrong, the type is unknown, a file is pickled, or the tag is taken.
        PermissionError: If the Hub refuses the token.
        OSError: If the upload fails; the repository is then as it was.

    Example:
        ::

            lion_st.hub.publish_folder("hub_uploads/datasets/lion-quickstart", "org/lion-quickstart")
    """
    _require_place(repo_id, create_pr, revision, tag)
    folder = Path(folder)
    contents = _contents(folder)
    if not contents:
        raise FileNotFoundError(f"{str(folder)!r} is no folder with files to publish.")
    repo_type = repo_type or _type_of(folder)
    revisions = _revisions(contents, revision, create_pr or repo_type != "model")
    files = _sizes(revisions)
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
    if dry_run:
        return Publication(repo_id, files, card)
    return _Upload(repo_id, repo_type, token, private).send(revisions, files, card, message, create_pr, tag)


# ---- what is uploaded ----

Contents: TypeAlias = dict[str, "Path | bytes"]


def _stage(model: Any, folder: Path, repo_id: str, *, offline: bool, token: Token, **card_settings: Any) -> str:
    """Export a model with its card and the result files that the card shows."""
    from lion_st.models import load

    beside = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    if isinstance(model, str | Path):
        model = load(model, token=token)
    export(model, folder)
    card = render_card(model, repo_id, beside=beside, offline=offline, token=token, **card_settings)
    (folder / "README.md").write_text(card, encoding="utf-8")
    results = beside / RESULTS_FOLDER if beside is not None else None
    if results is not None and results.is_dir():
        for file in results.rglob("*.json"):
            target = folder / RESULTS_FOLDER / file.relative_to(results)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return card


def _contents(folder: Path) -> Contents:
    """A folder's files by path.

    Raises:
        ValueError: If one of them is pickled.
    """
    paths = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    contents: Contents = {path: file for path, file in paths.items() if not IGNORED.search(path)}
    for path in contents:
        if path.endswith(PICKLES):
            raise ValueError(
                f"{path} may be pickled, and loading it could run any code. Publish weights as safetensors, and remove "
                f"it from {str(folder)!r}."
            )
    return contents


def _revisions(contents: Contents, revision: str | None, alone: bool) -> dict[str, Contents]:
    """What each revision is to hold; the twin of a sparse model first, as main changes once all else is there."""
    if revision is not None or alone or not _is_sparse(contents):
        return {revision or MAIN: contents}
    return {SPARSE_ENCODER: _twin(contents), MAIN: contents}


def _is_sparse(contents: Contents) -> bool:
    """Whether this is a sparse checkpoint for SentenceTransformer."""
    if MODULES not in contents or CONFIG not in contents:
        return False
    has_head = any(module["type"].endswith(".SpladePooling") for module in _read(contents[MODULES]))
    return has_head and _read(contents[CONFIG]).get("model_type", "SentenceTransformer") == "SentenceTransformer"


def _twin(contents: Contents) -> Contents:
    """The same checkpoint for SparseEncoder, without the guard against it."""
    config = _read(contents[CONFIG]) | {"model_type": "SparseEncoder"}
    modules = [entry for entry in _read(contents[MODULES]) if entry["path"] != GUARD]
    kept: Contents = {path: content for path, content in contents.items() if not path.startswith(f"{GUARD}/")}
    return kept | {
        CONFIG: json.dumps(config, indent=2).encode(),
        MODULES: json.dumps(modules, indent=2).encode(),
    }


def _read(content: Path | bytes) -> Any:
    return json.loads(content if isinstance(content, bytes) else content.read_text(encoding="utf-8"))


def _sizes(contents: Mapping[str, Contents]) -> dict[str, dict[str, int]]:
    return {name: {path: _size(content) for path, content in parts.items()} for name, parts in contents.items()}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _type_of(folder: Path) -> RepositoryType:
    types: dict[str, RepositoryType] = {"models": "model", "datasets": "dataset", "spaces": "space"}
    parent = folder.resolve().parent.name
    if parent not in types:
        raise ValueError(
            f"{str(folder)!r} lies in neither of {', '.join(types)}/, so its type is unknown. Pass repo_type "
            '"model", "dataset" or "space".'
        )
    return types[parent]


def _require_place(repo_id: str, create_pr: bool, revision: str | None, tag: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if create_pr and (revision is not None or tag is not None):
        raise ValueError("A pull request goes to main and is not tagged: leave out revision and tag, or create_pr.")
    try:
        validate_repo_id(repo_id)
        owner, _, name = repo_id.partition("/")
        if owner and name:
            return
        reason = "it has no owner"
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"{repo_id!r} is no name for a repository: {reason}. Write owner/name.")


def _require_license(card: str, repo_id: str) -> None:
    from huggingface_hub import ModelCard

    if ModelCard(card).data.get("license") is None:
        raise ValueError(
            f"No licence is known for {repo_id!r}: it is the base model's. Name the base model (base_model=, "
            "--base-model), if its card on the Hub has a licence, or the licence (license=, --license)."
        )


# ---- how it is uploaded ----


class _Upload:
    """One repository on the Hub, written in whole commits."""

    def __init__(self, repo_id: str, repo_type: RepositoryType, token: Token, private: bool | None) -> None:
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        self.private = private
        self.kind: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
        self.api: HfApi = HfApi(token=token, library_name="lion_st")

    def send(
        self,
        contents: Mapping[str, Contents],
        files: dict[str, dict[str, int]],
        card: str | None,
        message: str | None,
        create_pr: bool,
        tag: str | None,
    ) -> Publication:
        """Make each revision hold its files and tag them, or open a pull request for the only one."""
        message = message or "Publish with lion_st"
        with self.explained():
            if create_pr:
                commit = self.commit(contents[MAIN], MAIN, message, create_pr=True)
                return Publication(self.repo_id, files, card, {commit.pr_revision: commit.oid}, url=commit.pr_url)
            branches, tags = self.references()
            if tag in tags and tags[tag] not in branches.values():
                raise ValueError(f"The tag {tag!r} of {self.repo_id!r} marks an earlier commit. Choose another one.")
            commits = {name: self.commit(parts, name, message).oid for name, parts in contents.items()}
            if tag == NEXT:
                tag = _next_tag(tags, commits[MAIN])
            wanted = {} if tag is None else {_tag_of(revision, tag): commit for revision, commit in commits.items()}
            self.set_tags(wanted, tags)
            kind = self.kind["repo_type"]
            page = f"{self.api.endpoint}/{'' if kind == 'model' else kind + 's/'}{self.repo_id}"
            return Publication(self.repo_id, files, card, commits, wanted, page)

    def set_tags(self, wanted: Mapping[str, str], there: Mapping[str, str]) -> None:
        """Mark commits that are not marked yet.

        Raises:
            ValueError: If a tag marks another commit.
        """
        for name, commit in wanted.items():
            if there.get(name, commit) != commit:
                raise ValueError(
                    f"Published as {commit}, but the tag {name!r} of {self.repo_id!r} marks an earlier commit and was "
                    "left there. Publish again with another tag."
                )
            if name not in there:
                self.api.create_tag(tag=name, revision=commit, **self.kind)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Make the repository if needed, run the block, and turn the clients' errors into ours."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            sdk = "gradio" if self.kind["repo_type"] == "space" else None
            self.api.create_repo(**self.kind, private=self.private, exist_ok=True, space_sdk=sdk)
            yield
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
                raise PermissionError(
                    f"The Hub does not let this token write to {self.repo_id!r} ({reason}). Log in with "
                    "`hf auth login`, or pass a token that may write."
                ) from error
            raise OSError(
                f"The upload to {self.repo_id!r} failed ({reason}). No revision is half changed; the same call made "
                "again goes on from here."
            ) from error

    def references(self) -> tuple[dict[str, str], dict[str, str]]:
        """Commits of the branches and of the tags."""
        refs = self.api.list_repo_refs(**self.kind)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        return branches, {ref.name: ref.target_commit for ref in refs.tags}

    def commit(self, contents: Mapping[str, Path | bytes], revision: str, message: str, create_pr: bool = False) -> Any:
        """Make a revision hold exactly these files, in one commit, which comes after the large ones have arrived."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if revision != MAIN:
            self.api.create_branch(branch=revision, exist_ok=True, **self.kind)
        additions = [CommitOperationAdd(path, content) for path, content in contents.items()]
        there = set(self.api.list_repo_files(revision=revision, **self.kind))
        gone = [CommitOperationDelete(path) for path in sorted(there - {".gitattributes"} - contents.keys())]
        return self.api.create_commit(
            operations=[*gone, *additions],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            **self.kind,
        )


def _tag_of(revision: str, tag: str) -> str:
    return f"{tag}-{SPARSE_ENCODER}" if revision == SPARSE_ENCODER else tag


def _next_tag(tags: Mapping[str, str], commit: str) -> str:
    """The version that marks this commit already, else the next of v1, v2, ..."""
    versions = {int(name[1:]): target for name, target in tags.items() if re.fullmatch(r"v\d+", name)}
    number = next((number for number, target in versions.items() if target == commit), max(versions, default=0) + 1)
    return f"v{number}"
