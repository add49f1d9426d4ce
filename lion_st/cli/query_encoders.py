"""Command that makes a small query encoder of a large model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lion_st.cli.options import (
    Device,
    Overwrite,
    Quiet,
    Revision,
    Weights,
    require_model,
    require_new,
    require_number,
    require_source,
)
from lion_st.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset


def query_encoder(
    model: Annotated[str, typer.Argument(help="Full checkpoint, which encodes the documents.")],
    data: Annotated[
        str, typer.Argument(help="Training tuples, see lion_st.data.load_tuples; their scores are not read.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the Router checkpoint to make.")],
    kind: Annotated[
        Literal["idf", "static", "truncated"],
        typer.Option(help="Weights of the query's tokens, from document frequencies or learned; or the first layers."),
    ] = "static",
    layers: Annotated[
        str, typer.Option(help="Layers that a truncated encoder keeps: so many first ones, or these, such as 0,6,-1.")
    ] = "2",
    split: Annotated[str, typer.Option(help="Split of the tuples, such as train[:1%].")] = "train",
    negatives: Annotated[int, typer.Option(min=0, help="Negatives of each query.")] = 4,
    queries: Annotated[str | None, typer.Option(help="Where query texts are, if not in the data.")] = None,
    documents: Annotated[str | None, typer.Option(help="Where document texts are, if not in the data.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the tuples.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries of a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="By default 1e-2 for token weights, 1e-4 for layers.")
    ] = None,
    device: Device = None,
    weights: Weights = "auto",
    revision: Revision = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make a small query encoder of a model, by distillation; documents and their index stay as they are."""
    kept = _layers(layers)
    require_number("--epochs", epochs, exclusive=True)
    require_number("--learning-rate", learning_rate, exclusive=True)
    require_model(model)
    require_source(data)
    require_new(output, overwrite)
    import lion_st
    from lion_st.data import load_tuples
    from lion_st.encoding.encode import encode_texts
    from lion_st.training.query_distillation import distill_query_encoder, make_distillation_targets
    from lion_st.training.query_encoders import (
        idf_weights,
        save_query_encoder,
        static_query_encoder,
        truncated_query_encoder,
    )
    from lion_st.training.query_tables import router_limit

    full = lion_st.load(model, device=device, dtype=weights, revision=revision, merge_adapter=True)
    if full.query_table is not None:
        raise UsageError(f"{model} encodes queries by a table, and has no other query encoder to learn from.")
    paradigm = lion_st.paradigm_of(full)
    if kind == "truncated" or paradigm in ("multi_vector", "hybrid"):  # which is refused
        student = truncated_query_encoder(full, kept)
    elif paradigm == "dense":
        raise UsageError(f"--kind {kind} weighs the terms of a sparse model, and {model} is dense: --kind truncated.")
    else:
        student = static_query_encoder(full)
    if paradigm == "sparse":
        router_limit(student, full)  # raises before documents are encoded
    tuples = load_tuples(
        data,
        negatives=negatives,
        split=split,
        queries=queries,
        documents=documents,
        sampling="first",
        drop_short=True,
    )
    if kind == "idf":
        vectors = encode_texts(full, _documents(tuples), "document", show_progress=not quiet)
        student = static_query_encoder(full, idf_weights([([], vectors)]))
    else:
        targets = make_distillation_targets(full, tuples, show_progress=not quiet)
        if kind == "static":
            student = static_query_encoder(full, idf_weights([([], targets.document_vectors)]))
        settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
        work = output.with_name(f".{output.name}-training")
        distill_query_encoder(student, targets, work, **settings, disable_tqdm=quiet)
    save_query_encoder(student, full, output, overwrite)
    typer.echo(f"{output}: {kind} query encoder of {model}, {sum(p.numel() for p in student.parameters()):,} weights.")


def _layers(text: str) -> int | list[int]:
    """A number of layers, or several layers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or (len(numbers) == 1 and numbers[0] < 1):
        raise UsageError(f"--layers takes a number of at least 1, or layers such as 0,6,-1, got {text!r}.")
    return numbers if len(numbers) > 1 else numbers[0]


def _documents(tuples: Dataset) -> list[str]:
    """The documents of tuples, each once."""
    from lion_st.training.query_distillation import document_columns

    columns = document_columns(tuples)
    return list(dict.fromkeys(row[name] for row in tuples for name in columns))
