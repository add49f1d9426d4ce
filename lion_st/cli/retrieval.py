"""Commands that retrieve: encode, index, search, prune."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from lion_st.cli.options import (
    Device,
    DocumentMaxActiveDims,
    Engine,
    EngineSettings,
    Idf,
    IndexRevision,
    Overwrite,
    QueryMaxActiveDims,
    Quiet,
    Revision,
    TableStyle,
    Threads,
    Weights,
    load_options,
    require_file,
    require_folder,
    require_model,
    require_new,
    require_number,
    require_published,
    require_source,
    usage_errors,
)
from lion_st.cli.options import engine_parameters as read_settings
from lion_st.errors import UsageError

if TYPE_CHECKING:
    from lion_st.retrieval.search import Result

TopTerms: TypeAlias = Annotated[int | None, typer.Option(min=1, help="Keep this many of a document's heaviest terms.")]
Threshold: TypeAlias = Annotated[float | None, typer.Option(help="Keep weights of at least this value.")]
SHOWN_TERMS = 10
SHOWN_CHARACTERS = 160  # of a found document's text


def encode(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a Hub repository.")],
    corpus: Annotated[
        str,
        typer.Argument(
            help="BEIR folder; .jsonl, .parquet, .tsv (id and text, or a header), .csv (a header), .txt (one text per "
            "line), also .gz, .bz2, .xz, .zst; folder of such files; Hub data set, owner/name, owner/name:subset or "
            "hf://owner/name/subset; or - for JSON lines on the standard input. Queries also as TREC topics."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder for the shards; the same command goes on where it stopped.")],
    task: Annotated[Literal["document", "query"], typer.Option(help="What the records are.")] = "document",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut texts here; by default at the model's limit.")
    ] = None,
    query_max_active_dims: QueryMaxActiveDims = None,
    document_max_active_dims: DocumentMaxActiveDims = None,
    vector_dtype: Annotated[Literal["float32", "float16"], typer.Option(help="How vectors are stored.")] = "float32",
    shard_documents: Annotated[int, typer.Option(min=1, help="Documents per shard.")] = 4096,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 16_384,
    on_bad_record: Annotated[
        Literal["skip", "raise"], typer.Option(help="Skip and count a bad record, or stop at it.")
    ] = "skip",
    ray: Annotated[
        bool, typer.Option("--ray", help="Encode on the Ray cluster of RAY_ADDRESS, or here with Ray.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray: actors; by default one per GPU.")] = None,
    cpus_per_worker: Annotated[float, typer.Option(help="Ray: CPUs that an actor reserves.")] = 1.0,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Encode anew instead of going on.")] = False,
    quiet: Quiet = False,
) -> None:
    """Encode a corpus into shards of vectors, streaming and resumable.

    On the GPUs of one machine: torchrun --nproc-per-node 8 -m lion_st encode MODEL CORPUS OUTPUT
    """
    require_number("--cpus-per-worker", cpus_per_worker, exclusive=True)
    if not ray and workers is not None:
        raise UsageError("--workers are actors of Ray: give --ray with it.")
    unread = document_max_active_dims if task == "query" else query_max_active_dims
    if unread is not None:
        flag = "--document-max-active-dims" if task == "query" else "--query-max-active-dims"
        raise UsageError(f"{flag} {unread} limits nothing where all texts are of --task {task}: give the other one.")
    require_model(model)
    require_source(corpus)
    require_new(output, overwrite=overwrite or (output / "settings.json").is_file())
    from lion_st.encoding import EncodedCorpus, encode_corpus, encode_corpus_on_ray, load_encoder
    from lion_st.encoding.shards import is_complete, launched_processes

    if overwrite and launched_processes()[0] == 0:
        _remove_shards(output)
    opening = load_options(device, weights, revision, query_max_active_dims, document_max_active_dims)
    settings: dict[str, Any] = {
        "task": task,
        "split": split,
        "max_tokens": max_tokens,
        "dtype": vector_dtype,
        "shard_documents": shard_documents,
        "tokens_per_batch": tokens_per_batch,
        "on_bad_record": on_bad_record,
        "show_progress": not quiet,
    }
    if ray:
        settings |= {"workers": workers, "cpus_per_worker": cpus_per_worker, "load_options": opening}
        encode_corpus_on_ray(model, corpus, output, **settings)
    else:
        encode_corpus(load_encoder(model, **opening), corpus, output, **settings)
    if not is_complete(output):  # the process that ends last of several will say it
        return
    manifest = EncodedCorpus(output).manifest
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items()) or "none"
    typer.echo(
        f"{output}: {manifest['documents']:,} texts in {len(manifest['shards']):,} shards, {manifest['tokens']:,} "
        f"tokens, {manifest['truncated']:,} truncated; skipped: {skipped}."
    )
    for example in manifest["skipped_examples"]:
        typer.echo(f"  skipped {example}")


def index(
    encoded: Annotated[str, typer.Argument(help="Encoded corpus: a folder or a data set on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder of the index.")],
    engine: Engine = "exact",
    settings: EngineSettings = None,
    queries: Annotated[
        Path | None, typer.Option(help="Encoded queries to measure recall with; by default a sample of documents.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Queries to measure recall with; 0 measures none.")] = 200,
    top_terms: TopTerms = None,
    threshold: Threshold = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the encoded corpus.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Build an index of an encoded corpus; an approximate, quantised or pruned one is measured against exact search."""
    parameters = read_settings(settings, [engine])
    require_published(encoded, "what `lion-st encode` wrote")
    if queries is not None:
        require_folder(queries, "queries that `lion-st encode --task query` wrote")
    require_new(output, overwrite)
    from lion_st.indexes.pruning import Pruning

    with usage_errors():
        pruning = Pruning(top_terms, threshold)
    from lion_st.encoding import EncodedCorpus
    from lion_st.encoding.shards import encoded_queries
    from lion_st.retrieval import index_corpus

    asked = None if queries is None else encoded_queries(queries, EncodedCorpus(encoded, revision=revision)).whole()[1]
    if engine == "milvus":
        parameters.setdefault("uri", f"{output}.db")
    report = index_corpus(
        encoded,
        output,
        engine,
        engine_parameters=parameters,
        pruning=None if pruning == Pruning() else pruning,
        queries=asked,
        sample=sample,
        overwrite=overwrite,
        revision=revision,
        show_progress=not quiet,
    )
    stats = report.index.stats()
    size = "" if stats["bytes"] is None else f", {stats['bytes'] / 1e6:,.1f} MB"
    recall = "".join(f", {name} {value:.4f}" for name, value in report.recall.items())
    typer.echo(
        f"{output}: {report.index.engine}, {stats['documents']:,} documents{size}, {report.seconds:.1f} s{recall}."
    )


def search(
    model: Annotated[str, typer.Argument(help="Checkpoint that encodes the queries.")],
    index: Annotated[str, typer.Argument(help="Index: a folder or a data set on the Hub.")],
    query: Annotated[
        str | None, typer.Argument(help="One query; without it and --queries you are asked for some.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="Queries: id<tab>text, TREC topics, .jsonl and all else that encode reads.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Write what --queries finds into this TREC run file.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents per query.")] = 10,
    explain: Annotated[bool, typer.Option("--explain", help="Show the terms of each score and their shares.")] = False,
    idf: Idf = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut queries here; by default at the model's limit.")
    ] = None,
    query_max_active_dims: QueryMaxActiveDims = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the checksums of the whole index first, and not of its small files alone.")
    ] = True,
    threads: Threads = 1,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    index_revision: IndexRevision = None,
    corpus: Annotated[
        str | None, typer.Option(help="The documents that were encoded, to show the text of each one found.")
    ] = None,
    allowed: Annotated[
        Path | None, typer.Option(help="Find none but the documents whose ids are in this file, one a line.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Search an index: one query, a file of queries, or interactively."""
    if query is not None and queries is not None:
        raise UsageError("Give one QUERY or a file of --queries, not both.")
    if run is not None and queries is None:
        raise UsageError("A run file needs query ids: give --queries with --run.")
    if run is not None and (corpus is not None or explain):
        raise UsageError("A run file has neither texts nor reasons: leave --corpus and --explain out, or --run.")
    require_model(model)
    require_published(index, "what `lion-st index` wrote")
    for source in (queries, corpus):
        require_source(source)
    if allowed is not None:
        require_file(allowed, "ids of documents, one a line")
    require_new(run, overwrite)
    from lion_st.data.files import checked, read_lines
    from lion_st.data.records import read_topics
    from lion_st.encoding import load_encoder
    from lion_st.indexes import load_index
    from lion_st.retrieval import search_run, search_texts
    from lion_st.retrieval.search import require_term_weights

    asked = read_topics(queries) if queries is not None else {}
    among = None if allowed is None else [line for _, line in checked(read_lines(allowed))]
    loaded = load_index(index, memory_map=True, verify=verify, revision=index_revision)
    if explain:
        require_term_weights(loaded)
    if idf:
        require_term_weights(loaded, "--idf needs")
    encoder = load_encoder(model, **load_options(device, weights, revision, query_max_active_dims))
    options: dict[str, Any] = {"threads": threads, "idf": idf, "max_tokens": max_tokens, "allowed": among}
    if run is not None:
        from lion_st.evaluation import write_run

        found = search_run(encoder, loaded, asked, k, **options, show_progress=not quiet)
        write_run(run, found, Path(index).resolve().name, overwrite)
        typer.echo(f"{run}: {sum(map(len, found.values())):,} documents for {len(found):,} queries.")
    elif asked or query is not None:
        searched = [query] if query is not None else list(asked.values())
        results = search_texts(encoder, loaded, searched, k, explain=explain, **options)
        texts = _read_texts(corpus, {result.document for result in results})
        _show(searched, results, texts, many=query is None)
    else:
        texts = _read_texts(corpus, None)
        for text in _asked_queries():
            _show([text], search_texts(encoder, loaded, [text], k, explain=explain, **options), texts, many=False)


def prune(
    encoded: Annotated[Path, typer.Argument(help="Folder of the encoded corpus of a sparse model.")],
    queries: Annotated[Path, typer.Option(help="Folder of the encoded queries.")],
    qrels: Annotated[Path, typer.Option(help="Relevance judgements, TREC or BEIR.")],
    report: Annotated[Path, typer.Option(help="Folder for the table (.md, .json) and the figure (.svg).")],
    top_terms: Annotated[list[int] | None, typer.Option(min=1, help="Terms kept of a document; repeatable.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Least weight; repeatable.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metrics, the first one for the figure; repeatable.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents per query.")] = 100,
    style: TableStyle = "markdown",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure what static pruning costs and saves: quality, index size and latency of each setting.

    Without settings of your own, a default range of both kinds is measured.
    """
    require_folder(encoded, "documents that `lion-st encode` wrote")
    require_folder(queries, "queries that `lion-st encode --task query` wrote")
    require_file(qrels, "relevance judgements")
    require_new(report, overwrite)
    from lion_st.evaluation.metrics import require_metrics
    from lion_st.indexes.pruning import Pruning

    metrics = metric or ["nDCG@10", "Recall@100"]
    with usage_errors():
        settings = [Pruning(top_terms=count) for count in top_terms or []]
        settings += [Pruning(threshold=weight) for weight in threshold or []]
        require_metrics(metrics, k)
    from lion_st.encoding import EncodedCorpus
    from lion_st.encoding.shards import encoded_queries
    from lion_st.evaluation import format_table, read_qrels, write_prune_report
    from lion_st.evaluation.pruning import DEFAULT_SETTINGS

    corpus = EncodedCorpus(encoded)
    if corpus.paradigm != "sparse":
        raise ValueError(f"{corpus.path} was encoded by a {corpus.paradigm} model: what is pruned are sparse vectors.")
    asked = encoded_queries(queries, corpus)
    rows = write_prune_report(
        report,
        corpus,
        asked.whole(),
        read_qrels(qrels),
        overwrite=overwrite,
        settings=[Pruning(), *settings] if settings else DEFAULT_SETTINGS,
        metrics=metrics,
        k=k,
    )
    typer.echo(format_table(rows, style=style))


def convert_index(
    encoded: Annotated[
        str, typer.Argument(help="Encoded corpus of a sparse model: a folder or a data set on the Hub.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write: documents, mapping, a query, README.md.")],
    to: Annotated[
        Literal[
            "anserini",
            "ciff",
            "bmp",
            "opensearch",
            "opensearch-sparse-vector",
            "elasticsearch",
            "qdrant",
            "pgvector",
            "vespa",
            "milvus",
        ],
        typer.Option(help="What is to read it; anserini is Pyserini's as well."),
    ],
    queries: Annotated[
        Path | None, typer.Option(help="Encoded queries to write as well, and to measure the loss with.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the collection, index or table.")] = "lion",
    scale: Annotated[
        float | None, typer.Option(help="A weight of 1 as an integer, where integers are kept; 100 by default.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Queries to measure the loss with; 0 measures none.")] = 200,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the encoded corpus.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write an encoded corpus for another search engine: bulk files, mapping, a query, commands, and what is lost."""
    require_number("--scale", scale, exclusive=True)
    require_published(encoded, "what `lion-st encode` wrote")
    if queries is not None:
        require_folder(queries, "queries that `lion-st encode --task query` wrote")
    require_new(output, overwrite)
    from lion_st.retrieval import exporters

    done = exporters.convert_index(
        encoded,
        output,
        to,
        queries=queries,
        name=name,
        scale=scale,
        sample=sample,
        overwrite=overwrite,
        revision=revision,
        show_progress=not quiet,
    )
    lost = "every weight as it is"
    if not done.is_exact:
        recall = "" if done.recall is None else f", Recall@10 against exact search {done.recall:.4f}"
        lost = (
            f"{done.keeps}: {done.dropped:,} of {done.terms:,} terms dropped, weights changed by "
            f"{done.mean_change:.3%} in the mean and {done.largest_change:.4f} at most{recall}"
        )
    typer.echo(f"{output}: {done.documents:,} documents for {to}, {lost}. {output / 'README.md'} has the commands.")


def _remove_shards(folder: Path) -> None:
    """Remove what an encoding wrote, and nothing else."""
    from lion_st.encoding.shards import MANIFEST, SETTINGS

    for name in (MANIFEST, "shard-*.safetensors", SETTINGS):
        for file in folder.glob(name):
            file.unlink()


def _asked_queries() -> Iterator[str]:
    """Queries typed or piped in, until the end of the input."""
    prompt = "query> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt)
        except EOFError:
            return
        if text.strip():
            yield text


def _read_texts(corpus: str | None, wanted: Set[str] | None) -> dict[str, str]:
    """Texts of documents by id, those that are wanted or all: of several with one id the first, as it is encoded."""
    from lion_st.data.records import Record, read_corpus

    texts: dict[str, str] = {}
    for record in read_corpus(corpus) if corpus is not None and wanted != set() else ():
        if isinstance(record, Record) and (wanted is None or record.id in wanted):
            texts.setdefault(record.id, record.text)
            if len(texts) == len(wanted or ()):
                break
    return texts


def _show(queries: Sequence[str], results: Sequence[Result], texts: Mapping[str, str], many: bool) -> None:
    """Print rank, score, id, text and reasons of each result, under its query where there are many."""
    answered = {result.query for result in results}
    if unanswered := [query for query in queries if query not in answered]:
        example = shorten(unanswered[0], SHOWN_CHARACTERS, placeholder=" ...")
        typer.echo(f"Nothing was found for {len(unanswered):,} of {len(queries):,} queries: {example}", err=True)
    for result in results:
        if many and result.rank == 1:
            typer.echo(result.query)
        text = " ".join(texts.get(result.document, "").split())
        shown_text = "\t" + shorten(text, SHOWN_CHARACTERS, placeholder=" ...") if text else ""
        typer.echo(f"{result.rank}\t{result.score:.4f}\t{result.document}{shown_text}")
        if result.terms:
            shown = [f"{term.term} {term.share:.0%}" for term in result.terms[:SHOWN_TERMS]]
            more = len(result.terms) - len(shown)
            typer.echo("\t" + ", ".join(shown) + (f", {more} more" if more else ""))
