"""Opening whatever encodes: Lion checkpoints, and stock Router checkpoints with an encoder for each kind of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def load_encoder(
    source: str | Path,
    *,
    query_max_active_dims: int | None = None,
    document_max_active_dims: int | None = None,
    **options: Any,
) -> SentenceTransformer | SparseEncoder:
    """Load a checkpoint to encode with: by `lion_st.load`, or with stock modules if it is a Router.

    Args:
        source: Folder or Hub repository.
        query_max_active_dims: Keep this many of the heaviest terms of a query, in place of the checkpoint's own limit.
        document_max_active_dims: The same for documents.
        options: Further arguments of `lion_st.load`; a Router takes `device`, `dtype`, `revision`, `token` and
            `local_files_only` of them.

    Raises:
        ValueError: If this is neither a Lion checkpoint nor a Router, a Router does not take an option, or the model is
            not a sparse one of ours, whose terms could be limited.
        FileNotFoundError: If the checkpoint cannot be reached.
    """
    from lion_st.checkpoints import is_router, saved_model_type
    from lion_st.models import load

    options = {key: value for key, value in options.items() if value is not None}
    hub: dict[str, Any] = {key: options[key] for key in ("revision", "token", "local_files_only") if key in options}
    limits = query_max_active_dims, document_max_active_dims
    if not is_router(str(source), hub):
        model = load(source, **options)
        if limits != (None, None):
            limit_terms(model, str(source), *limits)
        return model
    if limits != (None, None):
        raise ValueError(
            f"{source} is a Router of stock modules, which cannot limit the terms of a text: prune its vectors "
            "(lion_st.indexes.pruning.Pruning), or evaluate the model that it was made of."
        )
    from sentence_transformers import SentenceTransformer, SparseEncoder

    unknown = options.keys() - hub.keys() - {"device", "dtype"}
    if unknown:
        raise ValueError(f"{source} is a Router of stock modules, which does not take {sorted(unknown)}.")
    # A class other than the one that saved a checkpoint appends or drops modules without a word.
    is_dense = saved_model_type(str(source), hub) == "SentenceTransformer"
    stock: Any = SentenceTransformer if is_dense else SparseEncoder
    if options.get("dtype", "auto") != "auto":
        hub["model_kwargs"] = {"dtype": options["dtype"]}
    return stock(str(source), device=options.get("device"), similarity_fn_name="dot", **hub)


def limit_terms(
    model: Any,
    source: str,
    query_max_active_dims: int | None,
    document_max_active_dims: int | None,
    only_these: bool = False,
) -> None:
    """Have a sparse model keep so many terms of a text when it encodes; part of its fingerprint, and of what it saves.

    Args:
        model: Of `lion_st.load`.
        source: Its name, for errors.
        query_max_active_dims: Heaviest terms of a query; None leaves the model's own limit.
        document_max_active_dims: The same for documents.
        only_these: Remove the model's own limits.
    """
    from lion_st.models import paradigm_of
    from lion_st.modules import SpladeHead

    head = model[1]
    if not isinstance(head, SpladeHead):
        raise ValueError(
            f"{source} is a {paradigm_of(model)} model, which has no terms to limit: leave out max_active_dims."
        )
    if query_max_active_dims is not None and model.query_table is not None:
        raise ValueError(f"A table encodes the queries of {source} and adds no terms to them: leave out the query's.")
    head.freeze_top_k()
    if only_these:
        head.max_active_dims = head.query_max_active_dims = head.document_max_active_dims = None
    for name, limit in (
        ("query_max_active_dims", query_max_active_dims),
        ("document_max_active_dims", document_max_active_dims),
    ):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is at least 1, got {limit}: a text keeps one term.")
        if limit is not None:
            setattr(head, name, limit)
