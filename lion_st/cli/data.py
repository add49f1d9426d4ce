"""Commands about data: data check."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from lion_st.cli.options import require_model, require_source
from lion_st.errors import FAILED, UsageError


def group() -> None:
    """Look at training data."""


def check(
    source: Annotated[str, typer.Argument(help="Training data: what `lion-st train --train_data` reads.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Subset of the data set.")] = None,
    queries: Annotated[str | None, typer.Option(help="Where query texts are, if not in the source.")] = None,
    documents: Annotated[str | None, typer.Option(help="The same for documents.")] = None,
    negatives: Annotated[int | None, typer.Option(min=0, help="Negatives that training will ask for.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer measures lengths and what is cut; else words are counted.")
    ] = None,
    query_length: Annotated[
        int, typer.Option("--query-length", "--query_length", min=1, help="Where training cuts queries, in tokens.")
    ] = 64,
    document_length: Annotated[
        int, typer.Option("--document-length", "--document_length", min=1, help="The same for documents.")
    ] = 128,
    query_prompt: Annotated[
        str, typer.Option("--query-prompt", "--query_prompt", help="What stands in front of queries, for lengths.")
    ] = "",
    document_prompt: Annotated[
        str, typer.Option("--document-prompt", "--document_prompt", help="The same for documents.")
    ] = "",
    eval_data: Annotated[
        list[str] | None,
        typer.Option("--eval-data", "--eval_data", help="Test collection that must not be trained on; repeatable."),
    ] = None,
    eval_split: Annotated[str, typer.Option("--eval-split", "--eval_split", help="Split of its judgements.")] = "test",
    sample: Annotated[int, typer.Option(min=1, help="Texts whose length is measured.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check training data to the end: texts, ids, negatives, scores, lengths, overlap with test collections.

    The exit code is 1 if something would be refused, or would train other than it looks.
    """
    if model is not None:
        require_model(model)
    require_source(source)
    for name, place in (("--queries", queries), ("--documents", documents)):
        if place == "-":
            raise UsageError(f"{name} cannot be read from the standard input: texts are looked up in it.")
        require_source(place)
    from lion_st.data.checking import check_tuples

    tokenizer = None
    if model is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
    report = check_tuples(
        source,
        split=split,
        subset=subset,
        queries=queries,
        documents=documents,
        negatives=negatives,
        tokenizer=tokenizer,
        query_length=query_length,
        document_length=document_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        eval_data=eval_data or (),
        eval_split=eval_split,
        sample=sample,
    )
    typer.echo(json.dumps(report.to_json(), indent=2) if as_json else report.describe())
    if not report.is_sound:
        raise typer.Exit(FAILED)
