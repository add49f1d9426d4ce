"""Model cards: every figure measured on the model, or read from a file beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.checkpoints import HYBRID_FILE, saved_model_type, unheld_by_stock
from lion_st.encoding.fingerprints import term_limit
from lion_st.exporting import single_models
from lion_st.extras import require
from lion_st.files import is_hub_name
from lion_st.hub.card_data import (
    EXPANDED_QUERY,
    SAMPLE_QUERIES,
    BaseModelData,
    CardData,
    TrainingSummary,
    base_model_data,
    carbon_emissions,
    card_data,
    training_summary,
)
from lion_st.hub.results import RESULTS_FOLDER, TaskScores, task_scores

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData
    from sentence_transformers.base.model import BaseModel

TEMPLATE = "model_card.md.jinja"
METRICS = {
    "nDCG@10": "ndcg_at_10",
    "MRR@10": "mrr_at_10",
    "Recall@100": "recall_at_100",
    "Recall@1000": "recall_at_1000",
    "MAP": "map_at_1000",
}
TAGS = {  # as sentence-transformers' own cards have them
    "sparse": ["sparse-encoder", "sparse", "splade"],
    "dense": ["sentence-similarity", "dense"],
    "multi_vector": ["multi-vector", "colbert", "late-interaction"],
}
TAGS["hybrid"] = TAGS["sparse"] + TAGS["dense"]
TABLE_METRICS = ("nDCG@10", "MRR@10", "Recall@100")
SCORES = {"multi_vector": "MaxSim: of each token of the query its best inner product with one of the document, summed"}
POOLING = {
    "mean_normalized": "and the vector is the mean of its tokens' L2-normalized states, itself not normalized again",
    "mean": "and the vector is the mean of its tokens' states",
    "last_token": "and the vector is the last token's state",
}
ACTIVATION = {
    "log1p": "log1p(relu(its largest scaled logit over the text's tokens))",
    "double_log1p": "log1p(log1p(relu(its largest scaled logit over the text's tokens)))",
}


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
    context = _model_context(data, base, metadata, repo_id)
    context["for_sparse_encoder"] = context["local"] and for_sparse_encoder
    context |= _results_context(scores, bool(places) and folder is not None and places[0] == folder / RESULTS_FOLDER)
    context |= _training_context(training, metadata)
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


def render(context: Mapping[str, Any]) -> str:
    """Fill the card's template, and check its metadata as huggingface_hub reads it."""
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    card = templates.get_template(TEMPLATE).render(context)
    ModelCard(card)
    return card


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
    names = base.names if base else ()
    further: dict[str, Any] = {"base_model_relation": "finetune"} if names else {}
    if emissions:
        further["co2_eq_emissions"] = dict(emissions)
    return ModelCardData(
        model_name=repo_id.split("/")[-1] if results else None,
        base_model=list(names) if len(names) > 1 else next(iter(names), None),
        language=list(languages or (base.languages if base else ())) or None,
        library_name="sentence-transformers",
        license=license or (base.license if base else None),
        license_name=base.license_name if base and license in (None, base.license) else None,
        license_link=base.license_link if base and license in (None, base.license) else None,
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


# ---- what the template takes ----


def _model_context(data: CardData, base: BaseModelData | None, metadata: ModelCardData, repo_id: str) -> dict[str, Any]:
    prompts = ", ".join(f"{name}: `{prompt}`" for name, prompt in data.prompts.items())
    limit = _lengths(data.query_length, data.document_length)
    names = base.names if base else ()
    properties = [
        ("Base model", ", ".join(map(hub_link, names))),
        ("Architecture", f"{data.architecture}, {'causal' if data.causal else 'bidirectional'}"),
        ("Parameters", f"{data.parameters:,}"),
        ("Weights", f"{data.dtype}, safetensors"),
        ("Vector", _vectors(data)),
        ("Lengths", limit),
        ("Prompts", prompts or "none"),
        ("Score", _fusion(data) if data.paradigm == "hybrid" else SCORES.get(data.paradigm, "inner product")),
        ("Licence", metadata.license),
    ]
    return {
        **card_frame(data.paradigm, data.dimensions, names, repo_id, limit),
        "metadata": metadata.to_yaml(),
        "properties": [(label, value) for label, value in properties if value],
        "reads": "from left to right alone" if data.causal else "in both directions",
        "pooling": _pooling(data),
        "activation": ACTIVATION[data.activation],
        "dense_dimensions": data.dense_dimensions,
        "sparsity": data.sparsity,
        "sample_size": len(SAMPLE_QUERIES),
        "expansion": data.expansion,
        "expanded_query": EXPANDED_QUERY,
    }


def _vectors(data: CardData) -> str:
    if data.dense_dimensions is None:
        return vector_description(data.paradigm, data.dimensions)
    both = (("sparse", data.dimensions), ("dense", data.dense_dimensions))
    return " and ".join(vector_description(paradigm, dimensions) for paradigm, dimensions in both)


def _fusion(data: CardData) -> str:
    if data.fusion_weights is None:
        return "inner products, whose two rankings are fused by reciprocal ranks"
    sparse, dense = data.fusion_weights
    return f"inner products, fused with the weights {sparse:g} (sparse) and {dense:g} (dense)"


def _pooling(data: CardData) -> str:
    text = POOLING[data.pooling or "mean"]
    return text.replace(", itself not normalized again", "") + ", brought to length 1" if data.normalized else text


def card_frame(
    paradigm: str, dimensions: int, bases: Sequence[str], repo_id: str, lengths: str | None
) -> dict[str, Any]:
    """What every card's text needs, with what a card may leave out left out."""
    sparse = paradigm == "sparse"
    row_size = f"{4 * dimensions / 1000:,.0f} kB"
    limits = [
        f"Longer texts are cut: {lengths}." if lengths else None,
        "It knows what its base model's training and its fine-tuning data hold, their languages and their biases.",
        "A score orders documents for one query. It is not a probability, and those of two queries do not compare.",
    ]
    # What a checkpoint cannot refuse by itself.
    if paradigm == "hybrid":
        limits.append(
            "`SentenceTransformer` gives its dense vector and `SparseEncoder`, of the other form, its sparse one, each "
            "in a pass of its own; `lion_st.load` makes both of one."
        )
    elif sparse:
        limits += [
            f"As dense rows, a million documents would take {4 * dimensions / 1000:,.0f} GB: index sparse ones.",
            "`truncate_dim` does not shorten its vectors: it keeps the first terms of the vocabulary, which are mostly "
            "zero. `max_active_dims` of `SparseEncoder` does.",
            "Each form loads in its own class alone: `SentenceTransformer` refuses the one for `SparseEncoder`, and "
            "the other way round.",
        ]
    elif paradigm == "multi_vector":
        limits += [
            f"A document takes {2 * dimensions:,} bytes in float16 for each of its tokens: it is for collections of up "
            "to some hundred thousand documents, or to rerank what another model found.",
            "`SentenceTransformer` and `SparseEncoder` refuse it: load it with `MultiVectorEncoder`.",
        ]
    else:
        limits.append("Its vectors are not sparse, and `SparseEncoder` refuses it: load it with `SentenceTransformer`.")
    return {
        "name": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "local": "/" not in repo_id,
        "for_sparse_encoder": False,
        "sparse": sparse,
        "hybrid": paradigm == "hybrid",
        "multi_vector": paradigm == "multi_vector",
        "stock_class": "MultiVectorEncoder" if paradigm == "multi_vector" else "SentenceTransformer",
        "dimensions": dimensions,
        "of_base": f" made of {' and '.join(map(hub_link, bases))}" if bases else "",
        "row_size": row_size,
        "limits": [limit for limit in limits if limit],
        "sparsity": None,
        "expansion": (),
        "results_table": None,
        "training": (),
        "training_costs": None,
        "llm2vec": False,
    }


def hub_link(name: str) -> str:
    """A Markdown link to a repository."""
    return f"[{name}](https://huggingface.co/{name})"


def vector_description(paradigm: str, dimensions: int) -> str:
    """The kind and size of the vectors."""
    if paradigm == "multi_vector":
        return f"{dimensions:,} dimensions, one vector a token"
    return f"{dimensions:,} terms, sparse" if paradigm == "sparse" else f"{dimensions:,} dimensions, dense"


def _lengths(query: int | None, document: int | None) -> str | None:
    parts = [
        f"{kind} {length} tokens"
        for kind, length in (("queries", query), ("documents", document))
        if length is not None
    ]
    return ", ".join(parts) or None


def _results_context(scores: Sequence[TaskScores], beside: bool) -> dict[str, Any]:
    own = [entry for entry in scores if not entry.is_bm25]
    if not own:
        return {}
    from lion_st.tables import format_table

    lexical = {(entry.task, entry.subset, entry.split): entry for entry in scores if entry.is_bm25}
    rows = []
    for entry in own:
        other = lexical.get((entry.task, entry.subset, entry.split))
        row: dict[str, Any] = {"test set": entry.task + ("" if entry.subset == "default" else f" ({entry.subset})")}
        for name in TABLE_METRICS:
            row[name] = entry.scores.get(METRICS[name])
            if lexical:
                row[f"BM25 {name}"] = other.scores.get(METRICS[name]) if other else None
        if entry.document_terms is not None:
            row |= {"terms a query": entry.query_terms, "terms a document": entry.document_terms}
        rows.append(row)
    return {
        "results_table": format_table(rows),
        "dtypes": ", ".join(sorted({entry.dtype for entry in own if entry.dtype})),
        "mteb_versions": ", ".join(sorted({entry.mteb_version for entry in own})),
        "has_bm25": bool(lexical),
        "has_terms": any(entry.document_terms is not None for entry in own),
        "results_beside": beside,
    }


def _training_context(training: TrainingSummary | None, metadata: ModelCardData) -> dict[str, Any]:
    if training is None:
        return {}
    costs = []
    if training.steps is not None:
        costs.append(f"{training.steps:,} steps")
    if training.seconds is not None:
        costs.append(f"{training.seconds / 3600:.2f} hours")
    if training.floating_point_operations:
        costs.append(f"{training.floating_point_operations:.3g} floating point operations")
    emissions = metadata.to_dict().get("co2_eq_emissions")
    if emissions:
        costs.append(f"{emissions['emissions']} g of CO2 equivalent (CodeCarbon)")
    return {
        "training": [(name, setting_value(value)) for name, value in sorted(training.settings.items())],
        "training_costs": f"It took {', '.join(costs)}." if costs else None,
    }


def setting_value(value: Any) -> str:
    """A setting as a card shows it, in one line: floats to six digits, lists as their items, mappings as JSON."""
    if isinstance(value, dict):
        return f"`{json.dumps(value, ensure_ascii=False)}`"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting_value, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", "\\n")
