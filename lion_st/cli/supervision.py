"""Commands that make training data: mine, teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lion_st.cli.options import (
    Device,
    Overwrite,
    Quiet,
    Threads,
    Weights,
    load_options,
    require_file,
    require_model,
    require_number,
    require_published,
    require_source,
)
from lion_st.errors import UsageError
from lion_st.files import require_writable

if TYPE_CHECKING:
    from lion_st.supervision.mining import Searcher
    from lion_st.supervision.teachers import Teacher

BM25 = "bm25"
MODEL_SETTINGS: dict[str, type] = {
    "batch_size": int, "max_tokens": int, "prompt": str, "yes": str, "no": str, "dtype": str, "revision": str
}  # fmt: skip
BM25_SETTINGS: dict[str, type] = {"k1": float, "b": float, "coverage": bool}


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
    mined = mine_negatives(
        _searchers(search, corpus, threads, load_options(device, weights), not quiet),
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


def teach(
    tuples: Annotated[str, typer.Argument(help="Training tuples: whatever `lion-st train` reads.")],
    output: Annotated[Path, typer.Argument(help="Parquet file of scored tuples; the same command goes on.")],
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=MODEL",
            help="A teacher: the name of its scores, and a CrossEncoder, a causal language model, a "
            "SentenceTransformer, SparseEncoder or MultiVectorEncoder (folder or Hub repository), or bm25. Repeatable.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME.SETTING=VALUE",
            help=f"A setting of a teacher; repeatable. Models: {', '.join(MODEL_SETTINGS)}. bm25: "
            f"{', '.join(BM25_SETTINGS)}. A prompt holds {{query}} and {{document}}; @FILE reads it from a file.",
        ),
    ] = None,
    queries: Annotated[str | None, typer.Option(help="Texts of query ids, if not in TUPLES.")] = None,
    documents: Annotated[str | None, typer.Option(help="Texts of document ids, if not in TUPLES.")] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of TUPLES.")] = None,
    split: Annotated[str, typer.Option(help="Split of TUPLES.")] = "train",
    rows_at_once: Annotated[int, typer.Option(min=1, help="Tuples of a block, after which it is saved.")] = 256,
    device: Device = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Score training tuples with one teacher or several, each a named list in a Parquet file; resumable.

    On the GPUs of one machine: torchrun --nproc-per-node 8 -m lion_st teach TUPLES OUTPUT ...
    """
    named = _named_teachers(teacher)
    by_teacher = _teacher_settings(settings, named)
    for source in (tuples, queries, documents):
        require_source(source)
    for model in named.values():
        if model != BM25:
            require_model(model)
    require_writable(output)
    from lion_st.supervision import Bm25, load_teacher
    from lion_st.supervision import teach as score

    teachers: dict[str, Teacher] = {
        name: Bm25(**by_teacher[name]) if model == BM25 else load_teacher(model, device=device, **by_teacher[name])
        for name, model in named.items()
    }
    taught = score(
        tuples,
        output,
        teachers,
        split=split,
        subset=subset,
        queries=queries,
        documents=documents,
        rows_at_once=rows_at_once,
        overwrite=overwrite,
        show_progress=not quiet,
    )
    if taught.tuples:  # the process that ends last of several will say it
        typer.echo(
            f"{output}: {taught.documents:,} documents of {taught.tuples:,} tuples, scored by {', '.join(teachers)}."
        )


def _named_teachers(given: list[str] | None) -> dict[str, str]:
    named: dict[str, str] = {}
    for one in given or []:
        name, equals, model = one.partition("=")
        if not (name and equals and model):
            raise UsageError(
                f"--teacher takes NAME=MODEL, such as minilm=cross-encoder/ms-marco-MiniLM-L6-v2: {one!r}."
            )
        if name in named:
            raise UsageError(f"--teacher names {name!r} twice: give each its own name.")
        named[name] = model
    if not named:
        raise UsageError("Name a teacher with --teacher NAME=MODEL, or --teacher bm25=bm25.")
    return named


def _teacher_settings(given: list[str] | None, named: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The settings of each teacher, of the types that they have."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in named}
    for one in given or []:
        key, equals, value = one.partition("=")
        name, _, setting = key.rpartition(".")
        if not equals or name not in named:
            raise UsageError(f"--set takes NAME.SETTING=VALUE with a NAME of --teacher, {', '.join(named)}: {one!r}.")
        kinds = BM25_SETTINGS if named[name] == BM25 else MODEL_SETTINGS
        if setting not in kinds:
            raise UsageError(f"--set {one}: {named[name]} has no {setting!r}; it has {', '.join(kinds)}.")
        settings[name][setting] = _read_setting(one, kinds[setting], value)
    return settings


def _read_setting(given: str, kind: type, value: str) -> Any:
    if kind is str:
        if value.startswith("@"):
            require_file(Path(value[1:]), "a prompt")
            return Path(value[1:]).read_text(encoding="utf-8")
        return value
    try:
        read = json.loads(value)
    except ValueError:
        read = value
    if not isinstance(read, bool if kind is bool else (int, kind)) or isinstance(read, bool) != (kind is bool):
        raise UsageError(f"--set {given}: that is not {'true or false' if kind is bool else 'a number'}.")
    return read


def _require_searcher(name: str) -> None:
    model, at, index = name.partition("@")
    if name != BM25:
        require_model(model)
    if at:
        require_published(index, "what `lion-st index` wrote")


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
