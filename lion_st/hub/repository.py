"""A repository on the Hub, each of whose revisions is written in one whole commit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lion_st.checkpoints import DENSE_FORM, HYBRID_FILE, SPARSE_FORM, is_weight_file
from lion_st.hub.results import RESULTS_FOLDER
from lion_st.hub.upload_files import Contents

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

MAIN = "main"
SPARSE_ENCODER = "sparse-encoder"
NEXT = "next of v1, v2, ..."  # no tag can have this name
MODULES = "modules.json"
# What a checkpoint may have at its top beside weights and modules; a newer one without it must not be read with it.
SETTINGS = re.compile(
    r"(generation_config|sentence_bert_config|special_tokens_map|added_tokens|vocab|lion_st_checks|hybrid)\.json|"
    r"tokenizer\.model|merges\.txt|vocab\.txt|chat_template\.jinja"
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


@dataclass(frozen=True)
class Change:
    """What will make a revision hold its files, in one commit on `parent`; `is_new` if the branch is not there yet."""

    revision: str
    parent: str
    is_new: bool
    additions: list[CommitOperationAdd]
    deletions: list[CommitOperationDelete]

    @property
    def deleted(self) -> list[str]:
        """Paths that go."""
        return [operation.path_in_repo for operation in self.deletions]


class Repository:
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
        """Mark commits that are not marked yet."""
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
    ) -> Change:
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
        return Change(revision, parent, is_new, additions, deletions)

    def outdated(self, there: set[str], commit: str) -> set[str]:
        """Which of the files of a commit have to go, if they are not published again."""
        if self.is_mirror:
            return there - {".gitattributes"}
        folders: tuple[str, ...] = ()
        if MODULES in there:
            modules = read_json(Path(self.api.hf_hub_download(filename=MODULES, revision=commit, **self.kind)))
            folders = tuple(f"{entry['path']}/" for entry in modules if entry["path"])
        if HYBRID_FILE in there:
            folders += (f"{SPARSE_FORM}/", f"{DENSE_FORM}/")
        return {
            path
            for path in there
            if is_weight_file(path)
            or SETTINGS.fullmatch(path)
            or path.startswith(folders)
            or (path.startswith(f"{RESULTS_FOLDER}/") and path.endswith(".json"))
        }

    def commit(self, change: Change, message: str, create_pr: bool = False) -> Any:
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


def read_json(content: Path | bytes) -> Any:
    """What a JSON file says, or its contents."""
    return json.loads(content if isinstance(content, bytes) else content.read_text(encoding="utf-8"))
