"""Model cards: every figure measured on the model, or read from a file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.checkpoints import HYBRID_FILE, saved_model_type, unheld_by_stock
from lion_st.encoding.fingerprints import term_limit
from lion_st.exporting import single_models
from lion_st.extras import require
from lion_st.files import is_hub_name
from lion_st.hub.card_data import (
    BaseModelData,
    TrainingSummary,
    base_model_data,
    carbon_emissions,
    card_data,
    training_summary,
)
from lion_st.hub.card_text import METRICS, model_context, render, results_context, training_context
from lion_st.hub.results import RESULTS_FOLDER, TaskScores, task_scores

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from sentence_transformers.base.model import BaseModel

TAGS = {  # as sentence-transformers' own cards have them
    "sparse": ["sparse-encoder", "sparse", "splade"],
    "dense": ["sentence-similarity", "dense"],
    "multi_vector": ["multi-vector", "colbert", "late-interaction"],
}
TAGS["hybrid"] = TAGS["sparse"] + TAGS["dense"]


def render_card(
    model: BaseModel | str | Path,
    repo_id: str | None = None,
    *,
    beside: str | Path | None = None,
    base_model: str | BaseModelData | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    results: Iterable[str | Path] = (),
    offline: bool = True,
    has_sparse_encoder_revision: bool = True,
    token: bool | str | None = None,
) -> str:
    """Write the model card of a checkpoint.

    What the card says is measured on the model (sparsity, a query's expansion), or read from files in the checkpoint's
    folder: `training.json`, CodeCarbon's `emissions.csv`, and mteb's results in `results/`. What nothing backs is left
    out. The licence and the languages are those of the base model's card. A card without a name on the Hub says how the
    folder is used.

    Args:
        model: A model of `lion_st.build` or `lion_st.load`, or a checkpoint to load first.
        repo_id: Name on the Hub, `owner/name`; by default the folder's.
        beside: Folder with the files named above; by default the checkpoint's own.
        base_model: Hub name of the model it was made of, if its files do not say; or all that is known of it.
        license: Hub identifier of the licence; by default that which the base model's card names.
        datasets: Hub names of training data, if the training record does not say.
        languages: Language codes, if the base model's card does not say.
        results: More files or folders with mteb's results of this model and of BM25.
        has_sparse_encoder_revision: Whether a sparse model's repository has the revision `sparse-encoder`, or will
            have.
        offline: Read the base model's card from the disk alone (its folder, or the Hub's cache).
        token: Hub token.

    Returns:
        Markdown with a YAML header.

    Raises:
        FileNotFoundError: If there are no results where they should be.
        ValueError: If the results are of several models, or several of one test set.

    Example:
        ::

            Path("README.md").write_text(lion_st.hub.render_card("runs/lion-sp-1b", "org/lion-sp-1b"))
    """
    source = str(beside) if beside is not None else None
    if isinstance(model, str | Path):
        from lion_st.models import load

        source = source or str(model)
        repo_id = repo_id or (str(model) if is_hub_name(str(model)) else Path(model).resolve().name)
        model = load(model, token=token, local_files_only=offline and Path(model).is_dir())
    folder = Path(source) if source is not None and Path(source).is_dir() else None
    repo_id = repo_id or "org/model"
    base = (
        base_model
        if isinstance(base_model, BaseModelData)
        else base_model_data(model, source, base_model, own_name=repo_id, offline=offline, token=token)
    )
    places = [Path(place) for place in results]
    if folder is not None and (folder / RESULTS_FOLDER).is_dir():
        places.insert(0, folder / RESULTS_FOLDER)
    scores = task_scores(places)
    _require_own_limits(model, scores)
    for_sparse_encoder = folder is not None and saved_model_type(str(folder), {}) == "SparseEncoder"
    data, training = card_data(model), training_summary(folder)
    kinds: tuple[str, ...] = ("SparseEncoder",) if for_sparse_encoder else ("SentenceTransformer",)
    forms: Any = [model[1]]
    if data.paradigm == "hybrid" and ("/" in repo_id or (folder is not None and (folder / HYBRID_FILE).is_file())):
        kinds, forms = ("SparseEncoder", "SentenceTransformer"), [part[1] for part in single_models(model)]
    problem = next(filter(None, map(unheld_by_stock, forms, kinds)), None)
    if problem is not None:
        raise ValueError(
            f"A card says how to load the model without lion_st, which this one cannot be: {problem}. Describe what "
            "`lion-st export` writes (--all-terms leaves limits out), or keep the README.md saved with the model."
        )
    metadata = card_metadata(
        repo_id,
        data.paradigm,
        base,
        license=license,
        datasets=datasets or _hub_datasets(training),
        languages=languages,
        scores=scores,
        emissions=carbon_emissions(folder),
    )
    context = model_context(data, base, metadata, repo_id)
    context["for_sparse_encoder"] = context["local"] and for_sparse_encoder
    context |= results_context(scores, bool(places) and folder is not None and places[0] == folder / RESULTS_FOLDER)
    context |= training_context(training, metadata)
    return render(context | {"has_sparse_encoder_revision": has_sparse_encoder_revision})


def _require_own_limits(model: Any, scores: Sequence[TaskScores]) -> None:
    """Refuse scores that were measured with fewer terms of a text than the model keeps."""
    own = {
        "query_max_active_dims": term_limit(model, "query"),
        "document_max_active_dims": term_limit(model, "document"),
    }
    for entry in scores:
        other = {name: entry.settings[name] for name in own if entry.settings.get(name) not in (None, own[name])}
        if other:
            measured = ", ".join(f"{name}={limit}" for name, limit in other.items())
            raise ValueError(
                f"{entry.file} was measured with {measured}, limits of terms that the model does not have: name the "
                "results without them, or describe a checkpoint with these limits."
            )


def card_metadata(
    repo_id: str,
    paradigm: str,
    base: BaseModelData | None,
    *,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    scores: Sequence[TaskScores] = (),
    emissions: Mapping[str, Any] | None = None,
) -> ModelCardData:
    """The card's YAML header; the licence is by default that of the base model."""
    from huggingface_hub import ModelCardData

    tags = ["sentence-transformers", "feature-extraction", "text-retrieval", "lion-st", *TAGS[paradigm]]
    results = [result for entry in scores if not entry.is_bm25 for result in _evaluation_results(entry)]
    base = base or BaseModelData(())
    has_base_license = license in (None, base.license)
    further: dict[str, Any] = {"base_model_relation": "finetune"} if base.names else {}
    if emissions:
        further["co2_eq_emissions"] = dict(emissions)
    return ModelCardData(
        model_name=repo_id.split("/")[-1] if results else None,
        base_model=list(base.names) if len(base.names) > 1 else next(iter(base.names), None),
        language=list(languages or base.languages) or None,
        library_name="sentence-transformers",
        license=license or base.license,
        license_name=base.license_name if has_base_license else None,
        license_link=base.license_link if has_base_license else None,
        pipeline_tag="feature-extraction" if paradigm in ("sparse", "multi_vector") else "sentence-similarity",
        tags=tags,
        datasets=list(datasets) if datasets else None,
        eval_results=results or None,
        **further,
    )


def _evaluation_results(entry: TaskScores) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-retrieval",
            task_name="Retrieval",
            dataset_type=_dataset_of(entry.task),
            dataset_name=entry.task,
            dataset_config=entry.subset,
            dataset_split=entry.split,
            dataset_revision=entry.dataset_revision or None,
            metric_type=metric,
            metric_name=name,
            metric_value=entry.scores[metric],
            source_name="MTEB",
            source_url="https://github.com/embeddings-benchmark/mteb/",
        )
        for name, metric in METRICS.items()
        if metric in entry.scores
    ]


def _dataset_of(task: str) -> str:
    """Hub name of an mteb task's data; of a local test set, its name."""
    mteb = require("mteb")

    try:
        return mteb.get_task(task).metadata.dataset["path"]
    except KeyError:
        return task


def _hub_datasets(training: TrainingSummary | None) -> list[str] | None:
    sources = training.settings.get("train_data", "") if training else ""
    return [name for name in ([sources] if isinstance(sources, str) else sources) if is_hub_name(name)] or None
