"""The command that reruns the paper's comparison: study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lion_st.cli.options import TableStyle, require_file
from lion_st.errors import UsageError
from lion_st.extras import require
from lion_st.files import require_writable


def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study, such as training_scripts/studies/micro.yaml.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of data, cells and results; by default runs/NAME-OF-THE-FILE.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print every cell's steps, tokens, FLOPs, time and memory; run nothing.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of the cells that are finished; run nothing.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Cells that run side by side, on GPUs in turn where there are several.")
    ] = 1,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the batches of each training, each on a GPU of its own.")
    ] = 1,
    style: TableStyle = "markdown",
) -> None:
    """Compare sparse and dense retrievers by size and objective under one budget of training FLOPs.

    Cells run one after another, or as many side by side as there are workers, each in a process of its own. Repeat the
    command to go on: finished cells are skipped, interrupted ones resume, failed ones are tried again. The report is
    written into OUTPUT/report: rows as CSV and Parquet, tables, tests, power laws, figures, and an HTML page.
    """
    require_file(file, "a study")
    if plan and report:
        raise UsageError("--plan comes before a study and --report after it: give one of them.")
    output = output or Path("runs") / file.stem
    require_writable(output)
    from lion_st.evaluation import format_table
    from lion_st.study import StudyIncomplete, plan_study, read_study, run_study, write_report

    planned = plan_study(read_study(file), processes)
    if plan:
        typer.echo(format_table(planned.rows(), style=style))
        hours = planned.flops / planned.study.flops_per_second / 3600
        typer.echo(
            f"\n{len(planned.cells)} cells, {planned.flops:.3g} FLOPs, about {hours:.3g} hours of training at "
            f"{planned.study.flops_per_second:.3g} FLOPs a second, without start and evaluation of each cell."
        )
        return
    incomplete = None
    if not report:
        require("matplotlib")  # before hours of training
        try:
            run_study(planned, output, lambda line: typer.echo(line), workers)
        except StudyIncomplete as error:
            incomplete = error
    if incomplete is None or any(output.glob("cells/*/rows.json")):
        page = write_report(planned, output)
        typer.echo((page.parent / "table.md").read_text(encoding="utf-8"))
        typer.echo(page)
    if incomplete is not None:
        raise incomplete
