"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeAlias

import typer

TableStyle: TypeAlias = Annotated[
    Literal["markdown", "html", "latex"], typer.Option("--style", help="How to lay the table out.")
]
Engine: TypeAlias = Annotated[
    Literal["exact", "seismic", "faiss", "milvus"], typer.Option("--engine", help="Engine of the index.")
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Torch device; the best one there is by default.")]
Weights: TypeAlias = Annotated[
    str, typer.Option("--weights", metavar="DTYPE", help="Of the weights: auto, float32, bfloat16, float16.")
]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
Threads: TypeAlias = Annotated[int, typer.Option(min=1, help="CPU threads of the search.")]
EngineSettings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of the engine, such as quantization=uint8; repeatable."
    ),
]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def engine_parameters(settings: list[str] | None) -> dict[str, Any]:
    """Read `name=value` pairs; a value that is JSON is taken as such, any other as text.

    Raises:
        ValueError: If a pair has no name or no equals sign.

    Example:
        >>> engine_parameters(["kind=hnsw", "ef_search=200"])
        {'kind': 'hnsw', 'ef_search': 200}
    """
    parameters: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {setting!r}.")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters
