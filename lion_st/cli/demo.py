"""Command that opens the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lion_st.cli.options import (
    Device,
    IndexRevision,
    Quiet,
    Revision,
    Weights,
    load_options,
    require_folder,
    require_model,
    require_published,
    require_source,
)
from lion_st.errors import UsageError


def demo(
    model: Annotated[str, typer.Argument(help="Sparse checkpoint: a folder or a Hub repository.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="BEIR folder, or documents as encode takes, to search; by default SQuAD dev of the quickstart data."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense checkpoint to search beside it; without one, BM25 is beside it.")
    ] = None,
    encoded: Annotated[
        Path | None,
        typer.Option(help="Folder of `lion-st encode` of the documents, in place of encoding them."),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(help="Exact index of the documents: a folder of `lion-st index`, or a data set on the Hub."),
    ] = None,
    index_revision: IndexRevision = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; by default 127.0.0.1, this machine alone.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port; by default the first free one from 7860.")
    ] = None,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """Open a page to explore a model: a query's expansion terms, what it finds, and why."""
    for checkpoint in filter(None, (model, dense)):
        require_model(checkpoint)
    require_source(data)
    if encoded is not None:
        require_folder(encoded, "what `lion-st encode` wrote")
    if index is not None and encoded is not None:
        raise UsageError("--index and --encoded both give the documents' vectors: leave one out.")
    if index_revision is not None and index is None:
        raise UsageError("--index-revision is that of an index on the Hub: give its name as --index.")
    if index is not None:
        require_published(index, "what `lion-st index` wrote")
    from lion_st.demo import build_page, launch, load_explorer

    explorer = load_explorer(
        model,
        data,
        dense,
        encoded=encoded,
        index=index,
        index_revision=index_revision,
        load_options=load_options(device, weights, revision),
        show_progress=not quiet,
    )
    launch(build_page(explorer), host, port)
