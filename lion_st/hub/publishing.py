"""To the Hub: a stock checkpoint with its card, also for SparseEncoder, or a folder as it is, in whole commits."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from lion_st.checkpoints import DENSE_FORM, HYBRID_FILE, SPARSE_FORM
from lion_st.exporting import export
from lion_st.hub.cards import render_card
from lion_st.hub.index_cards import read_vectors, render_index_card
from lion_st.hub.repository import (
    MAIN,
    MODULES,
    NEXT,
    SPARSE_ENCODER,
    Publication,
    Repository,
    RepositoryType,
    Token,
    read_json,
)
from lion_st.hub.results import RESULTS_FOLDER
from lion_st.hub.upload_files import Contents, files_to_upload, stays_inside
from lion_st.wrong_class import (
    BLOCK,
    TRANSFORMER,
    is_of_transformer,
    own_class_alone,
    with_moved_transformer,
)
from lion_st.wrong_class import SETTINGS as CONFIG

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel
    from typing_extensions import Unpack

LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")


class PublishOptions(TypedDict, total=False):
    """Where in a repository something is published, and how.

    Attributes:
        private: Make a new repository private, and refuse one that is there and public; by default the owner's
            setting.
        revision: Branch or pull request (`refs/pr/1`) to publish to in place of main, without the sparse-encoder
            revision and with no tag but `tag`. A branch is made if it is not there.
        create_pr: Open a pull request in place of committing, without the sparse-encoder revision and tags.
        dry_run: Say what would be published, without a network.
        token: Hub token that may write; by default the one that `hf auth login` saved.
        tag: Name of the tag; of models and indexes by default the next of v1, v2, ...
        message: Commit message.
        announce: Called with what is going up before anything is sent, such as to print it.
    """

    private: bool | None
    revision: str | None
    create_pr: bool
    dry_run: bool
    token: Token
    tag: str | None
    message: str | None
    announce: Callable[[Publication], None] | None


def publish(
    model: BaseModel | str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    results: Iterable[str | Path] = (),
    **options: Unpack[PublishOptions],
) -> Publication:
    """Publish a model on the Hub as a stock checkpoint with its card.

    `SentenceTransformer(repo_id)` loads the main revision. Of a sparse model the revision `sparse-encoder` holds the
    same weights for `SparseEncoder(repo_id, revision="sparse-encoder")`. Both are tagged: `v1` and
    `v1-sparse-encoder`, then `v2`, ... Of a hybrid model the main revision gives stock classes the dense vector, the
    other one the sparse vector, and `lion_st.load(repo_id)` makes both of one pass: the main revision holds the sparse
    checkpoint too, in the folder `sparse`, so that it is whole at every commit.

    A revision changes in one commit, the main one last, after all weights of both have arrived, and only if nobody else
    has changed it since. So each revision holds one whole checkpoint at any time, the earlier one or this one, whatever
    fails. The same call made again goes on from there and sends only what is missing.

    What an earlier checkpoint left in the repository and this one has not is deleted: weights, module folders,
    tokenizer files, and `results/*.json`. All other files stay.

    Args:
        model: A model of `lion_st.build` or `lion_st.load`, or a checkpoint to load first, with the files of
            `render_card` beside it. Its LICENSE, NOTICE and USE_POLICY files are published too.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        base_model: See `render_card`.
        license: See `render_card`.
        results: See `render_card`.
        options: See `PublishOptions`.

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
    target = _Destination(repo_id, **options)
    with tempfile.TemporaryDirectory(prefix="lion-st-publish-") as temporary:
        folder = Path(temporary) / repo_id.split("/")[-1]
        card = _stage(
            model,
            folder,
            repo_id,
            offline=target.dry_run,
            token=target.token,
            base_model=base_model,
            license=license,
            results=list(results),
            has_sparse_encoder_revision=target.revision is None and not target.create_pr,
        )
        contents = _revisions(files_to_upload(folder), target.revision, target.create_pr)
        if not target.dry_run:
            _require_license(card, repo_id)
        return target.send(contents, card, "model", versioned=True)


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    repo_type: RepositoryType | None = None,
    **options: Unpack[PublishOptions],
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
        options: See `PublishOptions`.

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
    target = _Destination(repo_id, **options)
    folder = Path(folder)
    contents = files_to_upload(folder)
    if not contents:
        raise FileNotFoundError(f"{str(folder)!r} is not a folder with files to publish.")
    repo_type = repo_type or _type_of(folder)
    revisions = _revisions(contents, target.revision, target.create_pr or repo_type != "model")
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
    return target.send(revisions, card, repo_type, is_mirror=True)


def publish_index(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    model: str | None = None,
    **options: Unpack[PublishOptions],
) -> Publication:
    """Publish an index, or an encoded corpus, as a data set with a card, in one commit.

    `load_index(repo_id)` and `EncodedCorpus(repo_id)` open it, and compare the checksums of all files. The texts are
    not part of it, but the terms of a sparse vector give away much of what its text says. The revision then holds what
    was published and nothing else. Left out are other files in the folder, but for licences, and the skipped records
    that the manifest of an encoding shows.

    Args:
        folder: What `index_corpus` or `encode_corpus` wrote.
        repo_id: Name on the Hub, `owner/name`; made if it is not there.
        license: Licence, that of the documents for example; needed but in a dry run.
        model: Name on the Hub of the model that made the vectors, for the card, where that was a folder.
        options: See `PublishOptions`.

    Returns:
        Files, card, commits, tags and deletions.

    Raises:
        FileNotFoundError: If there is no such folder.
        StorageError: If it is neither an index nor an encoded corpus, is damaged, does not say of which model, or is an
            index of an engine whose files are not for other machines.
        ValueError: If no licence is given, and as in `publish_folder`.
        PermissionError: If the Hub refuses the token.
        OSError: If the upload fails.

    Example:
        ::

            lion_st.hub.publish_index("runs/index", "org/scifact-index", license="cc-by-4.0").url
    """
    target = _Destination(repo_id, **options)
    folder = Path(folder)
    vectors = read_vectors(folder)
    files: Contents = {
        path: content
        for path, content in files_to_upload(folder).items()
        if path.startswith(vectors.files) or ("/" not in path and path.upper().startswith(LICENCES))
    }
    files.update(vectors.replaced)
    card = render_index_card(vectors, repo_id, sum(map(_size, files.values())), license, model)
    if license is None and not target.dry_run:
        raise ValueError(
            f"No licence is known for {repo_id!r}: give one (license=, --license) that the licence of the documents "
            "allows."
        )
    contents: dict[str, Contents] = {target.revision or MAIN: files | {"README.md": card.encode()}}
    return target.send(contents, card, "dataset", is_mirror=True, versioned=True)


@dataclass
class _Destination:
    """A repository's name with `PublishOptions`, of which nothing is wrong."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    dry_run: bool = False
    token: Token = None
    tag: str | None = None
    message: str | None = None
    announce: Callable[[Publication], None] | None = None

    def __post_init__(self) -> None:
        self.revision = _place(self.repo_id, self.create_pr, self.revision, self.tag)

    def send(
        self,
        contents: dict[str, Contents],
        card: str | None,
        repo_type: RepositoryType,
        is_mirror: bool = False,
        versioned: bool = False,
    ) -> Publication:
        """Make revisions hold these contents, or say what would be sent; `versioned` names a new version in a tag."""
        sizes = {name: {path: _size(one) for path, one in parts.items()} for name, parts in contents.items()}
        plan = Publication(self.repo_id, sizes, card)
        if self.dry_run:
            return plan
        if self.announce is not None:
            self.announce(plan)
        tag = self.tag or (NEXT if versioned and self.revision is None else None)
        repository = Repository(self.repo_id, repo_type, self.token, self.private, is_mirror)
        return repository.send(contents, plan.files, card, self.message, self.create_pr, tag)


def _stage(model: Any, folder: Path, repo_id: str, *, offline: bool, token: Token, **card_settings: Any) -> str:
    """Export a model with its card, the result files that the card shows, and its licences."""
    from lion_st.models import load

    beside = Path(model) if isinstance(model, str | Path) and Path(model).is_dir() else None
    if isinstance(model, str | Path):
        model = load(model, token=token, local_files_only=offline and beside is not None)
    export(model, folder, create_model_card=False)
    if (folder / HYBRID_FILE).is_file():  # stock classes open what lies at the top
        for file in (folder / DENSE_FORM).iterdir():
            file.rename(folder / file.name)
        (folder / DENSE_FORM).rmdir()
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
        content = read_json(file)
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
    """What each revision is to hold; that for SparseEncoder first, as main changes once all else is there."""
    is_hybrid = HYBRID_FILE in contents
    if revision is not None or alone or not (is_hybrid or _is_sparse(contents)):
        return {revision or MAIN: contents}
    sparse = _sparse_form(contents) if is_hybrid else _for_sparse_encoder(contents)
    return {SPARSE_ENCODER: sparse, MAIN: contents}


def _sparse_form(contents: Contents) -> Contents:
    """The sparse checkpoint of an exported hybrid model, and what says more of both."""
    begin = f"{SPARSE_FORM}/"
    of_both = ("README.MD", f"{RESULTS_FOLDER}/".upper(), *LICENCES)
    beside = {path: content for path, content in contents.items() if path.upper().startswith(of_both)}
    return beside | {path.removeprefix(begin): content for path, content in contents.items() if path.startswith(begin)}


def _is_sparse(contents: Contents) -> bool:
    """Whether this is a sparse checkpoint for SentenceTransformer."""
    if MODULES not in contents or CONFIG not in contents:
        return False
    has_head = any(module["type"].endswith(".SpladePooling") for module in read_json(contents[MODULES]))
    return has_head and read_json(contents[CONFIG]).get("model_type", "SentenceTransformer") == "SentenceTransformer"


def _for_sparse_encoder(contents: Contents) -> Contents:
    """The same checkpoint for SparseEncoder, guarded against SentenceTransformer instead; see `lion_st.wrong_class`."""
    config = read_json(contents[CONFIG]) | {"model_type": "SparseEncoder"}
    moved: Contents = {
        f"{TRANSFORMER}/{path}" if is_of_transformer(path) else path: content
        for path, content in contents.items()
        if not path.startswith(f"{BLOCK}/")
    }
    return moved | {
        CONFIG: json.dumps(config, indent=2).encode(),
        MODULES: json.dumps(with_moved_transformer(read_json(contents[MODULES])), indent=2).encode(),
        "config.json": json.dumps(own_class_alone()).encode(),
    }


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
    """The revision to publish to, None for main."""
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
