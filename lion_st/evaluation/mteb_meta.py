"""What mteb is told of a retriever: the fields of its leaderboards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lion_st.encoding.fingerprints import input_module, text_limit
from lion_st.extras import require
from lion_st.files import is_hub_name, read_card
from lion_st.hooks import language_scripts
from lion_st.retrieval.retriever import ModelRetriever, Retriever

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

# mteb's names of data sets, by what the names of their training data have in them
TRAINED_ON = {
    r"ms[-_]?marco": "MSMARCO",
    r"hotpot": "HotpotQA",
    r"fever": "FEVER",
    r"\bnq\b|natural[-_]questions": "NQ",
    r"fiqa": "FiQA2018",
    r"scidocs": "SCIDOCS",
    r"arguana": "ArguAna",
    r"quora": "QuoraRetrieval",
    r"scifact": "SciFact",
    r"nfcorpus": "NFCorpus",
}


# Licences that mteb knows by their address alone
LICENSES = {
    f"llama{number}": f"https://www.llama.com/llama{number.replace('.', '_')}/license/"
    for number in ("3", "3.1", "3.2", "3.3")
}

MODEL_TYPES = {"sparse": "sparse", "lexical": "sparse", "multi_vector": "late-interaction"}  # of mteb, by paradigm
SCORES = {"maxsim": "MaxSim"}  # sentence-transformers' name -> mteb's


def is_standard(retriever: Retriever) -> bool:
    """Whether results are those of a checkpoint as it is on the Hub, exactly searched, and not of an experiment."""
    return (
        isinstance(retriever, ModelRetriever)
        and retriever.paradigm != "hybrid"  # which mteb's own wrappers do not fuse
        and retriever.commit is not None
        and is_hub_name(retriever.name)
        and retriever.engine in ("exact", "torch")
        and not retriever.engine_parameters.keys() - {"device", "memory_gb"}
        and retriever.query_model is retriever.model
        and retriever.query_length is None
        and retriever.document_length is None
        and retriever.encoded is None
        and not retriever.idf
    )


def model_meta(
    retriever: Retriever, digest: str | None = None, experiment: Mapping[str, Any] | None = None
) -> ModelMeta:
    """Describe a retriever to mteb.

    Args:
        retriever: A retriever.
        digest: Stands for the revision. By default it is the Hub commit of a checkpoint as it is there, and else the
            retriever's fingerprint, so that stale results are never reused.
        experiment: Settings that give their own result files.

    Returns:
        Of a checkpoint, mteb's fields as far as the model and its card tell; `loader` is mteb's own wrapper, which
        loads what was published.
    """
    ModelMeta = require("mteb.models.model_meta").ModelMeta
    revision = digest or hashlib.sha256(retriever.fingerprint().encode()).hexdigest()[:40]
    described: dict[str, Any] = {}
    if isinstance(retriever, ModelRetriever):
        described = _described(retriever)
        if digest is None and is_standard(retriever):
            revision = retriever.commit or revision
    return ModelMeta.create_empty(
        {
            "name": retriever.name if "/" in retriever.name else f"lion_st/{retriever.name}",
            "revision": revision,
            "model_type": [MODEL_TYPES.get(retriever.paradigm, "dense")],
            "experiment_kwargs": dict(experiment) if experiment else None,
            **described,
        }
    )


def training_datasets(names: list[str]) -> set[str] | None:
    """The data sets of mteb that some training data are of; None if none is known."""
    return {task for part, task in TRAINED_ON.items() if any(re.search(part, name.lower()) for name in names)} or None


def _described(retriever: ModelRetriever) -> dict[str, Any]:
    from mteb.models.model_meta import ScoringFunction
    from mteb.models.sentence_transformer_wrapper import (
        MultiVectorWrapper,
        SentenceTransformerEncoderWrapper,
        SparseEncoderWrapper,
    )
    from mteb.types import Licenses
    from sentence_transformers import MultiVectorEncoder, SparseEncoder

    wrappers: dict[Any, Any] = {SparseEncoder: SparseEncoderWrapper, MultiVectorEncoder: MultiVectorWrapper}
    other = SentenceTransformerEncoderWrapper
    model = retriever.model
    score = model.similarity_fn_name or "dot"
    weights = {one.data_ptr(): one for one in model.parameters()}.values()
    inner: Any = getattr(input_module(model, "document"), "model", None)
    embeddings = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    card = _card(model, retriever.commit)
    languages, datasets = card.get("language") or [], card.get("datasets") or []
    bases = card.get("base_model") or model.model_card_data.base_model or None
    license = card.get("license")
    link = LICENSES.get(str(license), card.get("license_link"))
    known = license if license in get_args(Licenses) else None
    return {
        "loader": next((own for kind, own in wrappers.items() if isinstance(model, kind)), other),
        "n_parameters": sum(one.numel() for one in weights),
        "n_embedding_parameters": None if embeddings is None else embeddings.weight.numel(),
        "memory_usage_mb": round(sum(one.nbytes for one in weights) / 2**20),
        "max_tokens": retriever.document_length or text_limit(model, "document"),
        "embed_dim": model.get_embedding_dimension(),
        "similarity_fn_name": ScoringFunction.from_str(SCORES.get(score, score)),
        "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
        "use_instructions": any(model.prompts.values()),
        "license": known or (link if isinstance(link, str) and link.startswith("https://") else None),
        "languages": language_scripts([languages] if isinstance(languages, str) else list(languages)),
        "training_datasets": training_datasets([datasets] if isinstance(datasets, str) else list(datasets)),
        "adapted_from": bases if isinstance(bases, str) or bases is None else bases[0],
        "open_weights": True if retriever.commit else None,
        "reference": f"https://huggingface.co/{retriever.name}" if is_standard(retriever) else None,
    }


def _card(model: Any, commit: str | None) -> Mapping[str, Any]:
    """The header of a checkpoint's card, from its folder or the Hub; empty if there is none."""
    inner = getattr(input_module(model, "document"), "model", None)
    place = str(model.model_card_data.model_id or getattr(inner, "name_or_path", ""))
    if not Path(place).is_dir() and (commit is None or not is_hub_name(place)):
        return {}
    return read_card(place, commit)
