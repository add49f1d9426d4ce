"""One form for sparse vectors and one for dense ones, whatever library made them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    import torch

# scipy CSR float32 [N, V] for a sparse model, numpy float32 or float16 [N, D] for a dense one.
Vectors: TypeAlias = sparse.csr_array | np.ndarray


def to_csr(vectors: Any) -> sparse.csr_array:
    """Convert vectors to a canonical CSR matrix: float32 values, sorted terms, no stored zeros.

    Args:
        vectors: [N, V] as a scipy sparse matrix, a torch tensor (dense, COO or CSR) or a numpy array.

    Raises:
        ValueError: If the matrix is not two-dimensional, its parts do not fit each other (a term is not in 0..V-1), or
            a value is negative or not finite: the vectors of a sparse retriever are term weights.
    """
    if sparse.issparse(vectors):
        _require_sound(vectors)
    if _is_tensor(vectors):
        matrix = _tensor_to_csr(vectors.detach())
    elif isinstance(vectors, sparse.csr_array):
        matrix = vectors
    elif sparse.issparse(vectors):
        matrix = sparse.csr_array(vectors, dtype=np.float32)
    else:
        matrix = sparse.csr_array(_two_dimensional(np.asarray(vectors, dtype=np.float32)))
    _require_sound(matrix)
    matrix = matrix.astype(np.float32, copy=False)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not matrix.nnz:
        return matrix
    smallest = matrix.data.min()
    if not (smallest >= 0 and matrix.data.max() < np.inf):
        bad = matrix.data[~(np.isfinite(matrix.data) & (matrix.data >= 0))][0]
        raise ValueError(f"Sparse vectors hold term weights >= 0, got {bad}: is this the output of a dense model?")
    if smallest == 0:
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def to_dense(vectors: Any) -> np.ndarray:
    """Convert vectors to a C-contiguous float32 matrix [N, D].

    Raises:
        TypeError: If the vectors are sparse.
        ValueError: If the matrix is not two-dimensional or a value is not finite.
    """
    is_tensor = _is_tensor(vectors)
    if sparse.issparse(vectors) or (is_tensor and str(vectors.layout) != "torch.strided"):
        raise TypeError("This index holds dense vectors and got sparse ones: create it with paradigm='sparse'.")
    if is_tensor:
        vectors = vectors.detach().float().cpu().numpy()
    matrix = _two_dimensional(np.ascontiguousarray(vectors, dtype=np.float32))
    if not np.isfinite(matrix).all():
        raise ValueError("Dense vectors hold NaN or infinity: check the model's dtype and the encoded texts.")
    return matrix


def active_terms(vectors: sparse.csr_array) -> float:
    """Mean number of non-zero terms per row (0 for an empty matrix)."""
    return float(vectors.nnz / vectors.shape[0]) if vectors.shape[0] else 0.0


def _require_sound(matrix: Any) -> None:
    """Raise a ValueError if indices of a compressed matrix lead outside of its arrays; compiled code trusts them."""
    if matrix.ndim != 2 or not hasattr(matrix, "check_format"):
        return
    try:
        matrix.check_format(full_check=True)
    except ValueError as error:
        rows, terms = matrix.shape
        raise ValueError(f"Sparse vectors of {rows} texts over {terms} terms are damaged: {error}.") from error


def _is_tensor(vectors: Any) -> TypeGuard[torch.Tensor]:
    """Whether these are a torch tensor; torch itself is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(vectors, torch.Tensor)


def _tensor_to_csr(vectors: torch.Tensor) -> sparse.csr_array:
    import torch

    if vectors.layout == torch.sparse_csr:
        parts = (vectors.values().float(), vectors.col_indices(), vectors.crow_indices())
        return sparse.csr_array(tuple(part.cpu().numpy() for part in parts), shape=tuple(vectors.shape))
    if vectors.layout == torch.sparse_coo:
        coalesced = vectors.coalesce()
        terms = tuple(coalesced.indices().cpu().numpy())
        values = coalesced.values().float().cpu().numpy()
        return sparse.coo_array((values, terms), shape=tuple(vectors.shape)).tocsr()
    return sparse.csr_array(_two_dimensional(vectors.float().cpu().numpy()))


def _two_dimensional(matrix: np.ndarray) -> np.ndarray:
    if matrix.ndim != 2:
        raise ValueError(f"Vectors are a matrix [N, dimensions], got the shape {tuple(matrix.shape)}.")
    return matrix


def keep_top_terms(vectors: sparse.csr_array, count: int) -> sparse.csr_array:
    """Keep each row's `count` heaviest terms, of equal weights the lower term ids."""
    rows = rows_of(vectors)
    order = np.lexsort((vectors.indices, -vectors.data, rows))
    rank = np.arange(vectors.nnz) - vectors.indptr[rows]
    keep = np.zeros(vectors.nnz, dtype=bool)
    keep[order] = rank < count  # order and rows agree on where each row lies
    return select_entries(vectors, keep)


def rows_of(vectors: sparse.csr_array) -> np.ndarray:
    """Row of each stored entry [nnz]."""
    return np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))


def select_entries(vectors: sparse.csr_array, keep: np.ndarray) -> sparse.csr_array:
    """The entries that a mask [nnz] keeps."""
    counts = np.bincount(rows_of(vectors)[keep], minlength=vectors.shape[0])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(vectors.indptr.dtype)
    return sparse.csr_array((vectors.data[keep], vectors.indices[keep], indptr), shape=vectors.shape)
