"""Verbs of the evaluation room: evaluate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lion_st.cli.options import (
    Device,
    EngineSettings,
    Quiet,
    Revision,
    TableStyle,
    Threads,
    Weights,
    engine_parameters,
)


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    for verb in (evaluate, compare):
        app.command(rich_help_panel="Evaluate")(verb)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, or bm25.")],
    data: Annotated[
        list[str], typer.Option(help="BEIR folder or mteb task such as SciFact or TRECDL2019; repeatable.")
    ],
    engine: Annotated[
        Literal["exact", "seismic", "faiss", "milvus"], typer.Option("--engine", help="Engine of the indexes.")
    ] = "exact",
    settings: EngineSettings = None,
    protocol: Annotated[
        Literal["model", "msmarco", "trec-dl", "beir"],
        typer.Option(help="Lengths, depth and metrics of the evaluation."),
    ] = "model",
    self_matches: Annotated[
        Literal["keep", "drop_before_cut", "drop_after_cut"] | None,
        typer.Option(help="Documents with the id of their query; by default as the protocol says."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Documents per query, in place of the protocol's.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metrics in place of the protocol's; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of BEIR folders.")] = "test",
    bm25: Annotated[bool, typer.Option("--bm25", help="Add a row for BM25.")] = False,
    output: Annotated[
        Path, typer.Option(help="Folder of results, runs and rows; what is there is not run again.")
    ] = Path("results"),
    keep_encoded: Annotated[
        bool, typer.Option("--keep-encoded", help="Keep encoded corpora and use them again with other engines.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is there.")] = False,
    threads: Threads = 1,
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 8192,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    style: TableStyle = "markdown",
    quiet: Quiet = False,
) -> None:
    """Score models on retrieval test sets; results are mteb's, and resume."""
    from lion_st.evaluation import evaluate_retrieval, format_table
    from lion_st.evaluation.evaluate import table_columns

    rows = []
    for model in [*(["bm25"] if bm25 and "bm25" not in models else []), *models]:
        rows += evaluate_retrieval(
            model,
            data,
            engine,
            output,
            split=split,
            protocol=protocol,
            top_k=top_k,
            self_matches=self_matches,
            metrics=metric,
            engine_parameters=engine_parameters(settings),
            tokens_per_batch=tokens_per_batch,
            threads=threads,
            keep_encoded=keep_encoded,
            load_options={"device": device, "dtype": weights, "revision": revision},
            overwrite=overwrite,
            show_progress=not quiet,
        )
    typer.echo(format_table(rows, table_columns(rows), style))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="TREC run files, each named after its file.")],
    qrels: Annotated[Path, typer.Option(help="Relevance judgements, TREC or BEIR.")],
    metric: Annotated[list[str] | None, typer.Option(help="Metrics; repeatable.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Compare with this run alone, by its file name.")] = None,
    permutations: Annotated[int, typer.Option(min=1, help="Random flips of the test.")] = 100_000,
    biggest: Annotated[int, typer.Option(min=0, help="Queries shown with the largest differences.")] = 5,
    relevance_level: Annotated[int, typer.Option(min=1, help="Lowest relevant grade; 2 for TREC DL.")] = 1,
    style: TableStyle = "markdown",
) -> None:
    """Test whether runs differ: paired randomisation tests, Holm's correction, wins and losses."""
    from lion_st.evaluation import compare_runs, format_table, read_qrels, read_run

    names = {run.name: run for run in runs}
    if len(names) < len(runs):
        raise ValueError(f"Two of the runs have the same file name: {[str(run) for run in runs]}.")
    comparisons = compare_runs(
        read_qrels(qrels),
        {name: read_run(run) for name, run in names.items()},
        metric or ("nDCG@10",),
        baseline,
        permutations,
        biggest=biggest,
        relevance_level=relevance_level,
    )
    typer.echo(format_table([comparison.row() for comparison in comparisons], style=style))
    for comparison in comparisons if biggest else []:
        typer.echo(f"\n{comparison.metric}: {comparison.b} against {comparison.a}")
        for name, queries in (("better", comparison.gains), ("worse", comparison.drops)):
            typer.echo(f"  {name}: " + (", ".join(f"{query} {value:+.3f}" for query, value in queries) or "no query"))
