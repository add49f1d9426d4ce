"""Commands that evaluate: evaluate, compare, fuse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lion_st.cli.options import (
    Device,
    DocumentMaxActiveDims,
    EngineSettings,
    Idf,
    Overwrite,
    QueryMaxActiveDims,
    Quiet,
    Revision,
    TableStyle,
    Threads,
    Weights,
    engine_parameters,
    load_options,
    require_file,
    require_folder,
    require_model,
    require_new,
    require_number,
    require_source,
    usage_errors,
)
from lion_st.errors import UsageError
from lion_st.files import require_writable

if TYPE_CHECKING:
    from lion_st.retrieval import Retriever


# Options of `evaluate`, as its help groups them.
test_set_option = partial(typer.Option, rich_help_panel="Test sets")
baseline_option = partial(typer.Option, rich_help_panel="BM25 and fusion")
protocol_option = partial(typer.Option, rich_help_panel="Protocol")
file_option = partial(typer.Option, rich_help_panel="Files")


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, TREC run files, or bm25.")],
    data: Annotated[
        list[str] | None,
        test_set_option(
            help="BEIR folder, Hub data set with such files (mteb/scifact), mteb task (SciFact, TRECDL2019) or "
            "benchmark (BEIR, NanoBEIR, 'MTEB(eng, v2)'); repeatable."
        ),
    ] = None,
    trec: Annotated[
        tuple[str, str, Path] | None,
        test_set_option(
            metavar="CORPUS TOPICS QRELS", help="A test set: documents and queries as encode takes, and qrels."
        ),
    ] = None,
    bm25: Annotated[bool, baseline_option("--bm25", help="Add a row for BM25.")] = False,
    bm25_stemmer: Annotated[
        str | None,
        baseline_option(help="Stem BM25's words: porter, as Anserini does, english or another algorithm of PyStemmer."),
    ] = None,
    hybrid: Annotated[
        Literal["rrf", "convex"] | None,
        baseline_option(help="Add a row that fuses the models, by reciprocal ranks or by weights fitted on --dev."),
    ] = None,
    dev: Annotated[str | None, baseline_option(help="Development set for the weights of --hybrid convex.")] = None,
    dev_split: Annotated[str, baseline_option(help="Split of the development set, if it is a folder.")] = "dev",
    query_model: Annotated[
        str | None, typer.Option(help="Encode queries with this checkpoint, such as a small query encoder.")
    ] = None,
    query_max_active_dims: QueryMaxActiveDims = None,
    document_max_active_dims: DocumentMaxActiveDims = None,
    idf: Idf = False,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="exact (the default), torch, seismic, faiss or milvus; of several, the first for such vectors.",
        ),
    ] = None,
    settings: EngineSettings = None,
    protocol: Annotated[
        Literal["model", "msmarco", "trec-dl", "beir"],
        protocol_option(help="Lengths, depth, metrics and self-matches."),
    ] = "model",
    self_matches: Annotated[
        Literal["task", "keep", "drop_before_cut", "drop_after_cut"] | None,
        protocol_option(help="What becomes of a document with its query's id, in place of the protocol's rule."),
    ] = None,
    top_k: Annotated[
        int | None, protocol_option("-k", min=1, help="Documents per query, in place of the protocol's.")
    ] = None,
    metric: Annotated[list[str] | None, protocol_option(help="Metrics in place of the protocol's; repeatable.")] = None,
    split: Annotated[str, test_set_option(help="Split of BEIR folders.")] = "test",
    output: Annotated[
        Path, file_option(help="Folder of results, runs and rows; what is there is read back, not run again.")
    ] = Path("results"),
    encoded: Annotated[
        Path | None, file_option(help="Vectors of the test set's documents, as lion-st encode wrote them.")
    ] = None,
    keep_encoded: Annotated[
        bool, file_option("--keep-encoded", help="Keep encoded corpora for other engines and for interrupted runs.")
    ] = False,
    overwrite: Annotated[bool, file_option("--overwrite", help="Run again what is there.")] = False,
    threads: Threads = 1,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 8192,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    style: TableStyle = "markdown",
    quiet: Quiet = False,
) -> None:
    """Score models on retrieval test sets; results are mteb's, and resume."""
    parameters = engine_parameters(settings, engine or ["exact"])
    searching = [model for model in models if not Path(model).is_file()]  # the others are runs
    _require_fusion(searching, hybrid, dev)
    for model in (*searching, *([query_model] if query_model is not None else [])):
        if model != "bm25":
            require_model(model)
    for source in (*(data or []), *map(str, trec or ()), *([dev] if dev else [])):
        require_source(source)
    if encoded is not None:
        require_folder(encoded, "documents that `lion-st encode` wrote")
    if not data and trec is None:
        raise UsageError("There is nothing to evaluate on: give --data or --trec.")
    if bm25_stemmer is not None and not (bm25 or "bm25" in models):
        raise UsageError(f"--bm25-stemmer {bm25_stemmer} is of BM25: add --bm25.")
    if idf and not set(searching) - {"bm25"}:
        raise UsageError("--idf weighs the terms of sparse models' queries: give such a model, or leave it out.")
    require_writable(output)
    _require_metrics(metric)
    from lion_st.retrieval import Bm25Retriever

    with usage_errors():
        lexical = Bm25Retriever(stemmer=bm25_stemmer)
    from lion_st.evaluation import evaluate_retrieval, format_table, open_retriever, trec_task
    from lion_st.evaluation.evaluate import adjusted_protocol, table_columns

    sources: list[Any] = list(data or [])
    if trec is not None:
        sources.append(trec_task(*trec, name=Path(trec[1]).name.partition(".")[0]))
    rules = adjusted_protocol(protocol, top_k, self_matches, metric)
    names = _distinct_names(models, "" if query_model is None else f"+{Path(query_model).name}")
    retriever_settings: dict[str, Any] = {
        "engine_parameters": parameters,
        "tokens_per_batch": tokens_per_batch,
        "threads": threads,
        "encoded": encoded,
        "encoded_dir": output / "encoded" if keep_encoded or hybrid else None,
        "idf": idf,
        "query_model": query_model,
        "load_options": load_options(device, weights, revision, query_max_active_dims, document_max_active_dims),
    }

    def opened(model: str) -> Any:
        """A retriever, or the path of a run."""
        if Path(model).is_file():
            return model
        if model == "bm25":
            return lexical
        return open_retriever(model, engine or "exact", rules, name=names.get(model), **retriever_settings)

    evaluated = [*(["bm25"] if bm25 and "bm25" not in models else []), *models]
    retrievers: Iterable[Any] = map(opened, evaluated)  # one after the other, so that one model is in memory
    if hybrid is not None:
        retrievers = list(retrievers)
        parts = [one for name, one in zip(evaluated, retrievers, strict=True) if name in searching]
        retrievers.append(_fused(parts, dev, dev_split, rules.top_k, not quiet))
    rows = []
    for retriever in retrievers:
        rows += evaluate_retrieval(
            retriever,
            sources,
            output_dir=output,
            split=split,
            protocol=rules,
            overwrite=overwrite,
            show_progress=not quiet,
            name=names.get(retriever) if isinstance(retriever, str) else None,  # of a run
        )
    typer.echo(format_table(rows, table_columns(rows), style))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="TREC run files, each named after its file.")],
    qrels: Annotated[Path, typer.Option(help="Relevance judgements, TREC or BEIR; evaluate writes them by its runs.")],
    metric: Annotated[list[str] | None, typer.Option(help="Metrics; repeatable.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this run alone, by its file name.")] = None,
    biggest: Annotated[int, typer.Option(min=0, help="Queries shown with the largest differences.")] = 5,
    relevance_level: Annotated[int, typer.Option(min=1, help="Lowest relevant grade; 2 for TREC DL.")] = 1,
    style: TableStyle = "markdown",
) -> None:
    """Test whether runs differ: paired randomisation tests, Holm's correction, wins and losses."""
    for run in runs:
        require_file(run, "a TREC run")
    require_file(qrels, "relevance judgements")
    names = {run.name: run for run in runs}
    if len(names) < len(runs):
        raise ValueError(f"Two of the runs have the same file name: {[str(run) for run in runs]}.")
    if len(names) < 2:
        raise UsageError(f"A comparison needs two runs or more, got {len(names)}.")
    if baseline is not None and baseline not in names:
        raise UsageError(f"--baseline {baseline} is not among the runs {', '.join(names)}.")
    _require_metrics(metric)
    from lion_st.evaluation import compare_runs, format_table, read_qrels, read_run

    comparisons = compare_runs(
        read_qrels(qrels),
        {name: read_run(run) for name, run in names.items()},
        metric or ("nDCG@10",),
        baseline,
        biggest=biggest,
        relevance_level=relevance_level,
    )
    typer.echo(format_table([comparison.row() for comparison in comparisons], style=style))
    for comparison in comparisons if biggest else []:
        typer.echo(f"\n{comparison.metric}: {comparison.b} against {comparison.a}")
        for name, queries in (("better", comparison.gains), ("worse", comparison.drops)):
            typer.echo(f"  {name}: " + (", ".join(f"{query} {value:+.3f}" for query, value in queries) or "no query"))


def fuse(
    runs: Annotated[list[Path], typer.Argument(help="TREC run files of the same queries, such as Lion-SP's and DS's.")],
    output: Annotated[Path, typer.Option(help="Run file to write.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Of each run, for a convex combination; without weights, by reciprocal ranks. Repeatable."),
    ] = None,
    dev: Annotated[
        list[Path] | None, typer.Option(help="Runs of a development set to fit two weights on; one for each run.")
    ] = None,
    dev_qrels: Annotated[Path | None, typer.Option(help="Its relevance judgements, TREC or BEIR.")] = None,
    metric: Annotated[str | None, typer.Option(help="What fitted weights maximise; by default nDCG@10.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents per query.")] = 1000,
    overwrite: Overwrite = False,
) -> None:
    """Fuse runs into a hybrid one, by reciprocal ranks or by weights, given or fitted."""
    if len(runs) < 2:
        raise UsageError(f"Fusion needs two runs or more, got {len(runs)}.")
    if bool(dev) != (dev_qrels is not None) or (dev and weight):
        raise UsageError("Fitting weights takes --dev runs with their --dev-qrels, and no --weight.")
    if weight and len(weight) != len(runs):
        raise UsageError(f"{len(runs)} runs need as many --weight, got {len(weight)}.")
    if dev and len(dev) != len(runs):
        raise UsageError(f"{len(runs)} runs need as many --dev runs, got {len(dev)}.")
    if dev and len(runs) != 2:
        raise UsageError(f"Weights are fitted for two runs, got {len(runs)}: give --weight for each.")
    if metric is not None and not dev:
        raise UsageError("--metric is what weights are fitted to: give --dev and --dev-qrels with it.")
    for one in weight or ():
        require_number("--weight", one)
    if weight and not any(weight):
        raise UsageError("All --weight are 0: give one that is not.")
    for run in (*runs, *(dev or [])):
        require_file(run, "a TREC run")
    require_file(dev_qrels, "relevance judgements")
    require_new(output, overwrite)
    from lion_st.evaluation.metrics import require_metrics

    metric = metric or "nDCG@10"
    if dev:
        with usage_errors():
            require_metrics([metric], k)
    from lion_st.evaluation import fit_run_weights, fuse_runs, read_qrels, read_run, write_run

    weights: Sequence[float] | None = weight or None
    if dev and dev_qrels is not None:
        weights = fit_run_weights([read_run(run) for run in dev], read_qrels(dev_qrels), metric, k=k)
    fused = fuse_runs([read_run(run) for run in runs], weights, k)
    write_run(output, fused, output.stem, overwrite)
    how = "reciprocal ranks" if weights is None else "weights " + ", ".join(f"{one:.2f}" for one in weights)
    typer.echo(f"{output}: {len(fused):,} queries, fused by {how}.")


def _distinct_names(models: Sequence[str], ending: str) -> dict[str, str]:
    """Names of folders and runs that are called like others: as much of their paths as tells them apart."""
    places = {model: Path(model).resolve().parts for model in models if Path(model).exists()}
    names = {}
    for model, parts in places.items():
        others = set(places.values()) - {parts}
        depth = 1
        while any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        if depth > 1:
            names[model] = "-".join(parts[-depth:]) + (ending if Path(model).is_dir() else "")
    return names


def _require_metrics(names: Sequence[str] | None) -> None:
    """Refuse a metric that there is not."""
    from lion_st.evaluation.metrics import metric_depth

    with usage_errors():
        for name in names or ():
            metric_depth(name)


def _require_fusion(models: Sequence[str], how: str | None, dev: str | None) -> None:
    """Refuse a fusion of too few or too many models, and weights without what they are fitted on."""
    if how == "convex" and dev is None:
        raise UsageError("The weights of --hybrid convex are fitted on a development set: give it as --dev.")
    if dev is not None and how != "convex":
        raise UsageError("--dev is for the weights of --hybrid convex: give both, or neither.")
    if how is not None and (len(models) < 2 or (how == "convex" and len(models) > 2)):
        count = "two models" if how == "convex" else "two models or more"
        raise UsageError(f"--hybrid {how} fuses {count}, got {len(models)}.")


def _fused(
    retrievers: Sequence[Retriever], dev: str | None, dev_split: str, depth: int, show_progress: bool
) -> Retriever:
    """The fusion of retrievers, by weights fitted on a development set or, without one, by reciprocal ranks."""
    from lion_st.evaluation import fit_hybrid
    from lion_st.retrieval import HybridRetriever

    if dev is None:
        return HybridRetriever(retrievers, depth=depth)
    return fit_hybrid(retrievers, dev, dev_split, depth=depth, show_progress=show_progress)
