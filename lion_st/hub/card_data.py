"""What can be said of a checkpoint: measured on the model itself, or read from files beside it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeAlias

from lion_st.files import is_hub_name, read_card, read_json

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from lion_st.retrieval.explain import TextTerm

# A folder or Hub name, and its revision.
Place: TypeAlias = tuple[str, str | None]

EXPANDED_QUERY = "why do lions hunt at night"
SHOWN_TERMS = 12
SAMPLE_QUERIES = (
    EXPANDED_QUERY,
    "capital of france",
    "how is sugar stored in plants",
    "who wrote the novel 1984",
    "symptoms of iron deficiency",
    "difference between a lake and a pond",
    "how to convert a list to a tuple in python",
    "when did the first passenger railway open",
)
SAMPLE_DOCUMENTS = (
    "Lions hunt mostly at night, when the darkness hides them and the savanna has cooled down.",
    "Paris is the capital and the largest city of France. It lies on the Seine, in the north of the country.",
    "Plants build sugar from carbon dioxide and water by photosynthesis, and store what they do not need as starch.",
    "George Orwell's last novel, Nineteen Eighty-Four, was published in June 1949, seven months before his death.",
    "Too little iron in the blood makes people tired and pale; they may be short of breath and feel cold.",
    "There is no fixed line between lakes and ponds, but a pond is shallow enough for light to reach its bottom.",
    "The built-in function tuple takes any iterable, so that tuple([1, 2, 3]) is the tuple (1, 2, 3).",
    "The Stockton and Darlington Railway carried its first passengers behind a steam locomotive in 1825.",
)
TRAINING_RECORD = "training.json"
EMISSIONS_FILE = "emissions.csv"


@dataclass(frozen=True)
class Sparsity:
    """Mean number of active terms of the sample's queries and documents."""

    queries: float
    documents: float
    terms: int


@dataclass(frozen=True)
class CardData:
    """What the model says of itself."""

    paradigm: str
    dimensions: int  # of a hybrid model, the sparse vector's; of a multi-vector one, those of a token's vector
    parameters: int
    dtype: str
    architecture: str
    query_length: int | None
    document_length: int | None
    prompts: dict[str, str]
    pooling: str | None = None
    causal: bool = False
    normalized: bool = False
    activation: str = "log1p"
    sparsity: Sparsity | None = None
    expansion: tuple[TextTerm, ...] = ()
    dense_dimensions: int | None = None  # of a hybrid model
    fusion_weights: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrainingSummary:
    """The settings of the run that made a checkpoint, and what it cost."""

    settings: dict[str, Any]
    steps: int | None = None
    seconds: float | None = None
    floating_point_operations: float | None = None


@dataclass(frozen=True)
class BaseModelData:
    """The Hub names of the models that a checkpoint was made of, and what their own cards say."""

    names: tuple[str, ...]
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = field(default=())


def card_data(model: BaseModel) -> CardData:
    """Describe a model of `lion_st.load` or `lion_st.build`; its sparse vectors are those of a few sample texts."""
    from lion_st.exporting import single_models
    from lion_st.models import paradigm_of

    transformer: Any = model[0]
    head: Any = model[1]
    paradigm = paradigm_of(model)
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    sparse: Any = model
    dense: Any = model
    if paradigm == "hybrid":
        sparse, dense = single_models(model)
    measured: dict[str, Any] = {}
    if paradigm in ("sparse", "hybrid"):
        measured = {"sparsity": measured_sparsity(sparse), "expansion": expansion(sparse)}
        measured["activation"] = head.activation
    if paradigm in ("dense", "hybrid"):
        measured |= {"pooling": dense[1].mode, "normalized": dense[1].normalize}
    if paradigm == "hybrid":
        measured |= {"dense_dimensions": dense.get_embedding_dimension(), "fusion_weights": head.fusion_weights}
    return CardData(
        paradigm=paradigm,
        dimensions=dense.get_embedding_dimension() if paradigm == "dense" else sparse[1].get_embedding_dimension(),
        parameters=sum(unique.values()),
        dtype=str(transformer.model.dtype).removeprefix("torch."),
        architecture=type(transformer.model).__name__,
        causal=bool(transformer.causal),
        query_length=transformer.query_length,
        document_length=transformer.document_length,
        prompts={name: prompt for name, prompt in model.prompts.items() if prompt},
        **measured,
    )


def measured_sparsity(model: BaseModel) -> Sparsity:
    """Mean active terms of the sample texts under a sparse model."""
    queries, documents = _sparse_rows(model, "query", SAMPLE_QUERIES), _sparse_rows(model, "document", SAMPLE_DOCUMENTS)
    active = [float((rows > 0).sum(1).float().mean()) for rows in (queries, documents)]
    return Sparsity(queries=active[0], documents=active[1], terms=queries.shape[1])


def expansion(model: BaseModel) -> tuple[TextTerm, ...]:
    """The heaviest terms of `EXPANDED_QUERY` under a sparse model, its own words told from expansions."""
    from lion_st.retrieval.explain import expanded_terms

    rows = _sparse_rows(model, "query", [EXPANDED_QUERY]).numpy()
    return tuple(expanded_terms(rows, EXPANDED_QUERY, model.tokenizer, SHOWN_TERMS))


def _sparse_rows(model: Any, task: str, texts: Iterable[str]) -> Any:
    rows = getattr(model, f"encode_{task}")(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return (rows.to_dense() if rows.is_sparse else rows).float().cpu()


# ---- files beside the checkpoint ----


def training_summary(folder: Path | None) -> TrainingSummary | None:
    """The record that training left in a checkpoint's folder, None if there is none or the run has not finished."""
    if folder is None or not (folder / TRAINING_RECORD).is_file():
        return None
    content = read_json(folder / TRAINING_RECORD)
    if not content.get("finished"):
        return None
    settings = {name: _without_folders(value) for name, value in content["settings"].items() if value is not None}
    figures = {name: content.get(name) for name in ("steps", "seconds", "floating_point_operations")}
    return TrainingSummary(settings, **figures)


def _without_folders(value: Any) -> Any:
    """A path on somebody's machine is of no use to others; its last part is."""
    if isinstance(value, dict):
        return {_without_folders(name): _without_folders(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    is_local = Path(value).is_absolute() or windows.is_absolute() or value.startswith("~")
    return windows.name if is_local else value


def carbon_emissions(folder: Path | None) -> dict[str, Any] | None:
    """What CodeCarbon recorded in a checkpoint's folder, as model cards name it; emissions in grams of CO2."""
    if folder is None or not (folder / EMISSIONS_FILE).is_file():
        return None
    with (folder / EMISSIONS_FILE).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    emissions = {
        "emissions": round(1000 * sum(float(row["emissions"]) for row in rows), 3),
        "source": "codecarbon",
        "training_type": "fine-tuning",
        "hours_used": round(sum(float(row["duration"]) for row in rows) / 3600, 3),
    }
    hardware = rows[-1].get("gpu_model") or rows[-1].get("cpu_model")
    return emissions | ({"hardware_used": hardware} if hardware else {})


# ---- the base model ----


def base_model_data(
    model: BaseModel | None,
    source: str | None,
    name: str | None = None,
    *,
    own_name: str | None = None,
    offline: bool = True,
    token: Any = None,
) -> BaseModelData | None:
    """What a checkpoint was made of: as told, or as its adapter, its card or its training record say.

    Args:
        model: The loaded checkpoint.
        source: Its folder or Hub name.
        name: The base model's Hub name, if known.
        own_name: The checkpoint's own Hub name, which is not its base's.
        offline: Read the base model's card from the disk alone, not from the Hub.
        token: Hub token.

    Returns:
        Its name and what its card says, or None if nothing says what the base is.
    """
    groups: list[tuple[str, ...]] = [(name,)] if name else [*_recorded_bases(model, source, offline, token)]
    groups = [tuple(base for base in group if base not in (source, own_name)) for group in groups]
    several = next((group for group in groups if len(group) > 1), None)
    bases = several or tuple(base for group in groups for base in group)
    names = several or next(((base,) for base in bases if is_hub_name(base)), ())
    # Of an adapter and its base, in this order, the base's licence is that of the merged weights.
    places = [(base, None) for base in (reversed(bases) if several else bases)]
    return described_bases(names, places, offline=offline, token=token)


def described_bases(
    names: tuple[str, ...], places: Iterable[Place], *, offline: bool = True, token: Any = None
) -> BaseModelData | None:
    """What the cards of base models say; of licences and languages, the first that is named.

    Args:
        names: Hub names of the models.
        places: Folders and Hub names where they are described, the surest first.
        offline: Read cards from the disk alone, not from the Hub.
        token: Hub token.

    Returns:
        Names, licence and languages, or None if nothing is known.
    """
    from huggingface_hub import ModelCardData

    found = (read_card(source, revision, offline=offline, token=token) for source, revision in places)
    cards = [ModelCardData(**{**metadata, "ignore_metadata_errors": True}) for metadata in found if metadata]
    if not names and not cards:
        return None
    licensed = next((card for card in cards if card.license), None)
    languages = next((card.language for card in cards if card.language), [])
    return BaseModelData(
        names,
        licensed.license if licensed else None,
        licensed.license_name if licensed else None,
        licensed.license_link if licensed else None,
        tuple([languages] if isinstance(languages, str) else languages),
    )


def _recorded_bases(model: Any, source: str | None, offline: bool, token: Any) -> Iterator[tuple[str, ...]]:
    """Names and folders of the base model, the surest first; several where a card lists what was merged."""
    from lion_st.training.recipes import BACKBONES, mntp_folder

    if model is not None:
        adapter = getattr(model[0], "adapter_config", None)
        if adapter is not None:
            yield (adapter.base_model_name_or_path,)
        if model.model_card_data.base_model:
            yield (model.model_card_data.base_model,)
    if source is None:
        return
    listed = read_card(source, offline=offline, token=token).get("base_model")
    if listed:
        yield (listed,) if isinstance(listed, str) else tuple(listed)
    record = Path(source) / TRAINING_RECORD
    if record.is_file():
        settings = read_json(record)["settings"]
        backbone = settings.get("backbone")
        if Path(settings["model"]).is_dir() or settings["model"] != mntp_folder(backbone):
            yield (settings["model"],)
        if backbone in BACKBONES:
            yield (BACKBONES[backbone].model,)
