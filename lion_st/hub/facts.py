"""What can be said of a checkpoint: measured on the model itself, or read from files beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

# Test set, subset, split and engine -> mean active terms of its queries and of its documents.
ActiveTerms: TypeAlias = dict[tuple[str, str, str, str], tuple[float | None, float | None]]

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
RESULTS_FOLDER = "results"


@dataclass(frozen=True)
class Term:
    """One weight of an expanded query; `in_query` tells the query's own words from those the model added."""

    name: str
    weight: float
    in_query: bool


@dataclass(frozen=True)
class Sparsity:
    """Mean number of active terms of the sample's queries and documents."""

    queries: float
    documents: float
    terms: int


@dataclass(frozen=True)
class ModelFacts:
    """What the model says of itself."""

    paradigm: str
    dimensions: int
    parameters: int
    dtype: str
    architecture: str
    query_length: int | None
    document_length: int | None
    prompts: dict[str, str]
    pooling: str | None = None
    sparsity: Sparsity | None = None
    expansion: tuple[Term, ...] = ()


@dataclass(frozen=True)
class TaskScores:
    """One model's scores on one test set, as mteb wrote them."""

    model: str
    task: str
    subset: str
    split: str
    scores: dict[str, float]
    dataset_revision: str
    mteb_version: str
    engine: str | None
    file: Path
    query_terms: float | None = None
    document_terms: float | None = None

    @property
    def is_bm25(self) -> bool:
        """Whether these are BM25's."""
        return self.model.split("/")[-1].lower().startswith("bm25")


@dataclass(frozen=True)
class TrainingRecord:
    """The settings of the run that made a checkpoint, and what it cost."""

    settings: dict[str, Any]
    steps: int | None = None
    seconds: float | None = None
    floating_point_operations: float | None = None


@dataclass(frozen=True)
class BaseModelFacts:
    """The base model's name, and what its own card says of it."""

    name: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = field(default=())


def model_facts(model: BaseModel) -> ModelFacts:
    """Describe a model of `lion_st.load` or `lion_st.build`; a sparse one is run on a few sample texts."""
    from lion_st.models import paradigm_of

    transformer: Any = model[0]
    head: Any = model[1]
    paradigm = paradigm_of(model)
    unique = {parameter.data_ptr(): parameter.numel() for parameter in transformer.model.parameters()}
    measured: dict[str, Any] = {}
    if paradigm == "sparse":
        measured = {"sparsity": measured_sparsity(model), "expansion": tuple(expanded_query(model))}
    else:
        measured["pooling"] = head.mode
    return ModelFacts(
        paradigm=paradigm,
        dimensions=head.get_embedding_dimension(),
        parameters=sum(unique.values()),
        dtype=str(transformer.model.dtype).removeprefix("torch."),
        architecture=type(transformer.model).__name__,
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


def expanded_query(model: BaseModel, query: str = EXPANDED_QUERY, count: int = SHOWN_TERMS) -> list[Term]:
    """The heaviest terms of a query under a sparse model, its own words told from expansions."""
    from lion_st.retrieval.explain import term_names, top_terms

    row = _sparse_rows(model, "query", [query])[0]
    tokens = model.tokenizer(query, add_special_tokens=False)["input_ids"]
    own = {name.lower() for name in term_names(tokens, model.tokenizer)}
    terms = top_terms(row.numpy()[None], model.tokenizer, count)
    return [Term(name, weight, name.lower() in own) for name, weight in terms]


def _sparse_rows(model: Any, task: str, texts: Iterable[str]) -> Any:
    rows = getattr(model, f"encode_{task}")(list(texts), convert_to_tensor=True, show_progress_bar=False)
    return (rows.to_dense() if rows.is_sparse else rows).float().cpu()


# ---- files beside the checkpoint ----


def training_record(folder: Path | None) -> TrainingRecord | None:
    """The record that training left in a checkpoint's folder, None if there is none or the run has not finished."""
    if folder is None or not (folder / TRAINING_RECORD).is_file():
        return None
    content = json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
    if not content.get("finished"):
        return None
    settings = {name: _without_folders(value) for name, value in content["settings"].items() if value is not None}
    figures = {name: content.get(name) for name in ("steps", "seconds", "floating_point_operations")}
    return TrainingRecord(settings, **figures)


def _without_folders(value: Any) -> Any:
    """A path on somebody's machine is of no use to others; its last part is."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


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


def task_scores(folders: Iterable[Path]) -> list[TaskScores]:
    """Every mteb result in folders, by test set; of several engines the exact one.

    Raises:
        ValueError: If they are of several models other than BM25, or a file is damaged.
    """
    found: dict[tuple[bool, str, str, str], TaskScores] = {}
    terms: ActiveTerms = {}
    models: set[str] = set()
    for file in (file for folder in folders for file in sorted(folder.rglob("*.json"))):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}). Evaluate again, or remove it.") from error
        terms |= _active_terms(content)
        for scores in _read_task_result(file, content):
            key = (scores.is_bm25, scores.task, scores.subset, scores.split)
            models |= set() if scores.is_bm25 else {scores.model}
            if key not in found or scores.engine == "exact":
                found[key] = scores
    if len(models) > 1:
        raise ValueError(
            f"The results are of several models: {', '.join(sorted(models))}. Name the folder of the one that the card "
            "is about."
        )
    return [_with_terms(scores, terms) for _, scores in sorted(found.items())]


def _with_terms(scores: TaskScores, terms: ActiveTerms) -> TaskScores:
    key = (scores.task, scores.subset, scores.split, str(scores.engine))
    queries, documents = terms.get(key, (None, None))
    return replace(scores, query_terms=queries, document_terms=documents)


def _active_terms(rows: Any) -> ActiveTerms:
    """Mean active terms of queries and documents in the rows that `evaluate_retrieval` wrote."""
    if not isinstance(rows, list):
        return {}
    return {
        (row["dataset"], row["subset"], row["split"], row["engine"]): (row["query_terms"], row["document_terms"])
        for row in rows
        if row.get("document_terms") is not None
    }


def _read_task_result(file: Path, content: Any) -> list[TaskScores]:
    if not isinstance(content, dict) or not {"task_name", "mteb_version", "scores"} <= content.keys():
        return []
    meta_file = file.parent / "model_meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8")) if meta_file.is_file() else {}
    return [
        TaskScores(
            model=meta.get("name") or file.parent.parent.name.replace("__", "/"),
            task=content["task_name"],
            subset=part.get("hf_subset", "default"),
            split=split,
            scores={name: value for name, value in part.items() if isinstance(value, int | float)},
            dataset_revision=content.get("dataset_revision") or "",
            mteb_version=content["mteb_version"],
            engine=(meta.get("experiment_kwargs") or {}).get("engine"),
            file=file,
        )
        for split, parts in content["scores"].items()
        for part in parts
    ]


# ---- the base model ----


def base_model_facts(
    model: BaseModel | None,
    source: str | None,
    name: str | None = None,
    *,
    own_name: str | None = None,
    offline: bool = True,
    token: Any = None,
) -> BaseModelFacts | None:
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
    from huggingface_hub import ModelCardData

    bases = [name] if name else [*_recorded_bases(model, source, offline, token)]
    bases = [base for base in bases if base not in (source, own_name)]
    name = next((base for base in bases if is_hub_name(base)), None)
    card: Mapping[str, Any] = {}
    for base in bases:
        card = card or _card_metadata(base, offline, token)
    if name is None:
        return None
    data = ModelCardData(**{**card, "ignore_metadata_errors": True})
    languages = [data.language] if isinstance(data.language, str) else data.language or []
    return BaseModelFacts(name, data.license, data.license_name, data.license_link, tuple(languages))


def is_hub_name(source: str) -> bool:
    """Whether a model's source is the name of a Hub repository, not a folder."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).is_dir()


def _recorded_bases(model: Any, source: str | None, offline: bool, token: Any) -> Iterable[str]:
    """Names and folders of the base model, the surest first."""
    from lion_st.training.recipes import BACKBONES, mntp_folder

    if model is not None:
        adapter = getattr(model[0], "adapter_config", None)
        if adapter is not None:
            yield adapter.base_model_name_or_path
        if model.model_card_data.base_model:
            yield model.model_card_data.base_model
    if source is None:
        return
    base = _card_metadata(source, offline, token).get("base_model")
    if base:
        yield base if isinstance(base, str) else base[0]
    record = Path(source) / TRAINING_RECORD
    if record.is_file():
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
        backbone = settings.get("backbone")
        if Path(settings["model"]).is_dir() or settings["model"] != mntp_folder(backbone):
            yield settings["model"]
        if backbone in BACKBONES:
            yield BACKBONES[backbone].model


def _card_metadata(source: str, offline: bool, token: Any = None) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    path = Path(source) / "README.md"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, "README.md", local_files_only=offline, token=token))
        except (EntryNotFoundError, HfHubHTTPError, ValueError):
            return {}
    if not path.is_file():
        return {}
    return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
