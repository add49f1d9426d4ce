"""Command that starts a server."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from lion_st.cli.options import (
    Device,
    DocumentMaxActiveDims,
    Idf,
    IndexRevision,
    QueryMaxActiveDims,
    Quiet,
    Revision,
    Threads,
    Weights,
    load_options,
    require_model,
    require_published,
    require_source,
    usage_errors,
)

# Options of `serve`, as its help groups them.
index_option = partial(typer.Option, rich_help_panel="Index")
server_option = partial(typer.Option, rich_help_panel="Server")
limit_option = partial(typer.Option, rich_help_panel="Limits of requests")


def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub repository.")],
    index: Annotated[
        str | None,
        index_option(
            help="Index for /search: a folder, which is read again when it is built anew, or a data set on the Hub."
        ),
    ] = None,
    index_revision: IndexRevision = None,
    corpus: Annotated[
        str | None, index_option(help="The documents, whose texts /search answers with; read again with the index.")
    ] = None,
    host: Annotated[
        str, server_option(help="Address to listen on; 0.0.0.0 for all of the machine's, best with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, server_option(min=0, max=65_535, help="Port to listen on; 0 takes a free one.")] = 8080,
    workers: Annotated[
        int, server_option(min=1, help="Processes, each with the model; they share the memory of the index.")
    ] = 1,
    api_key: Annotated[
        str | None,
        server_option(envvar="LION_ST_API_KEY", show_envvar=True, help="Bearer token that requests have to send."),
    ] = None,
    default_task: Annotated[
        Literal["query", "document"], typer.Option(help="What texts are where a request names no prompt.")
    ] = "document",
    auto_truncate: Annotated[
        bool, limit_option(help="Cut long texts where a request does not say; else refuse them.")
    ] = True,
    max_batch_tokens: Annotated[int, limit_option(min=1, help="Tokens of a forward pass.")] = 16_384,
    max_client_batch_size: Annotated[int, limit_option(min=1, help="Texts of a request.")] = 32,
    max_concurrent_requests: Annotated[
        int, limit_option(min=1, help="Texts that a worker holds at a time; further ones get 429.")
    ] = 512,
    payload_limit: Annotated[int, limit_option(min=1, help="Bytes of a request; longer ones get 413.")] = 2_000_000,
    timeout: Annotated[float, limit_option(help="Seconds from which a request gets 504.")] = 60.0,
    reload_seconds: Annotated[
        float, index_option(help="How often to look whether the index was built anew; 0 never does.")
    ] = 5.0,
    allow_other_model: Annotated[
        bool, index_option("--allow-other-model", help="Search an index that a model of other weights made.")
    ] = False,
    verify: Annotated[
        bool, index_option(help="Compare the checksums of the whole index first, and not of its small files alone.")
    ] = True,
    query_max_active_dims: QueryMaxActiveDims = None,
    document_max_active_dims: DocumentMaxActiveDims = None,
    idf: Idf = False,
    threads: Threads = 1,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """Serve a model over HTTP, and search an index: the interfaces of text-embeddings-inference, OpenAI's, /search.

    Needs the extra serve of lion-st. Requests under way are answered before it ends.
    """
    require_model(model)
    if index is not None:
        require_published(index, "what `lion-st index` wrote")
    require_source(corpus)
    from lion_st.serving.settings import ServerSettings

    with usage_errors():
        settings = ServerSettings(
            model,
            index,
            corpus,
            host,
            port,
            workers,
            default_task=default_task,
            auto_truncate=auto_truncate,
            max_batch_tokens=max_batch_tokens,
            max_client_batch_size=max_client_batch_size,
            max_concurrent_requests=max_concurrent_requests,
            payload_limit=payload_limit,
            timeout=timeout,
            api_key=api_key,
            reload_seconds=reload_seconds,
            search_threads=threads,
            allow_other_model=allow_other_model,
            verify=verify,
            idf=idf,
            load_options=load_options(device, weights, revision, query_max_active_dims, document_max_active_dims),
            index_revision=index_revision,
        )
    from lion_st.serving import serve as run

    run(settings, typer.echo)
