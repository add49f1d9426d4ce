"""To the Hub: a stock checkpoint with its card and its sparse twin, or a folder as it is, in whole commits."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lion_st.checkpoints import is_weight_file
from lion_st.exporting import export
from lion_st.guard import GUARD
from lion_st.hub.cards import render_card
from lion_st.hub.facts import RESULTS_FOLDER
from lion_st.hub.upload_files import Contents, files_to_upload, stays_inside

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from sentence_transformers.base.model import BaseModel

MAIN = "main"
SPARSE_ENCODER = "sparse-encoder"
NEXT = "next of v1, v2, ..."  # no tag can have this name
CONFIG = "config_sentence_transformers.json"
MODULES = "modules.json"
LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")
# What a checkpoint may have at its top beside weights and modules; a newer one without it must not be read with it.
SETTINGS = re.compile(
    r"(generation_config|sentence_bert_config|special_tokens_map|added_tokens|vocab)\.json|tokenizer\.model|"
    r"merges\.txt|vocab\.txt|chat_template\.jinja"
)

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
        deleted: Files that were there before and are no longer, for each revision; empty in a dry run, which does not
            look.
    """

    repo_id: str
    files: dict[str, dict[str, int]]
    card: str | None = None
    commits: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    url: str | None = None
    deleted: dict[str, list[str]] = field(default_factory=dict)


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
    announce: Callable[[Publication], None] | None = None,
) -> Publication:
    """Publish a model on the Hub as a stock checkpoint with its card.

    `SentenceTransformer(repo_id)` loads the main revision. Of a sparse model the revision `sparse-encoder` holds the
    same weights for `SparseEncoder(repo_id, revision="sparse-encoder")`. Both are tagged: `v1` and
    `v1-sparse-encoder`, then `v2`, ...

    A revision changes in one commit, the main one last, after all weights of both have arrived, and only if nobody else
    has changed it since. So each revision holds one whole checkpoint at any time, the earlier one or this one, whatever
    fails. The same call made again goes on from there and sends only what is missing.

    What an earlier checkpoint left in the repository and this one has not is deleted: weights, module folders,
    tokenizer files, and `results/*.json`. All other files stay.

    Args:
        model: A model of `lion_st.build` or `lion_st.load`, or a checkpoint to load first, with the files of
            `render_card` beside it. Its LICENSE, NOTICE and USE_POLICY files are published too.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        private: Make a new repository private, and refuse one that is there and public; by default the owner's
            setting.
        revision: Branch or pull request (`refs/pr/1`) to publish to in place of main, with no twin and no tag but
            `tag`. A branch is made if it is not there.
        create_pr: Open a pull request in place of committing, with no twin and no tag.
        dry_run: Export, and say what would be published, without a network.
        token: Hub token that may write; by default the one that `hf auth login` saved.
        tag: Name of the tag; by default the next of v1, v2, ...
        base_model: See `render_card`.
        license: See `render_card`.
        results: See `render_card`.
        message: Commit message.
        announce: Called with what is going up before anything is sent, such as to print it.

    Returns:
        Files, card, commits, tags and deletions.

    Raises:
        ValueError: If the name, the revision, the model or the card is wrong, no licence is known, the tag is taken,
            the repository is public against `private`, a pull request would change nothing, or a file may not be
            uploaded, see `publish_folder`.
        PermissionError: If the Hub refuses the token.
        OSError: If the upload fails.

    Example:
        ::

            lion_st.hub.publish("runs/lion-sp-1b", "org/lion-sp-1b", dry_run=True).files["main"]
            lion_st.hub.publish("runs/lion-sp-1b", "org/lion-sp-1b").url
    """
    revision = _place(repo_id, create_pr, revision, tag)
    with tempfile.TemporaryDirectory(prefix="lion-st-publish-") as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        card = _stage(model, folder, repo_id, offline=dry_run, token=token, base_model=base_model, license=license,
                      results=list(results), has_twin=revision is None and not create_pr)  # fmt: skip
        contents = _revisions(files_to_upload(folder), revision, create_pr)
        files = _sizes(contents)
        if dry_run:
            return Publication(repo_id, files, card)
        _require_license(card, repo_id)
        if announce is not None:
            announce(Publication(repo_id, files, card))
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
    announce: Callable[[Publication], None] | None = None,
) -> Publication:
    """Publish a folder as it is, such as one of hub_uploads/, in one commit.

    The revision then holds the folder's files and no others. Refused are links out of the folder, and files that are
    pickled or hold a private key or a token, known by their names and by what is in them. Of a sparse model the
    revision `sparse-encoder` is made as by `publish`.

    Args:
        folder: What to publish; files and folders whose name begins with a dot, all but .gitattributes, and caches are
            left out.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        repo_type: `"model"`, `"dataset"` or `"space"`; by default as the folder's parent says (models/, datasets/,
            spaces/).
        private: Make a new repository private, and refuse one that is there and public.
        revision: Branch or pull request (`refs/pr/1`) in place of main.
        create_pr: Open a pull request in place of committing.
        dry_run: Say what would be published, without a network.
        token: Hub token that may write.
        tag: Name of a tag to set.
        message: Commit message.
        announce: Called with what is going up before anything is sent, such as to print it.

    Returns:
        Files, commits, tags and deletions.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing in it.
        ValueError: If the name or the revision is wrong, the type is unknown, a file is refused, the tag is taken, the
            repository is public against `private`, or a pull request would change nothing.
        PermissionError: If the Hub refuses the token.
        OSError: If the upload fails.

    Example:
        ::

            lion_st.hub.publish_folder("hub_uploads/datasets/lion-quickstart", "org/lion-quickstart")
    """
    revision = _place(repo_id, create_pr, revision, tag)
    folder = Path(folder)
    contents = files_to_upload(folder)
    if not contents:
        raise FileNotFoundError(f"{str(folder)!r} is not a folder with files to publish.")
    repo_type = repo_type or _type_of(folder)
    revisions = _revisions(contents, revision, create_pr or repo_type != "model")
    files = _sizes(revisions)
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
    if dry_run:
        return Publication(repo_id, files, card)
    if announce is not None:
        announce(Publication(repo_id, files, card))
    upload = _Upload(repo_id, repo_type, token, private, is_mirror=True)
    return upload.send(revisions, files, card, message, create_pr, tag)


# ---- what is uploaded ----


def _stage(model: Any, folder: Path, repo_id: str, *, offline: bool, token: Token, **card_settings: Any) -> str:
    """Export a model with its card, the result files that the card shows, and its licences."""
    from lion_st.models import load

    beside = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    if isinstance(model, str | Path):
        model = load(model, token=token, local_files_only=offline and beside is not None)
    export(model, folder, create_model_card=False)
    card = render_card(model, repo_id, beside=beside, offline=offline, token=token, **card_settings)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if beside is not None:
        licences = (file for file in beside.iterdir() if file.is_file() and file.name.upper().startswith(LICENCES))
        for file in [*licences, *_result_files(beside / RESULTS_FOLDER)]:
            if not stays_inside(file, beside):
                raise ValueError(f"{file} is a link out of {str(beside)!r}. Copy what it names, or remove the link.")
            target = folder / file.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return card


def _result_files(folder: Path) -> Iterator[Path]:
    """mteb's results in a folder, its descriptions of the models, and rows of figures that name no files of ours."""
    for file in sorted(folder.rglob("*.json")):
        content = _read(file)
        if isinstance(content, dict) and {"task_name", "mteb_version", "scores"} <= content.keys():
            yield file
            description = file.parent / "model_meta.json"
            if description.is_file():
                yield description
        elif isinstance(content, list) and all(map(_is_plain_row, content)):
            yield file


def _is_plain_row(row: Any) -> bool:
    return isinstance(row, dict) and "dataset" in row and not (row.get("run") or row.get("qrels"))


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


def _place(repo_id: str, create_pr: bool, revision: str | None, tag: str | None) -> str | None:
    """The revision to publish to, None for main.

    Raises:
        ValueError: If nothing can be published there.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    revision = None if revision == MAIN else revision
    if create_pr and (revision is not None or tag is not None):
        raise ValueError("A pull request goes to main and is not tagged: leave out revision and tag, or create_pr.")
    if revision == SPARSE_ENCODER:
        raise ValueError(
            f"The revision {revision!r} is made of main, and published with it. Leave out revision (--revision), or "
            "name another branch."
        )
    try:
        validate_repo_id(repo_id)
        owner, _, name = repo_id.partition("/")
        if owner and name:
            return revision
        reason = "it has no owner"
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"{repo_id!r} is not a name of a repository: {reason}. Write owner/name.")


def _require_license(card: str, repo_id: str) -> None:
    from huggingface_hub import ModelCard

    if ModelCard(card).data.get("license") is None:
        raise ValueError(
            f"No licence is known for {repo_id!r}: it is the base model's. Name the base model (base_model=, "
            "--base-model), if its card on the Hub has a licence, or the licence (license=, --license)."
        )


# ---- how it is uploaded ----


@dataclass(frozen=True)
class _Change:
    """What will make a revision hold its files, in one commit on `parent`; `is_new` if the branch is not there yet."""

    revision: str
    parent: str
    is_new: bool
    additions: list[CommitOperationAdd]
    deletions: list[CommitOperationDelete]

    @property
    def deleted(self) -> list[str]:
        return [operation.path_in_repo for operation in self.deletions]


class _Upload:
    """One repository on the Hub, written in whole commits; `is_mirror` if it is to hold no other files."""

    def __init__(
        self, repo_id: str, repo_type: RepositoryType, token: Token, private: bool | None, is_mirror: bool = False
    ) -> None:
        from huggingface_hub import HfApi

        self.repo_id = repo_id
        self.private = private
        self.is_mirror = is_mirror
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
            branches, tags = self.references()
            if create_pr:
                change = self.transfer(contents[MAIN], MAIN, branches, create_pr=True)
                commit = self.commit(change, message, create_pr=True)
                if commit.pr_url is None:
                    raise ValueError(f"{self.repo_id!r} holds these files already; there is nothing to ask for.")
                reference = commit.pr_revision
                deleted = {reference: change.deleted}
                return Publication(self.repo_id, files, card, {reference: commit.oid}, {}, commit.pr_url, deleted)
            if tag in tags and tags[tag] not in branches.values():
                raise ValueError(f"The tag {tag!r} of {self.repo_id!r} marks an earlier commit. Choose another one.")
            changes = [self.transfer(parts, name, branches) for name, parts in contents.items()]
            commits = {change.revision: self.commit(change, message).oid for change in changes}
            if tag == NEXT:
                tag = _next_tag(tags, commits[MAIN])
            wanted = {} if tag is None else {_tag_of(revision, tag): commit for revision, commit in commits.items()}
            self.set_tags(wanted, tags)
            kind = self.kind["repo_type"]
            page = f"{self.api.endpoint}/{'' if kind == 'model' else kind + 's/'}{self.repo_id}"
            deleted = {change.revision: change.deleted for change in changes}
            return Publication(self.repo_id, files, card, commits, wanted, page, deleted)

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
            if self.private and not self.api.repo_info(**self.kind).private:
                raise ValueError(
                    f"{self.repo_id!r} is there and public, and private makes only a new repository private. Change "
                    "that in its settings on the Hub, leave out private (--private), or choose another name."
                )
            yield
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:
            reason = _one_line(error)
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

    def transfer(
        self, contents: Contents, revision: str, branches: Mapping[str, str], create_pr: bool = False
    ) -> _Change:
        """Send a revision's large files, and plan the commit that names them."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        is_new = revision not in branches and not revision.startswith("refs/")
        start = MAIN if is_new else revision
        parent = str(self.api.repo_info(revision=start, **self.kind).sha)
        additions = [CommitOperationAdd(path, content) for path, content in contents.items()]
        there = set(self.api.list_repo_files(revision=parent, **self.kind))
        deletions = [CommitOperationDelete(path) for path in sorted(self.outdated(there, parent) - contents.keys())]
        self.api.preupload_lfs_files(
            additions=additions, revision=start, create_pr=create_pr, free_memory=False, **self.kind
        )
        return _Change(revision, parent, is_new, additions, deletions)

    def outdated(self, there: set[str], commit: str) -> set[str]:
        """Which of the files of a commit have to go, if they are not published again."""
        if self.is_mirror:
            return there - {".gitattributes"}
        folders: tuple[str, ...] = ()
        if MODULES in there:
            modules = _read(Path(self.api.hf_hub_download(filename=MODULES, revision=commit, **self.kind)))
            folders = tuple(f"{entry['path']}/" for entry in modules if entry["path"])
        return {
            path
            for path in there
            if is_weight_file(path)
            or SETTINGS.fullmatch(path)
            or path.startswith(folders)
            or (path.startswith(f"{RESULTS_FOLDER}/") and path.endswith(".json"))
        }

    def commit(self, change: _Change, message: str, create_pr: bool = False) -> Any:
        """Make a revision hold its files, unless somebody else has changed it since."""
        if change.is_new:
            self.api.create_branch(branch=change.revision, revision=change.parent, exist_ok=True, **self.kind)
        return self.api.create_commit(
            operations=[*change.deletions, *change.additions],
            commit_message=message,
            revision=change.revision,
            create_pr=create_pr,
            parent_commit=change.parent,
            **self.kind,
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _tag_of(revision: str, tag: str) -> str:
    return f"{tag}-{SPARSE_ENCODER}" if revision == SPARSE_ENCODER else tag


def _next_tag(tags: Mapping[str, str], commit: str) -> str:
    """The version that marks this commit already, else the next of v1, v2, ..."""
    versions = {int(name[1:]): target for name, target in tags.items() if re.fullmatch(r"v\d+", name)}
    number = next((number for number, target in versions.items() if target == commit), max(versions, default=0) + 1)
    return f"v{number}"
