"""Options that several commands share, how their values are read, and what is checked before anything is computed."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from lion_st.engines import ENGINES, engine_settings, require_settings
from lion_st.errors import UsageError
from lion_st.files import is_hub_name, require_free, require_writable

# Which advise to install kernels, and to try another dtype.
HUSHED = ("bitsandbytes", "sentence_transformers")
BARS = ("HUB", "DATASETS")  # libraries whose progress bars a variable of the environment turns off
DATA_SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".txt", ".parquet", ".gz", ".bz2", ".xz", ".zst")

TableStyle: TypeAlias = Annotated[
    Literal["markdown", "html", "latex"], typer.Option("--style", help="How to lay the table out.")
]
Engine: TypeAlias = Annotated[
    Literal["exact", "torch", "seismic", "faiss", "milvus"], typer.Option("--engine", help="Engine of the index.")
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Torch device; the best one there is by default.")]
Weights: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Of the model's weights; auto is the checkpoint's own."),
]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Revision: TypeAlias = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
IndexRevision: TypeAlias = Annotated[str | None, typer.Option(help="Hub revision of the index.")]
QueryMaxActiveDims: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, help="Keep so many of a query's heaviest terms, in place of the sparse checkpoint's own limit."
    ),
]
DocumentMaxActiveDims: TypeAlias = Annotated[int | None, typer.Option(min=1, help="The same for documents.")]
Threads: TypeAlias = Annotated[int, typer.Option(min=1, help="CPU threads of the search.")]
Idf: TypeAlias = Annotated[
    bool,
    typer.Option("--idf", help="Multiply the weights of queries' terms by their idf in the collection; sparse."),
]
EngineSettings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the engine, such as quantization=uint8; repeatable. "
        + " ".join(f"{engine}: {', '.join(engine_settings(engine))}." for engine in ENGINES),
    ),
]


def _hush(context: typer.Context, quiet: bool) -> bool:
    """Turn off the progress bars and notes of libraries, of those that are yet to be imported too."""
    if not quiet:
        return quiet
    for name in HUSHED:
        logger = getLogger(name)
        context.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(ERROR)
    if "transformers" not in sys.modules:
        os.environ |= {name: "1" for name in ("TQDM_DISABLE", *(f"HF_{one}_DISABLE_PROGRESS_BARS" for one in BARS))}
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        return quiet
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    context.call_on_close(lambda: logging.set_verbosity(before[0]))
    if before[1]:
        context.call_on_close(logging.enable_progress_bar)
    return quiet


def load_options(
    device: str | None,
    weights: str,
    revision: str | None = None,
    query_max_active_dims: int | None = None,
    document_max_active_dims: int | None = None,
) -> dict[str, Any]:
    """What the command line says of a model, as arguments of `load_encoder` and, without limits, of `lion_st.load`."""
    given: dict[str, Any] = {
        "device": device,
        "dtype": weights,
        "revision": revision,
        "query_max_active_dims": query_max_active_dims,
        "document_max_active_dims": document_max_active_dims,
    }
    return {name: value for name, value in given.items() if value is not None}


Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", callback=_hush, help="Show no progress bars and no notes of libraries.")
]


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with a value of the command line, as the library says it, is an error of the command line."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def require_number(flag: str, value: float | None, exclusive: bool = False) -> None:
    """Refuse a number that is not finite or too small."""
    if value is None or (math.isfinite(value) and (value > 0 if exclusive else value >= 0)):
        return
    raise UsageError(f"{flag} is a finite number {'above' if exclusive else 'of at least'} 0, got {value}.")


def engine_parameters(settings: list[str] | None, engines: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` pairs; a value that is JSON is taken as such, any other as text.

    Example:
        >>> engine_parameters(["kind=hnsw", "ef_search=200"], ["faiss"])
        {'kind': 'hnsw', 'ef_search': 200}
    """
    with usage_errors():
        require_settings(engines, ())
    parameters: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not name or not equals:
            raise UsageError(f"--set takes NAME=VALUE, got {setting!r}.")
        with usage_errors():
            require_settings(engines, [name])
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


def require_model(model: str) -> None:
    """Refuse a path that is not there, before anything is imported; a name of the Hub is left to be looked up."""
    path = Path(model).expanduser()
    is_name = re.fullmatch(r"(?!(runs|data)/)[\w-][\w.-]*(/[\w.-]+)?", model) is not None  # folders of commands
    if not path.is_dir() and (path.exists() or not is_name):
        raise FileNotFoundError(f"There is no checkpoint folder {model!r}.")


def require_folder(path: Path, what: str) -> None:
    """Refuse a folder that is not there."""
    if not path.is_dir():
        raise FileNotFoundError(f"There is no such folder: {str(path)!r}, which should be {what}.")


def require_published(place: str, what: str) -> None:
    """Refuse a folder that is not there, before anything is imported; a name of the Hub is left to be looked up.

    Raises:
        FileNotFoundError: What it should be.
    """
    if not is_hub_name(place):
        require_folder(Path(place), f"{what}, and that is not a name on the Hub, owner/name")


def require_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"There is no such file: {str(path)!r}, which should be {what}.")


def require_source(source: str | None) -> None:
    """Refuse a path of texts that is not there; standard input and names of data sets are left to be opened."""
    if source is None or source == "-" or source.startswith("hf://") or Path(source).expanduser().exists():
        return
    if Path(source.rpartition(":")[0] or source).exists():  # FOLDER:SUBSET
        return
    path = Path(source)
    if path.is_absolute() or source.startswith((".", "~")) or path.suffix in DATA_SUFFIXES or len(path.parts) > 2:
        raise FileNotFoundError(f"{source} does not exist.")


def require_new(path: Path | None, overwrite: bool) -> None:
    """Refuse to write over a file or a folder with something in it, and into what cannot be written, before computing.

    Raises:
        FileExistsError: If something is there and is not to be replaced.
        OSError: See `require_writable`.
    """
    if path is None:
        return
    require_free(path, overwrite)
    require_writable(path)
