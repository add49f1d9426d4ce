"""Commands that publish: export, card, publish, publish-index, import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from lion_st.cli.options import (
    DocumentMaxActiveDims,
    Overwrite,
    QueryMaxActiveDims,
    Quiet,
    Revision,
    Weights,
    require_folder,
    require_model,
    require_new,
    require_source,
)
from lion_st.errors import UsageError

if TYPE_CHECKING:
    from lion_st.hub.publishing import Publication, PublishOptions

STALE = "weights, module folders, tokenizer files and results that are not listed"

BaseModel: TypeAlias = Annotated[
    str | None, typer.Option("--base-model", help="Hub name of the model it was made of, if its files do not say.")
]
License: TypeAlias = Annotated[
    str | None,
    typer.Option("--license", help="Its licence; by default that which the base model's card names."),
]
Results: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--results", help="More files or folders of mteb results, of this model or of BM25; repeatable."),
]
RepositoryName: TypeAlias = Annotated[str, typer.Argument(help="Name on the Hub, owner/name; made if it is not there.")]
Private: TypeAlias = Annotated[
    bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")
]
Branch: TypeAlias = Annotated[str | None, typer.Option(help="Branch in place of main; made if it is not there.")]
CreatePr: TypeAlias = Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="List files, sizes and the card, without a network.")
]
Tag: TypeAlias = Annotated[str | None, typer.Option(help="Tag to set; by default the next of v1, v2, ...")]
Base: TypeAlias = Annotated[str | None, typer.Option(help="Where an adapter's base model is, if not where it says.")]
ParadigmOption: TypeAlias = Annotated[
    Literal["sparse", "dense"] | None, typer.Option("--paradigm", help="Of a bare adapter, which does not say.")
]
AsSparseEncoder: TypeAlias = Annotated[
    bool,
    typer.Option("--sparse-encoder", help="Write it for SparseEncoder(path) instead of SentenceTransformer(path)."),
]


def export(
    model: Annotated[str, typer.Argument(help="Checkpoint or adapter: a folder or a Hub repository.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    sparse_encoder: AsSparseEncoder = False,
    paradigm: ParadigmOption = None,
    base: Base = None,
    query_max_active_dims: QueryMaxActiveDims = None,
    document_max_active_dims: DocumentMaxActiveDims = None,
    all_terms: Annotated[
        bool, typer.Option("--all-terms", help="Leave out the checkpoint's own limits of terms.")
    ] = False,
    with_limits: Annotated[
        bool,
        typer.Option(
            "--with-limits",
            help="Keep limits that stock modules do not have, or a hybrid model in one, for lion_st.load alone.",
        ),
    ] = False,
    dev: Annotated[
        str | None,
        typer.Option(help="Hybrid: development set to fit the weights of both scores on, which are kept in it."),
    ] = None,
    dev_split: Annotated[str, typer.Option(help="Split of the development set, if it is a folder.")] = "dev",
    weights: Weights = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint that sentence-transformers loads without lion_st: adapters merged, scale folded in.

    --query-max-active-dims and --document-max-active-dims are kept in it. --sparse-encoder holds one number for both;
    two need --with-limits, and lion_st to load. Of a hybrid model two checkpoints are written, sparse and dense, beside
    hybrid.json with the weights of their scores; lion_st.load opens the folder of both.
    """
    if all_terms and (query_max_active_dims or document_max_active_dims or with_limits):
        raise UsageError(
            "--all-terms leaves limits out: give no --query-max-active-dims, --document-max-active-dims or "
            "--with-limits."
        )
    require_model(model)
    require_new(output, overwrite)
    if dev is not None:
        require_source(dev)
    from lion_st.encoding.loading import limit_terms
    from lion_st.hub import export as write
    from lion_st.models import load

    loaded = load(model, paradigm=paradigm, base=base, dtype=weights, revision=revision)
    if all_terms or query_max_active_dims or document_max_active_dims:
        limit_terms(loaded, model, query_max_active_dims, document_max_active_dims, only_these=all_terms)
    if dev is not None:
        from lion_st.evaluation import fit_fusion

        of_sparse, of_dense = fit_fusion(loaded, dev, dev_split, show_progress=not quiet)
        typer.echo(f"Weights {of_sparse:.2f} of the sparse and {of_dense:.2f} of the dense score.", err=True)
    model_type: Literal["SparseEncoder"] | None = "SparseEncoder" if sparse_encoder else None
    typer.echo(write(loaded, output, model_type, overwrite, with_limits=with_limits))


def card(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub repository.")],
    repo_id: Annotated[str | None, typer.Option(help="Its name on the Hub; by default the folder's.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; by default the standard output.")] = None,
    base_model: BaseModel = None,
    license: License = None,
    results: Results = None,
    online: Annotated[bool, typer.Option("--online", help="Read the base model's card from the Hub.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a model card: what the model and the files beside it say, and nothing else."""
    _require_results(results)
    require_new(output, overwrite)
    require_model(model)
    from lion_st.files import atomic_write
    from lion_st.hub import render_card

    text = render_card(
        model, repo_id, base_model=base_model, license=license, results=results or (), offline=not online
    )
    if output is None:
        typer.echo(text, nl=False)
    else:
        atomic_write(output, text)
        typer.echo(output)


def publish(
    model: Annotated[str, typer.Argument(help="Checkpoint; with --folder any folder, uploaded as it is.")],
    repo_id: RepositoryName,
    folder: Annotated[
        bool, typer.Option("--folder", help="Upload a folder as it is, such as one of hub_uploads/.")
    ] = False,
    private: Private = False,
    revision: Branch = None,
    create_pr: CreatePr = False,
    dry_run: DryRun = False,
    tag: Tag = None,
    base_model: BaseModel = None,
    license: License = None,
    results: Results = None,
    repo_type: Annotated[
        Literal["model", "dataset", "space"] | None,
        typer.Option(help="With --folder: by default as its parent says (models/, datasets/, spaces/)."),
    ] = None,
) -> None:
    """Publish a model on the Hub: a stock checkpoint with its card, and a revision for SparseEncoder."""
    require_model(model)
    _require_results(results)
    if folder and (base_model or license or results):
        raise UsageError("--folder uploads a folder as it is: leave --base-model, --license and --results out.")
    if repo_type is not None and not folder:
        raise UsageError("--repo-type is for --folder: a model's repository is a model.")
    from lion_st.hub import publish as publish_model
    from lion_st.hub import publish_folder

    options = _publish_options(private, revision, create_pr, dry_run, tag)
    if folder:
        done = publish_folder(model, repo_id, repo_type=repo_type, **options)
    else:
        done = publish_model(model, repo_id, base_model=base_model, license=license, results=results or (), **options)
    _report(done, "all other files" if folder else STALE)


def publish_index(
    folder: Annotated[Path, typer.Argument(help="Index or encoded corpus, of `lion-st index` or `lion-st encode`.")],
    repo_id: RepositoryName,
    license: Annotated[
        str | None, typer.Option("--license", help="Its licence, which that of the documents has to allow; needed.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name of the model that made the vectors, where that was a folder.")
    ] = None,
    private: Private = False,
    revision: Branch = None,
    create_pr: CreatePr = False,
    dry_run: DryRun = False,
    tag: Tag = None,
) -> None:
    """Publish an index or an encoded corpus on the Hub as a data set with a card; search and index take its name.

    It has no texts, but the terms of a sparse vector give away much of what its text says.
    """
    require_folder(folder, "what `lion-st index` or `lion-st encode` wrote")
    if license is None and not dry_run:
        raise UsageError("Give the --license of the index, which that of the documents has to allow.")
    from lion_st.hub import publish_index as publish_vectors

    options = _publish_options(private, revision, create_pr, dry_run, tag)
    done = publish_vectors(folder, repo_id, license=license, model=model, **options)
    _report(done, "all other files")


def import_released(
    source: Annotated[str, typer.Argument(help="Released adapter or merged checkpoint: Hub repository or folder.")],
    output: Annotated[Path | None, typer.Argument(help="Folder to make; by default of its name in runs/.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Where an adapter's base model is, or a merged checkpoint's tokenizer.")
    ] = None,
    paradigm: ParadigmOption = None,
    contract: Annotated[
        Literal["lion", "laconic", "repllama"] | None,
        typer.Option(help="How a checkpoint that does not say reads texts: scale, prompts, special tokens, lengths."),
    ] = None,
    sparse_encoder: AsSparseEncoder = False,
    weights: Weights = "auto",
    license: Annotated[
        str | None,
        typer.Option("--license", help="Its licence; by default that which the card of its base or its own names."),
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a stock checkpoint of a released retriever: the paper's adapters, or merged ones such as LACONIC."""
    require_model(source)
    require_new(output if output is not None else Path("runs") / Path(source).name, overwrite)
    from lion_st.hub import import_released as convert

    typer.echo(
        convert(
            source,
            base,
            output,
            paradigm=paradigm,
            contract=contract,
            model_type="SparseEncoder" if sparse_encoder else "SentenceTransformer",
            dtype=weights,
            license=license,
            overwrite=overwrite,
            revision=revision,
        )
    )


def _publish_options(
    private: bool, revision: str | None, create_pr: bool, dry_run: bool, tag: str | None
) -> PublishOptions:
    """What all commands that publish share; without --private the owner's setting holds, which may be private too."""
    return {
        "private": private or None,
        "revision": revision,
        "create_pr": create_pr,
        "dry_run": dry_run,
        "tag": tag,
        "announce": _list_files,
    }


def _require_results(results: list[Path] | None) -> None:
    """Refuse result files and folders that are not there."""
    for path in results or ():
        if not path.exists():
            raise FileNotFoundError(f"There are no --results {str(path)!r}.")


def _list_files(plan: Publication) -> None:
    for revision, files in plan.files.items():
        typer.echo(f"{plan.repo_id}, revision {revision}: {len(files)} files, {_size(sum(files.values()))}")
        for path, size in files.items():
            typer.echo(f"  {_size(size):>9}  {path}")


def _report(done: Publication, outdated: str) -> None:
    if done.url is None:
        _list_files(done)
        typer.echo(f"Of what is in the repository, {outdated} would be deleted.")
        if done.card is not None:
            typer.echo(f"\n{done.card}", nl=False)
        return
    for revision, paths in done.deleted.items():
        for path in paths:
            typer.echo(f"  deleted of {revision}: {path}")
    for name, commit in done.tags.items():
        typer.echo(f"tag {name}: {commit}")
    typer.echo(done.url)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
