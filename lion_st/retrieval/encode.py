"""Texts to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import sparse

from lion_st.retrieval.vectors import Vectors, to_csr, to_dense

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SparseEncoder


def encode_texts(
    model: SentenceTransformer | SparseEncoder,
    texts: Sequence[str],
    kind: Literal["query", "document"],
    *,
    batch_size: int = 32,
    show_progress: bool = False,
) -> Vectors:
    """Encode texts held in memory, longest first so that a batch holds texts of like length.

    Args:
        model: A sparse or dense model.
        texts: N texts.
        kind: Whether they are queries or documents: their prompts and lengths may differ.
        batch_size: Texts per batch.
        show_progress: Show a progress bar.

    Returns:
        float32, [N, V] as CSR for a sparse model, never dense beyond one batch, or [N, D] as an array for a dense one.
    """
    import torch
    from tqdm.auto import tqdm

    from lion_st.models import paradigm_of

    if kind not in ("query", "document"):
        raise ValueError(f"kind is 'query' or 'document', got {kind!r}.")
    convert = to_csr if paradigm_of(model) == "sparse" else to_dense
    encode = model.encode_query if kind == "query" else model.encode_document
    order = np.argsort([-len(text) for text in texts], kind="stable")
    parts = []
    with tqdm(total=len(texts), desc=f"Encoding {kind}s", unit=kind, disable=not show_progress) as progress:
        for start in range(0, len(texts), batch_size):
            batch = [texts[row] for row in order[start : start + batch_size]]
            with torch.inference_mode():
                vectors = encode(batch, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
            parts.append(convert(vectors))
            progress.update(len(batch))
    if not parts:
        raise ValueError(f"There is no {kind} to encode.")
    back = np.argsort(order)
    if convert is to_csr:
        return sparse.vstack(parts, format="csr")[back]
    return np.concatenate(parts)[back]
