"""The text of a model card: the template, and what it is filled with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_st.hub.card_data import EXPANDED_QUERY, SAMPLE_QUERIES, BaseModelData, CardData, TrainingSummary
from lion_st.hub.results import TaskScores

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = "model_card.md.jinja"
METRICS = {
    "nDCG@10": "ndcg_at_10",
    "MRR@10": "mrr_at_10",
    "Recall@100": "recall_at_100",
    "Recall@1000": "recall_at_1000",
    "MAP": "map_at_1000",
}
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


def model_context(data: CardData, base: BaseModelData | None, metadata: ModelCardData, repo_id: str) -> dict[str, Any]:
    """What the template says of the model itself."""
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


def results_context(scores: Sequence[TaskScores], beside: bool) -> dict[str, Any]:
    """The table of results, those of BM25 beside them; `beside` says that their files are published with the model."""
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


def training_context(training: TrainingSummary | None, metadata: ModelCardData) -> dict[str, Any]:
    """The settings of the training and what it took."""
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
