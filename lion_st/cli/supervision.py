"""Commands that make training data: mine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lion_st.cli.options import (
    Device,
    Overwrite,
    Quiet,
    Threads,
    Weights,
    require_file,
    require_folder,
    require_model,
    require_number,
    require_source,
    require_writable,
)
from lion_st.errors import UsageError

if TYPE_CHECKING:
    from lion_st.supervision.mining import Searcher

BM25 = "bm25"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel="Train")(mine)


def mine(
    corpus: Annotated[
        str,
        typer.Argument(help="The documents: whatever `lion-st encode` reads. Read for BM25 and for a MODEL alone."),
    ],
    queries: Annotated[str, typer.Argument(help="The queries: the same, also TREC topics.")],
    output: Annotated[Path, typer.Argument(help="Parquet file of tuples; the same command goes on where it stopped.")],
    search: Annotated[
        list[str] | None,
        typer.Option(
            help="What to search with: bm25; MODEL@INDEX, a checkpoint and the index that `lion-st index` made with "
            "it; or MODEL, which encodes the documents into memory. Repeatable."
        ),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Judgements; by default those of CORPUS, if it is a BEIR folder.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a BEIR folder's judgements.")] = "train",
    negatives: Annotated[int, typer.Option(min=1, help="Negatives of a query, at most.")] = 16,
    ranks: Annotated[
        tuple[int, int], typer.Option(help="Ranks to take them from, positives not counted: from, and up to.")
    ] = (0, 100),
    absolute_margin: Annotated[
        float | None, typer.Option(help="A negative scores at least this far below the positive, in every ranking.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="A negative scores at most (1 - this) times the positive, in every ranking.")
    ] = None,
    queries_at_once: Annotated[int, typer.Option(min=1, help="Queries of a block, after which it is saved.")] = 1024,
    threads: Threads = 1,
    device: Device = None,
    weights: Weights = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find hard negatives of judged queries, by id, with several searchers together; resumable.

    On the GPUs of one machine: torchrun --nproc-per-node 8 -m lion_st mine CORPUS QUERIES OUTPUT ...
    """
    if not search:
        raise UsageError("Say what to search with: --search bm25, --search MODEL@INDEX or --search MODEL.")
    require_number("--absolute-margin", absolute_margin)
    require_number("--relative-margin", relative_margin)
    for source in (corpus, queries):
        require_source(source)
    require_file(qrels, "relevance judgements")
    for one in search:
        _require_searcher(one)
    require_writable(output)
    from lion_st.data.beir import beir_files
    from lion_st.data.records import read_topics
    from lion_st.data.trec import read_qrels
    from lion_st.supervision import mine_negatives

    judgements = read_qrels(qrels if qrels is not None else beir_files(corpus, split)[2])
    options: dict[str, Any] = {"device": device, "dtype": weights}
    mined = mine_negatives(
        _searchers(search, corpus, threads, options, not quiet),
        read_topics(queries),
        judgements,
        output,
        negatives=negatives,
        ranks=ranks,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        queries_at_once=queries_at_once,
        overwrite=overwrite,
        show_progress=not quiet,
    )
    if mined.tuples:  # the process that ends last of several will say it
        typer.echo(
            f"{output}: {mined.tuples:,} tuples with {mined.negatives / mined.tuples:.1f} negatives on average; "
            f"{mined.without:,} judged queries have none."
        )


def _require_searcher(name: str) -> None:
    model, at, index = name.partition("@")
    if name != BM25:
        require_model(model)
    if at:
        require_folder(Path(index), "what `lion-st index` wrote")


def _searchers(
    names: list[str], corpus: str, threads: int, options: dict[str, Any], show_progress: bool
) -> list[Searcher]:
    """The searchers that a command line names, with their documents."""
    from lion_st.data.records import read_texts
    from lion_st.encoding import load_encoder
    from lion_st.indexes import load_index
    from lion_st.retrieval import Bm25Retriever, ModelRetriever
    from lion_st.supervision import IndexSearcher

    documents: dict[str, str] = {}
    made: list[Searcher] = []
    for name in names:
        model, at, index = name.partition("@")
        if at:
            made.append(IndexSearcher(load_encoder(model, **options), load_index(index, memory_map=True), threads))
            continue
        documents = documents or {key: fields.content for key, fields in read_texts(corpus).items()}
        retriever: Any = Bm25Retriever() if name == BM25 else ModelRetriever(load_encoder(model, **options))
        retriever.index(documents, show_progress)
        made.append(retriever)
    return made
